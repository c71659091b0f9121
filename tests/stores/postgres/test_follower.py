"""The thread that keeps the cache current: notifications, queries, faults of the database, shutdown and forks."""

from __future__ import annotations

import contextlib
import itertools
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.clock import elapsed
from freegpt_auth.stores.postgres import PostgresTokenStore, reads
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.cache import TokenCache
from freegpt_auth.stores.postgres.follower import CERTAINTY, HEARTBEAT, Follower, State
from freegpt_auth.tokens import digest_of
from tests.helpers.pooler import smallest
from tests.helpers.proxy import PLAIN
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import PATIENCE, Clock, behind, cut_off, execute, frozen, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster
    from tests.stores.postgres.common import After, Lines

LEASE = 30.0
NEVER = 10_000.0  # seconds that no test waits: with this heartbeat only notifications lead to a query
REVOKE = "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id = 't1'"
DELETE = "DELETE FROM freegpt_auth.tokens WHERE id = 't2'"
TRUNCATE = "TRUNCATE freegpt_auth.tokens"


def _digest(number: int) -> bytes:
    return number.to_bytes(32)


def _insert(first: int, last: int = 0) -> str:
    """Return the statement that adds the tokens with the numbers from *first* to *last*, or the first only."""
    return f"""
        INSERT INTO freegpt_auth.tokens (digest, id, name, prefix, created_at)
        SELECT decode(lpad(to_hex(n), 64, '0'), 'hex'), 't' || n, 'token', 'sk', now()
        FROM generate_series({first}, {last or first}) n
    """


class Process(TokenCache):
    """The cache of one server process, with its follower."""

    def __init__(self, url: str, limit: int = 100_000, lease: float = LEASE, **options: Any) -> None:
        super().__init__(limit)
        self.generations: list[int] = []
        self.follower = Follower(Address(url), self, lease, self._renew, retry=(0.01, 0.05), **options)

    def _renew(self) -> None:
        self.generations.append(self.followed.generation)

    def start(self) -> Process:
        """Start the thread."""
        self.follower.start()
        return self

    @property
    def followed(self) -> State:
        """How far the cache may be relied on."""
        return self.follower.state

    @property
    def ids(self) -> set[str]:
        """The ids of the cached tokens."""
        return {token.id for token in self.tokens()}

    def is_revoked(self, number: int) -> bool:
        """Return whether a token is cached as revoked."""
        return getattr(self.find(_digest(number)), "revoked_at", None) is not None


Make = Callable[..., Process]


@pytest.fixture
def process(database: str) -> Iterator[Make]:
    """Return a function that makes a process with quick retries; its keywords go to the follower."""
    with contextlib.ExitStack() as stack:

        def make(url: str = database, **options: Any) -> Process:
            made = Process(url, **options)
            stack.callback(made.follower.stop)
            return made

        yield make


# --- following


