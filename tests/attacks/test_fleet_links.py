"""Links between hosts and their database that are cut, stalled, slow, without notifications, or used up.

In most tests two of three hosts suffer: one that caches every token, and one whose cache is too small for that. The
third must not notice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psycopg
import pytest

from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.stores.postgres.store import LOOK_UP_LIMIT
from freegpt_auth.tokens import generate_secret
from tests.helpers.fleet import LEASE, POLL, SLACK
from tests.helpers.postgresql import running
from tests.helpers.proxy import FAULTS, Proxy
from tests.helpers.watch import BOUND, CLOSED, USUAL, Client, percentile, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Fleet, StartFleet
    from tests.helpers.postgresql import Cluster

SUFFERING, WELL = (0, 1), (2,)
FEW = {"FREEGPT_AUTH_CACHE": "4"}
LONG_LEASE = {"FREEGPT_AUTH_LEASE": "30"}


@pytest.fixture
def three(fleet: StartFleet) -> Fleet:
    """Start three hosts, of which the second caches few tokens."""
    return fleet({}, FEW, {}, more=6)


def suffer(fleet: Fleet, act: Callable[[Proxy], None]) -> None:
    """Do something to the links of the suffering hosts."""
    for each in SUFFERING:
        act(fleet.hosts[each].proxy)


@pytest.mark.parametrize("fault", ["refused", *(pytest.param(each, marks=pytest.mark.slow) for each in [*FAULTS][1:])])
def test_isolated_host_closes_after_lease(three: Fleet, fault: str, rounds: int, record: Record) -> None:
    """Known tokens work for the lease and then get 503, never 401; after the fault the host recovers by itself."""
    begin, end = FAULTS[fault]
    times = [three.isolate(lambda: suffer(three, begin), lambda: suffer(three, end), SUFFERING) for _ in range(rounds)]
    three.end()
    closed, back = map(max, zip(*times, strict=True))
    record(closed_after=closed, back_after=back, slowest_answer=three.watch.slowest(), answers=three.watch.counts())


@pytest.mark.slow
@pytest.mark.parametrize("lease", ["5", "30"])
def test_resumed_server_trusts_no_old_cache(fleet: StartFleet, lease: str) -> None:
    """A process that was stopped for longer than its lease reads the database first, and knows new tokens."""
    # Such a process may close a connection that was idle for so long.
    ours = fleet({"FREEGPT_AUTH_LEASE": lease}, may_break=True)
    watch, server = ours.watch, ours.hosts[0].server
    token_id = ours.issue_fading()
    os.kill(server.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        ours.operator.revoke(token_id)
        _, new = ours.operator.create("new")
        wait_until(lambda: time.monotonic() > stopped + max(CERTAINTY, LEASE))
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(server.get, "/", new) for _ in range(8)]
            resumed = time.monotonic()
            os.kill(server.process.pid, signal.SIGCONT)
            assert {one.result() for one in answers} <= {200, 503}
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    watch.expect({**USUAL, "fading": 401})
    watch.stop()
    late = [one for one in watch.accepted("fading") if one.ended > resumed]
    assert lease == "30" or not late, late
    assert max((one.began for one in late), default=resumed) <= resumed + POLL + SLACK + watch.delay()
    watch.end(BOUND + resumed - stopped)


@pytest.mark.slow
def test_lost_replies_count_uses_once(fleet: StartFleet, rounds: int, record: Record) -> None:
    """A connection that is cut before its reply disturbs no known token, and no use is lost or counted twice."""
    ours = fleet(LONG_LEASE, LONG_LEASE)
    proxies, back, began = [each.proxy for each in ours.hosts], [], time.monotonic()

    def lost() -> int:
        return sum(each.lost_replies for each in proxies)

    for number in range(8 * rounds):
        least = lost() + 1
        for each in proxies:
            each.lose_reply_to = b"add_usage"  # the batch is committed
        wait_until(lambda least=least: lost() >= least)  # type: ignore[misc]
        for each in proxies:
            each.lose_reply_to = None
            each.cut()
        back.append(ours.watch.expect(USUAL))
        ours.watch.hold({"valid": 200, "key": 200, "nothing": 401}, 0.01 * number % 0.3)
    ours.watch.check({"valid": 200}, began, range(2))
    ours.end()
    record(cuts=8 * rounds, back_after_at_most=max(back), lost_replies=lost())


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 0.5])
def test_slow_link_exceeds_no_lease(three: Fleet, delay: float, record: Record) -> None:
    """A command waits for a host behind a slow link or names the time; no host accepts the token beyond its lease."""
    watch, token_id = three.watch, three.issue_fading()
    for each in SUFFERING:
        three.hosts[each].proxy.delay = delay
    watch.hold({"key": 200, "nothing": 401}, 1.5)
    done = three.operator.revoke(token_id)
    confirmed = "In force everywhere" not in done.err
    assert confirmed or delay == 0.5, done
    watch.expect({"fading": 401}, WELL)
    watch.check({"fading": 401}, done.ended, range(3) if confirmed else WELL)
    watch.hold({"key": 200, "nothing": 401}, LEASE + 1.0)
    assert not [one for one in watch.accepted("fading") if one.began > done.ended + LEASE]
    suffer(three, Proxy.mend)
    back = watch.expect({**USUAL, "fading": 401})
    three.end()
    record(revoke_took=done.seconds, confirmed_by_every_host=confirmed, back_after=back, answers=watch.counts())


@pytest.mark.slow
def test_hanging_look_ups_delay_no_known_token(three: Fleet, record: Record) -> None:
    """While all connections for look-ups hang, unknown tokens soon get 503, and known ones 200."""
    watch, host = three.watch, three.hosts[1]
    host.proxy.hold(keep=1)  # the oldest connection follows the database
    began = time.monotonic()

    def flood(_: int) -> tuple[int, float]:
        client, since = Client(host.server.url, generate_secret()), time.monotonic()
        status = client.ask()
        client.close()
        return status, time.monotonic() - since

    with ThreadPoolExecutor(LOOK_UP_LIMIT + 64) as pool:
        statuses, took = zip(*pool.map(flood, range(LOOK_UP_LIMIT + 64)), strict=True)
    assert set(statuses) == {503}
    watch.check({"valid": 200, "key": 200, "nothing": 401}, began, range(3))
    known = [one.ended - one.began for one in watch.accepted("valid") if one.host == 1 and one.began >= began]
    host.proxy.mend()
    watch.expect(USUAL)
    three.end()
    assert max(took) <= BOUND + watch.delay(), sorted(took)
    record(unknown_p50_ms=percentile([*took], 0.5), unknown_max_ms=percentile([*took], 1))
    record(known_p50_ms=percentile(known, 0.5), known_p99_ms=percentile(known, 0.99))


@pytest.mark.slow
def test_full_database_closes_only_cut_hosts(tmp_path: Path, fleet: StartFleet, record: Record) -> None:
    """While other clients hold every connection, connected hosts serve on, and a disconnected one closes."""
    with running(tmp_path / "data", max_connections="30", superuser_reserved_connections="0") as cluster:
        ours = fleet({}, {}, cluster=cluster)
        with every_connection(cluster):
            ours.hosts[0].proxy.cut()
            ours.watch.expect(CLOSED, [0])
            ours.watch.hold(CLOSED, POLL, [0])
            ours.watch.expect(USUAL, [1])
        back = ours.watch.expect(USUAL)
        ours.end()
        assert not any(line.startswith("ERROR") for line in ours.hosts[1].warnings())
    record(back_after=back)


@contextlib.contextmanager
def every_connection(cluster: Cluster) -> Iterator[None]:
    """Hold every connection of a database, and take each that becomes free."""
    over, full = threading.Event(), threading.Event()

    def take() -> None:
        with contextlib.ExitStack() as stack:
            while not over.wait(0.001):
                try:
                    stack.enter_context(psycopg.connect(cluster.url("postgres"), connect_timeout=2))
                except psycopg.OperationalError as error:
                    if "too many clients" in str(error):
                        full.set()

    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take)
        try:
            assert full.wait(60)
            yield
        finally:
            over.set()
        taking.result()
