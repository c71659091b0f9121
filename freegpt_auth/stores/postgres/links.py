"""Connections to a database, of which no use lasts longer than its limit, whatever became of the network."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo

from ...exceptions import ConfigurationError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from psycopg.abc import PQGen

TIME_LIMIT = 2.0
"""Seconds after which a database that does not answer counts as unreachable: a dead connection says nothing of itself."""

PATIENCE = 10.0
"""The same for commands, which nobody waits for on an event loop."""

_LONG_PATIENCE = 600.0  # for a statement on a whole table: to copy a million tokens takes one of 20 to 40 seconds
_T = TypeVar("_T")
Row = tuple[Any, ...]

_DEFAULTS = {
    "application_name": "freegpt_auth",
    "connect_timeout": 2,
    # A standby may be minutes behind. Of several hosts in the URL the primary is found.
    "target_session_attrs": "read-write",
}


class _Connection(psycopg.Connection[Row]):
    """A connection whose every wait has a limit."""

    limit: float = TIME_LIMIT

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        return super().wait(gen, interval, self.limit if timeout is None else timeout)


class Address:
    """Where a database is, and how to show that without the password.

    Args:
        url: ``postgresql://user:password@host:port/database``, with any parameter that libpq knows.

    Attributes:
        shown: the URL without password and parameters.

    Raises:
        ConfigurationError: it cannot be read. The message repeats nothing of it.
    """

    def __init__(self, url: str) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
            location = urlsplit(url)
        except (psycopg.ProgrammingError, ValueError):
            given, location = {}, urlsplit("")
        userinfo, at, hosts = location.netloc.rpartition("@")
        # To libpq the password ends at the @ behind any ? or #, and with no @ it is the port; here it would be shown.
        rest = userinfo + location.path + location.fragment + ("" if location.path else location.query)
        ports = f"0{given.get('port', '')}".replace(",", "")
        if not given or location.scheme not in ("postgresql", "postgres") or "@" in rest or not ports.isdecimal():
            raise ConfigurationError(
                "the URL of the store cannot be read: write postgresql://user:password@host:5432/database, and "
                "special characters of the password in percent-encoding, %40 for @ and %2F for /"
            )
        self.shown: str = f"postgresql://{userinfo.partition(':')[0]}{at}{hosts}{location.path}"
        self._parameters: dict[str, Any] = {**_DEFAULTS, **given}
        self._parameters["client_encoding"] = "UTF8"  # whatever the database's own is: names are text, not bytes

    def connect(self, limit: float = TIME_LIMIT) -> Link:
        """Return a new connection, of which no answer takes longer than *limit* seconds.

        Raises:
            psycopg.Error: there is none to be had.
        """
        # Prepared statements do not survive a pooler that gives each transaction another connection.
        connection = _Connection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        connection.limit = limit
        link = Link(connection)
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(link.close)
            # Not among the parameters: PgBouncer before 1.20, and others, refuse a connection that brings options.
            link.run("SET timezone TO 'UTC'")
            if_it_fails.pop_all()
        return link


class Link:
    """One connection. Whatever it cannot do raises ``psycopg.Error``, and it is then to be closed."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def run(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> list[Row]:
        """Run one statement and return its rows."""
        cursor = self._connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, values: Sequence[object] | dict[str, object] = ()) -> Row:
        """Run one statement and return its only row."""
        [row] = self.run(statement, values)
        return row

    def wait_for_much(self) -> None:
        """Let each answer from now on take as long as a statement on a whole table does."""
        self._connection.limit = _LONG_PATIENCE

    def script(self, statements: str) -> None:
        """Run several statements."""
        self._connection.execute(statements.encode())

    def batches(self, statement: str, size: int) -> Iterator[list[Row]]:
        """Run one statement in a transaction and yield its rows, so many at a time."""
        with self._connection.cursor(name="freegpt_auth") as cursor:
            cursor.execute(statement.encode())
            while rows := cursor.fetchmany(size):
                yield rows

    def copy(self, statement: str, rows: Iterator[Row]) -> None:
        """Send rows to a ``COPY … FROM STDIN``."""
        with self._connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                copy.write_row(row)

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Do all within or nothing, whatever the database has as defaults."""
        with self._connection.transaction():
            # A snapshot that is older than the lock that was waited for would not do. And a schema in which others may make
            # functions could hold one that matches a call better than PostgreSQL's own, and would run as us (CVE-2018-1058).
            self.script("SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path = pg_catalog")
            yield

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

    def _heard(self) -> list[str]:
        return [notify.channel for notify in self._connection.notifies(timeout=0, stop_after=1)]


class Pool:
    """A few connections that several threads share; opened when they are needed.

    Args:
        address: where they lead.
        size: how many there are at most.
    """

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._size = size
        self._age = 0
        self.forget()
        _pools.add(self)

    def forget(self) -> None:
        """Leave all connections to whom they belong: after a fork they are the parent's."""
        self._free = threading.BoundedSemaphore(self._size)
        self._idle: deque[tuple[int, Link]] = deque()

    def ask(self, question: Callable[[Link], _T]) -> _T:
        """Return what *question* makes of a connection. It may be called twice: a connection that was idle may be dead.

        Raises:
            StoreUnavailableError: all are in use for too long.
            psycopg.Error: there is none to be had, or what was done failed.
        """
        if not self._free.acquire(timeout=TIME_LIMIT):
            raise StoreUnavailableError(f"{self._address.shown} is slow: all connections of this process are in use")
        try:
            age = self._age  # before there is a connection, which may be an old one as soon as there is
            link = self._take()
            if link is not None:
                with contextlib.suppress(psycopg.OperationalError):
                    return self._ask(link, question, age)
            return self._ask(self._address.connect(), question, age)
        finally:
            self._free.release()

    def renew(self) -> None:
        """Open new connections from now on: the old ones may lead to a server that is no longer the primary."""
        self._age += 1
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[1].close()

    def _ask(self, link: Link, question: Callable[[Link], _T], age: int) -> _T:
        try:
            answer = question(link)
        except BaseException:
            link.close()  # it may have been interrupted in the middle of something
            raise
        self._idle.append((age, link))
        return answer

    def _take(self) -> Link | None:
        with contextlib.suppress(IndexError):
            while True:
                age, link = self._idle.pop()
                if age == self._age:
                    return link
                link.close()
        return None


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_inherited: list[object] = []  # never let go of: closing one would end the parent's


def _forget_all() -> None:
    for pool in list(_pools):
        _inherited.append(pool._idle)  # noqa: SLF001
        pool.forget()


os.register_at_fork(after_in_child=_forget_all)


def reason_of(error: Exception) -> str:
    """Return what went wrong, in one line without advice."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    lines = (primary or str(error) or type(error).__name__).splitlines()
    # What libpq advises stands in lines that begin with a tab.
    return " ".join(line.strip() for line in lines if not line.startswith("\t")).rstrip(".")
