"""The driver's connection with a time limit for each wait."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from ...clock import elapsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import PQGen

_CANCEL_TIMEOUT = 0.5  # seconds for the request to cancel a statement
_BLOCKERS_INTERVAL = 2.0  # seconds between two queries for the holder of a lock
_T = TypeVar("_T")
Row = tuple[Any, ...]


class LockHeldError(psycopg.errors.LockNotAvailable):
    """A lock was not released within the limit. The message names its holder and how to end it."""


class TimedConnection(psycopg.Connection[Row]):
    """A connection that limits each wait on the client's side too: a network may lose the database's error.

    Attributes:
        limit: longest wait for an answer, in seconds.
        describe_blockers: returns the sessions whose lock this connection waits for; called every 2 s during a wait.
    """

    limit: float
    describe_blockers: Callable[[], str] | None = None
    _blockers = ""

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Run *gen* to its end, or cancel the statement at the limit.

        Raises:
            LockHeldError: the database's limit for locks was reached, and the holder of the lock is known.
            psycopg.OperationalError: no answer arrived. Close the connection then.
        """
        longest = self.limit if timeout is None else timeout
        try:
            return super().wait(self._watch(gen) if self.describe_blockers else gen, interval, longest)
        except psycopg.errors.LockNotAvailable:
            if self._blockers:
                raise LockHeldError(self._blockers) from None
            raise
        except psycopg.OperationalError:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            # Its session would outlive the client: statement_timeout does not end a commit that waits for a standby.
            with contextlib.suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCEL_TIMEOUT)
            raise psycopg.OperationalError(f"timeout: no answer within {self.limit:g} s") from None

    def _watch(self, gen: PQGen[_T]) -> PQGen[_T]:
        """Run *gen* unchanged, and query the holders of locks during its waits."""
        due = elapsed() + _BLOCKERS_INTERVAL
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if elapsed() >= due and self.describe_blockers:
                    self._blockers = self.describe_blockers()
                    due = elapsed() + _BLOCKERS_INTERVAL
                wanted = gen.send(ready)
        except StopIteration as end:
            result: _T = end.value
            return result
