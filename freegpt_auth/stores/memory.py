"""Tokens that live as long as the process: for tests, examples and sources that need no file."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

from ..exceptions import TokenNotFoundError
from ..tokens import find
from .base import Merged, Survey, TokenStore
from .rules import count_active, duplicate_error, plan_merge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ..tokens import Token


class MemoryTokenStore(TokenStore):
    """A :class:`~freegpt_auth.stores.base.TokenStore` in memory. It always decides at once and is always configured."""

    def __init__(self) -> None:
        self.source: str = "memory"
        self._lock = threading.Lock()
        self._tokens: dict[bytes, Token] = {}
        self._state = object()

    def state(self) -> object:
        """Return an object that is replaced after each change."""
        return self._state

    def peek(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self._tokens.get(digest)

    def resolve(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self._tokens.get(digest)

    def survey(self) -> Survey:
        """Count the active tokens."""
        return Survey(configured=True, active=count_active(list(self._tokens.values())), source=self.source)

    def tokens(self) -> Mapping[bytes, Token]:
        """Return a copy of the table, oldest first."""
        return dict(self._tokens)

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that *reference* may mean."""
        return find(reference, self.tokens())

    def add(self, digest: bytes, token: Token) -> None:
        """Add a new token."""
        with self._lock:
            if digest in self._tokens or any(token.id == other.id for other in self._tokens.values()):
                raise duplicate_error(token)
            self._tokens[digest] = token
            self._state = object()

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Revoke the token."""
        with self._lock:
            digest, token = self._find(token_id)
            if token.revoked_at is None:
                token = self._tokens[digest] = msgspec.structs.replace(token, revoked_at=at)
                self._state = object()
            return token

    def delete(self, token_id: str) -> Token:
        """Remove the token."""
        with self._lock:
            digest, token = self._find(token_id)
            del self._tokens[digest]
            self._state = object()
            return token

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add missing tokens and apply revocations."""
        with self._lock:
            new, revoked = plan_merge(tokens, self._tokens)
            self._tokens |= new
            for digest, at in revoked.items():
                self._tokens[digest] = msgspec.structs.replace(self._tokens[digest], revoked_at=at)
            self._state = object()
            return Merged(len(new), len(revoked))

    def _find(self, token_id: str) -> tuple[bytes, Token]:
        for digest, token in self._tokens.items():
            if token.id == token_id:
                return digest, token
        raise TokenNotFoundError(f"there is no token with the id {token_id}")