CHANGES: dict[str, tuple[list[str], Callable[[Process], bool]]] = {
    "a row added": ([_insert(4)], lambda process: process.ids == {"t1", "t2", "t3", "t4"}),
    "a row changed": ([REVOKE], lambda process: process.is_revoked(1)),
    "a row removed": ([DELETE], lambda process: process.ids == {"t1", "t3"}),
    "another secret": (
        [f"UPDATE freegpt_auth.tokens SET digest = '\\x{_digest(99).hex()}' WHERE id = 't2'"],
        lambda process: process.find(_digest(2)) is None and process.find(_digest(99)) is not None,
    ),
    "many rows": ([_insert(4, 3003)], lambda process: len(process.ids) == 3003),
    "all rows": ([TRUNCATE], lambda process: process.ids == set()),
    "a transaction": (
        [REVOKE, DELETE, _insert(5)],
        lambda process: process.ids == {"t1", "t3", "t5"} and process.is_revoked(1),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notification_leads_to_a_query(process: Make, database: str, change: str, lines: Lines) -> None:
    """A command, or an operator with psql, changes one token or all: each server follows at the notification."""
    statements, has_followed = CHANGES[change]
    execute(database, _insert(1, 3))
    server = process(heartbeat=NEVER).start()
    assert server.ids == {"t1", "t2", "t3"}
    execute(database, *statements)
    wait_until(lambda: server.revision == 1 + len(statements))
    assert has_followed(server)
    assert server.complete
    assert lines() == []


def test_pooler_without_notifications(
    process: Make, cluster: Cluster, database: str, connection: Connection, lines: Lines
) -> None:
    """A pooler in transaction mode takes LISTEN and delivers nothing: one warning, and changes within a heartbeat."""
    with smallest(cluster, name_of(database)) as port:
        server = process(cluster.url(name_of(database), port=port) + PLAIN, time_limit=0.5).start()
        wait_until(lambda: server.complete)
        [warning] = lines("WARNING")
        assert warning == (
            f"{Address(cluster.url(name_of(database), port=port)).shown} delivers no notifications, as a pooler in "
            f"transaction mode does not: changes are looked for each {HEARTBEAT:g} s, and commands wait for that"
        )
        execute(database, _insert(1, 3), REVOKE)
        wait_until(lambda: server.ids == {"t1", "t2", "t3"} and server.is_revoked(1))
        assert behind(connection, 99) == 1
        server.follower.stop()
        assert behind(connection, 99) == 0
    assert len(lines()) == 1


@pytest.fixture
def reloads(after: After) -> list[None]:
    """Return a list with an item for each time that the whole table was read."""
    counted: list[None] = []
    after("every_token", lambda: counted.append(None))
    return counted


def test_log_with_a_gap_leads_to_a_reload(process: Make, database: str, reloads: list[None], lines: Lines) -> None:
    """After a lost connection the changes are read from the log, or every token if the log begins later or has a gap.

    An unchanged token stays the same object.
    """
    server = process()
    server.follower.refresh()
    for number in range(1, 9):
        execute(database, _insert(number))
    server.follower.refresh()
    assert (len(server.ids), server.revision, len(reloads)) == (8, 8, 1)
    kept = server.find(_digest(1))
    for count, removed in ((2, "revision <= 9"), (3, "revision > 10")):
        for number in (2 * server.revision, 2 * server.revision + 1):
            execute(database, _insert(number))
        execute(database, f"DELETE FROM freegpt_auth.changes WHERE {removed}")
        server.follower.refresh()
        assert f"t{number}" in server.ids
        assert (len(reloads), lines()) == (count, [])
        assert server.find(_digest(1)) is kept


def test_large_change_is_no_reload(process: Make, database: str, reloads: list[None]) -> None:
    """A statement that revokes thousands of tokens leads to no reload; TRUNCATE does, or a hundred thousand rows."""
    execute(database, _insert(1, 5_000))
    server = process()
    server.follower.refresh()
    revoke = "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id <> 't5000'"
    execute(database, revoke, _insert(5_001))
    server.follower.refresh()
    assert (server.revision, len(reloads)) == (3, 1)
    assert "t5001" in server.ids
    assert all(server.is_revoked(number) for number in range(1, 5_000))
    execute(database, TRUNCATE, _insert(1, 3_000), _insert(4_000, 4_001))
    server.follower.refresh()
    assert (server.revision, len(reloads), len(server.ids)) == (6, 2, 3_002)


def test_reload_is_of_one_revision(process: Make, database: str, after: After) -> None:
    """A change that is committed during a reload is not mixed in: it has a later revision."""
    numbers = itertools.count(1)
    after("head", lambda: execute(database, _insert(next(numbers))))
    server = process()
    server.follower.refresh()
    assert (server.revision, server.ids) == (1, {"t1"})


def test_larger_table_is_cached_in_part(process: Make, database: str) -> None:
    """While the table exceeds the cache, a token missing there is never certain to be unknown."""
    execute(database, _insert(1, 3))
    server = process(limit=2).start()
    assert not server.complete
    assert server.followed.certain_until == float("-inf")
    assert server.followed.leased_until > elapsed()
    execute(database, "DELETE FROM freegpt_auth.tokens WHERE id = 't3'")
    wait_until(lambda: server.revision == 2)
    execute(database, TRUNCATE)
    wait_until(lambda: server.complete and server.followed.certain_until > elapsed())


# --- how long memory may be relied on


def test_lease_counts_from_before_the_query(process: Make, database: str, after: After) -> None:
    """However long the query takes, certainty and lease count from its start, and the lease ends with the row."""
    clock = Clock()
    after("head", lambda: clock.advance(1))
    server = process(clock=clock, heartbeat=NEVER).start()
    covered = 1_000 + LEASE
    assert (server.followed.certain_until, server.followed.leased_until) == (1_000 + CERTAINTY, covered)
    began = clock()
    execute(database, _insert(1))
    wait_until(lambda: server.followed.certain_until == began + CERTAINTY)
    assert server.followed.leased_until == covered


def test_commands_wait_for_each_running_process(
    process: Make, database: str, connection: Connection, after: After
) -> None:
    """Commands wait for a process from before its first read, until it relies on its cache no more."""
    seen: list[int] = []
    after("head", lambda: seen.append(behind(connection, 0)))
    server = process().start()
    assert seen[0] == 1
    execute(database, _insert(1))
    wait_until(lambda: behind(connection, 1) == 0)
    assert server.ids == {"t1"}
    with psycopg.connect(database) as operator, ThreadPoolExecutor(1) as threads:
        operator.execute("SELECT FROM freegpt_auth.processes FOR UPDATE")
        stopping = threads.submit(server.follower.stop)
        wait_until(lambda: server.followed.leased_until == float("-inf"))
        assert not stopping.done()
        operator.rollback()
    assert behind(connection, 2) == 0


def test_idle_session_is_ended_after_the_lease(process: Make) -> None:
    """The database ends the session of a process that was cut off, not before its lease ends."""
    server = process(lease=0.3, heartbeat=NEVER).start()
    wait_until(lambda: server.followed.generation >= 2)
    assert server.generations[:2] == [0, 1]  # connections are renewed before the new generation is published


# --- when the database is away


def test_outage_is_logged_once(process: Make, cluster: Cluster, database: str, lines: Lines) -> None:
    """Lost, lease over, answers again: three lines in the log for each outage, however many attempts are made."""
    clock = Clock()
    server = process(clock=clock).start()
    shown = Address(database).shown
    for outage in (1, 2):
        with cut_off(cluster, database):
            wait_until(lambda: len(lines()) == 3 * outage - 2)  # noqa: B023  called in this round only
            assert server.followed.certain_until == float("-inf")
            assert server.followed.leased_until > clock()
            clock.advance(LEASE)
            wait_until(lambda: len(lines()) == 3 * outage - 1)  # noqa: B023
        wait_until(lambda: server.followed.trouble is None)
        lost, over, again = lines()[-3:]
        assert lost.startswith(f"{shown} does not answer: ")
        assert lost.endswith("Tokens known here are accepted for 30 s more, others are answered 503")
        assert over.startswith(f"{shown} does not answer: ")
        assert over.endswith("Its tokens are answered 503 until this is mended")
        assert again == f"{shown} answers again"
        assert server.followed.certain_until > clock()
    assert (len(lines("ERROR")), len(lines("INFO"))) == (4, 2)


def test_hung_database_is_given_up(process: Make, mortal: Cluster) -> None:
    """A database that accepts connections and answers nothing counts as lost, until it answers."""
    server = process(mortal.url("postgres"), heartbeat=0.1).start()
    with frozen(mortal):
        wait_until(lambda: "timeout" in str(server.followed.trouble))
    wait_until(lambda: server.followed.trouble is None)


def test_unexpected_error_is_retried(process: Make, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    """An unexpected error is logged like any other, and the thread goes on."""
    with monkeypatch.context() as broken:
        broken.setattr(reads, "head", lambda _: {"": ""}["unexpected"])
        server = process().start()
        assert "unexpected" in lines("ERROR")[0]
    wait_until(lambda: server.followed.trouble is None)


# --- a database that has lost changes


def _restore(url: str, revision: int, later: int) -> None:
    """Restore a backup older than a revocation and than a second token, with a number of *later* changes."""
    execute(
        url,
        "SET LOCAL session_replication_role = replica",
        "UPDATE freegpt_auth.tokens SET revoked_at = NULL",
        DELETE,
        f"DELETE FROM freegpt_auth.changes WHERE revision >= {revision}",
        f"UPDATE freegpt_auth.state SET revision = {revision}, mark = gen_random_uuid()",
        "INSERT INTO freegpt_auth.changes SELECT revision, mark, NULL FROM freegpt_auth.state",
        "SET LOCAL session_replication_role = origin",
        *(_insert(number) for number in range(3, 3 + later)),
    )


@pytest.mark.parametrize("later", [0, 1, 5], ids=["earlier", "the same number", "later"])
@pytest.mark.parametrize("limit", [100_000, 1])
def test_lost_revocation_stays_in_force(
    process: Make, database: str, connection: Connection, lines: Lines, later: int, limit: int
) -> None:
    """A loss of revocations is logged as an ERROR; those that are cached stay in force until the token is changed."""
    server = process(limit=limit).start()
    execute(database, _insert(1), _insert(2))
    wait_until(lambda: server.revision == 2)
    found = reads.look_up(connection, _digest(1))[1]
    server.fill(_digest(1), found, 2)
    execute(database, REVOKE)
    wait_until(lambda: server.revision == 3 and server.is_revoked(1))
    _restore(database, 2, later)
    wait_until(lines)
    [error] = lines("ERROR")
    assert error == (
        f"{Address(database).shown} has lost changes that were in force (a failover or a backup?): every token was "
        "read again. Tokens that this process knew as revoked stay so (1); look through list and revoke what is "
        "missing again"
    )
    assert server.revision == 2 + later
    assert server.fill(_digest(1), found, 2 + later) != found
    assert server.is_revoked(1)
    assert "t2" not in server.ids
    execute(database, "UPDATE freegpt_auth.tokens SET name = 'restored' WHERE id = 't1'")
    wait_until(lambda: server.revision == 3 + later)
    assert not server.is_revoked(1)
    assert len(lines()) == 1


# --- the clock


def test_time_is_that_of_the_database(
    process: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch, after: After
) -> None:
    """On a host whose clock is five minutes off, tokens expire by the database's clock, and never later."""
    right = time.time()
    monkeypatch.setattr(time, "time", lambda: right - 300)
    after("head", lambda: time.sleep(0.2))
    server = process()
    assert abs(server.follower.now() - right) < PATIENCE  # the first query
    [there] = connection.one("SELECT extract(epoch FROM clock_timestamp())::float8")
    assert there <= server.follower.now() < there + PATIENCE


# --- starting and stopping


def test_requests_start_one_thread(process: Make) -> None:
    """However many requests start the thread, one runs; after a shutdown the cache is not relied on."""
    server = process()
    for generation in (1, 2):
        with ThreadPoolExecutor(4) as threads:
            [*threads.map(lambda _: server.follower.start(), range(4))]
        assert server.follower.is_running()
        server.follower.stop()
        assert not server.follower.is_running()
        assert server.followed == State(generation=generation)


def test_restart_leaves_one_follower() -> None:
    """A thread that was stopped while it waited for the database ends, although another has been started since."""
    begun, going_on = queue.SimpleQueue[threading.Thread](), threading.Event()

    class Slow(Address):
        def connect(self, limit: float = 0.0) -> Connection:
            begun.put(threading.current_thread())
            going_on.wait(PATIENCE)
            raise psycopg.OperationalError(f"nothing within {limit:g} s")

    follower, stopped = Follower(Slow("postgresql://host/x"), TokenCache(1), LEASE, lambda: None, time_limit=0.01), []
    for _ in range(2):
        follower.start()
        stopped.append(begun.get(timeout=PATIENCE))
        follower.stop()
    follower.start()
    going_on.set()
    wait_until(lambda: not any(thread.is_alive() for thread in stopped))
    assert follower.is_running()
    follower.stop()


FORK = """
import os, sys, warnings
from datetime import UTC, datetime
warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # the subject of this test
from freegpt_auth import UNRESOLVED
from freegpt_auth.stores.postgres import PostgresTokenStore
url, token_id, is_asked, *digests = sys.argv[1:]
digests = [*map(bytes.fromhex, digests)]
store, ready, revoked = PostgresTokenStore(url, cache_limit=1), os.pipe(), os.pipe()
def are_revoked():
    return [store.resolve(digest).revoked_at is not None for digest in digests]
def pids():
    return {connection.one("SELECT pg_backend_pid()")[0] for _, connection in store._pool._idle}
assert store.survey().active == 2
assert not is_asked or are_revoked() == [False, False]
before, follower = pids(), store._follower
child = os.fork()
if child == 0:
    assert store._follower is not follower and not store._follower.is_running() and not store._pool._idle
    assert store.peek(digests[0]) is UNRESOLVED
    assert are_revoked() == [False, False]
    assert not pids() & before
    os.write(ready[1], b"x")
    os.read(revoked[0], 1)
    assert are_revoked() == [True, False]
    store.close()
    sys.exit()
os.read(ready[0], 1)
assert are_revoked() == [False, False]
PostgresTokenStore(url).revoke(token_id, datetime.now(UTC))
os.write(revoked[1], b"x")
assert are_revoked() == [True, False]
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store._follower is follower and follower.state.generation == 1
assert not is_asked or before <= pids()
store.close()
print("done")
"""


@pytest.mark.parametrize("is_asked", ["", "asked"])
def test_fork_shares_no_connection(database: str, keep: Callable[..., Any], is_asked: str) -> None:
    """A forked child follows the database by its own connections and sees revocations; the parent is undisturbed."""
    (token, secret), (_, other) = keep(PostgresTokenStore(database)), keep(PostgresTokenStore(database))
    arguments = [database, token.id, is_asked, digest_of(secret).hex(), digest_of(other).hex()]
    line = [sys.executable, "-X", "dev", "-W", "error", "-c", FORK, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.stderr) == ("done\n", "")
