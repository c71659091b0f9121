"""Revocations typed when servers have just lost the database: none is accepted after the command says so, to the second.

A server that lost its connection relies on its memory until its lease is over, and no command can reach it. The command
waits for it, or names the seconds; both must hold for every token at every host.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.stores.postgres.confirmation import CONFIRMATION
from tests.helpers.fleet import Client, Host, together, until
from tests.helpers.pooler import PGBOUNCER, pgbouncer, smallest
from tests.helpers.proxy import PLAIN, Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.fleet import Done, Operator, Record

AT_ONCE = 10
"""Revocations after each disturbance, by as many operators. ``--rounds 30`` makes 300 of each kind."""

LEASE = 8.0
"""Longer than a command waits: a host that stays away is named."""

_WITHIN = re.compile(r" In force everywhere within (\d+) s: ([12]) server process\(es\) have not confirmed it\.\n$")

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


@dataclass
class Witness:
    """Asks one host for one token after the other, again and again, until none is accepted.

    Attributes:
        host: the host.
        secrets: the tokens.
        accepted: when the last request began that was accepted, by token.
        seen: every token was accepted at least once.
    """

    host: Host
    secrets: list[str]
    accepted: dict[str, float] = field(default_factory=dict)
    seen: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> None:
        """Ask until it is over."""
        clients = {secret: Client(self.host.server.url, secret) for secret in self.secrets}
        while not self.over.is_set():
            for secret, client in clients.items():
                began = time.monotonic()
                if client.ask() == 200:
                    self.accepted[secret] = began
            if len(self.accepted) == len(self.secrets):
                self.seen.set()
            time.sleep(0.005)
        for client in clients.values():
            client.close()


@dataclass
class Tally:
    """The commands of all rounds.

    Attributes:
        said: seconds that each command named; 0 for "from now on".
        late: seconds for which each token was accepted after its command returned; negative if none was.
        took: seconds that each command took.
    """

    said: list[int] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def enter(self, done: Done, accepted: float) -> None:
        """Enter a command and the begin of the last request for its token that was accepted."""
        named = _WITHIN.search(done.err)
        assert named or done.err.endswith("It is refused from now on.\n"), done
        self.said.append(int(named[1]) if named else 0)
        self.late.append(accepted - done.ended)
        self.took.append(done.ended - done.began)

    def check(self) -> None:
        """No token was accepted longer than its command said."""
        wrong = [pair for pair in zip(self.late, self.said, strict=True) if pair[0] > pair[1]]
        assert not wrong, (len(wrong), wrong[:5])

    def record(self, record: Record) -> None:
        """Tell the figures."""
        record("revocations", len(self.said))
        record("accepted after the return, against the command", 0)
        record("named with a number", sum(each > 0 for each in self.said))
        record("highest number, s", max(self.said))
        spare = [said - late for said, late in zip(self.said, self.late, strict=True)]
        record("accepted last before that instant by at least, s", round(min(spare), 3))
        record("commands took at most, s", round(max(self.took), 2))


@pytest.fixture
def operators(durable: Any, tables: str, office: Any) -> list[Operator]:
    """Seat operators whose link to the database is whole."""
    return [office(durable.url(tables)) for _ in range(AT_ONCE)]


def revoke(operator: Operator, token_id: str) -> Done:
    """Revoke a token; try again where the database did not answer in time, in which case the command promised nothing."""
    for _ in range(5):
        done = operator.run("revoke", token_id)
        if done.status == 0:
            break
    assert done.status == 0, done
    return done


def revoke_all(operators: list[Operator], hosts: list[Host], disturb: Callable[[], None], tally: Tally) -> None:
    """Create a token for each operator, disturb the hosts when each knows it, and revoke all at once."""
    issued = [operator.create("one") for operator in operators]
    witnesses = [Witness(each, [secret for _, secret in issued]) for each in hosts]
    with ThreadPoolExecutor(len(hosts) + AT_ONCE) as pool, contextlib.ExitStack() as stack:
        for one in witnesses:
            stack.callback(one.over.set)
            pool.submit(one.follow)
        until(lambda: all(one.seen.is_set() for one in witnesses))
        disturb()
        done = list(pool.map(lambda one, token: revoke(one, token[0]), operators, issued))
        time.sleep(LEASE)  # longer than any that was cut off may go on
    for each, (_, secret) in zip(done, issued, strict=True):
        tally.enter(each, max(one.accepted[secret] for one in witnesses))


@pytest.fixture
def pair(durable: Any, tables: str, host: Any) -> list[Host]:
    """Start two hosts."""
    return together(lambda _: host(durable, tables, FREEGPT_AUTH_LEASE=f"{LEASE:g}"), range(2))


def both(hosts: list[Host], act: Callable[[Any], None]) -> None:
    """Do something to both links."""
    for each in hosts:
        act(each.proxy)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_as_soon_as_a_restarted_database_answers(
    durable: Any, operators: list[Operator], pair: list[Host], how: str, rounds: int, record_property: Record
) -> None:
    """The hosts were connected to the database before and are not yet again: the command waits until they are."""
    tally = Tally()

    def restart() -> None:
        (durable.stop if how == "stopped" else durable.kill)()
        durable.start()

    for _ in range(rounds):
        revoke_all(operators, pair, restart, tally)
    tally.check()
    assert set(tally.said) == {0}
    tally.record(record_property)


FAULTS: dict[str, tuple[Callable[[Proxy], None], Callable[[Proxy], None]]] = {
    "cut": (Proxy.refuse, Proxy.accept),
    "half open": (Proxy.lose, Proxy.mend),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_is_lost_a_moment_before(
    operators: list[Operator], pair: list[Host], fault: str, rounds: int, record_property: Record
) -> None:
    """The hosts stay away: the command names the seconds, which hold."""
    tally = Tally()
    begin, end = FAULTS[fault]
    for _ in range(rounds):
        revoke_all(operators, pair, lambda: both(pair, begin), tally)
        both(pair, end)
        time.sleep(2.0)
    tally.check()
    assert 0 < max(tally.said) <= LEASE - CONFIRMATION + 1
    tally.record(record_property)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_comes_back(
    operators: list[Operator], pair: list[Host], fault: str, rounds: int, record_property: Record
) -> None:
    """The hosts are away for a moment: the command waits until they have confirmed it."""
    tally = Tally()
    begin, end = FAULTS[fault]

    def blink() -> None:
        both(pair, begin)
        both(pair, end)

    for _ in range(rounds):
        revoke_all(operators, pair, blink, tally)
    tally.check()
    tally.record(record_property)


@pytest.fixture(params=["the smallest", pytest.param("PgBouncer", marks=needs_pgbouncer)])
def pooled(durable: Any, tables: str, host: Any, request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Start two hosts behind a pooler in transaction mode."""
    with pgbouncer(durable) if request.param == "PgBouncer" else smallest(durable, tables) as port:
        url = durable.url(tables, port=port) + PLAIN
        yield together(lambda _: host(durable, tables, url=url, FREEGPT_AUTH_LEASE=f"{LEASE:g}"), range(2))


def test_behind_a_pooler(operators: list[Operator], pooled: list[Host], rounds: int, record_property: Record) -> None:
    """No notification arrives: the command waits until each host has looked."""
    tally = Tally()
    for _ in range(rounds):
        revoke_all(operators, pooled, lambda: None, tally)
    tally.check()
    assert set(tally.said) == {0}
    tally.record(record_property)
