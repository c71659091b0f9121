"""The thread that keeps memory as the database has it: by what it hears, by looking, and through all that may happen to both."""

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
from freegpt_auth.stores.postgres import follower as module, reads, schema
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.cache import TokenCache
from freegpt_auth.stores.postgres.follower import CERTAINTY, HEARTBEAT, Follower
from tests.helpers.pooler import smallest
from tests.helpers.ports import free_port
from tests.helpers.postgresql import running
from tests.helpers.proxy import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth import Token
    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster

LEASE = 30.0
PATIENCE = 30.0
LATE = 1_000_000  # a revision that nobody is at
LONG = 10_000.0
"""Seconds that no test waits: a look that is due after so long is none."""

INSERT = """
    INSERT INTO freegpt_auth.tokens (digest, id, name, prefix, created_at)
    SELECT decode(lpad(to_hex(n), 64, '0'), 'hex'), 't' || n, 'token', 'sk', now() FROM generate_series({}, {}) n
"""
REVOKE = "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id = 't1'"


def _digest(number: int) -> bytes:
    return number.to_bytes(32)


@dataclass
class Process:
    """What a server process has of all this, and the connections of its thread."""

    follower: Follower
    cache: TokenCache
    connections: list[Connection] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)

    def ids(self) -> set[str]:
        """Return the ids of the tokens that are remembered."""
        return {token.id for token in self.cache.tokens()}

    def is_revoked(self, number: int) -> bool:
        """Tell whether a token is remembered as revoked."""
        token = self.cache.find(_digest(number))
        return token is not None and token.revoked_at is not None


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    """Return a function that gives a process that follows a database, and that is quick to try again."""
    monkeypatch.setattr(module, "_RETRY", (0.01, 0.05))
    with contextlib.ExitStack() as stack:

        def make(url: str, lease: float = LEASE, limit: int = 100_000) -> Process:
            address = Address(url)
            connect = address.connect

            def connect_and_note(*limits: float) -> Connection:
                made.connections.append(connect(*limits))
                return made.connections[-1]

            monkeypatch.setattr(address, "connect", connect_and_note)
            cache = TokenCache(limit)
            follower = Follower(address, cache, lease, lambda: made.ages.append(follower.state.generation))
            made = Process(follower, cache)
            stack.callback(follower.stop)
            return made

        yield make


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="freegpt_auth")


@pytest.fixture
def _only_hearing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be looked at without a notification."""
    monkeypatch.setattr(module, "HEARTBEAT", LONG)


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a server that may be killed."""
    with running(tmp_path_factory.mktemp("mortal") / "data", fsync="off") as cluster:
        _migrate(cluster.url("postgres"))
        yield cluster


def _migrate(url: str) -> None:
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415  nothing else here is of a store

    PostgresTokenStore(url).migrate()


