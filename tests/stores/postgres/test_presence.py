"""The row of a server process: it covers the process's lease in spite of lost connections and databases."""

from __future__ import annotations

import contextlib
import itertools
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
from freegpt_auth.stores.postgres.follower import CERTAINTY, HEARTBEAT
from freegpt_auth.stores.postgres.presence import Presence
from freegpt_auth.tokens import Token, digest_of, issue
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import PATIENCE, Clock, behind, name_of

if TYPE_CHECKING:
    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster
    from tests.stores.postgres.common import After

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LEASE = 2_000.0  # long, and looked at in hundreds of seconds: a busy machine changes no figure
STATE = "SELECT revision, extract(epoch FROM relies_until - clock_timestamp())::float8 FROM freegpt_auth.processes"
EXPIRE = "UPDATE freegpt_auth.processes SET relies_until = now()"
# Leaves a row as a failover does to a standby whose clock is ahead, and that had not received the last extension.
ANOTHER_SERVER = f"{EXPIRE} - interval '1 hour', server = server - interval '1 day'"


def _rows(connection: Connection) -> list[tuple[int, int]]:
    """Return the revision of each row, and the hundreds of seconds until it ends."""
    return [(revision, round(left / 100)) for revision, left in connection.run(STATE)]


# --- the row


def test_row_is_extended_a_fifth_of_the_lease_early(connection: Connection) -> None:
    """The row ends no sooner than the process stops to rely on its memory, and is not written each second."""
    clock = Clock()
    presence = Presence(LEASE, clock)
    presence.register(connection)
    first = clock() + LEASE
    assert (presence.covers_until, _rows(connection)) == (first, [(-1, 20)])
    connection.run("UPDATE freegpt_auth.processes SET relies_until = relies_until - interval '900 seconds'")
    clock.advance(390)
    for revision in (-1, 7):  # a revision alone does not move the end
        presence.publish(connection, revision)
        assert (presence.covers_until, _rows(connection)) == (first, [(revision, 11)])
    clock.advance(20)
    presence.publish(connection, 7)
    assert (presence.covers_until, _rows(connection)) == (clock() + LEASE, [(7, 20)])
    connection.run("DELETE FROM freegpt_auth.processes")
    presence.publish(connection, 8)  # it is made again, since the process relies on it
    assert _rows(connection) == [(8, 20)]
    presence.withdraw(connection)
    assert _rows(connection) == []
    connection.close()
    presence.withdraw(connection)


def test_a_slow_answer_shortens_the_cover(connection: Connection) -> None:
    """The local end counts from before the statement was sent, so the row never ends before it."""
    presence = Presence(LEASE, itertools.count(100.0, 5.0).__next__)
    presence.register(connection)
    assert presence.covers_until == 100.0 + LEASE


def test_a_server_that_cannot_write_its_row_is_closed(cluster: Cluster, database: str, keep: Any) -> None:
    """A process relies on nothing that no command can see; one line says why, and it recovers by itself."""
    store = PostgresTokenStore(database)
    _, secret = keep(store)
    cluster.sql("ALTER FUNCTION freegpt_auth.show_process RENAME TO away", name_of(database))
    with contextlib.closing(store):
        for ask in (store.resolve, store.peek):
            with pytest.raises(Exception, match="show_process"):
                ask(digest_of(secret))
        cluster.sql("ALTER FUNCTION freegpt_auth.away RENAME TO show_process", name_of(database))
        wait_until(lambda: store._follower.state.trouble is None)
        assert store.resolve(digest_of(secret)) is not None


def test_rows_that_are_over_are_removed(connection: Connection) -> None:
    """A process that was killed leaves a row, which the next process removes when it is over."""
    Presence(0.0).register(connection)
    Presence(LEASE).register(connection)
    assert _rows(connection) == [(-1, 20)]


