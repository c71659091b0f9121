"""Usage in PostgreSQL: exact over all servers, in spite of lost connections, databases and clocks."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.exceptions import UsageError
from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.stores.postgres.usage import PostgresUsage
from freegpt_auth.tokens import Token
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import UsageRecorder
from tests.helpers.postgresql import Cluster, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEVER = 3600.0
"""An interval longer than any test: only flush() writes."""


def fill(url: str, *ids: str) -> None:
    """Put tokens into a database."""
    created_at = datetime(2025, 11, 26, 12, tzinfo=UTC)
    tokens = [Token(id=token_id, name="", prefix="", created_at=created_at) for token_id in ids]
    PostgresTokenStore(url).merge({token.id.encode().ljust(32): token for token in tokens})


@pytest.fixture
def filled(database: str) -> str:
    """Return the URL of a database that holds the tokens a and b."""
    fill(database, "a", "b")
    return database


@pytest.fixture
def usage(filled: str) -> Iterator[PostgresUsage]:
    """Return the usage of the tokens a and b."""
    store = PostgresUsage(filled)
    yield store
    store.close()


def batch(sequence: int, process: str = "p", ago: float = 0.0, **counts: int) -> Batch:
    """Return a batch of uses, the last of each token's so many seconds ago."""
    return Batch(process, sequence, {token_id: (count, time.time() - ago) for token_id, count in counts.items()})


def counts(url: str) -> dict[str, int]:
    """Return the use counts as a reader without any history sees them."""
    with contextlib.closing(PostgresUsage(url)) as store:
        return {token_id: one.use_count for token_id, one in store.read().items()}