def _until(reached: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _run(url: str, *statements: str) -> None:
    """Run statements in one transaction, as an operator with psql does."""
    with psycopg.connect(url) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _behind(connection: Connection, revision: int) -> int:
    """Return the number of processes that commands wait for."""
    return int(reads.processes_behind(connection, revision)[0])


def _said(log: pytest.LogCaptureFixture, level: str = "") -> list[str]:
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


@pytest.mark.usefixtures("_only_hearing")
@pytest.mark.parametrize("change", CHANGES)
def test_what_anybody_changes_is_heard_of_at_once(
    process: Callable[..., Process], database: str, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A command, or an operator with psql, changes one token or all: each server knows without having looked."""
    statement, has_followed = CHANGES[change]
    _run(database, INSERT.format(1, 3))
    server = process(database)
    server.follower.start()
    assert server.ids() == {"t1", "t2", "t3"}
    _run(database, statement)
    _until(lambda: has_followed(server))
    assert server.cache.complete
    assert _said(caplog) == []


@pytest.mark.usefixtures("_only_hearing")
def test_changes_in_one_transaction_are_seen_together(process: Callable[..., Process], database: str) -> None:
    """What an operator does in one transaction is in force at once or not at all, however many statements it has."""
    server = process(database)
    server.follower.start()
    _run(database, INSERT.format(1, 3), REVOKE, "DELETE FROM freegpt_auth.tokens WHERE id = 't2'", INSERT.format(2, 2))
    _until(lambda: server.cache.revision == 4)
    assert server.ids() == {"t1", "t2", "t3"}
    assert server.is_revoked(1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_notification_that_is_lost_is_made_good_by_looking(
    process: Callable[..., Process], database: str, change: str
) -> None:
    """A second later at most a server knows what it was not told of."""
    statement, has_followed = CHANGES[change]
    _run(database, INSERT.format(1, 3))
    server = process(database)
    server.follower.start()
    server.connections[0].run("UNLISTEN *")
    _run(database, statement)
    _until(lambda: has_followed(server))


def test_behind_a_pooler_that_delivers_nothing_a_server_looks_and_says_so(
    process: Callable[..., Process],
    cluster: Any,
    database: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pooler in transaction mode takes LISTEN and delivers nothing: one warning, and changes within a second."""
    monkeypatch.setattr(module, "TIME_LIMIT", 0.5)
    name = database.rpartition("/")[2]
    with smallest(cluster, name) as port:
        server = process(cluster.url(name, port=port) + PLAIN)
        server.follower.start()
        _until(lambda: server.cache.complete)
        [warning] = _said(caplog, "WARNING")
        assert warning == (
            f"{server.follower._address.shown} delivers no notifications, as a pooler in transaction mode does not: "
            f"changes are looked for each {HEARTBEAT:g} s, and commands wait for that"
        )
        for statement, has_followed in ((INSERT.format(1, 3), lambda: "t3" in server.ids()), (REVOKE, None)):
            _run(database, statement)
            _until(has_followed or (lambda: server.is_revoked(1)))
        with contextlib.closing(Address(database).connect()) as other:
            assert _behind(other, LATE) == 1
            server.follower.stop()
            assert _behind(other, LATE) == 0
    assert len(_said(caplog)) == 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the revisions at which a whole table is read."""
    revisions: list[int] = []
    load = TokenCache.load

    def noted(cache: TokenCache, tokens: dict[bytes, Token], revision: int, *, pin_revocations: bool = False) -> None:
        revisions.append(revision)
        load(cache, tokens, revision, pin_revocations=pin_revocations)

    monkeypatch.setattr(TokenCache, "load", noted)
    return revisions


def test_the_log_is_read_as_far_as_it_reaches(
    process: Callable[..., Process], database: str, loads: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that was cut off reads the changes since, or everything where the log begins later or has a gap."""
    server = process(database)
    server.follower.refresh()
    for number in range(1, 9):
        _run(database, INSERT.format(number, number))
    server.follower.refresh()
    assert (len(server.ids()), server.cache.revision, loads) == (8, 8, [0])
    for removed in ("revision <= 9", "revision > 10"):
        for number in (2 * server.cache.revision, 2 * server.cache.revision + 1):
            _run(database, INSERT.format(number, number))
        _run(database, f"DELETE FROM freegpt_auth.changes WHERE {removed}")
        server.follower.refresh()
        assert f"t{number}" in server.ids()
        assert loads[-1] == server.cache.revision
    assert (len(loads), _said(caplog)) == (3, [])


def test_a_large_change_is_applied_in_steps(process: Callable[..., Process], database: str, loads: list[int]) -> None:
    """A statement that revokes thousands of tokens reads no table afresh; only TRUNCATE does, or a hundred thousand rows."""
    _run(database, INSERT.format(1, 5_000))
    server = process(database)
    server.follower.refresh()
    kept = server.cache.find(_digest(5_000))
    _run(database, "UPDATE freegpt_auth.tokens SET revoked_at = now() WHERE id <> 't5000'", INSERT.format(5_001, 5_001))
    server.follower.refresh()
    assert (server.cache.revision, loads) == (3, [1])
    assert server.cache.find(_digest(5_000)) is kept
    assert "t5001" in server.ids()
    assert all(server.is_revoked(number) for number in range(1, 5_000))
    _run(database, "TRUNCATE freegpt_auth.tokens", INSERT.format(1, 3_000), INSERT.format(4_000, 4_001))
    server.follower.refresh()
    assert (server.cache.revision, loads, len(server.ids())) == (6, [1, 6], 3_002)


def test_a_whole_table_is_read_beside_the_known_one(process: Callable[..., Process], database: str) -> None:
    """A table that is read afresh takes the place of the one in memory, whose unchanged tokens stay the same objects."""
    _run(database, INSERT.format(1, 100))
    server = process(database)
    server.follower.refresh()
    before = {number: server.cache.find(_digest(number)) for number in range(1, 101)}
    _run(database, REVOKE, "DELETE FROM freegpt_auth.changes")
    server.follower.refresh()
    assert server.is_revoked(1)
    assert all(server.cache.find(_digest(number)) is before[number] for number in range(2, 101))


def test_a_larger_table_is_held_in_part(process: Callable[..., Process], database: str) -> None:
    """Of a table that does not fit nothing is certain: a token that is not remembered may be there."""
    _run(database, INSERT.format(1, 3))
    server = process(database, limit=2)
    server.follower.start()
    assert not server.cache.complete
    assert server.follower.state.certain_until == float("-inf")
    assert server.follower.state.leased_until > elapsed()
    _run(database, "DELETE FROM freegpt_auth.tokens WHERE id = 't3'")
    _until(lambda: server.cache.revision == 2)
    _run(database, "TRUNCATE freegpt_auth.tokens")
    _until(lambda: server.cache.complete and server.follower.state.certain_until > elapsed())


# --- how long memory may be relied on


def test_the_lease_counts_from_before_the_database_was_asked(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the answer took, nothing is accepted later than the lease after the question."""
    asked: list[float] = []
    head = reads.head

    def slow_head(connection: Connection) -> reads.Head:
        asked.append(elapsed())
        answer = head(connection)
        time.sleep(0.2)
        return answer

    monkeypatch.setattr(reads, "head", slow_head)
    monkeypatch.setattr(module, "HEARTBEAT", LONG)
    server = process(database)
    server.follower.start()
    assert server.follower.state.leased_until <= asked[0] + LEASE
    assert server.follower.state.certain_until <= asked[0] + CERTAINTY
    assert server.follower.state.certain_until > elapsed()


def test_the_row_covers_the_lease(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process relies on its memory until the end of the row that commands see, and no longer."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.02)
    server = process(database)
    server.follower.start()
    time.sleep(1.0)  # many answers after the row was written
    with contextlib.closing(Address(database).connect()) as other:
        until = server.follower.state.leased_until
        [left] = other.one(
            "SELECT extract(epoch FROM relies_until - clock_timestamp())::float8 FROM freegpt_auth.servers"
        )
        assert until <= elapsed() + left


def test_a_change_waits_for_those_who_have_not_begun_to_read(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is about to read is counted before it does, and until it is at the revision that is waited for."""
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
        _run(database, INSERT.format(1, 1))
        go_on.set()
        _until(lambda: _behind(other, 1) == 0)
        assert server.ids() == {"t1"}
        starting.join()
        server.follower.stop()
        assert _behind(other, 2) == 0


@pytest.mark.usefixtures("_only_hearing")
def test_the_database_lets_a_process_be_that_asks_nothing(process: Callable[..., Process], database: str) -> None:
    """The database ends the connection of a process that was cut off, no sooner than that may accept no token any more."""
    server = process(database, lease=0.3)
    server.follower.start()
    _until(lambda: server.follower.state.generation >= 2)
    assert server.ages[:2] == [0, 1]  # other connections are renewed before anybody sees a new age


# --- when the database is away


def test_each_thing_is_said_once(
    process: Callable[..., Process],
    mortal: Cluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lost, over, and there again: three lines in the log, however often it was tried; and no restart."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    server = process(mortal.url("postgres"), lease=2.0)
    server.follower.start()
    assert server.follower.state.trouble is None
    mortal.kill()
    _until(lambda: len(_said(caplog)) == 1)
    assert server.follower.state.certain_until == float("-inf")
    assert server.follower.state.leased_until < elapsed() + 2.0
    _until(lambda: len(_said(caplog)) == 2)
    assert server.follower.state.leased_until <= elapsed()
    tries = len(server.connections)
    mortal.start()
    _until(lambda: server.follower.state.trouble is None and server.follower.state.leased_until > elapsed())
    lost, over, again = _said(caplog)
    shown = server.follower._address.shown
    assert lost.startswith(f"{shown} does not answer: ")
    assert "accepted for 2 s more" in lost or "accepted for 1 s more" in lost
    assert over.startswith(f"{shown} does not answer: ")
    assert over.endswith("Its tokens are answered 503 until this is mended")
    assert again == f"{shown} answers again"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]
    assert len(server.connections) > tries
    assert server.follower.state.certain_until > elapsed()
    mortal.kill()
    _until(lambda: len(_said(caplog)) == 5)  # all the same when it is lost again
    mortal.start()
    _until(lambda: len(_said(caplog)) == 6)
    assert _said(caplog, "INFO") == [again] * 2
    assert _said(caplog)[4].endswith("Its tokens are answered 503 until this is mended")


def test_what_hangs_is_given_up(
    process: Callable[..., Process], mortal: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that takes connections and answers nothing is as good as none, until it goes on."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    server = process(mortal.url("postgres") + "?connect_timeout=2")
    server.follower.start()
    for connection in server.connections:
        connection._driver.limit = 0.3
    mortal.freeze()
    try:
        _until(lambda: server.follower.state.trouble)
        assert "timeout" in _said(caplog, "ERROR")[0]
    finally:
        mortal.freeze(signal.SIGCONT)
    _until(lambda: server.follower.state.trouble is None)


def test_a_database_that_is_away_from_the_start_is_found_when_it_comes(
    process: Callable[..., Process], mortal: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that starts before its database is closed, says so once, and follows it as soon as it is there."""
    mortal.stop()
    server = process(mortal.url("postgres"))
    server.follower.refresh()
    server.follower.start()
    _until(lambda: server.follower.state.trouble)
    assert [line.rpartition(". ")[2] for line in _said(caplog)] == ["Its tokens are answered 503 until this is mended"]
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        server.follower.now()
    mortal.start()
    _until(lambda: server.follower.state.trouble is None)
    assert server.cache.complete


def test_tables_of_another_release_are_not_read(
    process: Callable[..., Process], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a schema, or with a later one, a server says which it needs, is closed, and goes on once it is there."""
    _run(database, INSERT.format(1, 1), "UPDATE freegpt_auth.state SET version = 9")
    server = process(database)
    server.follower.start()
    shown = server.follower._address.shown
    newer = f"{shown} has version 9 of the schema, and this release knows {schema.VERSION}: upgrade freegpt_auth"
    assert _said(caplog) == [f"{newer}. Its tokens are answered 503 until this is mended"]
    assert (server.follower.state.trouble, server.cache.tokens()) == (newer, [])
    _run(database, f"UPDATE freegpt_auth.state SET version = {schema.VERSION}")
    _until(lambda: server.ids() == {"t1"})
    _run(database, "UPDATE freegpt_auth.state SET version = 99")
    _until(lambda: server.follower.state.trouble)
    assert "accepted for" in _said(caplog, "ERROR")[-1]
    _run(database, "DROP SCHEMA freegpt_auth CASCADE")
    _until(lambda: "has no schema" in str(server.follower.state.trouble))
    _migrate(database)
    _until(lambda: server.follower.state.trouble is None and server.ids() == set())


def test_whatever_goes_wrong_the_thread_goes_on(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault that nobody thought of is said like any other, and ends with its cause."""
    with monkeypatch.context() as broken:
        broken.setattr(reads, "head", lambda _: {"": ""}["nobody thought of this"])
        server = process(database)
        server.follower.start()
        assert "nobody thought of this" in _said(caplog, "ERROR")[0]
    _until(lambda: server.follower.state.trouble is None)


# --- a database that has lost changes


LOSE = [
    "SET LOCAL session_replication_role = replica",
    "UPDATE freegpt_auth.tokens SET revoked_at = NULL",
    "DELETE FROM freegpt_auth.tokens WHERE id = 't2'",
]
"""What a backup does that is older than a revocation and than a second token."""

GOES_ON = "INSERT INTO freegpt_auth.changes SELECT revision, mark, NULL FROM freegpt_auth.state"


def _restore(url: str, revision: int) -> None:
    """Put an older state in the place of a database, which has counted up to a revision since."""
    raised = f"UPDATE freegpt_auth.state SET revision = {revision}, mark = gen_random_uuid()"
    _run(url, *LOSE, f"DELETE FROM freegpt_auth.changes WHERE revision >= {revision}", raised, GOES_ON)


@pytest.mark.parametrize("revision", [0, 2, 3], ids=["earlier", "before", "the same number"])
@pytest.mark.parametrize("limit", [100_000, 1])
def test_tokens_that_were_revoked_stay_so_when_the_database_lost_that(
    process: Callable[..., Process], database: str, revision: int, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover or a backup that lost revocations is an ERROR, and what was known as revoked here is refused on."""
    server = process(database, limit=limit)
    _run(database, INSERT.format(1, 1))
    server.follower.start()
    _run(database, INSERT.format(2, 2))
    _until(lambda: server.cache.revision == 2)
    with contextlib.closing(Address(database).connect()) as other:
        found = reads.look_up(other, _digest(1))[1]
        server.cache.fill(_digest(1), found, 2)
    _run(database, REVOKE)
    _until(lambda: server.cache.revision == 3 and server.is_revoked(1))
    _restore(database, revision)
    _until(lambda: _said(caplog))
    assert server.cache.revision == revision
    [error] = _said(caplog, "ERROR")
    assert error == (
        f"{server.follower._address.shown} has lost changes that were in force (a failover or a backup?): every token was "
        "read again. Tokens that this process knew as revoked stay so (1); look through list and revoke what is missing "
        "again"
    )
    assert server.cache.fill(_digest(1), found, revision) != found
    assert server.is_revoked(1)
    assert "t2" not in server.ids()
    _run(database, INSERT.format(3, 3))
    _until(lambda: server.cache.revision == revision + 1)
    _run(database, "TRUNCATE freegpt_auth.tokens")
    _until(lambda: server.cache.revision == revision + 2)
    _run(database, INSERT.format(1, 1))
    _until(lambda: server.cache.revision == revision + 3)
    assert not server.is_revoked(1)
    assert len(_said(caplog)) == 1


def test_what_was_lost_is_noticed_after_any_number_of_later_changes(
    process: Callable[..., Process], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that has lost changes and gone on past the number that was known is not taken for the one before."""
    server = process(database)
    _run(database, INSERT.format(1, 2))
    _run(database, REVOKE)
    server.follower.refresh()
    _restore(database, 1)
    for number in range(3, 8):
        _run(database, INSERT.format(number, number))
    server.follower.refresh()
    assert (server.cache.revision, server.cache.pinned, server.is_revoked(1)) == (6, 1, True)
    assert len(_said(caplog, "ERROR")) == 1
    assert server.ids() == {"t1", "t3", "t4", "t5", "t6", "t7"}


# --- the clock


def test_the_time_is_the_databases(
    process: Callable[..., Process], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host whose clock is five minutes off, tokens end when the database says, and never later."""
    right = time.time()
    monkeypatch.setattr(time, "time", lambda: right - 300)
    server = process(database)
    assert abs(server.follower.now() - right) < PATIENCE  # it was never asked, and is now
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


@pytest.mark.usefixtures("_only_hearing")
def test_a_follower_stops_and_starts_again(process: Callable[..., Process], database: str, cluster: Any) -> None:
    """After a shutdown nothing is relied on and no connection is left; what is asked then starts all anew."""
    server = process(database)
    server.follower.stop()
    assert not server.follower.is_running()
    for age in (1, 2, 3):
        threads = [threading.Thread(target=server.follower.start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.follower.is_running()
        assert server.follower.state.generation == age
        _run(database, INSERT.format(age, age))
        _until(lambda: server.cache.revision == age)  # noqa: B023  it is called in this round only
        server.follower.stop()
        assert not server.follower.is_running()
        assert server.follower.state.leased_until == server.follower.state.certain_until == float("-inf")
        assert all(connection._driver.closed for connection in server.connections)
    name = database.rpartition("/")[2]
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    _until(lambda: cluster.sql(ours) == [(0,)])


def test_a_follower_stops_while_it_cannot_connect(process: Callable[..., Process]) -> None:
    """A server shuts down at once though its database is away."""
    server = process(f"postgresql://127.0.0.1:{free_port()}/x")
    server.follower.start()
    began = time.monotonic()
    server.follower.stop()
    assert time.monotonic() - began < PATIENCE
    assert not [thread for thread in threading.enumerate() if thread.name == "freegpt_auth-follower"]


FORK = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # what this is about
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
def test_a_process_that_forks_shares_nothing(database: str, keep: Callable[..., Any], asked: str) -> None:
    """A child of a preloading server follows by itself and sees what is revoked; the parent goes on undisturbed."""
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415  nothing else here is of a store

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


def test_a_thread_that_is_slow_to_end_does_not_go_on_beside_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stopped while it waited for a database ends when it can, although another follows by then."""
    monkeypatch.setattr(module, "TIME_LIMIT", 0.01)
    connecting, going_on = threading.Event(), threading.Event()
    begun: list[threading.Thread] = []

    class Slow(Address):
        def connect(self, limit: float = 0.0) -> Connection:
            begun.append(threading.current_thread())
            connecting.set()
            going_on.wait(PATIENCE)
            raise psycopg.OperationalError(f"nothing within {limit:g} s")

    follower = Follower(Slow("postgresql://host/database"), TokenCache(1), LEASE, lambda: None)
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
