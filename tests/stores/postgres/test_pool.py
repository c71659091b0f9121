"""The pool: connections are reused, replaced when they are dead or outdated, and never lent twice at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.exceptions import StoreUnavailableError
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.pool import Pool
from tests.helpers.postgresql import PASSWORD
from tests.stores.postgres.common import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from freegpt_auth.stores.postgres.connection import Connection


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    """Return a pool of two connections to an empty database."""
    pool = Pool(Address(database), 2)
    yield pool
    pool.renew()


def _pid(connection: Connection) -> int:
    """Return the id of the connection's process on the server."""
    return int(connection.one("SELECT pg_backend_pid()")[0])


def _two(pool: Pool) -> tuple[int, int]:
    """Return the ids of both connections, used at the same time."""
    return pool.run(lambda connection: (_pid(connection), pool.run(_pid)))


def test_connections_are_reused(pool: Pool) -> None:
    """Consecutive work runs over one connection, concurrent work over two."""
    first = pool.run(_pid)
    assert pool.run(_pid) == first
    both = _two(pool)
    assert both[0] == first != both[1]
    assert set(_two(pool)) == set(both)


def test_interrupted_connection_is_not_reused(pool: Pool) -> None:
    """A connection whose work failed is closed: its next user could read the answer to an earlier statement."""
    seen: list[int] = []

    def interrupt(connection: Connection) -> None:
        seen.append(_pid(connection))
        raise KeyboardInterrupt

    def fail(connection: Connection) -> None:
        seen.append(_pid(connection))
        connection.run("SELECT 1 / 0")

    with pytest.raises(KeyboardInterrupt):
        pool.run(interrupt)
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.run(fail)
    assert pool.run(_pid) not in seen
    assert len(set(seen)) == 2


def test_dead_idle_connection_is_retried(pool: Pool, cluster: Any) -> None:
    """After a restart of the database, work succeeds over a new connection."""
    dead = _two(pool)
    for pid in dead:
        cluster.sql(f"SELECT pg_terminate_backend({pid})")
    assert pool.run(_pid) not in dead


def test_work_is_tried_at_most_twice(pool: Pool) -> None:
    """A lost connection is an error if it was new; an error of a living database is not retried."""
    tries: list[int] = []

    def fail(connection: Connection) -> None:
        tries.append(_pid(connection))
        raise psycopg.OperationalError("gone")

    def divide(connection: Connection) -> None:
        tries.append(_pid(connection))
        connection.run("SELECT 1 / 0")

    pool.run(_pid)
    with pytest.raises(psycopg.OperationalError, match="gone"):
        pool.run(fail)
    assert len(set(tries)) == len(tries) == 2
    pool.run(_pid)
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.run(divide)
    assert len(tries) == 3


def test_exhausted_pool_times_out(database: str) -> None:
    """Work waits for a free connection up to the limit, then fails with the reason and without the password."""
    pool, held, free = Pool(Address(database), 1, time_limit=0.05), threading.Event(), threading.Event()

    def hold(connection: Connection) -> int:
        held.set()
        free.wait(PATIENCE)
        return _pid(connection)

    with ThreadPoolExecutor(1) as threads:
        holding = threads.submit(pool.run, hold)
        held.wait(PATIENCE)
        with pytest.raises(StoreUnavailableError, match="is slow: all connections") as caught:
            pool.run(_pid)
        assert PASSWORD not in str(caught.value)
        free.set()
        assert pool.run(_pid) == holding.result(PATIENCE)
    pool.renew()


def test_failures_leak_no_capacity(database: str) -> None:
    """After any number of failed attempts the pool has as much capacity as before."""
    broken, fails = Address(database), [True]

    class Failing(Address):
        """An address that cannot be reached at first."""

        def connect(self, limit: float = 2.0) -> Connection:
            """Fail, or connect."""
            if fails:
                raise psycopg.OperationalError("gone")
            return broken.connect(limit)

    pool = Pool(Failing(database), 1, time_limit=0.05)
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError):
            pool.run(_pid)
    fails.clear()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            pool.run(lambda _: 1 / 0)
    assert pool.run(_pid)
    pool.renew()


def test_renew_replaces_every_connection(pool: Pool) -> None:
    """After a possible failover no idle connection is used again, nor one that was in use at that moment."""
    idle = pool.run(_pid)
    pool.renew()

    def renew(connection: Connection) -> int:
        pool.renew()
        return _pid(connection)

    in_use = pool.run(renew)
    assert len({idle, in_use, pool.run(_pid)}) == 3


def test_threads_run_and_renew_at_once(pool: Pool) -> None:
    """Each thread gets its own answers while others run work and renew the connections."""

    def run(number: int) -> int:
        if number % 5 == 0:
            pool.renew()
        return int(pool.run(lambda connection: connection.one("SELECT %s::int", (number,)))[0])

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(run, range(200))) == list(range(200))
