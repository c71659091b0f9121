"""Changes of a store, as several commands make and report them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..stores.base import AtOnce
from .usage import forget_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..location import Location
    from ..stores.base import TokenStore
    from ..tokens import Token


def now(store: TokenStore) -> datetime:
    """Return the present by the clock of *store*, to the second."""
    return datetime.fromtimestamp(store.now(), UTC).replace(microsecond=0)


def delete_tokens(
    store: TokenStore, tokens: Sequence[Token], locate_usage: Callable[[], Location | None]
) -> Iterator[Token]:
    """Delete *tokens*, in one change if the store can; yield each when it is deleted, then remove their usage."""
    ids, done = [token.id for token in tokens], []
    try:
        for token in store.delete_all(ids) if isinstance(store, AtOnce) else map(store.delete, ids):
            done.append(token.id)
            yield token
    finally:
        forget_usage(locate_usage, done)


def in_force(store: TokenStore, at_once: str = " It is refused from now on.") -> str:
    """Return *at_once*, or the seconds until the last change of *store* is in force in every server process."""
    unseen = store.unseen
    if unseen is None:
        return at_once
    return (
        f" In force everywhere within {unseen.seconds} s: {unseen.processes} server process(es) have not confirmed it."
    )
