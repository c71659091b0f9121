"""The row of a server process: it covers the process's lease in spite of lost connections and databases."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
import pytest

from freegpt_auth.stores.base import UNRESOLVED
from freegpt_auth.stores.postgres import PostgresTokenStore, reads
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.stores.postgres.presence import Presence
from freegpt_auth.tokens import Token, digest_of, issue
from tests.helpers.postgresql import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth.stores.postgres.connection import Connection

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
PATIENCE = 30.0
LEASE = 2_000.0
"""Long, and looked at in hundreds of seconds: a busy machine changes no figure."""
STATE = "SELECT revision, extract(epoch FROM relies_until - clock_timestamp())::float8 FROM freegpt_auth.processes"
ANOTHER_SERVER = """
    UPDATE freegpt_auth.processes SET server = server - interval '1 day', relies_until = now() - interval '1 hour'
"""
"""Leaves a row as a failover does to a standby whose clock is ahead, and that had not received the last extension."""


class Clock:
    """A local clock that moves by hand."""

    instant = 100.0

    def __call__(self) -> float:
        """Return the instant."""
        return self.instant


@pytest.fixture
def connections(database: str) -> Iterator[Callable[[], Connection]]:
    """Return a function that connects to an empty database."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Address(database).connect()))


def _behind(connection: Connection, revision: int) -> int:
    return int(reads.processes_behind(connection, revision)[0])


def _lines(connection: Connection) -> list[tuple[int, int]]:
    """Return the revision of each row, and the hundreds of seconds until it ends."""
    return [(revision, round(left / 100)) for revision, left in connection.run(STATE)]


