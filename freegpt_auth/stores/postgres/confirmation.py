"""The wait of a command until the server processes have confirmed its change."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ..base import Unseen
from . import reads
from .address import TIME_LIMIT
from .follower import HEARTBEAT

if TYPE_CHECKING:
    from .connection import Connection

CONFIRMATION = HEARTBEAT + TIME_LIMIT + 2.0
"""Default limit of the wait, in seconds. A process with a dead connection notices that within a heartbeat and the time
limit of an answer, and needs about a second to reconnect."""

_POLL = (0.002, 0.05)  # pauses between two reads of the rows, in seconds: the first and the longest


class Confirmation:
    """The waits of one store.

    Args:
        limit: longest wait of a change, in seconds.
    """

    def __init__(self, limit: float = CONFIRMATION) -> None:
        self._limit = limit
        self._timed_out_until = float("-inf")

    def wait(self, connection: Connection, longest: float = math.inf) -> Unseen | None:
        """Wait until every process relies on the present revision or a later one; return the processes that do not.

        While the processes of an earlier timeout may still be behind, the limit is a heartbeat: enough for the others.

        Args:
            connection: a connection outside a transaction.
            longest: limit of this wait, in seconds, if it is below the limit of the store.

        Raises:
            psycopg.Error: the rows of the processes cannot be read.
        """
        revision = reads.head(connection).revision
        began = time.monotonic()
        limit = min(self._limit, longest, HEARTBEAT if began < self._timed_out_until else math.inf)
        pause, longest_pause = _POLL
        while (unseen := _unseen(connection, revision)) and time.monotonic() < began + limit:
            time.sleep(pause)
            pause = min(longest_pause, 2 * pause)
        if unseen is not None:
            self._timed_out_until = time.monotonic() + unseen.seconds
        return unseen


def _unseen(connection: Connection, revision: int) -> Unseen | None:
    processes, seconds = reads.processes_behind(connection, revision)
    return Unseen(processes, seconds) if processes else None
