"""Locks on the tables: sessions of the servers do not pile up, and service returns with the release of the lock."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from freegpt_auth.tokens import generate_secret
from tests.helpers.asking import status
from tests.helpers.fleet import issue_tokens
from tests.helpers.pooler import PGBOUNCER, pgbouncer
from tests.helpers.proxy import PLAIN
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from tests.attacks.conftest import Record
    from tests.helpers.fleet import StartHost, StartOperator
    from tests.helpers.postgresql import Cluster

WORKERS = 4
EACH = 4
"""Most sessions of one worker: one that follows the database, two for look-ups, one for usage."""

HELD = 20.0
"""Duration of the lock in seconds, times ``--rounds``: 40 s in the figures of docs/operations/faults.md."""


class Crowd:
    """Threads that send valid and unknown tokens to one server, over a new connection each time.

    Attributes:
        answers: the number of answers of each status; 0 for a timeout.
    """

    def __init__(self, url: str, valid: str) -> None:
        self.answers: dict[int, int] = {}
        self._over = threading.Event()
        secrets = [valid, *(generate_secret() for _ in range(15))]
        self._threads = [threading.Thread(target=self._ask, args=(url, secret)) for secret in secrets]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, secret: str) -> None:
        while not self._over.wait(0.02):
            try:
                answer = status(url, secret)
            except OSError:  # the client's own time limit, on a loaded machine
                answer = 0
            self.answers[answer] = self.answers.get(answer, 0) + 1

    def close(self) -> None:
        """Stop all threads."""
        self._over.set()
        for thread in self._threads:
            thread.join()


PGBOUNCER_ONLY = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", pytest.param("PgBouncer", marks=PGBOUNCER_ONLY)])
def test_sessions_do_not_pile_up(
    durable: Cluster, tables: str, operator_at: StartOperator, host: StartHost, rounds: int, record: Record, way: str
) -> None:
    """While another session locks every table, each worker has at most its usual sessions."""
    secrets, _ = issue_tokens(operator_at(durable.url(tables)))
    valid = str(secrets["valid"])
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{tables}' AND application_name <> 'psql'"
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(pgbouncer(durable)) if way == "PgBouncer" else durable.port
        url = durable.url(tables, port=port) + PLAIN
        arguments = ("--workers", str(WORKERS))
        server = host(durable, tables, arguments=arguments, url=url, FREEGPT_AUTH_CACHE="1").server
        crowd = stack.enter_context(contextlib.closing(Crowd(server.url, valid)))
        wait_until(lambda: crowd.answers.get(401, 0) > 20)
        usual = most = durable.sql(sessions)[0][0]
        with psycopg.connect(durable.url(tables), application_name="psql") as operator:
            operator.execute("LOCK TABLE freegpt_auth.tokens, freegpt_auth.state, freegpt_auth.usage")
            end = time.monotonic() + HELD * rounds
            while time.monotonic() < end:
                most = max(most, durable.sql(sessions)[0][0])
                time.sleep(0.25)
        released = time.monotonic()
        wait_until(lambda: {server.get("/", valid) for _ in range(4 * WORKERS)} == {200})
        record(usual_sessions=usual, most_sessions=most, served_again_after=time.monotonic() - released)
    record(answers=crowd.answers)
    assert most <= EACH * WORKERS
    assert set(crowd.answers) <= {0, 200, 401, 503}