def _until(reached: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the row


def test_row_is_extended_a_fifth_of_the_lease_early(connections: Callable[[], Connection]) -> None:
    """The row ends no sooner than the process stops to rely on its memory, and is not written each second."""
    connection, clock = connections(), Clock()
    presence = Presence(LEASE, clock)
    presence.register(connection)
    assert presence.covers_until == clock.instant + LEASE
    assert _lines(connection) == [(-1, 20)]
    connection.run("UPDATE freegpt_auth.processes SET relies_until = relies_until - interval '900 seconds'")
    clock.instant += 390
    presence.publish(connection, -1)
    assert (presence.covers_until, _lines(connection)) == (100.0 + LEASE, [(-1, 11)])
    presence.publish(connection, 7)  # a revision alone does not move the end
    assert (presence.covers_until, _lines(connection)) == (100.0 + LEASE, [(7, 11)])
    clock.instant += 20
    presence.publish(connection, 7)
    assert (presence.covers_until, _lines(connection)) == (clock.instant + LEASE, [(7, 20)])
    connection.run("DELETE FROM freegpt_auth.processes")
    presence.publish(connection, 8)  # it is made again, since the process relies on it
    assert _lines(connection) == [(8, 20)]
    presence.withdraw(connection)
    assert _lines(connection) == []
    connection.close()
    presence.withdraw(connection)


def test_a_slow_answer_shortens_the_cover(
    connections: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local end counts from before the statement was sent, so the row never ends before it."""
    connection, clock = connections(), Clock()
    presence = Presence(LEASE, clock)
    run = connection.run

    def slowly(*given: Any) -> Any:
        clock.instant += 5
        return run(*given)

    monkeypatch.setattr(connection, "run", slowly)
    presence.register(connection)
    assert presence.covers_until == 100.0 + LEASE


def test_a_server_that_cannot_write_its_row_is_closed(cluster: Any, database: str, keep: Any) -> None:
    """A process relies on nothing that no command can see; one line says why, and it recovers by itself."""
    name = database.rpartition("/")[2]
    store = PostgresTokenStore(database)
    _, secret = keep(store)
    cluster.sql("ALTER FUNCTION freegpt_auth.show_process RENAME TO away", name)
    with contextlib.closing(store):
        with pytest.raises(Exception, match="show_process"):
            store.resolve(digest_of(secret))
        assert store._follower.state.leased_until == float("-inf")
        cluster.sql("ALTER FUNCTION freegpt_auth.away RENAME TO show_process", name)
        _until(lambda: store._follower.state.trouble is None)
        assert store.resolve(digest_of(secret)) is not None


def test_rows_that_are_over_are_removed(connections: Callable[[], Connection]) -> None:
    """A process that was killed leaves a row, which the next process removes when it is over."""
    connection = connections()
    Presence(0.0).register(connection)
    Presence(LEASE).register(connection)
    assert _lines(connection) == [(-1, 20)]


def test_what_was_read_without_a_row_is_not_relied_on(
    database: str, keep: Any, connections: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept reads again after its row is extended: a command between the read and the row missed it."""
    clock, head, answers = Clock(), reads.head, []
    store, operator = PostgresTokenStore(database, lease=LEASE, clock=clock), PostgresTokenStore(database)
    token, secret = keep(operator)
    digest = digest_of(secret)

    def read_and_revoke(connection: Connection) -> reads.Head:
        found = head(connection)
        answers.append(store.peek(digest))
        clock.instant += 1
        if len(answers) == 1:
            operator.revoke(token.id, NOW)
        return found

    with contextlib.closing(store):
        assert store.resolve(digest) == token
        connections().run("UPDATE freegpt_auth.processes SET relies_until = now()")
        monkeypatch.setattr(reads, "head", read_and_revoke)
        clock.instant += 2 * LEASE
        _until(lambda: isinstance(store.peek(digest), Token))
        assert operator.unseen is None
        assert answers[:3] == 3 * [UNRESOLVED]  # the read, the command, and the read after that
        assert store.resolve(digest) == msgspec.structs.replace(token, revoked_at=NOW)


# --- after a restart or a failover


def test_rows_of_another_server_count_for_a_lease(connections: Callable[[], Connection]) -> None:
    """After a failover the rows may be old and the clock ahead: each counts as behind for a lease, once."""
    connection = connections()
    presence = Presence(LEASE)
    presence.publish(connection, 99)
    connection.run(ANOTHER_SERVER)
    for _ in range(2):
        assert reads.processes_behind(connection, 1)[0] == 1
        assert _lines(connection) == [(-1, 20)]
    presence.publish(connection, 5)
    assert _behind(connection, 5) == 0
    connection.run(ANOTHER_SERVER)
    presence.publish(connection, 6)  # over a connection to the new server: the row is written anew
    assert _lines(connection) == [(6, 20)]
    connection.run(ANOTHER_SERVER)
    Presence(LEASE).register(connection)  # a process that comes back counts the others in
    assert sorted(_lines(connection)) == [(-1, 20), (-1, 20)]


def test_a_row_that_is_being_adopted_counts(connections: Callable[[], Connection], database: str) -> None:
    """Of two commands right after a failover, the second counts the rows that the first has not adopted yet."""
    connection = connections()
    Presence(LEASE).publish(connection, 99)
    connection.run(ANOTHER_SERVER)
    with psycopg.connect(database) as other:
        other.execute("SELECT freegpt_auth.adopt_processes()")
        assert reads.processes_behind(connection, 1) == (1, LEASE)


def test_the_row_survives_a_crash(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A command sees the processes of before a crash, though none is connected and commits wait for no disk."""
    with running(tmp_path_factory.mktemp("mortal") / "data", synchronous_commit="off") as cluster:
        url = cluster.url("postgres")
        store = PostgresTokenStore(url)
        store.migrate()
        with contextlib.closing(Address(url).connect()) as connection:
            Presence(LEASE).publish(connection, 0)
        cluster.kill()
        cluster.start()
        with contextlib.closing(Address(url).connect()) as connection:
            assert _behind(connection, 1) == 1


# --- commands


def test_a_command_waits_for_a_lost_process(connections: Callable[[], Connection], database: str, keep: Any) -> None:
    """The row of a process without a connection is waited for, until it shows the change or is over."""
    store = PostgresTokenStore(database, confirmation=PATIENCE)
    token, _ = keep(store)
    connection, presence = connections(), Presence(LEASE)
    presence.publish(connection, 1)
    with ThreadPoolExecutor(1) as threads:
        revoking = threads.submit(store.revoke, token.id, NOW)
        _until(lambda: store.find(token.id)[0].revoked_at)
        assert not revoking.done()
        presence.publish(connection, 2)
        revoking.result(PATIENCE)
    assert store.unseen is None
    presence.withdraw(connection)
    Presence(2.0).register(connection)
    store.delete(token.id)
    assert store.unseen is None
    assert connection.one("SELECT count(*) FROM freegpt_auth.servers WHERE revision < 2") == (0,)


def test_command_names_unconfirmed_processes(connections: Callable[[], Connection], database: str) -> None:
    """Their number, and the seconds until the last of them is over; a second change waits for the others only."""
    connection = connections()
    store = PostgresTokenStore(database, confirmation=1.5)
    for lease in (LEASE / 2, LEASE):
        Presence(lease).register(connection)
    waits = []
    for _ in range(2):
        token, secret = issue("ci", now=NOW)
        began = time.monotonic()
        store.add(digest_of(secret), token)
        waits.append(time.monotonic() - began)
        assert store.unseen is not None
        assert store.unseen.processes == 2
        assert LEASE - PATIENCE < store.unseen.seconds <= LEASE
    assert waits[0] >= 1.5
    assert waits[1] >= 1.0
    connection.run("UPDATE freegpt_auth.processes SET relies_until = now()")
    store.delete(token.id)
    assert store.unseen is None


def test_a_new_token_waits_for_certainty_only(connections: Callable[[], Connection], database: str, keep: Any) -> None:
    """No process says for longer than CERTAINTY that a token does not exist, so a creation waits no longer."""
    Presence(2 * PATIENCE).register(connections())
    began = time.monotonic()
    keep(PostgresTokenStore(database, confirmation=2 * PATIENCE))
    assert CERTAINTY <= time.monotonic() - began < PATIENCE
