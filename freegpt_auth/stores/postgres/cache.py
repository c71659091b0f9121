"""Tokens of a database in the memory of one process: an older state of a token never replaces a newer one. Pure.

The race prevented here: a row is read; its token is revoked and evicted; the stale row is cached. Each row carries the
revision at which it was read, and a later change of the same token makes the row unusable.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING, Literal

from ..base import UNRESOLVED, Unresolved
from ..steps import in_steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...tokens import Token
    from .reads import Change

CHANGES_KEPT = 10_000
"""Default number of changes whose revision is kept. A row that was read before the oldest of them is not used."""


class TokenCache:
    """Tokens by digest: all tokens of a database, or the recently used ones.

    :meth:`find` takes no lock and may run on an event loop. Every other method holds a lock for a moment.

    A full cache has two halves. A used token moves to the recent half. When that half is full, it becomes the older
    half, and the tokens of the previous older half are evicted.

    Args:
        limit: largest number of tokens. A part of a larger table is cached.
        changes_kept: number of changes whose revision is kept.

    Attributes:
        revision: revision of the cached state; -1 before the first load.
        complete: every token is cached: a digest that is missing here does not exist.
        state: replaced after each change of a cached token, and after each eviction.
    """

    def __init__(self, limit: int, changes_kept: int = CHANGES_KEPT) -> None:
        self.limit: int = limit
        self.revision: int = -1
        self.complete: bool = False
        self.state: object = object()
        self._changes_kept = changes_kept
        self._recent: dict[bytes, Token] = {}
        self._older: dict[bytes, Token] = {}
        self._changed: dict[bytes, int] = {}
        self._log: deque[tuple[int, bytes]] = deque()
        self._floor = -1
        self._pinned_revocations: dict[bytes, Token] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    def find(self, digest: bytes) -> Token | None:
        """Return the cached token with this digest."""
        token = self._recent.get(digest)
        return self._promote(digest) if token is None and self._older else token

    @property
    def pinned(self) -> int:
        """Number of tokens kept revoked until their next change: the database may have lost their revocation."""
        return len(self._pinned_revocations)

    def interned(self, digest: bytes, token: Token) -> Token:
        """Return the cached token if it equals *token*, else *token*: an unchanged token stays the same object."""
        for tokens in (self._recent, self._older):
            cached = tokens.get(digest)
            if cached == token:
                return cached
        return token

    def tokens(self) -> list[Token]:
        """Return every cached token."""
        with self._lock:
            return [*self._recent.values(), *self._older.values()]

    def load(self, tokens: dict[bytes, Token], revision: int, *, pin_revocations: bool = False) -> None:
        """Replace the whole cache.

        Args:
            tokens: rows of the table. More rows than the limit mean that the table does not fit.
            revision: revision at which they were read.
            pin_revocations: keep cached revoked tokens revoked, because the database may have lost changes.
        """
        complete = len(tokens) <= self.limit
        kept = tokens if complete else dict(itertools.islice(tokens.items(), self.limit // 2))
        with self._lock:
            before = (self._recent, self._older)
            if pin_revocations:
                cached = itertools.chain.from_iterable(each.items() for each in before)
                self._pinned_revocations.update(item for item in cached if item[1].revoked_at is not None)
            for digest in self._pinned_revocations.keys() & kept.keys():
                kept[digest] = self._pinned_revocations[digest]
            self.complete = False  # first: a reader that misses an evicted token must not report it as unknown
            self._recent, self._older = kept, {}
            self._changed, self._log, self._floor = {}, deque(), revision
            self.state = object()
            self.revision, self.complete = revision, complete
        for each in before:
            _release(each)

    def apply(self, changes: Iterable[Change], revision: int) -> None:
        """Apply *changes*, and raise the revision to *revision*."""
        with self._lock:
            for change in changes:
                self._apply(change)
            while len(self._log) > self._changes_kept:
                self._floor, digest = self._log.popleft()
                if self._changed[digest] == self._floor:
                    del self._changed[digest]
            self.state = object()  # after the changes: readers of the new state see them
            self.revision = revision
            evicted = self._rotate()
        _release(evicted)

    def fill(self, digest: bytes, token: Token | None, revision: int) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Cache a row that was read at *revision*, unless a later change made it stale.

        Rows newer than the cache are returned but not cached: a change being applied could overwrite them. Unknown
        digests are not cached either: a flood of wrong tokens must not take memory.

        Returns:
            The token to rely on; :data:`UNRESOLVED` if the row is stale and must be read again.
        """
        evicted: dict[bytes, Token] = {}
        with self._lock:
            if revision < self._floor or self._changed.get(digest, -1) > revision:
                return UNRESOLVED
            if token is not None:
                token = self._pinned_revocations.get(digest, token)
                if revision <= self.revision:
                    token = self._store(digest, token)
                    evicted = self._rotate()
        _release(evicted)
        return token

    def _apply(self, change: Change) -> None:
        digest, token = change.digest, change.token
        self._pinned_revocations.pop(digest, None)
        if token is None:
            self._older.pop(digest, None)
            self._recent.pop(digest, None)
        elif digest in self._older:  # replaced in place: a concurrent reader finds either state
            self._older[digest] = token
        elif self.complete or digest in self._recent:
            self._recent[digest] = token
        self._changed[digest] = change.revision
        self._log.append((change.revision, digest))

    def _store(self, digest: bytes, token: Token) -> Token:
        """Cache a token; return it, or the equal token that another thread has cached."""
        cached = self.interned(digest, token)
        if cached is token:
            is_replaced = digest in self._recent or digest in self._older
            self._recent[digest] = token
            self._older.pop(digest, None)
            if is_replaced:
                self.state = object()
        return cached

    def _rotate(self) -> dict[bytes, Token]:
        """Begin a new recent half if the present one is full; return the evicted tokens."""
        evicted: dict[bytes, Token] = {}
        if len(self._recent) > (self.limit if self.complete else self.limit // 2):
            self.complete = False  # first, as in load
            evicted, self._older, self._recent = self._older, self._recent, {}
            self.state = object()
        for digest in [*itertools.islice(self._older, max(0, len(self) - self.limit))]:
            del self._older[digest]
        return evicted

    def _promote(self, digest: bytes) -> Token | None:
        """Move a token from the older half to the recent half, and return it."""
        token = self._older.get(digest)
        if token is None or not self._lock.acquire(blocking=False):  # never wait: this runs on an event loop
            return token
        try:
            token = self._older.pop(digest, None)  # read again: it may have been changed or evicted meanwhile
            if token is None:
                return self._recent.get(digest)
            self._recent[digest] = token
            return token
        finally:
            self._lock.release()


def _release(tokens: dict[bytes, Token]) -> None:
    """Empty *tokens* in steps: dropped at once, a hundred thousand tokens hold the interpreter lock for 24 ms."""
    for _ in in_steps(range(len(tokens))):
        tokens.popitem()
