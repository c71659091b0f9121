"""The contract that every store keeps; ``tests/stores`` holds the suite that every store must pass.

A store is plain synchronous code. The middleware calls :meth:`Verifier.peek` on the event loop and the rest in a worker
thread, several at once, so a store must be safe to call from several threads.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ..tokens import Token


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


class Verifier(Protocol):
    """What the middleware needs of a token source. These three methods are enough to plug in one's own.

    A token is answered whether or not it is revoked or expired; the caller looks at that. While nothing in the store
    changes, a token should be the same object from call to call: what the application is told of it is made once for
    each object.
    """

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from memory: the token whose secret has this SHA-256 digest, ``None``, or :data:`UNRESOLVED`.

        It must not block; it runs on the event loop, once for every request. A server in open mode asks it for
        ``b""``, which is no token's digest: answer :data:`UNRESOLVED` when ``survey`` may have something new to tell.

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


class TokenStore(Verifier, Protocol):
    """A store that can also be changed: what the commands need.

    When a method that changes something has returned, the change is durable, and no server of this host decides
    anything without it.
    """

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first.

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
