"""The parts of a middleware, and which of them the middlewares of a process share."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

from .guard.authenticator import Authenticator
from .guard.lookups import LookUps
from .guard.refusal_log import RefusalLog
from .sharing import place, shared
from .stores import open_store, open_usage
from .usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from .settings import Settings
    from .stores.base import TokenSource


class Parts(NamedTuple):
    """The parts of a middleware.

    Attributes:
        authenticator: decides about requests.
        look_ups: the asynchronous side of the token source.
        refusals: the log of refusals.
        usage: counts uses; ``None`` to count none.
        counted: the key of the id of a scope's counted token, the same for each recorder of one usage store.
    """

    authenticator: Authenticator
    look_ups: LookUps
    refusals: RefusalLog
    usage: UsageRecorder | None
    counted: str


def told_apart(
    store: str | PathLike[str] | TokenSource | None,
) -> tuple[str | PathLike[str] | None, TokenSource | None]:
    """Return the location of a store, or the token source that *store* is; the other is ``None``."""
    return (store, None) if store is None or isinstance(store, (str, PathLike)) else (None, store)


def assemble(settings: Settings, source: TokenSource | None) -> Parts:
    """Return the parts of a middleware over *source*, by default the store that *settings* names.

    Raises:
        ConfigurationError: *settings* cannot be used.
    """
    verifier = _store(settings) if source is None else source
    one = id(verifier)  # not used again while a part holds the verifier
    look_ups = shared(lambda: LookUps(verifier), LookUps, one)
    named = settings.store_named or source is not None
    authenticator = shared(
        lambda: Authenticator(verifier, settings.key, required=settings.required, named=named),
        *(Authenticator, one, settings.key),  # one refusal of a revoked key holds for each guard
    )
    authenticator.restrict(required=settings.required, named=named)
    place_of_usage = None if settings.usage is None else place(settings.usage)
    usage = None if place_of_usage is None else _recorder(place_of_usage, settings.usage_interval)
    counted = f"freegpt_auth.counted.{hash(place_of_usage):x}"  # hashed: a URL may hold a password
    return Parts(authenticator, look_ups, shared(RefusalLog, RefusalLog, one), usage, counted)


def _store(settings: Settings) -> TokenSource:
    location, named = place(settings.store), settings.store_named
    lease, limit = settings.lease, settings.cache_limit
    return shared(
        lambda: open_store(location, named=named, lease=lease, cache_limit=limit),
        *(open_store, location, lease, limit),  # a guard that names the default file shares its store
    )


def _recorder(location: str, interval: float) -> UsageRecorder:
    return shared(lambda: UsageRecorder(open_usage(location), interval=interval), open_usage, location, interval)
