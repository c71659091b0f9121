"""Usage in PostgreSQL: exact over all servers, in spite of lost connections, databases and clocks."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
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
from tests.helpers.proxy import PLAIN, Proxy
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

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


# --- each use once


def test_lost_reply_counts_once(cluster: Any, filled: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the connection is cut between the commit and its answer, each use counts once in the end."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    with contextlib.closing(Proxy(cluster.port)) as proxy:
        through = cluster.url(name_of(filled), port=proxy.port) + PLAIN
        recorder = UsageRecorder(PostgresUsage(through), interval=NEVER)
        recorder.record(("a", time.time()))
        recorder.flush()
        recorder.record(("a", time.time()))
        proxy.lose_reply_to = b"add_usage"
        recorder.flush()
        wait_until(lambda: counts(filled) == {"a": 2})
        assert proxy.lost_replies
        recorder.record(("a", time.time()))
        recorder.record(("b", time.time()))
        recorder.flush()
        assert counts(filled) == {"a": 2}
        proxy.lose_reply_to = None
        recorder.finish()
    assert counts(filled) == {"a": 3, "b": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_batch_is_added_whole_or_not_at_all(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """Of a batch that fails in the middle nothing is kept, so that it can be sent again."""
    name = name_of(filled)
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
    name = name_of(filled)
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


def test_old_batch_records_are_deleted(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """The first batch of a process deletes the batch records older than 30 days, and no others."""
    name = name_of(filled)
    for process in ("old", "young"):
        usage.write(batch(1, process, a=1), 1.0)
    change = "UPDATE freegpt_auth.usage_batches SET written_at = now() - interval '{} days' WHERE process = '{}'"
    for days, process in ((31, "old"), (29, "young")):
        cluster.sql(change.format(days, process), name)
    usage.write(batch(1, "new", a=1), 1.0)
    assert cluster.sql("SELECT process FROM freegpt_auth.usage_batches ORDER BY 1", name) == [("new",), ("young",)]
    assert counts(filled) == {"a": 3}


def test_server_cannot_spoil_usage(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """A thief of the servers' password cannot make usage unreadable or stop the counting of other servers."""
    largest = 2**63 - 1
    call = "SELECT freegpt_auth.add_usage('thief', {}, '{{a,b}}', ARRAY[{}, 0]::bigint[], ARRAY[{}, 0]::float8[])"
    for sequence, ago in enumerate(["'NaN'", "'infinity'", "'-infinity'", "1e300", "-1e300", "NULL"], start=1):
        cluster.sql(call.format(sequence, 1, ago), name_of(filled))
        assert usage.read()["a"].last_used_at <= datetime.fromtimestamp(time.time() + 60, UTC)
    cluster.sql(call.format(7, -5, "0"), name_of(filled))
    assert counts(filled) == {"a": 6}
    cluster.sql(call.format(8, largest, "0"), name_of(filled))
    usage.write(batch(1, a=1, b=1), 1.0)
    assert counts(filled) == {"a": largest, "b": 1}


def test_an_instant_outside_the_calendar_is_one_line(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """A last use outside the calendar, in a table without its checks, is an error that names the row."""
    usage.write(batch(1, a=1), 1.0)
    unchecked = "ALTER DOMAIN freegpt_auth.instant DROP CONSTRAINT instant_check"
    cluster.sql(f"{unchecked}; UPDATE freegpt_auth.usage SET last_used_at = '12000-01-01'", name_of(filled))
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

    def use(token_id: str) -> int:
        used = 0
        while not stop.wait(0.0005):
            recorder.record((token_id, time.time()))
            used += 1
        return used

    def until_logged(words: str, times: int) -> None:
        wait_until(lambda: caplog.text.count(words) >= times)

    with ThreadPoolExecutor(2) as pool:
        using = [pool.submit(use, token_id) for token_id in "ab"]
        try:
            for times in range(1, 4):
                wait_until(lambda: counts(url))
                faults = caplog.text.count("cannot be written")
                cluster.kill()
                until_logged("cannot be written", faults + 1)
                cluster.start()
                until_logged("usage is written to", times)
        finally:
            stop.set()
    recorder.finish()
    assert counts(url) == {"a": using[0].result(), "b": using[1].result()}
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


def test_no_connection_is_left_behind(cluster: Any, filled: str, usage: PostgresUsage) -> None:
    """One connection is open between two writes, and none after closing."""
    name = name_of(filled)
    query = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    wait_until(lambda: not cluster.sql(query))
    for sequence in range(1, 4):
        usage.write(batch(sequence, a=1), 1.0)
    assert len(cluster.sql(query)) == 1
    usage.close()
    wait_until(lambda: not cluster.sql(query))
