"""Tokens that live as long as the process: for tests, examples and sources that need no file."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import msgspec

from ..exceptions import StoreError, TokenNotFoundError
from .base import Survey

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ..tokens import Token


class MemoryTokenStore:
    """A :class:`~freegpt_auth.stores.base.TokenStore` in memory. It always answers at once and is always configured."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[bytes, Token] = {}

    def peek(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self._tokens.get(digest)

    def resolve(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self._tokens.get(digest)

    def survey(self) -> Survey:
        """Count the active tokens."""
        return Survey(configured=True, active=count_active(dict(self._tokens)), source="memory")

    def tokens(self) -> Mapping[bytes, Token]:
        """Return a copy of the table, oldest first."""
        return dict(self._tokens)

    def add(self, digest: bytes, token: Token) -> None:
        """Keep a new token."""
        with self._lock:
            if digest in self._tokens or any(token.id == other.id for other in self._tokens.values()):
                raise StoreError(f"a token with the id {token.id} or with the same secret is there already")
            self._tokens[digest] = token

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on."""
        with self._lock:
            digest, token = self._find(token_id)
            if token.revoked_at is None:
                token = self._tokens[digest] = msgspec.structs.replace(token, revoked_at=at)
            return token

    def delete(self, token_id: str) -> Token:
        """Remove the token."""
        with self._lock:
            digest, token = self._find(token_id)
            del self._tokens[digest]
            return token

    def _find(self, token_id: str) -> tuple[bytes, Token]:
        for digest, token in self._tokens.items():
            if token.id == token_id:
                return digest, token
        raise TokenNotFoundError(f"there is no token with the id {token_id}")


def count_active(tokens: Mapping[bytes, Token]) -> int:
    """Count the tokens that work now."""
    now = time.time()
    return sum(
        token.revoked_at is None and (token.expires_at is None or token.expires_at.timestamp() > now)
        for token in tokens.values()
    )