def wait_until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Proxy:
    """Stands between a process and the database, and can keep an answer to itself.

    Attributes:
        swallow: let what the process says through, and cut the connection instead of passing the answer on.
        swallowed: how many answers were.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.swallow = False
        self.swallowed = 0
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()

    def _accept(self) -> None:
        threads = []
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for ways in ((client, server, False), (server, client, True)):
                    threads.append(threading.Thread(target=self._pump, args=ways))
                    threads[-1].start()
        for thread in threads:
            thread.join(30)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:  # noqa: FBT001
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                if answers and self.swallow:
                    self.swallowed += 1
                    break
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


# --- each use once


def test_lost_reply_counts_once(cluster: Any, filled: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the connection is cut between the commit and its answer, each use counts once in the end."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    proxy = Proxy(cluster.port)
    recorder = UsageRecorder(PostgresUsage(filled.replace(str(cluster.port), str(proxy.port))), interval=NEVER)
    try:
        recorder.record(("a", time.time()))
        recorder.flush()
        recorder.record(("a", time.time()))
        proxy.swallow = True
        recorder.flush()
        wait_until(lambda: counts(filled) == {"a": 2})
        assert proxy.swallowed
        recorder.record(("a", time.time()))
        recorder.record(("b", time.time()))
        recorder.flush()
        assert counts(filled) == {"a": 2}
        proxy.swallow = False
        recorder.flush()
        assert counts(filled) == {"a": 3, "b": 1}
    finally:
        recorder.finish()
        proxy.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_batch_is_added_whole_or_not_at_all(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """Of a batch that fails in the middle nothing is kept, so that it can be sent again."""
    name = filled.rpartition("/")[2]
    cluster.sql("ALTER TABLE freegpt_auth.usage ADD CONSTRAINT no_b CHECK (token_id <> 'b')", name)
    with pytest.raises(UsageError):
        usage.write(batch(1, a=1, b=1), 1.0)
    assert counts(filled) == {}
    cluster.sql("ALTER TABLE freegpt_auth.usage DROP CONSTRAINT no_b", name)
    usage.write(batch(1, a=1, b=1), 1.0)
    assert counts(filled) == {"a": 1, "b": 1}


def test_concurrent_batches_do_not_deadlock(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """Batches are written in the order of token ids, in whichever order they were counted: no deadlock."""
    fill(filled, "c", "d")
    usage.write(batch(1, a=1, b=1, c=1, d=1), 1.0)
    name = filled.rpartition("/")[2]
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    with psycopg.connect(filled) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT FROM freegpt_auth.usage WHERE token_id = 'b' FOR UPDATE")
        adding = pool.submit(usage.write, batch(2, d=1, c=1, b=1, a=1), 1.0)
        wait_until(lambda: cluster.sql(waiting) or adding.done())
        free = cluster.sql("SELECT token_id FROM freegpt_auth.usage ORDER BY 1 FOR UPDATE SKIP LOCKED", name)
        other.rollback()
        adding.result(timeout=30)
    assert free == [("c",), ("d",)]
    assert counts(filled) == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_of_deleted_tokens_nothing_is_kept(filled: str, usage: PostgresUsage) -> None:
    """Deleting a token deletes its usage; later uses of it are dropped, the rest of their batch is not."""
    usage.write(batch(1, a=1, b=1), 1.0)
    PostgresTokenStore(filled).delete("a")
    assert counts(filled) == {"b": 1}
    usage.write(batch(2, a=5, b=1, never=1), 1.0)
    usage.merge(usage.read())
    assert counts(filled) == {"b": 2}


def test_the_names_of_processes_are_not_kept_for_ever(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """The first batch of a process deletes the batch records older than 30 days, and no others."""
    name = filled.rpartition("/")[2]
    for process in ("old", "young"):
        usage.write(batch(1, process, a=1), 1.0)
    change = "UPDATE freegpt_auth.usage_batches SET written_at = now() - interval '{} days' WHERE process = '{}'"
    for days, process in ((31, "old"), (29, "young")):
        cluster.sql(change.format(days, process), name)
    usage.write(batch(1, "new", a=1), 1.0)
    assert cluster.sql("SELECT process FROM freegpt_auth.usage_batches ORDER BY 1", name) == [("new",), ("young",)]
    assert counts(filled) == {"a": 3}


def test_what_a_server_writes_spoils_nothing(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """A thief of the servers' password cannot make usage unreadable or stop the counting of other servers."""
    largest = 2**63 - 1
    call = "SELECT freegpt_auth.add_usage('thief', {}, '{{a,b}}', ARRAY[{}, 0]::bigint[], ARRAY[{}, 0]::float8[])"
    for sequence, (count, ago) in enumerate(
        [(1, "'NaN'"), (1, "'infinity'"), (1, "'-infinity'"), (1, "1e300"), (1, "-1e300"), (1, "NULL"), (-5, "0")],
        start=1,
    ):
        cluster.sql(call.format(sequence, count, ago), filled.rpartition("/")[2])
        assert usage.read()["a"].last_used_at <= datetime.fromtimestamp(time.time() + 60, UTC)
    assert counts(filled) == {"a": 6}
    cluster.sql(call.format(8, largest, "0"), filled.rpartition("/")[2])
    usage.write(batch(1, a=1, b=1), 1.0)
    assert counts(filled) == {"a": largest, "b": 1}


