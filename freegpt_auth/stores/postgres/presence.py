"""The row of a server process in the database: the revision it has read, and the end of its reliance on its cache.

The process extends the row first and relies on its cache second, so the row covers it even if its connection is lost. A
command that changed a token waits until the row shows the change, or reports the instant at which the row ends.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from ...clock import elapsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection

_RENEWAL = 0.2  # part of the lease after which the row is extended: at least three quarters of the lease are left

_NOTHING_READ = -1  # published before the first read: commands wait for any later revision

_NEVER = float("-inf")

_SHOW = "SELECT freegpt_auth.show_process(%s, %s, %s, %s)"
_WITHDRAW = "SELECT freegpt_auth.withdraw_process(%s)"


class Published(NamedTuple):
    """A state of the row that the database has confirmed.

    Attributes:
        revision: revision that the process has read; -1 before the first read.
        covers_until: local instant at which the row ends. It counts from just before the statement was sent, so it is
            never later than the end by the database's clock.
        covers_since: local instant since which the row was never expired.
    """

    revision: int = _NOTHING_READ
    covers_until: float = _NEVER
    covers_since: float = _NEVER


class Presence:
    """The row of one following thread.

    Args:
        lease: seconds from an extension of the row to its end.
        clock: local clock of the lease, in seconds.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = elapsed) -> None:
        self._lease = lease
        self._clock = clock
        self._process = secrets.token_hex(16)  # unguessable: no other session can change the row
        self._published = Published()

    @property
    def covers_until(self) -> float:
        """Local instant at which the row ends."""
        return self._published.covers_until

    @property
    def covers_since(self) -> float:
        """Local instant before which commands may have missed this process: its row was expired."""
        return self._published.covers_since

    def register(self, connection: Connection) -> None:
        """Extend the row over a new connection, before the first read over it.

        Raises:
            psycopg.Error: the database did not confirm the row. It still ends at :attr:`covers_until` or later.
        """
        self._write(connection, _NOTHING_READ, extend=True)

    def publish(self, connection: Connection, revision: int) -> None:
        """Publish the revision of the cache, and extend the row if that is due. Most calls write nothing.

        Raises:
            psycopg.Error: the database did not confirm the row. It still ends at :attr:`covers_until` or later.
        """
        is_due = self._clock() >= self.covers_until - (1 - _RENEWAL) * self._lease
        if is_due or revision != self._published.revision:
            self._write(connection, revision, extend=is_due)

    def withdraw(self, connection: Connection) -> None:
        """Delete the row of a process that no longer relies on its cache. If that fails, the row expires."""
        with contextlib.suppress(psycopg.Error):
            connection.run(_WITHDRAW, (self._process,))

    def _write(self, connection: Connection, revision: int, *, extend: bool) -> None:
        began = self._clock()
        connection.run(_SHOW, (self._process, self._lease, revision, extend))
        answered = self._clock()
        until = began + self._lease if extend else self.covers_until
        self._published = Published(revision, until, self.covers_since if answered < self.covers_until else answered)
