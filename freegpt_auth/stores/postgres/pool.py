"""Connections to a database, of which no use lasts longer than its limit, whatever became of the network."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo

from ...exceptions import ConfigurationError, StoreUnavailableError
from ...forks import Watched, keep
from . import blockers, session_settings
from .connection import Link
from .waits import Connection, Row

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PATIENCE", "TIME_LIMIT", "Address", "Link", "Pool", "Row"]

TIME_LIMIT = 2.0
"""Seconds after which a database that does not answer counts as unreachable: a dead connection says nothing of itself."""

PATIENCE = 10.0
"""The same for commands, which nobody waits for on an event loop."""

_T = TypeVar("_T")
# The database lives: another connection would wait as long, beside this one.
_ANSWERED = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)
_DEFAULTS = {
    "application_name": "freegpt_auth",
    "connect_timeout": 2,
    # A standby may be minutes behind. Of several hosts in the URL the primary is found.
    "target_session_attrs": "read-write",
}


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
        try:
            connection = Connection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        except UnicodeError:  # of the codec "idna": an empty label, or one of over 63 characters
            raise psycopg.OperationalError("the name of the host is none that can be looked up") from None
        connection.limit = limit
        connection.ask = self._holders if limit > TIME_LIMIT else None
        link = Link(connection)
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(link.close)
            link.settle(session_settings.settings(limit, connection.info.server_version))
            if_it_fails.pop_all()
        return link

    def _holders(self) -> str:
        held = ""
        with contextlib.suppress(psycopg.Error), contextlib.closing(self.connect()) as link:
            held = blockers.holders(link)
        return held


class Pool(Watched):
    """A few connections that several threads share; opened when they are needed.

    Args:
        address: where they lead.
        size: how many there are at most.
    """

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._size = size
        self._age = 0
        self._idle: deque[tuple[int, Link]] = deque()
        self.after_fork_in_child()
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Forget inherited connections without closing them: they belong to the parent."""
        keep(self._idle)
        self._free = threading.BoundedSemaphore(self._size)
        self._idle = deque()

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
                try:
                    return self._ask(link, question, age)
                except _ANSWERED:
                    raise
                except psycopg.OperationalError:  # the connection died while it was idle
                    pass
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
