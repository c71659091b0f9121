"""A primary that is killed in the middle of a stream of revocations, and a standby in its place.

Servers and operators know both by one URL. With synchronous replication nothing that was acknowledged is undone; without
it the last revocations are lost, and the servers that knew of them are stricter than their database.
"""

from __future__ import annotations

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest

from tests.helpers.fleet import USUAL, Done, Operator, make_tables, people, until, usage_of
from tests.helpers.postgresql import PASSWORD, Cluster, running
from tests.helpers.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.fleet import Record

pytestmark = pytest.mark.database

TOKENS = 60


class Pair(NamedTuple):
    """Two clusters, and what is between them."""

    primary: Cluster
    standby: Cluster
    wire: Proxy


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Run a primary and a standby, for which the primary waits or does not."""
    waits = {"synchronous_standby_names": "*"} if request.param == "synchronous" else {}
    with running(tmp_path / "primary") as primary, contextlib.ExitStack() as stack:
        wire = Proxy(primary.port)
        stack.callback(wire.close)
        source = f"host=127.0.0.1 port={wire.port} user=postgres password={PASSWORD} sslmode=disable gssencmode=disable"
        standby = primary.standby(tmp_path / "standby", primary_conninfo=source)
        stack.callback(lambda: standby.stop(signal.SIGQUIT))
        standby.start()
        for name, value in waits.items():
            primary.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        primary.sql("SELECT pg_reload_conf()")
        state = "sync" if waits else "async"
        until(lambda: primary.sql("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'") == [(state,)])
        yield Pair(primary, standby, wire)


def both(pair: Pair, tables: str) -> str:
    """Return the URL that leads to whichever of the two is the primary."""
    places = ",".join(f"127.0.0.1:{one.port}" for one in pair[:2])
    return f"postgresql://postgres:{PASSWORD}@{places}/{tables}"


def revoked_in(url: str) -> set[str]:
    """Return the ids of the tokens that a database knows as revoked."""
    with psycopg.connect(url, target_session_attrs="read-write") as link:
        return {row[0] for row in link.execute("SELECT id FROM freegpt_auth.tokens WHERE revoked_at IS NOT NULL")}


@pytest.mark.parametrize("pair", ["synchronous"], indirect=True)
def test_what_was_acknowledged_stays_revoked(
    pair: Pair, office: Any, host: Any, watched: Any, record_property: Record
) -> None:
    """Every revocation of which the command returned stays so, and servers follow the new primary without a restart."""
    primary, standby, _ = pair
    tables = make_tables(primary)
    url = both(pair, tables)
    operators = [office(url) for _ in range(3)]
    secrets, ids = people(operators[0])
    issued = dict(operators[0].create(f"one-{number}") for number in range(TOKENS))
    hosts = [host(primary, tables, url=url) for _ in range(2)]
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
    acknowledged: set[str] = set()

    def stream(operator: Operator, some: list[str]) -> None:
        for token_id in some:
            if operator.run("revoke", token_id).status == 0:
                acknowledged.add(token_id)

    names = list(issued)
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(stream, operator, names[part::3]) for part, operator in enumerate(operators)]
        until(lambda: len(acknowledged) >= TOKENS // 3)
        primary.kill()
        killed = time.monotonic()
        before = len(acknowledged)
        # Nobody else is there to be waited for.
        standby.promote()
        standby.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
        standby.sql("SELECT pg_reload_conf()")
        back = watch.expect(USUAL)
        for one in streams:
            one.result()
    assert acknowledged <= revoked_in(url)
    for each in hosts:
        assert {each.server.get("/", issued[token_id]) for token_id in acknowledged} == {401}
        assert not any("has lost changes" in line for line in each.loud())
    done = operators[0].revoke(ids["valid"])
    watch.expect({"valid": 401})
    assert done.ended > killed
    watch.leave()
    assert all(one.status != 200 for one in watch.given if one.who == "valid" and one.began > done.ended)
    until(lambda: usage_of(url, ids["valid"]) == watch.accepted("valid"))
    record_property("acknowledged", len(acknowledged))
    record_property("of them before the primary was killed", before)
    record_property("undone", 0)
    record_property("back after", round(back, 2))


@pytest.mark.parametrize("pair", ["asynchronous"], indirect=True)
def test_who_knew_of_a_lost_revocation_goes_on_refusing(
    pair: Pair, office: Any, host: Any, watched: Any, record_property: Record
) -> None:
    """Without synchronous replication the new primary may know less; processes that knew refuse, and say what happened."""
    primary, standby, wire = pair
    tables = make_tables(primary)
    url = both(pair, tables)
    operator = office(url)
    secrets, _ = people(operator)
    issued = dict(operator.create(f"one-{number}") for number in range(20))
    hosts = [host(primary, tables, url=url, FREEGPT_AUTH_LEASE="20") for _ in range(2)]
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
    names, done = list(issued), []
    for number, token_id in enumerate(names):
        if number == 5:
            (position,) = primary.sql("SELECT pg_current_wal_lsn()")
            until(lambda: standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{position[0]}'") == [(True,)])  # noqa: B023
            wire.lose()
        done.append(operator.revoke(token_id))
    primary.kill()
    standby.promote()
    back = watch.expect(USUAL)
    lost = set(names) - revoked_in(url)
    assert lost <= set(names[5:])
    assert lost
    until(lambda: all(any("has lost changes" in line for line in each.loud()) for each in hosts))
    for each in hosts:
        assert {each.server.get("/", secret) for secret in issued.values()} == {401}
        assert sum(line.startswith("ERROR") and "has lost changes" in line for line in each.loud()) == 1
    fresh = host(primary, tables, url=url)
    assert {fresh.server.get("/", issued[token_id]) for token_id in lost} == {200}
    for token_id in lost:
        operator.revoke(token_id)
    assert {fresh.server.get("/", secret) for secret in issued.values()} == {401}
    watch.end()
    record_property("acknowledged", len(done))
    record_property("lost by the new primary", len(lost))
    record_property("accepted by processes that knew", 0)
    record_property("back after", round(back, 2))


@pytest.mark.parametrize("pair", ["synchronous"], indirect=True)
def test_a_revocation_that_was_not_replicated_is_acknowledged_by_nobody(
    pair: Pair, office: Any, record_property: Record
) -> None:
    """A command whose commit was broken off has failed, and so has the next one for the same token, until a standby has it."""
    primary, standby, wire = pair
    tables = make_tables(primary)
    operators = [office(both(pair, tables)) for _ in range(2)]
    token_id, _ = operators[0].create("once")
    wire.hold()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(operators[0].run, "revoke", token_id)
            until(lambda: _let_go(primary, tables))  # by an operator who wonders what the database waits for
            until(lambda: revoked_in(primary.url(tables)) == {token_id})
            second = pool.submit(operators[1].run, "revoke", token_id)
            answers: list[Done] = [first.result(), second.result()]
    finally:
        wire.mend()
    assert [answer.status for answer in answers] == [1, 1], answers
    last = operators[1].run("revoke", token_id)
    assert last.status == 0
    primary.kill()
    standby.promote()
    assert revoked_in(both(pair, tables)) == {token_id}
    record_property("exit statuses", [one.status for one in (*answers, last)])


def _let_go(primary: Cluster, tables: str) -> bool:
    """Break off a commit that waits for the standby: it is then done here only."""
    ended = primary.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE wait_event = 'SyncRep' AND datname = '{tables}' AND query = 'COMMIT'"
    )
    return bool(ended)
