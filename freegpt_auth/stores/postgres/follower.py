"""Keeps a process's memory of the tokens as the database has them: one thread with a connection of its own.

A notification is a hint, the revision is the truth. The thread listens first and reads then, reads whatever has changed
since the revision it knows, and looks each second whether a notification was lost. How long memory may be relied on is
counted from the moment before the database was last asked: that, and not the notification, bounds what a process that is
cut off may still accept.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from typing import TYPE_CHECKING

import psycopg

from ...clock import elapsed
from ...exceptions import StoreError, StoreUnavailableError
from . import reads, schema
from .faults import reason_of
from .loader import Loader
from .pool import PATIENCE, TIME_LIMIT
from .presence import Presence

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cache import TokenCache
    from .pool import Address, Link

HEARTBEAT = 1.0
"""Seconds after which the revision is looked at without a notification."""

CERTAINTY = HEARTBEAT + TIME_LIMIT
"""Seconds since the database was last asked for which a token that is not in memory counts as unknown. After that it may
be one that was made meanwhile, and the database is asked."""

_RETRY = (0.1, 1.0)  # seconds between two attempts to connect: at first and at last, and a random part of it more

_SLICE = 0.1  # seconds after which a thread that waits for a notification sees that it is to stop

_NEVER = float("-inf")

_logger = logging.getLogger("freegpt_auth")


class Follower:
    """Follows a database for one process.

    Args:
        address: where it is.
        cache: what is kept up to date.
        lease: seconds for which memory is relied on after the database was last asked.
        renew: called with each new connection of the thread: others may lead to another server now.
        clock: local clock of leases and of the database's time between two answers, in seconds.

    Attributes:
        leased_until: until when, by the local clock, tokens in memory may be accepted.
        certain_until: until when a token that is not in memory does not exist.
        trouble: why the database cannot be asked; ``None`` while it can.
        age: how many connections there were; what was read over an earlier one may come from another server.
    """

    def __init__(
        self,
        address: Address,
        cache: TokenCache,
        lease: float,
        renew: Callable[[], None],
        clock: Callable[[], float] = elapsed,
    ) -> None:
        self._address = address
        self._cache = cache
        self._lease = lease
        self._renew = renew
        self._clock = clock
        self.leased_until: float = _NEVER
        self.certain_until: float = _NEVER
        self.trouble: str | None = None
        self.age: int = 0
        self._loader = Loader(cache, address.shown)
        self._ahead: float | None = None
        self._reading = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_looked = threading.Event()
        self._is_over = False

    def now(self) -> float:
        """Return the time by the database's clock, in seconds since the epoch. It is asked, and blocks, if it never was."""
        while self._ahead is None:
            try:
                with contextlib.closing(self._address.connect(PATIENCE)) as link:
                    self._look_at_head(link)
            except psycopg.Error as error:
                raise StoreUnavailableError(f"{self._address.shown} does not answer: {reason_of(error)}") from None
        return self._ahead + self._clock()

    def is_running(self) -> bool:
        """Tell whether memory is being kept up to date."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread if it does not run, and wait until it has asked the database once."""
        with self._starting:
            if self._thread is None:
                stopping = self._stopping = threading.Event()  # its own: a slow one must not go on beside the next
                self._has_looked.clear()
                # Not before the first request: a thread does not survive the fork of a preloading server.
                thread = threading.Thread(target=self._run, args=(stopping,), name="freegpt_auth-follower", daemon=True)
                thread.start()
                self._thread = thread
        self._has_looked.wait(2 * TIME_LIMIT)

    def stop(self) -> None:
        """End the thread. The next request starts it again."""
        with self._starting:
            if self._thread is not None:
                self._stopping.set()
                self._thread.join(2 * TIME_LIMIT)
                self._thread = None
            self.leased_until = self.certain_until = _NEVER

    def look(self) -> None:
        """Bring memory to where the database is now, over a connection for this once."""
        try:
            with contextlib.closing(self._address.connect()) as link:
                schema.check(schema.version_of(link), self._address.shown)
                self._catch_up(link)
        except (psycopg.Error, StoreError) as error:
            self._lose(error)

    def _run(self, stopping: threading.Event) -> None:
        pause, longest = _RETRY
        presence = Presence(self._lease, self._clock)
        while not stopping.is_set():
            try:
                with contextlib.closing(self._address.connect()) as link:
                    self._follow(link, presence, stopping)
                    self.leased_until = self.certain_until = _NEVER
                    presence.withdraw(link)
            except Exception as error:  # noqa: BLE001  whatever it is, memory must not stay as it is for good
                pause = min(longest, 2 * pause) if self.trouble else _RETRY[0]
                self._lose(error)
                # A thousand processes that lost the same database must not come back in the same moment.
                stopping.wait(pause * random.uniform(1, 2))  # noqa: S311

    def _follow(self, link: Link, presence: Presence, stopping: threading.Event) -> None:
        schema.check(schema.version_of(link), self._address.shown)
        self._renew()
        self.age += 1  # after that: whoever sees it reads over connections that are as new
        if self._hears(link):
            reads.end_if_idle(link, self._lease)
        # Before the first read: from here on, commands wait for this process (at most one lease if it is cut off).
        presence.join(link)
        while not stopping.is_set():
            since = self._catch_up(link)
            presence.show(link, self._cache.revision)
            if since < presence.covers_since:  # the host slept: commands returned while the row was over
                continue
            self._rely(since, presence.covers_until)
            due = self._clock() + HEARTBEAT
            while not stopping.is_set() and self._clock() < due and not link.notifications(_SLICE):
                pass

    def _hears(self, link: Link) -> bool:
        """Listen, and tell whether notifications arrive: a pooler may give each transaction another connection."""
        own = f"{schema.CHANNEL}-{secrets.token_hex(8)}"
        link.run(f'LISTEN "{schema.CHANNEL}"')
        link.run(f'LISTEN "{own}"')
        # Over another connection: a pooler hands on what a connection tells itself, and nothing that others tell it.
        with contextlib.closing(self._address.connect()) as other:
            other.run("SELECT pg_notify(%s, '')", (own,))
        deadline = time.monotonic() + TIME_LIMIT
        while (left := deadline - time.monotonic()) > 0:
            if own in link.notifications(left):
                link.run(f'UNLISTEN "{own}"')
                return True
        _logger.warning(
            "%s delivers no notifications, as a pooler in transaction mode does not: changes are looked for each %g s, "
            "and commands wait for that",
            *(self._address.shown, HEARTBEAT),
        )
        return False

    def _catch_up(self, link: Link) -> float:
        """Bring memory to where the database is now, and return when it was asked."""
        with self._reading:
            began = self._clock()
            self._loader.catch_up(link, self._look_at_head(link))
            return began

    def _look_at_head(self, link: Link) -> reads.Head:
        began = self._clock()
        head = reads.head(link)
        schema.check(head.version, self._address.shown)
        self._ahead = head.now - began  # never behind the database's own clock: no token is accepted after its end
        return head

    def _rely(self, since: float, covers_until: float) -> None:
        self.leased_until = min(since + self._lease, covers_until)
        self.certain_until = since + CERTAINTY if self._cache.complete else _NEVER
        if self.trouble is not None:
            _logger.info("%s answers again", self._address.shown)
        self.trouble, self._is_over = None, False
        self._has_looked.set()

    def _lose(self, error: Exception) -> None:
        """Go on with what is known for as long as the lease lasts, and say so."""
        self.certain_until = _NEVER
        left = self.leased_until - self._clock()
        reason = reason_of(error)
        trouble = reason if isinstance(error, StoreError) else f"{self._address.shown} does not answer: {reason}"
        if self.trouble is None and left > 0:
            _logger.error("%s. Tokens known here are accepted for %.0f s more, others are answered 503", trouble, left)
        elif left <= 0 and not self._is_over:
            self._is_over = True
            _logger.error("%s. Its tokens are answered 503 until this is mended", trouble)
        self.trouble = trouble
        self._has_looked.set()
