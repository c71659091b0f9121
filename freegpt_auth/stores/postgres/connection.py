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

    from .timed_connection import Row, TimedConnection

_LONG_LIMIT = 600.0  # for whole-table statements, in seconds: copying a million tokens takes 20 to 40 s


class Connection:
    """One connection. Any failure raises ``psycopg.Error``; close the connection then.

    Results arrive in PostgreSQL's binary format, which does not depend on session settings.
    """

    def __init__(self, driver: TimedConnection) -> None:
        self._driver = driver
        self._local_settings = ""

    def apply_settings(self, settings: dict[str, str]) -> None:
        """Apply *settings* to the session; behind a pooler, to each transaction."""
        # Not as connection options: PgBouncer before 1.20, and other poolers, refuse them.
        process = self._driver.info.backend_pid
        if not self.run(session_settings.APPLY, (list(settings), list(settings.values()), process)):
            self._local_settings = session_settings.local(settings)

    def run(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> list[Row]:
        """Run one statement and return its rows."""
        with self._with_settings():
            cursor = self._driver.execute(statement.encode(), values or None, binary=True)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> Row:
        """Run one statement and return its only row."""
        [row] = self.run(statement, values)
        return row

    def allow_long_statements(self) -> None:
        """Raise the time limits to those of whole-table statements until the end of the transaction."""
        self._driver.limit = _LONG_LIMIT
        self.script(session_settings.local(session_settings.limits(_LONG_LIMIT)))

    def script(self, statements: str) -> None:
        """Run several statements."""
        self._driver.execute(statements.encode())

    def batches(self, statement: str, size: int) -> Iterator[list[Row]]:
        """Run one statement in a transaction and yield its rows, *size* at a time."""
        with self._driver.cursor(name="freegpt_auth") as cursor:
            cursor.execute(statement.encode(), binary=True)
            while rows := cursor.fetchmany(size):
                yield rows

    def copy(self, statement: str, rows: Iterator[Row]) -> None:
        """Send *rows* to a ``COPY … FROM STDIN``."""
        with self._driver.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                copy.write_row(row)

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Run the block in one transaction, rolled back if the block raises."""
        limit = self._driver.limit
        # READ COMMITTED: a snapshot taken before a wait for a lock would be outdated after it.
        self.script(f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._local_settings}")
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
            self._driver.limit = limit

    def notifications(self, seconds: float) -> list[str]:
        """Wait up to *seconds* for a notification; return the channel of each notification received."""
        if received := self._received():
            return received
        # psycopg's own wait polls during its last millisecond: repeated for ever, half a percent of a core.
        poll = select.poll()
        poll.register(self._driver.fileno(), select.POLLIN)
        poll.poll(seconds * 1000)
        return self._received()

    def close(self) -> None:
        """Close the connection. Never raises an error."""
        with contextlib.suppress(psycopg.Error):
            self._driver.close()

    def _with_settings(self) -> AbstractContextManager[None]:
        """Return a transaction with the local settings, if a statement would otherwise run without them."""
        is_bare = self._local_settings and self._status() == TransactionStatus.IDLE
        return self.transaction() if is_bare else contextlib.nullcontext()

    def _status(self) -> TransactionStatus:
        return self._driver.info.transaction_status

    def _received(self) -> list[str]:
        return [notify.channel for notify in self._driver.notifies(timeout=0, stop_after=1)]
