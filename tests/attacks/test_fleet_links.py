"""What becomes of the links between hosts and database: cut, swallowed, held, slow, deaf, and used up.

Two hosts suffer: one that knows every token, and one whose memory is too small for that. A third one does not, and goes on
as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest

from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.stores.postgres.store import LOOK_UP_LIMIT
from freegpt_auth.tokens import generate_secret
from tests.helpers.fleet import (
    BOUND,
    CLOSED,
    USUAL,
    Client,
    Host,
    Operator,
    Watch,
    make_tables,
    middle,
    people,
    together,
    until,
    usage_of,
)
from tests.helpers.postgresql import running
from tests.helpers.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.fleet import Record

pytestmark = [pytest.mark.database, pytest.mark.slow]

LEASE = 5.0
POLL = 1.0
SLACK = 1.5
"""Seconds that a machine which is busy may take for what is done at once."""

SUFFERING, WELL = (0, 1), (2,)
FEW = {"FREEGPT_AUTH_CACHE": "4"}
FAULTS = {
    "refused": (Proxy.refuse, Proxy.accept),
    "vanishing": (Proxy.lose, Proxy.mend),
    "held": (Proxy.hold, Proxy.mend),
}


class Fleet(NamedTuple):
    """Three hosts and all who deal with them, and the ids of the tokens that are valid or revoked."""

    operator: Operator
    hosts: list[Host]
    watch: Watch
    ids: dict[str, str]
    url: str

    def is_counted(self) -> bool:
        """Tell whether the database knows as many uses as there were."""
        return usage_of(self.url, self.ids["valid"]) == self.watch.accepted("valid")


@pytest.fixture
def fleet(durable: Any, tables: str, office: Any, host: Any, watched: Any) -> Fleet:
    """Start three hosts, of which the second remembers few tokens, and clients that ask them."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator, more=6)
    hosts = together(lambda memory: host(durable, tables, **memory), ({}, FEW, {}))
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
    return Fleet(operator, hosts, watch, ids, durable.url(tables))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_is_cut_off_accepts_nothing_beyond_its_lease(
    fleet: Fleet, fault: str, rounds: int, record_property: Record
) -> None:
    """Known tokens work for the lease, and then get a 503 like all others, never a 401; when the link is back all is as new."""
    operator, hosts, watch, _, url = fleet
    begin, end = FAULTS[fault]
    closed, back = [], []
    for number in range(rounds):
        token_id, fading = operator.create(f"fading-{number}")
        watch.forget("fading")
        watch.add("fading", fading)
        watch.expect({"fading": 200})
        for each in SUFFERING:
            begin(hosts[each].proxy)
        cut = time.monotonic()
        done = operator.revoke(token_id)
        watch.expect({**CLOSED, "fading": 503}, SUFFERING)
        closed.append(time.monotonic() - cut)
        watch.see({"valid": 503, "fading": 503, "revoked": 503}, cut + LEASE + 0.05, SUFFERING)
        watch.see({**USUAL, "fading": 401}, done.ended, WELL)
        watch.hold({**CLOSED, "fading": 503}, POLL, SUFFERING)
        new_id, new = operator.create("new")
        for each in SUFFERING:
            assert hosts[each].server.get("/", new) == 503
            end(hosts[each].proxy)
        back.append(watch.expect({**USUAL, "fading": 401}))
        for each in hosts:
            assert each.server.get("/", new) == 200
    watch.end()
    until(fleet.is_counted)
    until(lambda: usage_of(url, new_id) == len(hosts))
    record_property("closed after", round(max(closed), 2))
    record_property("back after", round(max(back), 2))
    record_property("slowest answer", round(watch.slowest(), 2))
    record_property("answers", watch.counts())


