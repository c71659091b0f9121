"""The row by which a server process shows commands the revision it has seen, and until when it relies on its memory.

The row is extended first and relied on second, so it covers the process whether or not its connection is seen: a command
that changed a token waits until the row shows the change, or names the instant at which the row ends.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from ...clock import elapsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pool import Link

_RENEWAL = 0.2  # part of the lease after which the row is extended: three quarters of the lease are always left

_NOTHING_READ = -1  # shown before anything is read: commands wait for any later revision

_NEVER = float("-inf")

_SHOW = "SELECT freegpt_auth.show_process(%s, %s, %s, %s)"
_WITHDRAW = "SELECT freegpt_auth.withdraw_process(%s)"


class Shown(NamedTuple):
    """A state of the row that the database has confirmed.

    Attributes:
        revision: the revision the process has seen; -1 before it has read anything.
        covers_until: end of the row, counted by the local clock from before the statement was sent: never later than the
            end by the database's clock.
        covers_since: local instant since which the row has not been over.
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
        self._process = secrets.token_hex(16)  # known to this process alone: no other session can change the row
        self._shown = Shown()

    @property
    def covers_until(self) -> float:
        """The instant, by the local clock, at which the row ends."""
        return self._shown.covers_until

    @property
    def covers_since(self) -> float:
        """The instant, by the local clock, before which commands may have missed this process: its row was over."""
        return self._shown.covers_since

    def join(self, link: Link) -> None:
        """Extend the row over a new connection, before anything is read over it.

        Raises:
            psycopg.Error: the database did not confirm the row; it still ends at :attr:`covers_until` or later.
        """
        self._write(link, _NOTHING_READ, extend=True)

    def show(self, link: Link, revision: int) -> None:
        """Show the revision that memory has reached, and extend the row if it is due. Usually nothing is written.

        Raises:
            psycopg.Error: the database did not confirm the row; it still ends at :attr:`covers_until` or later.
        """
        is_due = self._clock() >= self.covers_until - (1 - _RENEWAL) * self._lease
        if is_due or revision != self._shown.revision:
            self._write(link, revision, extend=is_due)

    def withdraw(self, link: Link) -> None:
        """Remove the row of a process that relies on nothing any more. If that fails, the row ends by itself."""
        with contextlib.suppress(psycopg.Error):
            link.run(_WITHDRAW, (self._process,))

    def _write(self, link: Link, revision: int, *, extend: bool) -> None:
        began = self._clock()
        link.run(_SHOW, (self._process, self._lease, revision, extend))
        answered = self._clock()
        until = began + self._lease if extend else self.covers_until
        self._shown = Shown(revision, until, self.covers_since if answered < self.covers_until else answered)
