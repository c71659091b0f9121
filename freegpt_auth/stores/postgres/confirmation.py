"""Waits until the server processes have confirmed a change, connected or not, and returns those that have not."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ..base import Unseen
from . import reads
from .follower import HEARTBEAT
from .pool import TIME_LIMIT

if TYPE_CHECKING:
    from .pool import Link

CONFIRMATION = HEARTBEAT + TIME_LIMIT + 2.0
"""Seconds that a change waits for server processes. One whose connection is dead notices that within a heartbeat and the
limit of an answer, and needs about a second to come back."""

_LOOK_AGAIN = (0.002, 0.05)  # seconds between two looks at the processes: at first and at last


class Confirmation:
    """The waits of one store.

    Args:
        patience: seconds that a change waits at most.
    """

    def __init__(self, patience: float = CONFIRMATION) -> None:
        self._patience = patience
        self._vain_until = float("-inf")

    def wait(self, link: Link, longest: float = math.inf) -> Unseen | None:
        """Wait until every process relies on the present state or a later one; return those that do not after the wait.

        Processes that an earlier wait did not see are not waited for again: a heartbeat is enough for the others.

        Args:
            link: a connection outside of a transaction.
            longest: seconds to wait at most, if that is less than the patience of the store.

        Raises:
            psycopg.Error: the processes cannot be read.
        """
        revision = reads.head(link).revision
        began = time.monotonic()
        limit = min(self._patience, longest, HEARTBEAT if began < self._vain_until else math.inf)
        pause, longest_pause = _LOOK_AGAIN
        while (unseen := _unseen(link, revision)) and time.monotonic() < began + limit:
            time.sleep(pause)
            pause = min(longest_pause, 2 * pause)
        if unseen is not None:
            self._vain_until = time.monotonic() + unseen.seconds
        return unseen


def _unseen(link: Link, revision: int) -> Unseen | None:
    processes, seconds = reads.processes_behind(link, revision)
    return Unseen(processes, seconds) if processes else None
