"""One connection: transactions, batches, notifications, and a limit for each wait."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psycopg
import pytest

from freegpt_auth.stores.postgres.address import Address
from tests.helpers.postgresql import PASSWORD
from tests.stores.postgres.common import PATIENCE, frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster


def test_transaction_is_atomic(connection: Connection) -> None:
    """A failed block is rolled back, and the isolation level is ours with any default of the session."""
    connection.run("CREATE TABLE public.here (number integer)")
    connection.run("SET default_transaction_isolation TO 'serializable'")
    with contextlib.suppress(psycopg.errors.DivisionByZero), connection.transaction():
        connection.run("INSERT INTO public.here VALUES (1)")
        connection.run("SELECT 1 / 0")
    with connection.transaction():
        connection.run("INSERT INTO public.here VALUES (%s)", (2,))
        assert connection.one("SELECT current_setting('transaction_isolation')") == ("read committed",)
    assert connection.run("SELECT number FROM public.here") == [(2,)]


def test_long_limits_end_with_the_transaction(database: str) -> None:
    """After a transaction with long statements the usual limits apply again, on either side."""
    with contextlib.closing(Address(database).connect(1.0)) as connection:
        with connection.transaction():
            connection.allow_long_statements()
            connection.run("SELECT pg_sleep(1.5)")
        assert connection.one("SELECT current_setting('statement_timeout')") == ("900ms",)
        connection.run("SET statement_timeout TO 0")
        with pytest.raises(psycopg.OperationalError, match="no answer within 1 s"):
            connection.run("SELECT pg_sleep(30)")


def test_rows_are_read_and_sent_in_batches(connection: Connection) -> None:
    """A large table passes through a process a few rows at a time, in both directions."""
    connection.script("CREATE TABLE public.here (number integer, name text); INSERT INTO public.here VALUES (0, NULL)")
    connection.copy(
        "COPY public.here (number, name) FROM STDIN", ((number, f"tab\t{number}\n") for number in range(1, 10))
    )
    with connection.transaction():
        batches = list(connection.batches("SELECT number, name FROM public.here ORDER BY number", 4))
    assert [len(rows) for rows in batches] == [4, 4, 2]
    assert [row for rows in batches for row in rows] == [(0, None), *((n, f"tab\t{n}\n") for n in range(1, 10))]


def test_notifications_arrive_at_once_and_once(connection: Connection, database: str) -> None:
    """A notification ends the wait; those that arrived during a statement are returned together, and none twice."""
    connection.run('LISTEN "here"')
    with contextlib.closing(Address(database).connect()) as other, ThreadPoolExecutor(1) as threads:
        received = threads.submit(connection.notifications, 10 * PATIENCE)
        other.run("SELECT pg_notify('here', '')")
        assert received.result(PATIENCE) == ["here"]
        other.run("SELECT pg_notify('here', number::text) FROM generate_series(1, 20) number")
        connection.run("SELECT 1")
    assert connection.notifications(PATIENCE) == ["here"] * 20
    assert connection.notifications(0.01) == []


def test_close_raises_no_error(connection: Connection, cluster: Cluster) -> None:
    """A connection that the server or the driver has ended is closed without an error, and more than once."""
    cluster.sql(f"SELECT pg_terminate_backend({connection.one('SELECT pg_backend_pid()')[0]})")
    with pytest.raises(psycopg.OperationalError):
        connection.run("SELECT 1")
    connection.close()
    connection.close()


def test_connection_shows_no_password(connection: Connection) -> None:
    """The password is in no representation that a debugger or a log line shows."""
    assert PASSWORD not in repr([connection, vars(connection)])


USES: dict[str, Callable[[Connection], object]] = {
    "run": lambda connection: connection.run("SELECT 1"),
    "script": lambda connection: connection.script("SELECT 1; SELECT 2"),
    "batches": lambda connection: list(connection.batches("SELECT generate_series(1, 9)", 2)),
    "transaction": lambda connection: connection.transaction().__enter__(),
    "copy": lambda connection: connection.copy(
        "COPY public.here (number) FROM STDIN", ((number,) for number in range(9))
    ),
}


@pytest.mark.parametrize("use", USES)
def test_every_wait_has_its_limit(mortal: Cluster, use: str) -> None:
    """A server or a network that does not answer delays no caller longer than the limit."""
    connection = Address(mortal.url("postgres")).connect(0.2)
    connection.run("BEGIN")
    with ThreadPoolExecutor(1) as threads, frozen(mortal):
        used = threads.submit(USES[use], connection)
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            used.result(PATIENCE)
        threads.submit(connection.close).result(PATIENCE)


def test_connecting_and_listening_have_limits(mortal: Cluster) -> None:
    """A server that accepts a connection and does not answer times out; a wait for notifications ends in time."""
    address = Address(mortal.url("postgres"))
    with contextlib.closing(address.connect()) as connection, ThreadPoolExecutor(1) as threads, frozen(mortal):
        assert threads.submit(connection.notifications, 0.1).result(PATIENCE) == []
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            threads.submit(address.connect).result(PATIENCE)
