"""Usage of tokens, as the commands read, copy and remove it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ..acting import as_owner_of
from ..exceptions import FreeGPTAuthError, StoreError, UsageError
from ..settings import usage_location
from ..stores import open_usage
from ..stores.file.disk import explain
from .output import note

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from ..location import Location
    from ..usage.base import Usage, UsageStore


def read_usage(store: Location) -> Mapping[str, Usage]:
    """Return the usage of the tokens at *store* by token id. If it cannot be read, print a note: the list goes on."""
    location = usage_location(store)
    if location is None:
        return {}
    try:
        with _opened(location) as usage:
            return usage.read()
    except StoreError as error:
        note(f"freegpt-auth: usage cannot be read and is left out: {error}")
        return {}


def copy_usage(origin: Location | None, target: Location | None, ids: Mapping[str, str]) -> None:
    """Copy the usage of tokens from one location to another.

    Args:
        origin: location to read; ``None`` if no usage is kept.
        target: location to merge into; ``None`` if no usage is kept.
        ids: id of each token in the target, by its id in the origin.

    Raises:
        StoreError: the usage cannot be read or written.
    """
    if origin is None or target is None or origin == target:
        return
    try:
        with _opened(origin) as before:
            usage = {ids[token_id]: used for token_id, used in before.read().items() if token_id in ids}
        if usage:
            with _opened(target) as after:
                after.merge(usage)
    except StoreError as error:
        raise StoreError(f"the tokens were copied; their usage could not be copied: {error}; run it again") from None


def forget_usage(locate: Callable[[], Location | None], token_ids: Sequence[str]) -> None:
    """Remove the usage of deleted tokens. A fault is one line and no failure: the tokens are deleted.

    Args:
        locate: returns the location, ``None`` if no usage is kept; its errors are faults too.
        token_ids: ids of the deleted tokens.
    """
    try:
        location = locate()
        if token_ids and location is not None:
            with _opened(location) as usage:
                usage.forget(token_ids)
    except (FreeGPTAuthError, OSError) as error:  # OSError: the working directory is gone
        reason = explain(error) if isinstance(error, OSError) else error
        note(f"freegpt-auth: the usage of the deleted token(s) could not be removed: {reason}")


@contextlib.contextmanager
def _opened(location: Location) -> Generator[UsageStore]:
    """Open the usage at *location* as the owner of its folder; any fault is a ``StoreError`` that names the place."""
    with as_owner_of(location), contextlib.closing(open_usage(location)) as store:
        try:
            yield store
        except UsageError as error:
            raise StoreError(f"{store.source}: {error}") from None
