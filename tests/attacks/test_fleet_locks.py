"""Locks on the tables: sessions of the servers do not pile up behind one, and service returns when it goes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.tokens import generate_secret
from tests.helpers.asking import status
from tests.helpers.fleet import people, until
from tests.helpers.pooler import PGBOUNCER, pgbouncer
from tests.helpers.proxy import PLAIN

if TYPE_CHECKING:
    from tests.helpers.fleet import Record

pytestmark = pytest.mark.slow

WORKERS = 4
EACH = 4
"""Sessions of one worker at most: one that follows, two for look-ups, one for usage."""

HELD = 20.0
"""Seconds for which the lock is held, times ``--rounds``: 40 s in the figures of docs/operations/faults.md."""

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


class Crowd:
    """Threads that ask one server for valid and for unknown tokens, over a new connection each time.

    Attributes:
        given: how often each status was answered; 0 for none.
    """

    def __init__(self, url: str, valid: str) -> None:
        self.given: dict[int, int] = {}
        self._gone = threading.Event()
        secrets = [valid, *(generate_secret() for _ in range(15))]
        self._threads = [threading.Thread(target=self._ask, args=(url, secret)) for secret in secrets]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, secret: str) -> None:
        while not self._gone.wait(0.02):
            try:
                answer = status(url, secret)
            except OSError:  # the client's own limit, on a machine with too much to do
                answer = 0
            self.given[answer] = self.given.get(answer, 0) + 1

    def leave(self) -> None:
        """Stop asking."""
        self._gone.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("way", ["direct", pytest.param("PgBouncer", marks=needs_pgbouncer)])
def test_sessions_do_not_pile_up(
    durable: Any, tables: str, office: Any, host: Any, rounds: int, record_property: Record, way: str
) -> None:
    """While a lock is held on every table, each worker has at most the sessions it has in peace."""
    secrets, _ = people(office(durable.url(tables)))
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{tables}' AND application_name <> 'psql'"

    def attack(port: int) -> None:
        url = durable.url(tables, port=port) + PLAIN
        server = host(durable, tables, "--workers", str(WORKERS), url=url, FREEGPT_AUTH_CACHE="1").server
        valid = secrets["valid"]
        crowd = Crowd(server.url, valid)
        try:
            until(lambda: crowd.given.get(401, 0) > 20, within=60)
            peace, most = durable.sql(sessions, "postgres")[0][0], 0
            with psycopg.connect(durable.url(tables), application_name="psql") as operator:
                operator.execute("LOCK TABLE freegpt_auth.tokens, freegpt_auth.state, freegpt_auth.usage")
                end = time.monotonic() + HELD * rounds
                while time.monotonic() < end:
                    most = max(most, durable.sql(sessions, "postgres")[0][0])
                    time.sleep(0.25)
            released = time.monotonic()
            until(lambda: {server.get("/", valid) for _ in range(4 * WORKERS)} == {200}, within=60)
            record_property("sessions before", peace)
            record_property("most sessions during the lock", most)
            record_property("served again after", round(time.monotonic() - released, 1))
        finally:
            crowd.leave()
        record_property("answers", crowd.given)
        assert most <= EACH * WORKERS
        assert set(crowd.given) <= {0, 200, 401, 503}

    if way == "direct":
        attack(durable.port)
    else:
        with pgbouncer(durable) as port:
            attack(port)
