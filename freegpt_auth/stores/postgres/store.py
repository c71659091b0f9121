"""The contract of a store on PostgreSQL, for any number of servers on any number of hosts.

Requests are answered from memory, which a thread keeps up to date. Commands write in a connection of their own, and wait
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
from .cache import TokenCache
from .confirmation import CONFIRMATION, Confirmation
from .faults import failure, reason_of
from .follower import CERTAINTY, Follower
from .pool import PATIENCE, Address, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from datetime import datetime
    from typing import TypeVar

    from ...tokens import Token
    from ..base import Unseen
    from .pool import Link

    _T = TypeVar("_T")

LOOK_UP_LIMIT = 256
"""Requests of one process that wait for the database at the same time; more are answered 503."""

_CONNECTIONS = 2  # for look-ups and usage, beside the follower's one; several threads take turns
_ATTEMPTS = 5
_PAUSE = 1.0  # seconds without look-ups after one that failed


class PostgresTokenStore(TokenStore, Watched):
    """A :class:`~freegpt_auth.stores.base.TokenStore` in a PostgreSQL database. Nothing is read before it is asked.

    Args:
        url: ``postgresql://user:password@host:port/database``; the schema is made by ``python -m freegpt_auth migrate``.
        lease: seconds for which tokens in memory are accepted while the database cannot be reached.
        cache_limit: how many tokens a process keeps in memory. While the database holds no more, an unknown token needs
            no query; of a larger one those used of late are kept.
        clock: local clock of the lease, in seconds.
        confirmation: seconds that a change waits for server processes to confirm it.

    Attributes:
        unseen: server processes that have not confirmed the last change by this object; ``None`` if there are none.

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
        confirmation: float = CONFIRMATION,
    ) -> None:
        self._address = Address(url)
        self._lease = lease
        self._limit = cache_limit
        self._clock = clock
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
        self._follower = Follower(self._address, self._cache, self._lease, self._pool.renew, self._clock)

    def after_fork_in_child(self) -> None:
        """Follow the database anew."""
        keep(self._follower)
        self._begin()

    def state(self) -> object | None:
        """Return the state of the cache while ``peek`` can rely on it."""
        cache, follower = self._cache, self._follower
        until = follower.certain_until if cache.complete else follower.leased_until
        return cache.state if self._clock() < until else None

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from memory, for as long as it may be relied on; see :class:`~freegpt_auth.stores.base.TokenSource`."""
        now, follower = self._clock(), self._follower
        if now >= follower.leased_until:
            return self._without_lease()
        is_certain = now < follower.certain_until  # as it was before memory is looked at, which may be filled meanwhile
        token = self._cache.find(digest)
        if token is None and not (is_certain and self._cache.complete):
            return UNRESOLVED
        return token

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from memory once it is up to date, else from the table."""
        self._follower.start()
        for _ in range(_ATTEMPTS):
            age = self._follower.age
            token = self.peek(digest)
            if token is not UNRESOLVED:
                return token
            if self._follower.trouble is not None:
                break
            revision, found = self._look_up(digest)
            # Not over a connection that may lead to another server than the follower's.
            if age == self._follower.age:
                token = self._cache.fill(digest, found, revision)
                if token is not UNRESOLVED:
                    return token
        raise StoreUnavailableError(self._follower.trouble or f"{self.source} changes faster than it can be read")

    def survey(self) -> Survey:
        """Read the tokens, and tell how many work; of more than a million, a million.

        A server with a database is never open, whether it can be reached or not.
        """
        if not self._follower.is_running():
            self._follower.look()
        held = self._cache.held()
        active = count_active(held, self.now()) if held else 0
        if not self._cache.complete and not self._follower.trouble:
            with contextlib.suppress(psycopg.Error, StoreError):
                active = self._pool.ask(reads.count_active)
        return Survey(configured=True, active=active, source=self.source, kind="database")

    def now(self) -> float:
        """Return the time by the database's clock, by which tokens end, in seconds since the epoch."""
        return self._follower.now()

    def close(self) -> None:
        """Let go of every connection. What is asked after that opens new ones."""
        self._follower.stop()
        self._pool.renew()

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first."""
        with self._connected() as link, link.transaction():
            return reads.in_order(link)

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that *reference* may mean; see :func:`freegpt_auth.tokens.find`."""
        with self._connected() as link:
            return find(reference, reads.referred(link, reference))

    def add(self, digest: bytes, token: Token) -> None:
        """Keep a new token."""
        # A process that has not read for CERTAINTY seconds looks up every token that it does not know.
        self._change(lambda link: writes.insert(link, digest, token), CERTAINTY)

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on, in every process that confirms it; :attr:`unseen` has the others and their end."""
        return self._change(lambda link: _found(writes.revoke(link, token_id, at), token_id))

    def delete(self, token_id: str) -> Token:
        """Remove the token and what is known of its use."""
        return self._change(lambda link: _found(writes.delete(link, token_id), token_id))

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add the tokens that are not there and revoke those that are revoked in *tokens*."""
        return self._change(lambda link: writes.merge(link, tokens))

    def migrate(self) -> tuple[int, int]:
        """Make the schema, or bring it to this release's version; see :class:`~freegpt_auth.stores.base.Migrating`."""
        with self._connected(check=False) as link:
            return schema.migrate(link, self.source)

    # --- requests

    def _without_lease(self) -> Literal[Unresolved.UNRESOLVED]:
        if self._follower.trouble is not None and self._follower.is_running():
            raise StoreUnavailableError(self._follower.trouble)
        return UNRESOLVED  # not asked yet

    def _look_up(self, digest: bytes) -> tuple[int, Token | None]:
        # Those who wait must not all wait in turn for what hangs.
        if time.monotonic() < self._paused_until:
            raise StoreUnavailableError(f"{self.source} did not answer a moment ago")
        try:
            return self._pool.ask(lambda link: reads.look_up(link, digest))
        except (psycopg.Error, StoreUnavailableError) as error:
            self._paused_until = time.monotonic() + _PAUSE
            if isinstance(error, StoreUnavailableError):
                raise
            raise StoreUnavailableError(f"{self.source} does not answer: {reason_of(error)}") from None
        except (StoreError, ValueError) as error:  # of this row alone: others can be looked up
            raise StoreUnavailableError(f"{self.source}: {reason_of(error)}") from None

    # --- commands

    @contextlib.contextmanager
    def _connected(self, *, check: bool = True) -> Generator[Link]:
        try:
            link = self._address.connect(PATIENCE)
        except psycopg.Error as error:
            raise StoreUnavailableError(f"{self.source} does not answer: {reason_of(error)}") from None
        try:
            with contextlib.closing(link):
                if check:
                    schema.check(schema.version_of(link), self.source)
                yield link
        except (psycopg.Error, ValueError) as error:
            raise failure(error, self.source) from None

    def _change(self, change: Callable[[Link], _T], longest: float = math.inf) -> _T:
        with self._connected() as link:
            with link.transaction():
                link.run(writes.DURABLE)
                result = change(link)
            self.unseen = self._confirmation.wait(link, longest)
        return result


def _found(token: Token | None, token_id: str) -> Token:
    if token is None:
        raise TokenNotFoundError(f"there is no token with the id {token_id}")
    return token
