"""One connection to a database: statements, transactions, notifications."""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING

import psycopg
from psycopg.pq import TransactionStatus

from . import session_settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from contextlib import AbstractContextManager

    from .waits import Connection, Row

_LONG_PATIENCE = 600.0  # for a statement on a whole table: to copy a million tokens takes one of 20 to 40 seconds


class Link:
    """One connection. Whatever it cannot do raises ``psycopg.Error``, and it is then to be closed.

    Results come in PostgreSQL's binary form, which no setting of a session changes.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._local = ""

    def settle(self, settings: dict[str, str]) -> None:
        """Set the session up; behind a pooler, each transaction."""
        # Not among the parameters: PgBouncer before 1.20, and others, refuse a connection that brings options.
        process = self._connection.info.backend_pid
        if not self.run(session_settings.APPLY, (list(settings), list(settings.values()), process)):
            self._local = session_settings.local(settings)

    def run(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> list[Row]:
        """Run one statement and return its rows."""
        with self._settled():
            cursor = self._connection.execute(statement.encode(), values or None, binary=True)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> Row:
        """Run one statement and return its only row."""
        [row] = self.run(statement, values)
        return row

    def wait_for_much(self) -> None:
        """Raise the time limits to those of whole-table statements until the end of the transaction."""
        self._connection.limit = _LONG_PATIENCE
        self.script(session_settings.local(session_settings.limits(_LONG_PATIENCE)))

    def script(self, statements: str) -> None:
        """Run several statements."""
        self._connection.execute(statements.encode())

    def batches(self, statement: str, size: int) -> Iterator[list[Row]]:
        """Run one statement in a transaction and yield its rows, so many at a time."""
        with self._connection.cursor(name="freegpt_auth") as cursor:
            cursor.execute(statement.encode(), binary=True)
            while rows := cursor.fetchmany(size):
                yield rows

    def copy(self, statement: str, rows: Iterator[Row]) -> None:
        """Send rows to a ``COPY … FROM STDIN``."""
        with self._connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                copy.write_row(row)

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Commit everything within, or nothing."""
        limit = self._connection.limit
        # A snapshot that is older than the lock that was waited for would not do.
        self.script(f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._local}")
        try:
            yield
            self.script("COMMIT")
        except BaseException:
            # In any other state the connection waits for an answer or is lost: closing it rolls back.
            if self._status() in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                with contextlib.suppress(psycopg.Error):
                    self.script("ROLLBACK")
            raise
        finally:
            self._connection.limit = limit

    def notifications(self, seconds: float) -> list[str]:
        """Wait for notifications, and return the channels they came by: of those that come together, all."""
        if heard := self._heard():
            return heard
        # psycopg's own wait does not sleep through its last millisecond: half a percent of a core, if it never ends.
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        poll.poll(seconds * 1000)
        return self._heard()

    def close(self) -> None:
        """Close it. It never fails."""
        with contextlib.suppress(psycopg.Error):
            self._connection.close()

    def _settled(self) -> AbstractContextManager[None]:
        is_bare = self._local and self._status() == TransactionStatus.IDLE
        return self.transaction() if is_bare else contextlib.nullcontext()

    def _status(self) -> TransactionStatus:
        return self._connection.info.transaction_status

    def _heard(self) -> list[str]:
        return [notify.channel for notify in self._connection.notifies(timeout=0, stop_after=1)]
