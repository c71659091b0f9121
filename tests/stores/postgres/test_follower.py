"""The thread that keeps the cache current: notifications, queries, faults of the database, shutdown and forks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth import StoreUnavailableError
from freegpt_auth.clock import elapsed
from freegpt_auth.stores.postgres import PostgresTokenStore, reads, schema
from freegpt_auth.stores.postgres.address import TIME_LIMIT, Address
from freegpt_auth.stores.postgres.cache import TokenCache
from freegpt_auth.stores.postgres.follower import CERTAINTY, HEARTBEAT, Follower
from tests.helpers.pooler import smallest
from tests.helpers.ports import free_port
from tests.helpers.postgresql import running
from tests.helpers.proxy import PLAIN
from tests.stores.postgres.common import PATIENCE, execute, name_of, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth import Token
    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster

LEASE = 30.0
LATE = 1_000_000
"""A revision that no process has reached."""

NEVER = 10_000.0
"""Seconds that no test waits: with this heartbeat only notifications lead to a query."""

INSERT = """
    INSERT INTO freegpt_auth.tokens (digest, id, name, prefix, created_at)
    SELECT decode(lpad(to_hex(n), 64, '0'), 'hex'), 't' || n, 'token', 'sk', now() FROM generate_series({}, {}) n
"""
REVOKE = "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id = 't1'"


def _digest(number: int) -> bytes:
    return number.to_bytes(32)


@dataclass
class Process:
    """The follower and the cache of one server process, and the connections of its thread."""

    follower: Follower
    cache: TokenCache
    connections: list[Connection] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)

    def ids(self) -> set[str]:
        """Return the ids of the cached tokens."""
        return {token.id for token in self.cache.tokens()}

    def is_revoked(self, number: int) -> bool:
        """Return whether a token is cached as revoked."""
        token = self.cache.find(_digest(number))
        return token is not None and token.revoked_at is not None


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    """Return a function that makes a process with quick retries; its keywords go to the follower."""
    with contextlib.ExitStack() as stack:

        def make(
            url: str,
            lease: float = LEASE,
            limit: int = 100_000,
            *,
            heartbeat: float = HEARTBEAT,
            time_limit: float = TIME_LIMIT,
        ) -> Process:
            address = Address(url)
            connect = address.connect

            def connect_and_note(*limit: float) -> Connection:
                made.connections.append(connect(*limit))
                return made.connections[-1]

            monkeypatch.setattr(address, "connect", connect_and_note)
            cache = TokenCache(limit)
            follower = Follower(
                address,
                cache,
                lease,
                lambda: made.generations.append(follower.state.generation),
                heartbeat=heartbeat,
                time_limit=time_limit,
                retry=(0.01, 0.05),
            )
            made = Process(follower, cache)
            stack.callback(follower.stop)
            return made

        yield make


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="freegpt_auth")


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a PostgreSQL server that tests may kill."""
    with running(tmp_path_factory.mktemp("mortal") / "data", fsync="off") as cluster:
        PostgresTokenStore(cluster.url("postgres")).migrate()
        yield cluster


def _behind(connection: Connection, revision: int) -> int:
    """Return the number of processes that commands wait for."""
    return int(reads.processes_behind(connection, revision)[0])


def _lines(log: pytest.LogCaptureFixture, level: str = "") -> list[str]:
    return [record.getMessage() for record in log.records if level in ("", record.levelname)]


# --- following


