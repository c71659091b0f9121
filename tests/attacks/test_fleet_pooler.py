"""A pooler in transaction mode between servers and database: it accepts LISTEN and delivers no notification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.fleet import POLL, SLACK
from tests.helpers.pooler import PGBOUNCER, pgbouncer, smallest
from tests.helpers.proxy import PLAIN

if TYPE_CHECKING:
    from tests.attacks.conftest import Record
    from tests.helpers.fleet import StartFleet, StartOperator
    from tests.helpers.postgresql import Cluster

PGBOUNCER_ONLY = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minimal", pytest.param("PgBouncer", marks=PGBOUNCER_ONLY)])
def test_pooled_servers_poll(
    durable: Cluster, tables: str, operator_at: StartOperator, fleet: StartFleet, kind: str, record: Record
) -> None:
    """Servers without notifications see a revocation before its command returns; behind a pooler they log that once.

    A third server gets none from a certain moment on.
    """
    with pgbouncer(durable) if kind == "PgBouncer" else smallest(durable, tables) as port:
        url = durable.url(tables, port=port) + PLAIN
        ours = fleet({"url": url}, {"url": url, "FREEGPT_AUTH_CACHE": "4"}, {}, tables=tables, more=6)
        pooled, later = ours.hosts[:2], ours.hosts[2]
        later.proxy.drops_notifications = True
        took = []
        for number in range(4):
            token_id = ours.issue_fading()
            done = (operator_at(url) if number % 2 else ours.operator).revoke(token_id)
            assert done.err.count("\n") == 1, done
            ours.watch.expect({"fading": 401})
            ours.watch.check({"fading": 401}, done.ended, range(3))
            took.append(done.seconds)
        assert max(took) < POLL + SLACK + ours.watch.delay()
        for each in pooled:
            assert ["delivers no notifications" in line for line in each.warnings()] == [True]
        ours.end()
    record(commands_took_at_most=max(took))
