"""Locks on the tables: sessions of the servers do not pile up, and service returns with the release of the lock."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from freegpt_auth.tokens import generate_secret
from tests.helpers.pooler import PGBOUNCER, pgbouncer
from tests.helpers.proxy import PLAIN
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from tests.attacks.conftest import Record
    from tests.helpers.fleet import StartFleet
    from tests.helpers.postgresql import Cluster

WORKERS = 4
EACH = 4
"""Most sessions of one worker: one that follows the database, two for look-ups, one for usage."""

HELD = 20.0
"""Duration of the lock in seconds, times ``--rounds``: 40 s in the figures of docs/operations/faults.md."""


PGBOUNCER_ONLY = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", pytest.param("PgBouncer", marks=PGBOUNCER_ONLY)])
def test_sessions_do_not_pile_up(
    durable: Cluster, tables: str, fleet: StartFleet, rounds: int, record: Record, way: str
) -> None:
    """While another session locks every table, each worker has at most its usual sessions."""
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{tables}' AND application_name <> 'psql'"
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(pgbouncer(durable)) if way == "PgBouncer" else durable.port
        options = {"url": durable.url(tables, port=port) + PLAIN, "arguments": ("--workers", str(WORKERS))}
        ours = fleet({**options, "FREEGPT_AUTH_CACHE": "1"}, tables=tables, may_break=True)
        watch, server = ours.watch, ours.hosts[0].server
        stack.callback(watch.stop)
        for number in range(14):
            watch.add(f"wrong-{number}", generate_secret())
        wait_until(lambda: watch.counts()["401"] > 100)
        usual = most = durable.sql(sessions)[0][0]
        patient = "-c deadlock_timeout=1min"  # of a deadlock with a server's statement, that statement is the victim
        with psycopg.connect(durable.url(tables), application_name="psql", options=patient) as operator:
            operator.execute("LOCK TABLE freegpt_auth.tokens, freegpt_auth.state, freegpt_auth.usage")
            end = time.monotonic() + HELD * rounds
            while time.monotonic() < end:
                most = max(most, durable.sql(sessions)[0][0])
                time.sleep(0.25)
        released = time.monotonic()
        wait_until(lambda: {server.get("/", watch.secrets["valid"]) for _ in range(4 * WORKERS)} == {200})
        record(usual_sessions=usual, most_sessions=most, served_again_after=time.monotonic() - released)
        watch.end(60.0)
    record(answers=watch.counts())
    assert most <= EACH * WORKERS