CHANGES: dict[str, tuple[str, Callable[[Process], bool]]] = {
    "a row added": (INSERT.format(4, 4), lambda process: process.ids() == {"t1", "t2", "t3", "t4"}),
    "a row changed": (REVOKE, lambda process: process.is_revoked(1)),
    "a row removed": ("DELETE FROM freegpt_auth.tokens WHERE id = 't2'", lambda process: process.ids() == {"t1", "t3"}),
    "another secret": (
        f"UPDATE freegpt_auth.tokens SET digest = '\\x{_digest(99).hex()}' WHERE id = 't2'",
        lambda process: process.cache.find(_digest(2)) is None and process.cache.find(_digest(99)) is not None,
    ),
    "a thousand rows": (INSERT.format(4, 1003), lambda process: len(process.ids()) == 1003),
    "more rows": (INSERT.format(4, 3003), lambda process: len(process.ids()) == 3003),
    "all rows": ("TRUNCATE freegpt_auth.tokens", lambda process: process.ids() == set()),
    "all rows one by one": ("DELETE FROM freegpt_auth.tokens", lambda process: process.ids() == set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notification_leads_to_a_query(
    process: Callable[..., Process], database: str, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A command, or an operator with psql, changes one token or all: each server follows at the notification."""
    statement, has_followed = CHANGES[change]
    execute(database, INSERT.format(1, 3))
    server = process(database, heartbeat=NEVER)
    server.follower.start()
    assert server.ids() == {"t1", "t2", "t3"}
    execute(database, statement)
    until(lambda: has_followed(server))
    assert server.cache.complete
    assert _lines(caplog) == []


def test_transaction_is_followed_whole(process: Callable[..., Process], database: str) -> None:
    """The statements of one transaction are in force together."""
    server = process(database, heartbeat=NEVER)
    server.follower.start()
    execute(
        database, INSERT.format(1, 3), REVOKE, "DELETE FROM freegpt_auth.tokens WHERE id = 't2'", INSERT.format(2, 2)
    )
    until(lambda: server.cache.revision == 4)
    assert server.ids() == {"t1", "t2", "t3"}
    assert server.is_revoked(1)


def test_lost_notification_is_made_good(process: Callable[..., Process], database: str) -> None:
    """A change without a notification is followed at the next heartbeat."""
    execute(database, INSERT.format(1, 3))
    server = process(database)
    server.follower.start()
    server.connections[0].run("UNLISTEN *")
    execute(database, REVOKE)
    until(lambda: server.is_revoked(1))


def test_pooler_without_notifications(
    process: Callable[..., Process], cluster: Any, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler in transaction mode takes LISTEN and delivers nothing: one warning, and changes within a heartbeat."""
    name = name_of(database)
    with smallest(cluster, name) as port:
        server = process(cluster.url(name, port=port) + PLAIN, time_limit=0.5)
        server.follower.start()
        until(lambda: server.cache.complete)
        [warning] = _lines(caplog, "WARNING")
        assert warning == (
            f"{server.follower._address.shown} delivers no notifications, as a pooler in transaction mode does not: "
            f"changes are looked for each {HEARTBEAT:g} s, and commands wait for that"
        )
        for statement, has_followed in ((INSERT.format(1, 3), lambda: "t3" in server.ids()), (REVOKE, None)):
            execute(database, statement)
            until(has_followed or (lambda: server.is_revoked(1)))
        with contextlib.closing(Address(database).connect()) as other:
            assert _behind(other, LATE) == 1
            server.follower.stop()
            assert _behind(other, LATE) == 0
    assert len(_lines(caplog)) == 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the revisions at which the whole table was read."""
    revisions: list[int] = []
    load = TokenCache.load

    def noted(cache: TokenCache, tokens: dict[bytes, Token], revision: int, *, pin_revocations: bool = False) -> None:
        revisions.append(revision)
        load(cache, tokens, revision, pin_revocations=pin_revocations)

    monkeypatch.setattr(TokenCache, "load", noted)
    return revisions


def test_log_with_a_gap_leads_to_a_reload(
    process: Callable[..., Process], database: str, loads: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """After a lost connection the changes are read from the log, or every token if the log begins later or has a gap."""
    server = process(database)
    server.follower.refresh()
    for number in range(1, 9):
        execute(database, INSERT.format(number, number))
    server.follower.refresh()
    assert (len(server.ids()), server.cache.revision, loads) == (8, 8, [0])
    for removed in ("revision <= 9", "revision > 10"):
        for number in (2 * server.cache.revision, 2 * server.cache.revision + 1):
            execute(database, INSERT.format(number, number))
        execute(database, f"DELETE FROM freegpt_auth.changes WHERE {removed}")
        server.follower.refresh()
        assert f"t{number}" in server.ids()
        assert loads[-1] == server.cache.revision
    assert (len(loads), _lines(caplog)) == (3, [])


def test_large_change_is_no_reload(process: Callable[..., Process], database: str, loads: list[int]) -> None:
    """A statement that revokes thousands of tokens leads to no reload; TRUNCATE does, or a hundred thousand rows."""
    execute(database, INSERT.format(1, 5_000))
    server = process(database)
    server.follower.refresh()
    kept = server.cache.find(_digest(5_000))
    execute(
        database, "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id <> 't5000'", INSERT.format(5_001, 5_001)
    )
    server.follower.refresh()
    assert (server.cache.revision, loads) == (3, [1])
    assert server.cache.find(_digest(5_000)) is kept
    assert "t5001" in server.ids()
    assert all(server.is_revoked(number) for number in range(1, 5_000))
    execute(database, "TRUNCATE freegpt_auth.tokens", INSERT.format(1, 3_000), INSERT.format(4_000, 4_001))
    server.follower.refresh()
    assert (server.cache.revision, loads, len(server.ids())) == (6, [1, 6], 3_002)


def test_reload_keeps_unchanged_tokens(process: Callable[..., Process], database: str) -> None:
    """After a reload the unchanged tokens are the same objects."""
    execute(database, INSERT.format(1, 100))
    server = process(database)
    server.follower.refresh()
    before = {number: server.cache.find(_digest(number)) for number in range(1, 101)}
    execute(database, REVOKE, "DELETE FROM freegpt_auth.changes")
    server.follower.refresh()
    assert server.is_revoked(1)
    assert all(server.cache.find(_digest(number)) is before[number] for number in range(2, 101))


def test_larger_table_is_cached_in_part(process: Callable[..., Process], database: str) -> None:
    """While the table exceeds the cache, a token missing there is never certain to be unknown."""
    execute(database, INSERT.format(1, 3))
    server = process(database, limit=2)
    server.follower.start()
    assert not server.cache.complete
    assert server.follower.state.certain_until == float("-inf")
    assert server.follower.state.leased_until > elapsed()
    execute(database, "DELETE FROM freegpt_auth.tokens WHERE id = 't3'")
    until(lambda: server.cache.revision == 2)
    execute(database, "TRUNCATE freegpt_auth.tokens")
    until(lambda: server.cache.complete and server.follower.state.certain_until > elapsed())


# --- how long memory may be relied on


def test_lease_counts_from_before_the_query(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the query takes, the lease ends that long after its start."""
    began: list[float] = []
    head = reads.head

    def slow_head(connection: Connection) -> reads.Head:
        began.append(elapsed())
        answer = head(connection)
        time.sleep(0.2)
        return answer

    monkeypatch.setattr(reads, "head", slow_head)
    server = process(database, heartbeat=NEVER)
    server.follower.start()
    assert server.follower.state.leased_until <= began[0] + LEASE
    assert server.follower.state.certain_until <= began[0] + CERTAINTY
    assert server.follower.state.certain_until > elapsed()


def test_row_covers_the_lease(process: Callable[..., Process], database: str) -> None:
    """A process relies on its cache until the instant in the row that commands see, and no longer."""
    server = process(database, heartbeat=0.02)
    server.follower.start()
    time.sleep(0.3)  # several queries after the row was written
    with contextlib.closing(Address(database).connect()) as other:
        leased_until = server.follower.state.leased_until
        [left] = other.one(
            "SELECT extract(epoch FROM relies_until - clock_timestamp())::float8 FROM freegpt_auth.servers"
        )
        assert leased_until <= elapsed() + left


def test_commands_wait_from_before_the_first_read(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands wait for a process from before its first read until it has reached their revision."""
    reading, go_on = threading.Event(), threading.Event()
    head = reads.head

    def held_up(connection: Connection) -> reads.Head:
        reading.set()
        assert go_on.wait(PATIENCE)
        return head(connection)

    monkeypatch.setattr(reads, "head", held_up)
    server = process(database)
    starting = threading.Thread(target=server.follower.start)
    starting.start()
    with contextlib.closing(Address(database).connect()) as other:
        assert reading.wait(PATIENCE)
        assert _behind(other, 0) == _behind(other, 1) == 1
        execute(database, INSERT.format(1, 1))
        go_on.set()
        until(lambda: _behind(other, 1) == 0)
        assert server.ids() == {"t1"}
        starting.join()
        server.follower.stop()
        assert _behind(other, 2) == 0


def test_idle_session_is_ended_after_the_lease(process: Callable[..., Process], database: str) -> None:
    """The database ends the session of a process that was cut off, not before its lease ends."""
    server = process(database, lease=0.3, heartbeat=NEVER)
    server.follower.start()
    until(lambda: server.follower.state.generation >= 2)
    assert server.generations[:2] == [0, 1]  # connections are renewed before the new generation is published


# --- when the database is away


def test_outage_is_logged_once(
    process: Callable[..., Process], mortal: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost, lease over, answers again: three lines in the log, however many attempts are made."""
    server = process(mortal.url("postgres"), lease=2.0, heartbeat=0.1)
    server.follower.start()
    assert server.follower.state.trouble is None
    mortal.kill()
    until(lambda: len(_lines(caplog)) == 1)
    assert server.follower.state.certain_until == float("-inf")
    assert server.follower.state.leased_until < elapsed() + 2.0
    until(lambda: len(_lines(caplog)) == 2)
    assert server.follower.state.leased_until <= elapsed()
    attempts = len(server.connections)
    mortal.start()
    until(lambda: server.follower.state.trouble is None and server.follower.state.leased_until > elapsed())
    lost, over, again = _lines(caplog)
    shown = server.follower._address.shown
    assert lost.startswith(f"{shown} does not answer: ")
    assert "accepted for 2 s more" in lost or "accepted for 1 s more" in lost
    assert over.startswith(f"{shown} does not answer: ")
    assert over.endswith("Its tokens are answered 503 until this is mended")
    assert again == f"{shown} answers again"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]
    assert len(server.connections) > attempts
    assert server.follower.state.certain_until > elapsed()
    mortal.kill()
    until(lambda: len(_lines(caplog)) == 5)
    mortal.start()
    until(lambda: len(_lines(caplog)) == 6)
    assert _lines(caplog, "INFO") == [again] * 2
    assert _lines(caplog)[4].endswith("Its tokens are answered 503 until this is mended")


def test_hung_database_is_given_up(
    process: Callable[..., Process], mortal: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that accepts connections and answers nothing counts as lost, until it answers."""
    server = process(mortal.url("postgres") + "?connect_timeout=2", heartbeat=0.1)
    server.follower.start()
    for connection in server.connections:
        connection._driver.limit = 0.3
    mortal.freeze()
    try:
        until(lambda: server.follower.state.trouble)
        assert "timeout" in _lines(caplog, "ERROR")[0]
    finally:
        mortal.freeze(signal.SIGCONT)
    until(lambda: server.follower.state.trouble is None)


def test_database_down_at_start_is_found(
    process: Callable[..., Process], mortal: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that starts before its database is closed, logs that once, and follows the database once it runs."""
    mortal.stop()
    server = process(mortal.url("postgres"))
    server.follower.refresh()
    server.follower.start()
    until(lambda: server.follower.state.trouble)
    assert [line.rpartition(". ")[2] for line in _lines(caplog)] == ["Its tokens are answered 503 until this is mended"]
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        server.follower.now()
    mortal.start()
    until(lambda: server.follower.state.trouble is None)
    assert server.cache.complete


def test_schema_of_another_release_is_refused(
    process: Callable[..., Process], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a later schema, or without one, a server is closed, logs the version it needs, and recovers once it is there."""
    execute(database, INSERT.format(1, 1), "UPDATE freegpt_auth.state SET version = 9")
    server = process(database)
    server.follower.start()
    shown = server.follower._address.shown
    newer = f"{shown} has version 9 of the schema, and this release knows {schema.VERSION}: upgrade freegpt_auth"
    assert _lines(caplog) == [f"{newer}. Its tokens are answered 503 until this is mended"]
    assert (server.follower.state.trouble, server.cache.tokens()) == (newer, [])
    execute(database, f"UPDATE freegpt_auth.state SET version = {schema.VERSION}")
    until(lambda: server.ids() == {"t1"})
    execute(database, "UPDATE freegpt_auth.state SET version = 99")
    until(lambda: server.follower.state.trouble)
    assert "accepted for" in _lines(caplog, "ERROR")[-1]
    execute(database, "DROP SCHEMA freegpt_auth CASCADE")
    until(lambda: "has no schema" in str(server.follower.state.trouble))
    PostgresTokenStore(database).migrate()
    until(lambda: server.follower.state.trouble is None and server.ids() == set())


def test_unexpected_error_is_retried(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error is logged like any other, and the thread goes on."""
    with monkeypatch.context() as broken:
        broken.setattr(reads, "head", lambda _: {"": ""}["unexpected"])
        server = process(database)
        server.follower.start()
        assert "unexpected" in _lines(caplog, "ERROR")[0]
    until(lambda: server.follower.state.trouble is None)


# --- a database that has lost changes


LOSE = [
    "SET LOCAL session_replication_role = replica",
    "UPDATE freegpt_auth.tokens SET revoked_at = NULL",
    "DELETE FROM freegpt_auth.tokens WHERE id = 't2'",
]
"""The effect of restoring a backup older than a revocation and than a second token."""

GOES_ON = "INSERT INTO freegpt_auth.changes SELECT revision, mark, NULL FROM freegpt_auth.state"


def _restore(url: str, revision: int) -> None:
    """Restore an older state of a database, and let its revision be *revision*."""
    raised = f"UPDATE freegpt_auth.state SET revision = {revision}, mark = gen_random_uuid()"
    execute(url, *LOSE, f"DELETE FROM freegpt_auth.changes WHERE revision >= {revision}", raised, GOES_ON)


@pytest.mark.parametrize("revision", [0, 2, 3], ids=["earlier", "before", "the same number"])
@pytest.mark.parametrize("limit", [100_000, 1])
def test_lost_revocation_stays_in_force(
    process: Callable[..., Process], database: str, revision: int, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover or a backup that loses revocations is logged as an ERROR; cached revocations stay in force."""
    server = process(database, limit=limit)
    execute(database, INSERT.format(1, 1))
    server.follower.start()
    execute(database, INSERT.format(2, 2))
    until(lambda: server.cache.revision == 2)
    with contextlib.closing(Address(database).connect()) as other:
        found = reads.look_up(other, _digest(1))[1]
        server.cache.fill(_digest(1), found, 2)
    execute(database, REVOKE)
    until(lambda: server.cache.revision == 3 and server.is_revoked(1))
    _restore(database, revision)
    until(lambda: _lines(caplog))
    assert server.cache.revision == revision
    [error] = _lines(caplog, "ERROR")
    assert error == (
        f"{server.follower._address.shown} has lost changes that were in force (a failover or a backup?): every token was "
        "read again. Tokens that this process knew as revoked stay so (1); look through list and revoke what is missing "
        "again"
    )
    assert server.cache.fill(_digest(1), found, revision) != found
    assert server.is_revoked(1)
    assert "t2" not in server.ids()
    execute(database, INSERT.format(3, 3))
    until(lambda: server.cache.revision == revision + 1)
    execute(database, "TRUNCATE freegpt_auth.tokens")
    until(lambda: server.cache.revision == revision + 2)
    execute(database, INSERT.format(1, 1))
    until(lambda: server.cache.revision == revision + 3)
    assert not server.is_revoked(1)
    assert len(_lines(caplog)) == 1


def test_loss_is_noticed_after_later_changes(
    process: Callable[..., Process], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that lost changes and has passed the cached revision since is recognised as another."""
    server = process(database)
    execute(database, INSERT.format(1, 2))
    execute(database, REVOKE)
    server.follower.refresh()
    _restore(database, 1)
    for number in range(3, 8):
        execute(database, INSERT.format(number, number))
    server.follower.refresh()
    assert (server.cache.revision, server.cache.pinned, server.is_revoked(1)) == (6, 1, True)
    assert len(_lines(caplog, "ERROR")) == 1
    assert server.ids() == {"t1", "t3", "t4", "t5", "t6", "t7"}


# --- the clock


def test_time_is_that_of_the_database(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host whose clock is five minutes off, tokens expire by the database's clock, and never later."""
    right = time.time()
    monkeypatch.setattr(time, "time", lambda: right - 300)
    server = process(database)
    assert abs(server.follower.now() - right) < PATIENCE  # the first query
    head = reads.head

    def slow_head(connection: Connection) -> reads.Head:
        time.sleep(0.2)
        found = head(connection)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(reads, "head", slow_head)
    server.follower.refresh()
    before = server.follower.now()
    with contextlib.closing(Address(database).connect()) as other:
        there = float(other.one("SELECT extract(epoch FROM clock_timestamp())::float8")[0])
    assert before - PATIENCE < there <= server.follower.now()


# --- starting and stopping


def test_follower_restarts(process: Callable[..., Process], database: str, cluster: Any) -> None:
    """After a shutdown the cache is not used and no connection is left; the next request starts the thread again."""
    server = process(database, heartbeat=NEVER)
    server.follower.stop()
    assert not server.follower.is_running()
    for generation in (1, 2, 3):
        threads = [threading.Thread(target=server.follower.start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.follower.is_running()
        assert server.follower.state.generation == generation
        execute(database, INSERT.format(generation, generation))
        until(lambda: server.cache.revision == generation)  # noqa: B023  called in this round only
        server.follower.stop()
        assert not server.follower.is_running()
        assert server.follower.state.leased_until == server.follower.state.certain_until == float("-inf")
        assert all(connection._driver.closed for connection in server.connections)
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name_of(database)}' AND application_name = 'freegpt_auth'"
    until(lambda: cluster.sql(ours) == [(0,)])


def test_follower_stops_while_it_connects(process: Callable[..., Process]) -> None:
    """A server shuts down at once while its database is down."""
    server = process(f"postgresql://127.0.0.1:{free_port()}/x")
    server.follower.start()
    began = time.monotonic()
    server.follower.stop()
    assert time.monotonic() - began < PATIENCE
    assert not [thread for thread in threading.enumerate() if thread.name == "freegpt_auth-follower"]


FORK = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # the subject of this test
from freegpt_auth import UNRESOLVED
from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.tokens import digest_of

url, secret, other, token_id, asked = sys.argv[1:]
digest = digest_of(secret)
store = PostgresTokenStore(url, cache_limit=1)

def until(reached):
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def look():
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token

def pids():
    return [connection.one("SELECT pg_backend_pid()")[0] for _, connection in store._pool._idle]

assert store.survey().active == 2
if asked == "asked":
    assert look().revoked_at is None and store.resolve(digest_of(other)).revoked_at is None
before, follower = pids(), store._follower
child_is_ready, parent_has_revoked = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    assert store._follower is not follower and not store._follower.is_running() and not store._pool._idle
    assert store.peek(digest) is UNRESOLVED
    assert look().revoked_at is None and store.resolve(digest_of(other)).revoked_at is None
    assert not set(pids()) & set(before)
    os.write(child_is_ready[1], b"x")
    os.read(parent_has_revoked[0], 1)
    assert look().revoked_at is not None
    store.close()
    sys.exit()
os.read(child_is_ready[0], 1)
assert look().revoked_at is None
age = store._follower.state.generation
commands = PostgresTokenStore(url)
commands.revoke(token_id, __import__("datetime").datetime.now(__import__("datetime").timezone.utc))
os.write(parent_has_revoked[1], b"x")
assert look().revoked_at is not None
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store._follower is follower and store._follower.state.generation == age == 1
assert asked != "asked" or pids()[: len(before)] == before
assert store.resolve(digest_of(other)).revoked_at is None
store.close()
print("done")
"""


@pytest.mark.parametrize("asked", ["asked", "not asked"])
def test_fork_shares_no_connection(database: str, keep: Callable[..., Any], asked: str) -> None:
    """A forked child follows the database by its own connections and sees revocations; the parent is undisturbed."""
    store = PostgresTokenStore(database)
    token, secret = keep(store)
    _, other = keep(store)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", FORK, database, secret, other, token.id, asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONDEVMODE": "1"},
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_restart_leaves_one_follower() -> None:
    """A thread that was stopped while it waited for the database ends, although another has been started since."""
    connecting, going_on = threading.Event(), threading.Event()
    begun: list[threading.Thread] = []

    class Slow(Address):
        def connect(self, limit: float = 0.0) -> Connection:
            begun.append(threading.current_thread())
            connecting.set()
            going_on.wait(PATIENCE)
            raise psycopg.OperationalError(f"nothing within {limit:g} s")

    follower = Follower(Slow("postgresql://host/database"), TokenCache(1), LEASE, lambda: None, time_limit=0.01)
    for _ in range(2):
        connecting.clear()
        follower.start()
        assert connecting.wait(PATIENCE)
        follower.stop()
    follower.start()
    going_on.set()
    for thread in begun[:2]:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert follower.is_running()
    follower.stop()
