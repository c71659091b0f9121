"""A pooler in transaction mode between servers and database: it takes LISTEN, and delivers nothing."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.helpers.fleet import USUAL, people, until, usage_of
from tests.helpers.pooler import PGBOUNCER, pgbouncer, smallest
from tests.helpers.proxy import PLAIN

if TYPE_CHECKING:
    from tests.helpers.fleet import Record

pytestmark = pytest.mark.slow

POLL = 1.0
SLACK = 1.5

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


@pytest.mark.parametrize("kind", ["the smallest", pytest.param("PgBouncer", marks=needs_pgbouncer)])
def test_behind_a_pooler_a_server_polls(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, kind: str, record_property: Record
) -> None:
    """It is detected and said once, and a command waits until the server has looked."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator, more=6)
    with pgbouncer(durable) if kind == "PgBouncer" else smallest(durable, tables) as port:
        url = durable.url(tables, port=port) + PLAIN
        hosts = [host(durable, tables, url=url), host(durable, tables, url=url, FREEGPT_AUTH_CACHE="4")]
        watch = watched(hosts, secrets)
        watch.expect(USUAL)
        late, took = [], []
        for number in range(4):
            token_id, fading = operator.create(f"fading-{number}")
            watch.forget("fading")
            watch.add("fading", fading)
            watch.expect({"fading": 200})
            done = office(url).run("revoke", token_id) if number % 2 else operator.run("revoke", token_id)
            assert (done.status, done.err.count("\n")) == (0, 1), done
            watch.expect({"fading": 401})
            late.append(max(watch.last("fading", each) for each in range(2)) - done.ended)
            took.append(done.ended - done.began)
        assert max(late) <= 0
        assert max(took) < POLL + SLACK + watch.delay()
        for each in hosts:
            assert [line for line in each.loud() if "delivers no notifications" not in line] == []
            assert len(each.loud()) == 1
        watch.end()
        until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))
    record_property("accepted after the command", 0)
    record_property("commands took at most", round(max(took), 2))


@needs_pgbouncer
def test_commands_hold_behind_a_pooler(durable: Any, tables: str, office: Any) -> None:
    """Through PgBouncer, with hostile defaults of the role, values are exact and a wait for a lock ends with its holder."""
    for name, value in {"DateStyle": "German", "extra_float_digits": "-11", "search_path": "public"}.items():
        durable.sql(f"ALTER DATABASE {tables} SET {name} = '{value}'")
    with pgbouncer(durable) as port:
        operator = office(durable.url(tables, port=port) + PLAIN)
        _, secret = operator.create("brief", "--expires-in", "100")
        [listed] = json.loads(operator.run("list", "--json").out)
        created, expires = (datetime.fromisoformat(listed[name]) for name in ("created_at", "expires_at"))
        assert (expires - created).total_seconds() == 100
        with psycopg.connect(durable.url(tables), application_name="psql") as other:
            other.execute("UPDATE freegpt_auth.state SET revision = revision")
            done = operator.run("revoke", secret)
            assert (done.status, f"process {other.info.backend_pid} (role postgres, psql" in done.err) == (1, True), (
                done
            )
        assert operator.revoke(secret).err.startswith("Revoked")