def test_an_instant_outside_the_calendar_is_one_line(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """A last use outside the calendar, in a table without its checks, is an error that names the row."""
    usage.write(batch(1, a=1), 1.0)
    unchecked = "ALTER DOMAIN freegpt_auth.instant DROP CONSTRAINT instant_check"
    cluster.sql(f"{unchecked}; UPDATE freegpt_auth.usage SET last_used_at = '12000-01-01'", filled.rpartition("/")[2])
    with pytest.raises(UsageError, match=r"outside the years 1 to 9999; correct freegpt_auth\.usage with psql"):
        usage.read()


# --- clocks


@pytest.mark.parametrize("ahead", [300, -300])
def test_the_clocks_of_hosts_may_differ(filled: str, ahead: int) -> None:
    """A token's last use is when it was by the database's clock, though the clock of its host is 5 minutes off."""
    program = f"""
import sys, time
true, skew = time.time, {ahead}
time.time = lambda: true() + skew
from freegpt_auth.stores import open_usage
from freegpt_auth.usage.recorder import UsageRecorder
recorder = UsageRecorder(open_usage({filled!r}), interval=3600)
recorder.record(("a", time.time() - 60))
recorder.record(("b", time.time()))
skew -= 10000  # and is put back meanwhile
recorder.record(("b", time.time()))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with contextlib.closing(PostgresUsage(filled)) as store:
        used = {token_id: time.time() - one.last_used_at.timestamp() for token_id, one in store.read().items()}
    assert counts(filled) == {"a": 1, "b": 2}
    assert 0 <= used["a"] < 60  # counted by a clock that went back: never later than it was written
    assert 0 <= used["b"] < 30


# --- a database that is away


@pytest.fixture
def own(tmp_path: Any) -> Iterator[tuple[Cluster, str]]:
    """Run a durable PostgreSQL for this test, with the tokens a and b."""
    with running(tmp_path / "data") as cluster:
        url = cluster.url("postgres")
        PostgresTokenStore(url).migrate()
        fill(url, "a", "b")
        yield cluster, url


def test_killed_database_loses_no_use(own: tuple[Cluster, str], caplog: pytest.LogCaptureFixture) -> None:
    """Through kill -9 in the middle of writing, and a while without a database, every use counts once in the end."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    cluster, url = own
    recorder = UsageRecorder(PostgresUsage(url), interval=0.01)
    stop = threading.Event()
    recorded = [0, 0]

    def use(number: int) -> None:
        while not stop.is_set():
            recorder.record(("ab"[number], time.time()))
            recorded[number] += 1
            time.sleep(0.0005)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = sum(counts(url).values())
            wait_until(partial(_exceeds, lambda: sum(counts(url).values()), before))
            cluster.kill()
            away = sum(recorded)
            wait_until(partial(_exceeds, lambda: sum(recorded), away + 50))
            cluster.start()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    recorder.finish()
    assert counts(url) == {"a": recorded[0], "b": recorded[1]}
    assert "dropped" not in caplog.text
    assert "the-password" not in caplog.text


def test_hung_database_delays_shutdown_briefly(own: tuple[Cluster, str], caplog: pytest.LogCaptureFixture) -> None:
    """A server stops within a few seconds although its database hangs, and logs the number of lost uses."""
    cluster, url = own
    recorder = UsageRecorder(PostgresUsage(url), interval=NEVER)
    recorder.record(("a", time.time()))
    recorder.flush()
    recorder.record(("a", time.time()))
    cluster.freeze()
    try:
        began = time.monotonic()
        recorder.finish()
        assert time.monotonic() - began < 30
    finally:
        cluster.freeze(signal.SIGCONT)
    assert "usage cannot be written to" in caplog.text
    recorder.finish()
    assert counts(url) == {"a": 2}


def test_ended_idle_connection_is_replaced(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """A firewall or an operator that ends the connection between two writes costs no warning and no use."""
    usage.write(batch(1, a=1), 1.0)
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}' AND application_name <> ''"
    cluster.sql(ended.format(filled.rpartition("/")[2]))
    usage.write(batch(2, a=1), 1.0)
    assert counts(filled) == {"a": 2}


def test_no_connection_crosses_a_fork(filled: str) -> None:
    """A child has a connection of its own, so that no answer to one process reaches the other; the parent keeps its own."""
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from freegpt_auth.stores import open_usage
store = open_usage({filled!r})
def tell():
    print(*store._pool.run(lambda connection: connection.one("SELECT pg_backend_pid()")), flush=True)
tell()
child = os.fork()
if not child:
    tell()
    store.close()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
tell()
store.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    before, child, after = done.stdout.split()
    assert before == after != child
    assert done.stderr == ""


def test_no_connection_is_left_behind(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """One connection is open between two writes, and none after closing."""
    name = filled.rpartition("/")[2]
    query = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    wait_until(lambda: not cluster.sql(query))
    for sequence in range(1, 4):
        usage.write(batch(sequence, a=1), 1.0)
    assert len(cluster.sql(query)) == 1
    usage.close()
    wait_until(lambda: not cluster.sql(query))


def test_foreign_url_is_refused_without_its_password(filled: str) -> None:
    """The error about a wrong password does not repeat it."""
    wrong = filled.replace("the-password-of-the-database", "not-the-password")
    with pytest.raises(UsageError, match="password authentication failed") as caught:
        PostgresUsage(wrong).read()
    assert "not-the-password" not in str(caught.value)
    with psycopg.connect(filled) as connection:
        assert connection.execute("SELECT count(*) FROM freegpt_auth.usage").fetchone() == (0,)


def _exceeds(read: Callable[[], int], limit: int) -> bool:
    return read() > limit
