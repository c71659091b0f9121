"""The pool: connections are reused, replaced when they are dead or outdated, and never lent twice at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

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
    from tests.helpers.postgresql import Cluster


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    """Return a pool of two connections to an empty database."""
    pool = Pool(Address(database), 2, time_limit=PATIENCE)
    yield pool
    pool.renew()


def _pid(connection: Connection) -> int:
    """Return the id of the connection's process on the server."""
    return int(connection.one("SELECT pg_backend_pid()")[0])


def _two(pool: Pool) -> set[int]:
    """Return the ids of both connections, used at the same time."""
    return pool.run(lambda connection: {_pid(connection), pool.run(_pid)})


def test_connections_are_reused(pool: Pool) -> None:
    """Consecutive work runs over one connection, concurrent work over two."""
    first = pool.run(_pid)
    assert pool.run(_pid) == first
    both = _two(pool)
    assert len(both) == 2
    assert _two(pool) == both > {first}


def test_dead_idle_connection_is_retried(pool: Pool, cluster: Cluster) -> None:
    """After a restart of the database, work succeeds over a new connection."""
    dead = _two(pool)
    for pid in dead:
        cluster.sql(f"SELECT pg_terminate_backend({pid})")
    assert pool.run(_pid) not in dead


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (psycopg.OperationalError("gone"), 2),
        (psycopg.errors.QueryCanceled("slow"), 1),
        (psycopg.DataError("wrong"), 1),
        (KeyboardInterrupt("stop"), 1),
    ],
)
def test_failed_connection_is_not_reused(pool: Pool, error: BaseException, tries: int) -> None:
    """A connection whose work failed is closed: its next user could read the answer to an earlier statement.

    Work is tried again, once, if an idle connection was lost; an error of a living database is not retried.
    """
    first, used = pool.run(_pid), list[int]()

    def fail(connection: Connection) -> None:
        used.append(_pid(connection))
        raise error

    with pytest.raises(type(error), match=str(error)):
        pool.run(fail)
    assert (used[0], len({*used})) == (first, tries)
    assert pool.run(_pid) not in used


@pytest.mark.parametrize("error", [psycopg.OperationalError, ZeroDivisionError], ids=["connecting", "work"])
def test_failures_leak_no_capacity(database: str, nowhere: str, error: type[Exception]) -> None:
    """After any number of failed attempts the pool has as much capacity as before."""
    pool = Pool(Address(database if error is ZeroDivisionError else nowhere), 1, time_limit=0.05)
    for _ in range(3):
        with pytest.raises(error):
            pool.run(lambda _: 1 / 0)
    pool.renew()


def test_exhausted_pool_times_out(database: str) -> None:
    """Work waits for a free connection up to the limit, then fails with the reason and without the password."""
    pool = Pool(Address(database), 1, time_limit=0.05)
    with pytest.raises(StoreUnavailableError, match="is slow: all connections") as caught:
        pool.run(lambda _: pool.run(_pid))
    assert PASSWORD not in str(caught.value)
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
