"""A primary that is killed during a stream of revocations, and its standby that takes over.

Servers and operators reach both by one URL. With synchronous replication no acknowledged revocation is undone. Without
it the last revocations are lost, and servers that have seen them are stricter than their database.
"""

from __future__ import annotations

import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest

from tests.helpers.fleet import Done, Operator, create_database
from tests.helpers.postgresql import PASSWORD, Cluster, running
from tests.helpers.proxy import Proxy
from tests.helpers.watch import USUAL, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Host, StartFleet, StartHost, StartOperator

pytestmark = pytest.mark.database

TOKENS = 60


class Pair(NamedTuple):
    """A primary and its standby, the proxy between them, and a database in them."""

    primary: Cluster
    standby: Cluster
    wire: Proxy
    tables: str

    @property
    def url(self) -> str:
        """The URL that leads to the primary, whichever of the two that is."""
        places = ",".join(f"127.0.0.1:{one.port}" for one in (self.primary, self.standby))
        return f"postgresql://postgres:{PASSWORD}@{places}/{self.tables}"

    def fail_over(self) -> None:
        """Kill the primary and promote the standby, which then waits for no other."""
        self.primary.kill()
        self.standby.promote()
        self.standby.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
        self.standby.sql("SELECT pg_reload_conf()")

    def revoked(self) -> set[str]:
        """Return the ids of the revoked tokens in the primary."""
        with psycopg.connect(self.url, target_session_attrs="read-write") as link:
            return {row[0] for row in link.execute("SELECT id FROM freegpt_auth.tokens WHERE revoked_at IS NOT NULL")}


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Run a primary and a standby; with the parameter "sync" the primary waits for the standby."""
    with running(tmp_path / "primary") as primary, contextlib.ExitStack() as stack:
        wire = Proxy(primary.port)
        stack.callback(wire.close)
        source = f"host=127.0.0.1 port={wire.port} user=postgres password={PASSWORD} sslmode=disable gssencmode=disable"
        standby = primary.standby(tmp_path / "standby", primary_conninfo=source)
        stack.callback(lambda: standby.stop(signal.SIGQUIT))
        standby.start()
        if request.param == "sync":
            primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.sql("SELECT pg_reload_conf()")
        state = [(request.param,)]
        wait_until(lambda: primary.sql("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'") == state)
        yield Pair(primary, standby, wire, create_database(primary))


def reports_loss(host: Host) -> bool:
    """Return whether a host has logged that the database has lost changes."""
    return any("has lost changes" in line for line in host.warnings())


def refused_everywhere(hosts: list[Host], secrets: list[str]) -> bool:
    """Return whether every host refuses all secrets."""
    return all({each.server.get("/", secret) for secret in secrets} == {401} for each in hosts)


@pytest.mark.parametrize("pair", ["sync"], indirect=True)
def test_acknowledged_revocation_survives_failover(
    pair: Pair, operator_at: StartOperator, fleet: StartFleet, record: Record
) -> None:
    """Every revocation whose command succeeded stays, and servers follow the new primary without a restart."""
    ours = fleet({"url": pair.url}, {"url": pair.url}, cluster=pair.primary, tables=pair.tables, url=pair.url)
    operators = [operator_at(pair.url) for _ in range(3)]
    issued = dict(ours.operator.create(f"one-{number}") for number in range(TOKENS))
    acknowledged: set[str] = set()

    def revoke_all(operator: Operator, token_ids: list[str]) -> None:
        for token_id in token_ids:
            if operator.run("revoke", token_id).status == 0:
                acknowledged.add(token_id)

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(revoke_all, one, [*issued][part::3]) for part, one in enumerate(operators)]
        wait_until(lambda: len(acknowledged) >= TOKENS // 3)
        before = len(acknowledged)
        pair.fail_over()
        back = ours.watch.expect(USUAL)
        for stream in streams:
            stream.result()
    assert acknowledged <= pair.revoked()
    assert refused_everywhere(ours.hosts, [issued[token_id] for token_id in acknowledged])
    assert not any(map(reports_loss, ours.hosts))
    done = ours.operator.revoke(ours.ids["valid"])
    ours.watch.expect({"valid": 401})
    ours.watch.stop()
    assert all(one.began <= done.ended for one in ours.watch.accepted("valid"))
    ours.check_usage()
    record(acknowledged=len(acknowledged), before_the_kill=before, undone=0, back_after=back)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["async"], indirect=True)
def test_lost_revocation_stays_refused(pair: Pair, host: StartHost, fleet: StartFleet, record: Record) -> None:
    """After a failover that loses revocations, servers that have seen them keep refusing, and log the loss once."""
    options = {"url": pair.url, "FREEGPT_AUTH_LEASE": "20"}
    ours = fleet(options, options, cluster=pair.primary, tables=pair.tables, url=pair.url)
    issued = dict(ours.operator.create(f"one-{number}") for number in range(20))
    ids = [*issued]
    for token_id in ids[:5]:
        ours.operator.revoke(token_id)
    ((position,),) = pair.primary.sql("SELECT pg_current_wal_lsn()")
    wait_until(lambda: pair.standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{position}'") == [(True,)])
    pair.wire.lose()
    for token_id in ids[5:]:
        ours.operator.revoke(token_id)
    pair.fail_over()
    back = ours.watch.expect(USUAL)
    lost = set(ids) - pair.revoked()
    assert lost
    assert lost <= set(ids[5:])
    for each in ours.hosts:
        wait_until(partial(reports_loss, each))
        assert sum(line.startswith("ERROR") and "has lost changes" in line for line in each.warnings()) == 1
    assert refused_everywhere(ours.hosts, [*issued.values()])
    fresh = host(pair.primary, pair.tables, url=pair.url)
    assert {fresh.server.get("/", issued[token_id]) for token_id in lost} == {200}
    for token_id in lost:
        ours.operator.revoke(token_id)
    assert refused_everywhere([fresh], [*issued.values()])
    ours.watch.end()
    record(acknowledged=len(ids), lost_by_the_new_primary=len(lost), back_after=back)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["sync"], indirect=True)
def test_unreplicated_revocation_fails(pair: Pair, operator_at: StartOperator, record: Record) -> None:
    """A revocation whose commit was interrupted fails, and so does a repeated one, until the standby has it."""
    operators = [operator_at(pair.url) for _ in range(2)]
    token_id, _ = operators[0].create("once")
    pair.wire.hold()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(operators[0].run, "revoke", token_id)
            wait_until(lambda: interrupt_commit(pair))
            wait_until(lambda: pair.revoked() == {token_id})
            second = pool.submit(operators[1].run, "revoke", token_id)
            failed: list[Done] = [first.result(), second.result()]
    finally:
        pair.wire.mend()
    assert [done.status for done in failed] == [1, 1], failed
    last = operators[1].revoke(token_id)
    pair.fail_over()
    assert pair.revoked() == {token_id}
    record(exit_statuses=[done.status for done in (*failed, last)])


def interrupt_commit(pair: Pair) -> bool:
    """Terminate the sessions that wait for the standby: their commits are then local."""
    ended = pair.primary.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE wait_event = 'SyncRep' AND datname = '{pair.tables}' AND query = 'COMMIT'"
    )
    return bool(ended)
