"""Keeps the token cache of one process current: one thread with its own connection.

A notification is a hint; the revision decides. The thread listens first, then reads every change since the cached
revision. It reads the revision each second even without a notification, which may be lost. The lease counts from just
before the last query: the lease, not NOTIFY, bounds how long a partitioned process accepts tokens.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psycopg

from ...clock import elapsed
from ...exceptions import StoreError, StoreUnavailableError
from . import reads, schema
from .address import COMMAND_TIME_LIMIT, TIME_LIMIT
from .faults import reason_of
from .loader import Loader
from .notifications import listen
from .presence import Presence

if TYPE_CHECKING:
    from collections.abc import Callable

    from .address import Address
    from .cache import TokenCache
    from .connection import Connection

HEARTBEAT = 1.0
"""Default interval of reading the revision without a notification, in seconds."""

CERTAINTY = HEARTBEAT + TIME_LIMIT
"""Seconds after a query in which a token missing from a complete cache is unknown. Later it is looked up."""

RETRY = (0.1, 1.0)
"""Default pauses between two attempts to connect, in seconds: the first and the longest. A random part is added."""

_SLICE = 0.1  # longest wait for a notification, in seconds: the thread then checks whether to stop

_NEVER = float("-inf")

_logger = logging.getLogger("freegpt_auth")


@dataclass(frozen=True, slots=True)
class State:
    """How far the cache may be relied on; replaced whole, never changed.

    Attributes:
        leased_until: local instant until which cached tokens may be accepted.
        certain_until: local instant until which a token missing from a complete cache does not exist.
        trouble: reason why the database cannot be queried; ``None`` while it can.
        generation: number of connections so far. A row read in an earlier generation may come from another server.
    """

    leased_until: float = _NEVER
    certain_until: float = _NEVER
    trouble: str | None = None
    generation: int = 0


class Follower:
    """Follows a database for one process.

    Args:
        address: the database.
        cache: the cache to keep current.
        lease: seconds after the last query for which cached tokens are accepted.
        renew: called after each new connection of the thread: earlier connections may lead to another server.
        clock: local clock of leases, in seconds. The database's time advances by it between two queries.
        heartbeat: seconds between two queries without a notification.
        time_limit: seconds to wait for the first query, for the end of the thread, and for a test notification.
        retry: first and longest pause between two attempts to connect, in seconds.

    Attributes:
        state: how far the cache may be relied on. Read it before the cache: the cache may become complete meanwhile.
    """

    def __init__(
        self,
        address: Address,
        cache: TokenCache,
        lease: float,
        renew: Callable[[], None],
        clock: Callable[[], float] = elapsed,
        *,
        heartbeat: float = HEARTBEAT,
        time_limit: float = TIME_LIMIT,
        retry: tuple[float, float] = RETRY,
    ) -> None:
        self._address = address
        self._cache = cache
        self._lease = lease
        self._renew = renew
        self._clock = clock
        self._heartbeat = heartbeat
        self._time_limit = time_limit
        self._retry = retry
        self.state: State = State()
        self._publishing = threading.Lock()
        self._loader = Loader(cache, address.shown)
        self._clock_offset: float | None = None
        self._reading = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_read = threading.Event()
        self._has_logged_end = False

    def now(self) -> float:
        """Return the database's time, in seconds since the epoch. The first call queries the database, and blocks."""
        while self._clock_offset is None:
            try:
                with contextlib.closing(self._address.connect(COMMAND_TIME_LIMIT)) as connection:
                    self._read_head(connection)
            except psycopg.Error as error:
                raise StoreUnavailableError(f"{self._address.shown} does not answer: {reason_of(error)}") from None
        return self._clock_offset + self._clock()

    def is_running(self) -> bool:
        """Return whether a thread keeps the cache current."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread unless it runs, and wait for its first query."""
        with self._starting:
            if self._thread is None:
                stopping = self._stopping = threading.Event()  # one per thread: a slow thread stops despite a restart
                self._has_read.clear()
                # Started by the first request: a thread does not survive the fork of a preloading server.
                thread = threading.Thread(target=self._run, args=(stopping,), name="freegpt_auth-follower", daemon=True)
                thread.start()
                self._thread = thread
        self._has_read.wait(2 * self._time_limit)

    def stop(self) -> None:
        """End the thread. The next request starts another."""
        with self._starting:
            if self._thread is not None:
                self._stopping.set()
                self._thread.join(2 * self._time_limit)
                self._thread = None
            self._publish(leased_until=_NEVER, certain_until=_NEVER)

    def refresh(self) -> None:
        """Bring the cache to the present state of the database, over a connection of its own."""
        try:
            with contextlib.closing(self._address.connect()) as connection:
                schema.check(schema.version_of(connection), self._address.shown)
                self._catch_up(connection)
        except (psycopg.Error, StoreError) as error:
            self._fail(error)

    def _publish(self, **changes: Any) -> None:
        with self._publishing:  # a stopped thread that is slow to end publishes beside the next
            self.state = replace(self.state, **changes)

    def _run(self, stopping: threading.Event) -> None:
        pause, longest = self._retry
        presence = Presence(self._lease, self._clock)
        while not stopping.is_set():
            try:
                with contextlib.closing(self._address.connect()) as connection:
                    self._follow(connection, presence, stopping)
                    self._publish(leased_until=_NEVER, certain_until=_NEVER)
                    presence.withdraw(connection)
            except Exception as error:  # noqa: BLE001  without the thread the cache would be stale for good
                pause = min(longest, 2 * pause) if self.state.trouble else self._retry[0]
                self._fail(error)
                # Spread the attempts: a thousand processes may have lost the same database.
                stopping.wait(pause * random.uniform(1, 2))  # noqa: S311

    def _follow(self, connection: Connection, presence: Presence, stopping: threading.Event) -> None:
        schema.check(schema.version_of(connection), self._address.shown)
        self._renew()
        # After the renewal: a reader of the new generation must get new connections.
        self._publish(generation=self.state.generation + 1)
        if listen(connection, self._address, self._time_limit):
            reads.end_if_idle(connection, self._lease)  # only here: the session of a pooler serves other clients too
        else:
            _logger.warning(
                "%s delivers no notifications, as a pooler in transaction mode does not: changes are looked for each "
                "%g s, and commands wait for that",
                *(self._address.shown, self._heartbeat),
            )
        # Before the first read: from here on, commands wait for this process (at most one lease if it is cut off).
        presence.register(connection)
        while not stopping.is_set():
            since = self._catch_up(connection)
            presence.publish(connection, self._cache.revision)
            if since < presence.covers_since:  # the host slept: commands may have returned while the row was expired
                continue
            self._extend(since, presence.covers_until)
            due = self._clock() + self._heartbeat
            while not stopping.is_set() and self._clock() < due and not connection.notifications(_SLICE):
                pass

    def _catch_up(self, connection: Connection) -> float:
        """Bring the cache to the present state of the database; return the local instant just before the query."""
        with self._reading:
            began = self._clock()
            self._loader.catch_up(connection, self._read_head(connection))
            return began

    def _read_head(self, connection: Connection) -> reads.Head:
        began = self._clock()
        head = reads.head(connection)
        schema.check(head.version, self._address.shown)
        self._clock_offset = head.now - began  # never behind the database: no token outlives its expiry
        return head

    def _extend(self, since: float, covers_until: float) -> None:
        """Extend lease and certainty after a query that began at *since*, and log a recovery."""
        is_back = self.state.trouble is not None
        leased_until = min(since + self._lease, covers_until)
        certain_until = since + CERTAINTY if self._cache.complete else _NEVER
        self._publish(leased_until=leased_until, certain_until=certain_until, trouble=None)
        self._has_logged_end = False
        if is_back:
            _logger.info("%s answers again", self._address.shown)
        self._has_read.set()

    def _fail(self, error: Exception) -> None:
        """Publish the trouble; log it once during the lease and once after it."""
        before, reason = self.state, reason_of(error)
        trouble = reason if isinstance(error, StoreError) else f"{self._address.shown} does not answer: {reason}"
        self._publish(certain_until=_NEVER, trouble=trouble)
        left = before.leased_until - self._clock()
        if before.trouble is None and left > 0:
            _logger.error("%s. Tokens known here are accepted for %.0f s more, others are answered 503", trouble, left)
        elif left <= 0 and not self._has_logged_end:
            self._has_logged_end = True
            _logger.error("%s. Its tokens are answered 503 until this is mended", trouble)
        self._has_read.set()
