"""Rules about sets of tokens that every store follows: merge, duplicates, counting. Pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..exceptions import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from ..tokens import Token


def plan_merge(
    tokens: Mapping[bytes, Token], known: Mapping[bytes, Token]
) -> tuple[dict[bytes, Token], dict[bytes, datetime]]:
    """Return the *tokens* to add to *known*, and the instants of revocation to set on known ones, both by digest.

    Raises:
        StoreError: a new token has the id of another.
    """
    new = {digest: token for digest, token in tokens.items() if digest not in known}
    ids = {token.id for token in known.values()}
    for token in new.values():
        if token.id in ids:
            raise duplicate_error(token)
        ids.add(token.id)
    revoked = {
        digest: token.revoked_at
        for digest, token in tokens.items()
        if token.revoked_at is not None and digest in known and known[digest].revoked_at is None
    }
    return new, revoked


def duplicate_error(token: Token) -> StoreError:
    """Return the error for a token whose id or digest another token has."""
    return StoreError(f"a token with the id {token.id} or with the same secret is there already")


def count_active(tokens: Iterable[Token], now: float | None = None) -> int:
    """Count the tokens in force at *now*, in seconds since the epoch; default: the present."""
    now = time.time() if now is None else now
    return sum(token.status(now) == "active" for token in tokens)
