"""The location of a database: reads its URL, shows it without the password, and connects."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo

from ...exceptions import ConfigurationError
from . import blockers, session_settings
from .connection import Connection
from .timed_connection import TimedConnection

TIME_LIMIT = 2.0
"""Longest wait of a server for an answer, in seconds. A database that takes longer counts as unreachable: a dead
connection reports no error."""

COMMAND_TIME_LIMIT = 10.0
"""Longest wait of a command for an answer, in seconds. No event loop waits for a command."""

_DEFAULTS = {
    "application_name": "freegpt_auth",
    "connect_timeout": 2,
    # Finds the primary among several hosts in the URL. A standby may be minutes behind.
    "target_session_attrs": "read-write",
}


class Address:
    """The location of a database.

    Args:
        url: ``postgresql://user:password@host:port/database``, with any parameter of libpq.

    Attributes:
        shown: the URL without password and parameters.

    Raises:
        ConfigurationError: *url* cannot be read. The message repeats no part of it.
    """

    def __init__(self, url: str) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
            location = urlsplit(url)
        except (psycopg.ProgrammingError, ValueError):
            given, location = {}, urlsplit("")
        userinfo, at, hosts = location.netloc.rpartition("@")
        # libpq's password extends past ? and # to an @; without an @ it is the port. ``shown`` would reveal it.
        rest = userinfo + location.path + location.fragment + ("" if location.path else location.query)
        ports = f"0{given.get('port', '')}".replace(",", "")
        if not given or location.scheme not in ("postgresql", "postgres") or "@" in rest or not ports.isdecimal():
            raise ConfigurationError(
                "the URL of the store cannot be read: write postgresql://user:password@host:5432/database, and "
                "special characters of the password in percent-encoding, %40 for @ and %2F for /"
            )
        self.shown: str = f"postgresql://{userinfo.partition(':')[0]}{at}{hosts}{location.path}"
        self._parameters: dict[str, Any] = {**_DEFAULTS, **given}
        self._parameters["client_encoding"] = "UTF8"  # with SQL_ASCII, the driver would return bytes for names

    def connect(self, limit: float = TIME_LIMIT) -> Connection:
        """Return a new connection that waits at most *limit* seconds for each answer.

        Raises:
            psycopg.Error: the database cannot be reached.
        """
        # Prepared statements do not work behind a pooler that gives each transaction another session.
        try:
            driver = TimedConnection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        except UnicodeError:  # the codec "idna" refuses an empty label, and one of over 63 characters
            raise psycopg.OperationalError("the name of the host is none that can be looked up") from None
        driver.limit = limit
        driver.describe_blockers = self._describe_blockers if limit > TIME_LIMIT else None
        connection = Connection(driver)
        with contextlib.ExitStack() as on_error:
            on_error.callback(connection.close)
            connection.apply_settings(session_settings.settings(limit, driver.info.server_version))
            on_error.pop_all()
        return connection

    def _describe_blockers(self) -> str:
        found = ""
        with contextlib.suppress(psycopg.Error), contextlib.closing(self.connect()) as connection:
            found = blockers.describe(connection)
        return found