def test_reading_without_a_row_is_not_relied_on(database: str, keep: Any, connection: Connection, after: After) -> None:
    """A process that slept reads again after its row is extended: a command between the read and the row missed it."""
    clock, answers = Clock(), list[object]()
    store, operator = PostgresTokenStore(database, lease=LEASE, clock=clock), PostgresTokenStore(database)
    token, secret = keep(operator)
    digest = digest_of(secret)

    def revoke() -> None:
        answers.append(store.peek(digest))
        clock.advance(1)
        if len(answers) == 1:
            operator.revoke(token.id, NOW)

    with contextlib.closing(store):
        assert store.resolve(digest) == token
        connection.run(EXPIRE)
        after("head", revoke)
        clock.advance(2 * LEASE)
        wait_until(lambda: isinstance(store.peek(digest), Token))
        assert operator.unseen is None
        assert answers[:3] == 3 * [UNRESOLVED]  # the read, the command, and the read after that
        assert store.resolve(digest) == msgspec.structs.replace(token, revoked_at=NOW)


# --- after a restart or a failover


def test_rows_of_another_server_count_for_a_lease(connection: Connection) -> None:
    """After a failover the rows may be old and the clock ahead: each counts as behind for a lease, once."""
    presence = Presence(LEASE)
    presence.publish(connection, 99)
    connection.run(ANOTHER_SERVER)
    for _ in range(2):
        assert behind(connection, 1) == 1
        assert _rows(connection) == [(-1, 20)]
    presence.publish(connection, 5)
    assert behind(connection, 5) == 0
    connection.run(ANOTHER_SERVER)
    presence.publish(connection, 6)  # over a connection to the new server: the row is written anew
    assert _rows(connection) == [(6, 20)]
    connection.run(ANOTHER_SERVER)
    Presence(LEASE).register(connection)  # a process that comes back counts the others in
    assert _rows(connection) == [(-1, 20), (-1, 20)]


def test_a_row_that_is_being_adopted_counts(connection: Connection, database: str) -> None:
    """Of two commands right after a failover, the second counts the rows that the first has not adopted yet."""
    Presence(LEASE).publish(connection, 99)
    connection.run(ANOTHER_SERVER)
    with psycopg.connect(database) as other:
        other.execute("SELECT freegpt_auth.adopt_processes()")
        assert reads.processes_behind(connection, 1) == (1, LEASE)


def test_the_row_survives_a_crash(mortal: Cluster) -> None:
    """A command sees the processes of before a crash, though none is connected and commits wait for no disk."""
    address, presence = Address(mortal.url("postgres")), Presence(LEASE)
    with contextlib.closing(address.connect()) as connection:
        presence.publish(connection, 0)
    mortal.kill()
    mortal.start()
    with contextlib.closing(address.connect()) as connection:
        assert behind(connection, 1) == 1
        presence.withdraw(connection)


# --- commands


def test_a_command_waits_for_a_lost_process(connection: Connection, database: str, keep: Any) -> None:
    """The row of a process without a connection is waited for, until it shows the change or is over."""
    store, presence = PostgresTokenStore(database, confirmation=PATIENCE), Presence(LEASE)
    token, _ = keep(store)
    presence.publish(connection, 1)
    with ThreadPoolExecutor(1) as threads:
        revoking = threads.submit(store.revoke, token.id, NOW)
        wait_until(lambda: store.find(token.id)[0].revoked_at)
        assert not revoking.done()
        presence.publish(connection, 2)
        revoking.result(PATIENCE)
    assert store.unseen is None
    presence.withdraw(connection)
    Presence(2.0).register(connection)
    store.delete(token.id)
    assert store.unseen is None
    assert connection.one("SELECT count(*) FROM freegpt_auth.servers WHERE revision < 2") == (0,)


def test_command_names_unconfirmed_processes(connection: Connection, database: str) -> None:
    """Their number, and the seconds to the end of the last. The next change waits a heartbeat only, for the others.

    A creation waits for CERTAINTY at most: no process says for longer that a token does not exist.
    """
    store = PostgresTokenStore(database, confirmation=PATIENCE)
    for lease in (LEASE / 2, LEASE):
        Presence(lease).register(connection)
    for shortest, longest in ((CERTAINTY, PATIENCE), (HEARTBEAT, CERTAINTY)):
        token, secret = issue("ci", now=NOW)
        began = time.monotonic()
        store.add(digest_of(secret), token)
        assert shortest <= time.monotonic() - began < longest
        assert store.unseen is not None
        assert store.unseen.processes == 2
        assert LEASE - PATIENCE < store.unseen.seconds <= LEASE
    connection.run(EXPIRE)
    store.delete(token.id)
    assert store.unseen is None
