"""The parts of a middleware, and their sharing by the middlewares of a process."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

from .guard.authenticator import Authenticator
from .guard.lookups import LookUps
from .guard.refusal_log import RefusalLog
from .sharing import shared
from .stores import open_store, open_usage
from .stores.completion import completed
from .usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from .location import Location
    from .settings import Settings
    from .stores.base import CompleteSource, TokenSource


class Parts(NamedTuple):
    """The parts of a middleware.

    Attributes:
        authenticator: decides about requests.
        look_ups: the asynchronous side of the token source.
        refusals: the log of refusals.
        usage: counts uses; ``None`` to count none.
        counted: key in the scope of the id of the counted token, the same for each recorder of one usage store.
    """

    authenticator: Authenticator
    look_ups: LookUps
    refusals: RefusalLog
    usage: UsageRecorder | None
    counted: str


def location_or_source(
    store: str | PathLike[str] | TokenSource | None,
) -> tuple[str | PathLike[str] | None, TokenSource | None]:
    """Return *store* as a location or as a token source; the other is ``None``."""
    return (store, None) if store is None or isinstance(store, (str, PathLike)) else (None, store)


def assemble(settings: Settings, source: TokenSource | None) -> Parts:
    """Return the parts of a middleware over *source*, by default the store that *settings* names.

    Raises:
        ConfigurationError: *settings* or *source* cannot be used.
    """
    # Python may reuse the id of a freed object: the parts keep the source alive.
    used = _store(settings) if source is None else shared(lambda: completed(source), completed, id(source))
    one, named = id(used), settings.store_named or source is not None
    look_ups = shared(lambda: LookUps(used), LookUps, one)
    authenticator = shared(
        lambda: Authenticator(used, settings.key, required=settings.required, named=named),
        *(Authenticator, one, settings.key),  # a key revoked at one guard is refused by each
    )
    authenticator.restrict(required=settings.required, named=named)
    place = None if settings.usage is None else settings.usage.absolute()
    usage = None if place is None else _recorder(place, settings.usage_interval)
    counted = f"freegpt_auth.counted.{hash(place):x}"  # hashed: a URL may hold a password
    return Parts(authenticator, look_ups, shared(RefusalLog, RefusalLog, one), usage, counted)


def _store(settings: Settings) -> CompleteSource:
    location, named = settings.store.absolute(), settings.store_named
    lease, limit = settings.lease, settings.cache_limit
    return shared(
        lambda: open_store(location, named=named, lease=lease, cache_limit=limit),
        *(open_store, location, lease, limit),  # without *named*: a guard that names the default file shares its store
    )


def _recorder(location: Location, interval: float) -> UsageRecorder:
    return shared(lambda: UsageRecorder(open_usage(location), interval=interval), open_usage, location, interval)
