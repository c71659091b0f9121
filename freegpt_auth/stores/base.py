"""The contracts of a token source and of a token store; ``tests/stores`` holds the suite that every store must pass.

A store is synchronous code. The middleware calls :meth:`TokenSource.peek` and :meth:`CompleteSource.state` on the event
loop and every other method in worker threads, several at once: a store must be thread-safe.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

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
"""The answer of ``peek`` if memory cannot decide: ``resolve`` must be called."""


class Survey(NamedTuple):
    """The contents of a store, for the choice of a mode and for its line in the log.

    Attributes:
        configured: it holds tokens, may hold some, or held some: requests must be authenticated.
        active: number of tokens in force.
        source: the place of the tokens, in words for the log.
        kind: the mode of a server over it.
    """

    configured: bool
    active: int
    source: str
    kind: Literal["token-file", "database"] = "token-file"


class Merged(NamedTuple):
    """The effect of a merge.

    Attributes:
        added: number of tokens that were new.
        revoked: number of known tokens that are revoked now.
    """

    added: int
    revoked: int


class Unseen(NamedTuple):
    """Server processes that have not confirmed a change.

    Attributes:
        processes: their number.
        seconds: longest time until all of them refuse every revoked or deleted token.
    """

    processes: int
    seconds: int


class TokenSource(Protocol):
    """The methods that a token source must have. The optional ones of :class:`CompleteSource` are used if it has them.

    The methods return revoked and expired tokens too: the caller decides. While a token does not change, a source
    should return the same object: the application's user and credentials are made once per object.
    """

    @abstractmethod
    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Return the token with this SHA-256 digest, from memory; :data:`UNRESOLVED` if memory cannot decide.

        It runs on the event loop and must not block. A server in open mode passes ``b""``, the digest of no token:
        return :data:`UNRESOLVED` while ``survey`` could now report a configured store.

        Raises:
            StoreUnavailableError: the source cannot decide about this digest now.
        """
        ...

    @abstractmethod
    def resolve(self, digest: bytes) -> Token | None:
        """Return the token from the store itself. It may block, and is called only after ``peek`` was unresolved.

        Raises:
            StoreUnavailableError: the source cannot decide about this digest now.
        """
        ...

    @abstractmethod
    def survey(self) -> Survey:
        """Read the store and return its contents in numbers. It may block.

        A store that cannot be read is *configured*: a fault must not open a server. Once configured, a store stays so
        for the life of the process.
        """
        ...


class CompleteSource(TokenSource, Protocol):
    """A token source with all parts. Inherit from it for the defaults of the optional ones.

    Attributes:
        look_up_limit: number of requests that may wait for ``resolve``; others are answered 503. Default: no limit.
        cache_limit: largest number of tokens in memory, and of callers kept ready. Default: no limit.
    """

    look_up_limit: float = math.inf
    cache_limit: float = math.inf

    def now(self) -> float:
        """Return the time by which tokens expire, in seconds since the epoch. Default: the clock of this host.

        Raises:
            StoreUnavailableError: the clock cannot be read now.
        """
        return time.time()

    def close(self) -> None:
        """Release open resources when the server shuts down; later calls reopen them. Default: nothing to release."""
        return

    def state(self) -> object | None:
        """Return an object that is replaced after ``peek`` changes its answer for a digest.

        While it is the same object, a request with an accepted token needs no call of ``peek``. ``state`` runs on the
        event loop and must neither block nor raise. Default: ``None``: only ``peek`` can decide.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "peek" in vars(cls) and "state" not in vars(cls):  # an inherited state does not describe another peek
            cls.state = CompleteSource.state  # type: ignore[method-assign]


class TokenStore(CompleteSource, Protocol):
    """A store whose tokens can be changed, as commands do.

    When a method that makes a change has returned, the change is durable and in force in every server of this host.

    Attributes:
        source: the place of the tokens, in words for the operator. It holds no password.
        unseen: server processes that have not confirmed the last change by this object; ``None`` if there are none.
    """

    source: str
    unseen: Unseen | None = None

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
        """Add a new token.

        Raises:
            StoreError: it cannot be written, or a token with this digest or id exists.
        """
        ...

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Revoke the token and return its record. A revoked token keeps its first instant of revocation.

        Raises:
            TokenNotFoundError: no token has this id.
            StoreError: it cannot be changed.
        """
        ...

    def delete(self, token_id: str) -> Token:
        """Remove the token's record and return it.

        Raises:
            TokenNotFoundError: no token has this id.
            StoreError: it cannot be changed.
        """
        ...

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add missing tokens and apply revocations, atomically. Existing tokens keep their other fields. Idempotent.

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
            TokenNotFoundError, StoreError: as ``revoke`` does.
        """
        ...

    def delete_all(self, token_ids: Sequence[str]) -> list[Token]:
        """Remove tokens as ``delete`` does, and return their records in the order of the ids.

        Raises:
            TokenNotFoundError, StoreError: as ``delete`` does.
        """
        ...


@runtime_checkable
class Migrating(Protocol):
    """A store whose tables change from release to release."""

    def migrate(self) -> tuple[int, int]:
        """Bring the tables to this release's version; return the versions before and after. Safe to run concurrently.

        Raises:
            StoreError: the migration failed, or the version is later.
        """
        ...
