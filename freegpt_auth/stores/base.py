"""The contract that every store keeps; ``tests/stores`` holds the suite that every store must pass.

A store is plain synchronous code. The middleware calls :meth:`TokenSource.peek` on the event loop and the rest in a worker
thread, several at once, so a store must be safe to call from several threads.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from ..tokens import Token


LEASE = 30.0
"""Default lease, in seconds: how long known tokens are accepted while their source cannot be read."""

CACHE_LIMIT = 100_000
"""Default number of tokens of a database that a process keeps in memory, about 0.5 KB each."""


class Unresolved(Enum):
    """The type of :data:`UNRESOLVED`."""

    UNRESOLVED = "unresolved"


UNRESOLVED: Final = Unresolved.UNRESOLVED
"""What ``peek`` answers when memory alone cannot tell: the store may have changed."""


class Survey(NamedTuple):
    """What a store holds, as far as the choice of a mode and the line in the log need it.

    Attributes:
        configured: there are tokens, or there may be, or there were: requests must be authenticated.
        active: how many tokens work now.
        source: where they come from, in words for the log.
    """

    configured: bool
    active: int
    source: str


class Merged(NamedTuple):
    """What became of tokens that were put into a store.

    Attributes:
        added: how many were not there.
        revoked: how many were there, and are revoked now.
    """

    added: int
    revoked: int


class Unseen(NamedTuple):
    """Server processes that have not confirmed a change.

    Attributes:
        processes: their number.
        seconds: until the last of them refuses every token that was revoked or deleted, at most.
    """

    processes: int
    seconds: int


class TokenSource(Protocol):
    """What the middleware needs of a token source. These three methods are enough to plug in one's own.

    A token is answered whether or not it is revoked or expired; the caller looks at that. While nothing in the store
    changes, a token should be the same object from call to call: what the application is told of it is made once for
    each object.

    Four more are used if they are there: ``now()``, the time in seconds since the epoch by the clock by which tokens end,
    if that is not this host's, which may raise what ``resolve`` does; ``look_up_limit``, how many requests may wait for
    ``resolve`` at the same time, where more are to be answered 503; ``cache_limit``, how many tokens it keeps in memory,
    if that is not all of them; and ``close()``, called when the server shuts down.
    """

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from memory: the token whose secret has this SHA-256 digest, ``None``, or :data:`UNRESOLVED`.

        It must not block; it runs on the event loop, once for every request. A server in open mode asks it for
        ``b""``, which is no token's digest: answer :data:`UNRESOLVED` when ``survey`` may have something new to tell, and
        from the moment on at which it would tell that the store is configured.

        Raises:
            StoreUnavailableError: it is known already that nothing can be known about this digest now.
        """
        ...

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from the store itself. It may block, and is called only after ``peek`` was unresolved.

        Raises:
            StoreUnavailableError: nothing can be known about this digest now.
        """
        ...

    def survey(self) -> Survey:
        """Read the store and tell what it holds. It may block.

        A store that cannot be read is *configured*: what cannot be known must not open a server. Once a store was
        configured it stays so for as long as the process lives.
        """
        ...


class TokenStore(TokenSource, Protocol):
    """A store that can also be changed: what the commands need.

    When a method that changes something has returned, the change is durable, and no server of this host decides
    anything without it. A database has servers on several hosts: its store also has ``unseen``, an :class:`Unseen` after a
    change that some of their processes have not confirmed, else ``None``.

    Attributes:
        source: where the tokens are, in words for the operator. No password is in it.
    """

    source: str

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first.

        Raises:
            StoreError: they cannot be read.
        """
        ...

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that *reference* may mean; see :func:`freegpt_auth.tokens.find`.

        Raises:
            StoreError: they cannot be read.
        """
        ...

    def add(self, digest: bytes, token: Token) -> None:
        """Keep a new token.

        Raises:
            StoreError: it cannot be kept, or a token with this digest or id is there already.
        """
        ...

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on and return its record. One that was revoked before keeps its first instant.

        Raises:
            TokenNotFoundError: there is no such token.
            StoreError: it cannot be changed.
        """
        ...

    def delete(self, token_id: str) -> Token:
        """Remove the token's record and return it as it was.

        Raises:
            TokenNotFoundError: there is no such token.
            StoreError: it cannot be changed.
        """
        ...

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add the tokens that are not there, and revoke those that are revoked in *tokens*: all in one change, or none.

        A token that is there keeps everything else, and nothing is un-revoked. So it makes no difference to do it twice.

        Raises:
            StoreError: it cannot be done, or a new token has the id of another.
        """
        ...


@runtime_checkable
class AtOnce(Protocol):
    """A store that revokes or deletes several tokens in one change: all of them, or none."""

    def revoke_all(self, token_ids: Sequence[str], at: datetime) -> list[Token]:
        """Revoke tokens as ``revoke`` does, and return their records in the order of the ids.

        Raises:
            TokenNotFoundError: one of them is not there.
            StoreError: they cannot be changed.
        """
        ...

    def delete_all(self, token_ids: Sequence[str]) -> list[Token]:
        """Remove tokens as ``delete`` does, and return their records in the order of the ids.

        Raises:
            TokenNotFoundError: one of them is not there.
            StoreError: they cannot be changed.
        """
        ...


@runtime_checkable
class Migrating(Protocol):
    """A store whose tables change from release to release."""

    def migrate(self) -> tuple[int, int]:
        """Bring it to this release's version; return the version it had, and has. Several may do so at once.

        Raises:
            StoreError: it cannot be done, or its version is a later release's.
        """
        ...
