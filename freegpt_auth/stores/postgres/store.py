"""A token store in PostgreSQL, for any number of servers on any number of hosts.

Requests are answered from a cache, which one thread keeps current. A command writes over its own connection, then waits
until every server process has confirmed the change.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Literal

import psycopg

from ...clock import elapsed
from ...exceptions import StoreError, StoreUnavailableError, TokenNotFoundError
from ...forks import Watched, keep
from ...tokens import find
from ..base import CACHE_LIMIT, LEASE, UNRESOLVED, Merged, Survey, TokenStore, Unresolved
from ..rules import count_active
from . import reads, schema, writes
from .address import COMMAND_TIME_LIMIT, Address
from .cache import TokenCache
from .confirmation import CONFIRMATION, Confirmation
from .faults import failure, reason_of
from .follower import CERTAINTY, HEARTBEAT, Follower
from .pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from datetime import datetime
    from typing import TypeVar

    from ...tokens import Token
    from ..base import Unseen
    from .connection import Connection
    from .follower import State

    _T = TypeVar("_T")

LOOK_UP_LIMIT = 256
"""Largest number of requests of one process that wait for the database at once; further requests are answered 503."""

_CONNECTIONS = 2  # shared by all look-ups; the follower has its own
_ATTEMPTS = 5  # look-ups for one request: each may be outdated by a change
_PAUSE = 1.0  # seconds without look-ups after a failed one


class PostgresTokenStore(TokenStore, Watched):
    """A :class:`~freegpt_auth.stores.base.TokenStore` in a PostgreSQL database. It connects on first use.

    Args:
        url: ``postgresql://user:password@host:port/database``. ``python -m freegpt_auth migrate`` makes the schema.
        lease: seconds for which cached tokens are accepted while the database cannot be reached.
        cache_limit: largest number of tokens that a process caches. While the database holds no more, an unknown token
            needs no query; otherwise, only recently used tokens are cached.
        clock: local clock of the lease, in seconds.
        heartbeat: seconds between two queries of the revision.
        confirmation: longest wait of a change for server processes to confirm it, in seconds.

    Attributes:
        unseen: server processes that have not confirmed this object's last change; ``None`` if all have.

    Raises:
        ConfigurationError: *url* cannot be read.
    """

    look_up_limit: float = LOOK_UP_LIMIT

    def __init__(
        self,
        url: str,
        *,
        lease: float = LEASE,
        cache_limit: int = CACHE_LIMIT,
        clock: Callable[[], float] = elapsed,
        heartbeat: float = HEARTBEAT,
        confirmation: float = CONFIRMATION,
    ) -> None:
        self._address = Address(url)
        self._lease = lease
        self._limit = cache_limit
        self._clock = clock
        self._heartbeat = heartbeat
        self._confirmation = Confirmation(confirmation)
        self.unseen: Unseen | None = None
        self.cache_limit: float = cache_limit
        self.source: str = self._address.shown
        self._pool = Pool(self._address, _CONNECTIONS)
        self._paused_until = 0.0
        self._begin()
        self.watch_forks()

    def _begin(self) -> None:
        self._cache = TokenCache(self._limit)
        self._follower = Follower(
            self._address, self._cache, self._lease, self._pool.renew, self._clock, heartbeat=self._heartbeat
        )

    def after_fork_in_child(self) -> None:
        """Begin with an empty cache and a new thread; keep the parent's connections open."""
        keep(self._follower)
        self._begin()

    def state(self) -> object | None:
        """Return the state of the cache while ``peek`` can rely on it."""
        cache, followed = self._cache, self._follower.state
        until = followed.certain_until if cache.complete else followed.leased_until
        return cache.state if self._clock() < until else None

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from the cache while its lease lasts; see :class:`~freegpt_auth.stores.base.TokenSource`."""
        state = self._follower.state  # before the cache, which may become complete meanwhile
        now = self._clock()
        if now >= state.leased_until:
            return self._without_lease(state)
        token = self._cache.find(digest)
        if token is None and not (now < state.certain_until and self._cache.complete):
            return UNRESOLVED
        return token

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from the cache once it is current, else from the table."""
        self._follower.start()
        for _ in range(_ATTEMPTS):
            generation = self._follower.state.generation
            token = self.peek(digest)
            if token is not UNRESOLVED:
                return token
            if self._follower.state.trouble is not None:
                break
            revision, found = self._look_up(digest)
            # The generation is the same: the row is from the server that the follower reads.
            if generation == self._follower.state.generation:
                token = self._cache.fill(digest, found, revision)
                if token is not UNRESOLVED:
                    return token
        raise StoreUnavailableError(self._follower.state.trouble or f"{self.source} changes faster than it can be read")

    def survey(self) -> Survey:
        """Read the tokens and count the active ones, up to a million.

        A server with a database is never open, whether or not the database can be reached.
        """
        if not self._follower.is_running():
            self._follower.refresh()
        cached = self._cache.tokens()
        active = count_active(cached, self.now()) if cached else 0
        if not self._cache.complete and not self._follower.state.trouble:
            with contextlib.suppress(psycopg.Error, StoreError):
                active = self._pool.run(reads.count_active)
        return Survey(configured=True, active=active, source=self.source, kind="database")

    def now(self) -> float:
        """Return the database's time, in seconds since the epoch: tokens expire by it."""
        return self._follower.now()

    def close(self) -> None:
        """Close every connection. Later calls open new ones."""
        self._follower.stop()
        self._pool.renew()

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first."""
        with self._connected() as connection, connection.transaction():
            return reads.in_order(connection)

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that match *reference*; see :func:`freegpt_auth.tokens.find`."""
        with self._connected() as connection:
            return find(reference, reads.referred(connection, reference))

    def add(self, digest: bytes, token: Token) -> None:
        """Add a new token."""
        # A process that has not read for CERTAINTY seconds looks up every token that is not in its cache.
        self._change(lambda connection: writes.insert(connection, digest, token), CERTAINTY)

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on. :attr:`unseen` counts the processes that have not confirmed it."""
        return self._change(lambda connection: _found(writes.revoke(connection, token_id, at), token_id))

    def delete(self, token_id: str) -> Token:
        """Remove the token and its usage."""
        return self._change(lambda connection: _found(writes.delete(connection, token_id), token_id))

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add missing tokens and apply revocations; see :class:`~freegpt_auth.stores.base.TokenStore`."""
        return self._change(lambda connection: writes.merge(connection, tokens))

    def migrate(self) -> tuple[int, int]:
        """Create or update the schema; see :class:`~freegpt_auth.stores.base.Migrating`."""
        with self._connected(check=False) as connection:
            return schema.migrate(connection, self.source)

    # --- requests

    def _without_lease(self, state: State) -> Literal[Unresolved.UNRESOLVED]:
        if state.trouble is not None and self._follower.is_running():
            raise StoreUnavailableError(state.trouble)
        return UNRESOLVED  # nothing was read yet

    def _look_up(self, digest: bytes) -> tuple[int, Token | None]:
        # After a failure all waiting requests fail at once: one by one, each would wait for the time limit.
        if time.monotonic() < self._paused_until:
            raise StoreUnavailableError(f"{self.source} did not answer a moment ago")
        try:
            return self._pool.run(lambda connection: reads.look_up(connection, digest))
        except (psycopg.Error, StoreUnavailableError) as error:
            self._paused_until = time.monotonic() + _PAUSE
            if isinstance(error, StoreUnavailableError):
                raise
            raise StoreUnavailableError(f"{self.source} does not answer: {reason_of(error)}") from None
        except (StoreError, ValueError) as error:  # in this row alone: others can be looked up
            raise StoreUnavailableError(f"{self.source}: {reason_of(error)}") from None

    # --- commands

    @contextlib.contextmanager
    def _connected(self, *, check: bool = True) -> Generator[Connection]:
        try:
            connection = self._address.connect(COMMAND_TIME_LIMIT)
        except psycopg.Error as error:
            raise StoreUnavailableError(f"{self.source} does not answer: {reason_of(error)}") from None
        try:
            with contextlib.closing(connection):
                if check:
                    schema.check(schema.version_of(connection), self.source)
                yield connection
        except (psycopg.Error, ValueError) as error:
            raise failure(error, self.source) from None

    def _change(self, change: Callable[[Connection], _T], longest: float = math.inf) -> _T:
        with self._connected() as connection:
            with connection.transaction():
                connection.run(writes.DURABLE)
                result = change(connection)
            self.unseen = self._confirmation.wait(connection, longest)
        return result


def _found(token: Token | None, token_id: str) -> Token:
    if token is None:
        raise TokenNotFoundError(f"there is no token with the id {token_id}")
    return token
