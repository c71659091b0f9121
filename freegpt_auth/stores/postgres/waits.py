"""The driver's connection, with a limit for every wait."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from ...clock import elapsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import PQGen

_CANCELLING = 0.5  # seconds for the request to cancel a statement
_NOTICE = 2.0  # seconds between two questions for the holder of a lock
_T = TypeVar("_T")
Row = tuple[Any, ...]


class HeldError(psycopg.errors.LockNotAvailable):
    """A lock was held for longer than the limit. The message names the holder and how to end it."""


class Connection(psycopg.Connection[Row]):
    """A connection whose waits are limited on this side too: a network may lose the error that the database sends.

    Attributes:
        limit: seconds for each answer.
        ask: return the holders of the lock that this connection waits for; called every other second of a wait.
    """

    limit: float
    ask: Callable[[], str] | None = None
    _holders = ""

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Finish *gen*, or cancel the statement after the limit.

        Raises:
            HeldError: the database's limit for locks was reached, and the holder is known.
            psycopg.OperationalError: no answer came. The connection is to be closed.
        """
        longest = self.limit if timeout is None else timeout
        try:
            return super().wait(self._asking(gen) if self.ask else gen, interval, longest)
        except psycopg.errors.LockNotAvailable:
            if self._holders:
                raise HeldError(self._holders) from None
            raise
        except psycopg.OperationalError:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            # Its session would go on without a client. statement_timeout ends all but the wait of a commit for a standby.
            with contextlib.suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCELLING)
            raise psycopg.OperationalError(f"timeout: no answer within {self.limit:g} s") from None

    def _asking(self, gen: PQGen[_T]) -> PQGen[_T]:
        """Pass the steps of a wait on, and ask for the holders of locks meanwhile."""
        due = elapsed() + _NOTICE
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if elapsed() >= due and self.ask:
                    self._holders = self.ask()
                    due = elapsed() + _NOTICE
                wanted = gen.send(ready)
        except StopIteration as end:
            result: _T = end.value
            return result
