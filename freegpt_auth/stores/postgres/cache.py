"""What a process remembers of the tokens in a database: never an older state of one after a newer. Pure.

Elsewhere revoked tokens came back in this way: a row is read, the token is revoked and forgotten, and then what was read
first is remembered. Here each state has the revision at which it was read, and a change of the same token at a later one
makes what is still on its way worthless.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..base import UNRESOLVED, Unresolved
from ..steps import PAUSE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...tokens import Token

CHANGES_KEPT = 10_000
"""Changes of which the revision is remembered; what was read before the oldest of them is not used."""

_SHED = 1_000  # tokens let go of at a stretch


class Change(NamedTuple):
    """One token's state since a revision.

    Attributes:
        revision: the revision that made it so.
        digest: whose state it is.
        token: the record; ``None`` if there is none any more.
    """

    revision: int
    digest: bytes
    token: Token | None


class TokenCache:
    """Tokens by digest: all of them, or those used of late.

    Looking is lock-free and may be done on an event loop; everything else takes a lock for a moment.

    Args:
        limit: how many tokens are held at most. A table that is larger is held in part.

    Attributes:
        revision: the revision that memory is at; -1 before the first load.
        complete: memory holds every token, so one that is not in it does not exist.
        state: replaced after each change of a token in memory, and after each eviction.
    """

    def __init__(self, limit: int) -> None:
        self.limit: int = limit
        self.revision: int = -1
        self.complete: bool = False
        self.state: object = object()
        self._young: dict[bytes, Token] = {}
        self._old: dict[bytes, Token] = {}
        self._changed: dict[bytes, int] = {}
        self._log: deque[tuple[int, bytes]] = deque()
        self._floor = -1
        self._lasting: dict[bytes, Token] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, digest: bytes) -> Token | None:
        """Return the token with this digest, if it is remembered."""
        token = self._young.get(digest)
        return self._found_again(digest) if token is None and self._old else token

    @property
    def lasting(self) -> int:
        """How many tokens stay revoked here whatever the database says, since it may have lost that."""
        return len(self._lasting)

    def same(self, digest: bytes, token: Token) -> Token:
        """Return the equal token in memory, else *token*: a token that did not change stays the same object."""
        for tokens in (self._young, self._old):
            held = tokens.get(digest)
            if held == token:
                return held
        return token

    def held(self) -> list[Token]:
        """Return every token that is remembered."""
        with self._lock:
            return [*self._young.values(), *self._old.values()]

    def load(self, tokens: dict[bytes, Token], revision: int, *, was_known: bool = True) -> None:
        """Put what was read afresh in the place of everything.

        Args:
            tokens: what was read. If it is more than the limit, it is taken for a part of the table.
            revision: when.
            was_known: what memory held before was a state of the same database. If not, the database may have lost
                changes: tokens that were known as revoked stay so, whatever it says.
        """
        complete = len(tokens) <= self.limit
        kept = tokens if complete else dict(itertools.islice(tokens.items(), self.limit // 2))
        with self._lock:
            before = (self._young, self._old)
            if not was_known:
                held = itertools.chain.from_iterable(each.items() for each in before)
                self._lasting.update(item for item in held if item[1].revoked_at is not None)
            for digest in self._lasting.keys() & kept.keys():
                kept[digest] = self._lasting[digest]
            self.complete = False  # before anything is let go of: who misses it must not take it for unknown
            self._young, self._old = kept, {}
            self._changed, self._log, self._floor = {}, deque(), revision
            self.state = object()
            self.revision, self.complete = revision, complete
        for each in before:
            _shed(each)

    def apply(self, changes: Iterable[Change], revision: int) -> None:
        """Bring memory to a later revision."""
        with self._lock:
            for change in changes:
                self._apply(change)
            while len(self._log) > CHANGES_KEPT:
                self._floor, digest = self._log.popleft()
                if self._changed[digest] == self._floor:
                    del self._changed[digest]
            self.state = object()  # after the change: a request may read both at this moment
            self.revision = revision
            shed = self._turned()
        _shed(shed)

    def fill(self, digest: bytes, token: Token | None, revision: int) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Remember what was read of one token at a revision, unless a later change made it worthless.

        A digest that no token has is not remembered: there are more of those than of memory.

        What is newer than memory is not remembered either: a change that is being read could then undo it.

        Returns:
            What may be relied on; :data:`UNRESOLVED` if it must be read again.
        """
        shed: dict[bytes, Token] = {}
        with self._lock:
            if revision < self._floor or self._changed.get(digest, -1) > revision:
                return UNRESOLVED
            if token is not None:
                token = self._lasting.get(digest, token)
                if revision <= self.revision:
                    token = self._remembered(digest, token)
                    shed = self._turned()
        _shed(shed)
        return token

    def _apply(self, change: Change) -> None:
        digest, token = change.digest, change.token
        self._lasting.pop(digest, None)
        if token is None:
            self._old.pop(digest, None)
            self._young.pop(digest, None)
        elif digest in self._old:  # in its place: who looks at this moment finds the one or the other
            self._old[digest] = token
        elif self.complete or digest in self._young:
            self._young[digest] = token
        self._changed[digest] = change.revision
        self._log.append((change.revision, digest))

    def _remembered(self, digest: bytes, token: Token) -> Token:
        """Remember a token; return it, or the equal one that another thread has read: it stays the same object."""
        same = self.same(digest, token)
        if same is token:
            is_other = digest in self._young or digest in self._old
            self._young[digest] = token
            self._old.pop(digest, None)
            if is_other:
                self.state = object()
        return same

    def _turned(self) -> dict[bytes, Token]:
        """Make room: return what was not used since room was made last."""
        shed: dict[bytes, Token] = {}
        if len(self._young) > (self.limit if self.complete else self.limit // 2):
            self.complete = False  # first, as in load
            shed, self._old, self._young = self._old, self._young, {}
            self.state = object()
        for digest in [*itertools.islice(self._old, max(0, len(self) - self.limit))]:
            del self._old[digest]
        return shed

    def _found_again(self, digest: bytes) -> Token | None:
        """Return a token that was not used since room was made last, and keep it when room is made next."""
        token = self._old.get(digest)
        if token is None or not self._lock.acquire(blocking=False):  # never wait: this runs on an event loop
            return token
        try:
            token = self._old.pop(digest, None)  # again: it may have been changed or shed meanwhile
            if token is None:
                return self._young.get(digest)
            self._young[digest] = token
            return token
        finally:
            self._lock.release()


def _shed(tokens: dict[bytes, Token]) -> None:
    """Let go of tokens in steps, so that no event loop has to wait for all of them at once."""
    while tokens:
        for _ in range(min(_SHED, len(tokens))):
            tokens.popitem()
        time.sleep(PAUSE)