@pytest.mark.parametrize("fault", FAULTS)
def test_within_a_long_lease_only_what_is_not_known_waits(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, fault: str
) -> None:
    """A host that is cut off accepts whom it knows, and soon says of nobody that there is no such token: it may be new."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator)
    alone = host(durable, tables, FREEGPT_AUTH_LEASE="30")
    watch = watched([alone], secrets)
    watch.expect(USUAL)
    began = time.monotonic()
    begin, end = FAULTS[fault]
    begin(alone.proxy)
    cut = time.monotonic()
    _, new = operator.create("new")
    known = {"valid": 200, "revoked": 401}
    watch.expect({**known, "wrong": 503})
    watch.see({"wrong": 503}, cut + CERTAINTY + 0.05, [0])
    assert alone.server.get("/", new) == 503
    watch.hold({**known, "wrong": 503}, LEASE)
    end(alone.proxy)
    watch.expect(USUAL)
    watch.see(known, began, [0])
    assert alone.server.get("/", new) == 200
    watch.end()
    until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))


@pytest.mark.parametrize("lease", [f"{LEASE:g}", "30"])
def test_a_server_that_was_stopped_for_a_while_trusts_nothing_old(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, lease: str
) -> None:
    """A process that did not run for longer than its lease asks first; and a token that is new meanwhile is never unknown."""
    operator = office(durable.url(tables))
    secrets, _ = people(operator)
    token_id, fading = operator.create("fading")
    alone = host(durable, tables, FREEGPT_AUTH_LEASE=lease)
    # It may find that a connection on which nothing came for so long has lived long enough.
    watch = watched([alone], {**secrets, "fading": fading}, may_break=True)
    watch.expect({**USUAL, "fading": 200})
    os.kill(alone.server.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        operator.revoke(token_id)
        _, new = operator.create("new")
        until(lambda: time.monotonic() > stopped + max(CERTAINTY, LEASE))
        with ThreadPoolExecutor(8) as crowd:
            asked = [crowd.submit(alone.server.get, "/", new) for _ in range(8)]
            resumed = time.monotonic()
            os.kill(alone.server.process.pid, signal.SIGCONT)
            assert {one.result() for one in asked} <= {200, 503}
    finally:
        os.kill(alone.server.process.pid, signal.SIGCONT)
    watch.expect({**USUAL, "fading": 401})
    watch.leave()
    late = [one for one in watch.given if (one.who, one.status) == ("fading", 200) and one.ended > resumed]
    assert lease == "30" or not late, late
    assert max((one.began for one in late), default=resumed) <= resumed + POLL + SLACK + watch.delay()
    watch.end(BOUND + resumed - stopped)


def test_connections_that_are_cut_are_made_anew(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, rounds: int, record_property: Record
) -> None:
    """Connections that are cut again and again disturb nobody who is known, and no use is lost or counted twice."""
    secrets, ids = people(office(durable.url(tables)))
    hosts = together(lambda _: host(durable, tables, FREEGPT_AUTH_LEASE="30"), range(2))
    watch, back = watched(hosts, secrets), []
    watch.expect(USUAL)
    began = time.monotonic()
    for number in range(8 * rounds):
        before = sum(each.proxy.robberies for each in hosts)
        for each in hosts:
            each.proxy.robbed = b"add_usage"  # it is written, and the answer never comes
        until(lambda: sum(each.proxy.robberies for each in hosts) > before)  # noqa: B023
        for each in hosts:
            each.proxy.robbed = None
            each.proxy.cut()
        back.append(watch.expect(USUAL))
        watch.hold({"valid": 200, "key": 200, "nothing": 401}, 0.01 * number % 0.3)
    watch.see({"valid": 200}, began, range(2))
    watch.end()
    until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))
    record_property("cuts", 8 * rounds)
    record_property("back after at most", round(max(back), 2))
    record_property("batches written of which the answer was lost", sum(each.proxy.robberies for each in hosts))
    record_property("uses, all counted once", watch.accepted("valid"))


def test_a_database_that_is_hung_closes_every_host(
    durable: Any, fleet: Fleet, rounds: int, record_property: Record
) -> None:
    """A database that takes connections and says nothing is as good as none; when it goes on, so does every host."""
    watch, back = fleet.watch, []
    for _ in range(rounds):
        durable.freeze()
        hung = time.monotonic()
        try:
            watch.expect(CLOSED)
            watch.see({"valid": 503, "revoked": 503}, hung + LEASE + 0.05, range(3))
            watch.hold(CLOSED, POLL)
        finally:
            durable.freeze(signal.SIGCONT)
        back.append(watch.expect(USUAL))
    watch.end()
    until(fleet.is_counted)
    record_property("back after", round(max(back), 2))
    record_property("slowest answer", round(watch.slowest(), 2))


@pytest.mark.parametrize("delay", [0.1, 0.5])
def test_a_slow_link_delays_and_opens_nothing(fleet: Fleet, delay: float, record_property: Record) -> None:
    """A command waits for a host behind a slow link, or says that it did not; then too, the lease is not exceeded."""
    operator, hosts, watch, _, _ = fleet
    token_id, fading = operator.create("fading")
    watch.add("fading", fading)
    watch.expect({"fading": 200})
    for each in SUFFERING:
        hosts[each].proxy.delay = delay
    watch.hold({"key": 200, "nothing": 401}, 1.5)
    done = operator.revoke(token_id)
    heard = "In force everywhere" not in done.err
    assert heard or delay == 0.5, done
    watch.expect({"fading": 401}, WELL)
    watch.see({"fading": 401}, done.ended, range(3) if heard else WELL)
    watch.hold({"key": 200, "nothing": 401}, LEASE + 1.0)
    late = [answer for answer in watch.given if answer.who == "fading" and answer.began > done.ended + LEASE]
    assert all(answer.status in {401, 503} for answer in late)
    for each in SUFFERING:
        hosts[each].proxy.mend()
    back = watch.expect({**USUAL, "fading": 401})
    watch.end()
    until(fleet.is_counted)
    record_property("revoke took", round(done.ended - done.began, 2))
    record_property("every host had seen it", heard)
    record_property("back after", round(back, 2))
    record_property("slowest answer", round(watch.slowest(), 2))
    record_property("answers", watch.counts())


def test_what_notifications_lose_the_poll_finds(fleet: Fleet, rounds: int, record_property: Record) -> None:
    """A host that hears no notifications any more sees a change within a second, and the command waits for it."""
    operator, hosts, watch, _, _ = fleet
    took = []
    for each in SUFFERING:
        hosts[each].proxy.is_deaf = True
    for number in range(2 * rounds):
        token_id, fading = operator.create(f"fading-{number}")
        watch.forget("fading")
        watch.add("fading", fading)
        watch.expect({"fading": 200})
        done = operator.revoke(token_id)
        assert "In force everywhere" not in done.err
        watch.expect({"fading": 401})
        watch.see({"fading": 401}, done.ended, range(3))
        took.append(done.ended - done.began)
    assert max(took) < POLL + SLACK + watch.delay()
    watch.end()
    record_property("revoke took at most", round(max(took), 2))


def test_a_host_that_never_hears_polls(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, record_property: Record
) -> None:
    """It says so once, and a command waits until it has looked: nothing is accepted there once the command returned."""
    operator = office(durable.url(tables))
    secrets, _ = people(operator)
    hosts = [host(durable, tables, away=True), host(durable, tables)]
    hosts[0].proxy.is_deaf = True
    hosts[0].proxy.accept()
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
    took = []
    for number in range(2):
        token_id, fading = operator.create(f"fading-{number}")
        watch.forget("fading")
        watch.add("fading", fading)
        watch.expect({"fading": 200})
        done = operator.revoke(token_id)
        watch.expect({"fading": 401})
        watch.see({"fading": 401}, done.ended, range(2))
        took.append(done.ended - done.began)
    assert max(took) < POLL + SLACK + watch.delay()
    assert sum("delivers no notifications" in line for line in hosts[0].loud()) == 1
    assert durable.sql("SELECT count(*) FROM freegpt_auth.servers", tables) == [(2,)]
    watch.end()
    record_property("revoke took at most", round(max(took), 2))


def test_look_ups_that_hang_hold_up_nobody_who_is_known(fleet: Fleet, record_property: Record) -> None:
    """While every connection for look-ups hangs, more unknown tokens than may wait get a 503 soon, and known ones a 200."""
    _, hosts, watch, _, _ = fleet
    sufferer = hosts[1]
    sufferer.proxy.hold(keep=1)  # the oldest is the one that follows the database
    began = time.monotonic()

    def flood() -> tuple[int, float]:
        client, since = Client(sufferer.server.url, generate_secret()), time.monotonic()
        status = client.ask()
        client.close()
        return status, time.monotonic() - since

    with ThreadPoolExecutor(LOOK_UP_LIMIT + 64) as crowd:
        asked = [crowd.submit(flood) for _ in range(LOOK_UP_LIMIT + 64)]
        answers = [one.result() for one in asked]
    assert {status for status, _ in answers} == {503}
    took = [seconds for _, seconds in answers]
    watch.see({"valid": 200, "key": 200, "nothing": 401}, began, range(3))
    known = [
        one.ended - one.began for one in watch.given if one.host == 1 and one.who == "valid" and one.began >= began
    ]
    sufferer.proxy.mend()
    watch.expect(USUAL)
    watch.end()
    until(fleet.is_counted)
    assert max(took) <= BOUND + watch.delay(), sorted(took)
    record_property("unknown tokens, in ms: p50", middle(took, 0.5))
    record_property("max", middle(took, 1))
    record_property("a known token meanwhile: p50", middle(known, 0.5))
    record_property("p99", middle(known, 0.99))


def test_a_database_without_a_free_connection_closes_only_who_needs_one(
    tmp_path: Path, office: Any, host: Any, watched: Any, record_property: Record
) -> None:
    """While others hold every connection, who is connected goes on, and who is not is as one that is cut off."""
    with running(tmp_path / "data", max_connections="30", superuser_reserved_connections="0") as cluster:
        tables = make_tables(cluster)
        operator = office(cluster.url(tables))
        secrets, ids = people(operator)
        hosts = [host(cluster, tables), host(cluster, tables)]
        watch = watched(hosts, secrets)
        watch.expect(USUAL)
        with _others(cluster):
            hosts[0].proxy.cut()
            watch.expect(CLOSED, [0])
            watch.hold(CLOSED, POLL, [0])
            watch.expect(USUAL, [1])
        back = watch.expect(USUAL)
        watch.end()
        until(lambda: usage_of(cluster.url(tables), ids["valid"]) == watch.accepted("valid"))
        assert any("too many clients" in line for line in hosts[0].loud())
        assert not any(line.startswith("ERROR") for line in hosts[1].loud())
    record_property("back after", round(back, 2))


@contextlib.contextmanager
def _others(cluster: Any) -> Iterator[None]:
    """Let others hold every connection of a database, and take each that is let go of."""
    over = threading.Event()

    def grab() -> None:
        held = []
        while not over.is_set():
            try:
                held.append(psycopg.connect(cluster.url("postgres"), connect_timeout=2))
            except psycopg.OperationalError:
                over.wait(0.005)
        for one in held:
            one.close()

    with ThreadPoolExecutor(1) as pool:
        grabbing = pool.submit(grab)
        try:
            until(lambda: _is_full(cluster))
            yield
        finally:
            over.set()
        grabbing.result()


def _is_full(cluster: Any) -> bool:
    try:
        psycopg.connect(cluster.url("postgres"), connect_timeout=2).close()
    except psycopg.OperationalError as error:
        return "too many clients" in str(error)
    return False
