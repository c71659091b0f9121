"""Revocations just after servers lost the database: no token is accepted longer than the command says.

A server without its connection relies on its cache until its lease is over, and no command can reach it. The command
waits for that server, or names the seconds. Both must hold for every token at every host.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from freegpt_auth.stores.postgres.confirmation import CONFIRMATION
from tests.helpers.proxy import Proxy
from tests.helpers.watch import Client, in_parallel, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Done, Host, Operator, StartHost, StartOperator
    from tests.helpers.postgresql import Cluster

AT_ONCE = 10
"""Simultaneous revocations after each disturbance. ``--rounds 30`` makes 300 of each kind."""

LEASE = 8.0
"""Longer than a command waits: the command names a host that stays away."""

_WITHIN = re.compile(r" In force everywhere within (\d+) s: ([12]) server process\(es\) have not confirmed it\.\n$")


@dataclass
class Witness:
    """Sends tokens to one host in turn.

    Attributes:
        host: the host.
        secrets: the tokens.
        accepted: the begin of the last accepted request of each token.
        ready: set once every token was accepted.
        over: set to end the requests.
    """

    host: Host
    secrets: list[str]
    accepted: dict[str, float] = field(default_factory=dict)
    ready: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> None:
        """Send requests until it is over."""
        clients = {secret: Client(self.host.server.url, secret) for secret in self.secrets}
        while not self.over.wait(0.005):
            for secret, client in clients.items():
                began = time.monotonic()
                if client.ask() == 200:
                    self.accepted[secret] = began
            if len(self.accepted) == len(self.secrets):
                self.ready.set()
        for client in clients.values():
            client.close()


@dataclass
class Setting:
    """Two hosts, ten operators with intact links, and the figures of all revocations.

    Attributes:
        said: the seconds that each command named; 0 for "from now on".
        late: the seconds for which each token was accepted after its command returned.
        took: the seconds that each command took.
    """

    hosts: list[Host]
    operators: list[Operator]
    rounds: int
    said: list[int] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def revoke_after(self, disturb: Callable[[], None]) -> None:
        """Create a token for each operator, disturb the hosts once they know it, and revoke all tokens at once."""
        issued = [operator.create("one") for operator in self.operators]
        witnesses = [Witness(each, [secret for _, secret in issued]) for each in self.hosts]
        with ThreadPoolExecutor(len(self.hosts) + AT_ONCE) as pool, contextlib.ExitStack() as stack:
            for one in witnesses:
                stack.callback(one.over.set)
                pool.submit(one.follow)
            wait_until(lambda: all(one.ready.is_set() for one in witnesses))
            disturb()
            # A command that gets no reply in time fails and promises nothing: it is repeated.
            done = [*pool.map(lambda operator, token: operator.revoke(token[0], attempts=5), self.operators, issued)]
            time.sleep(LEASE)  # a host that was cut off may accept tokens for so long
        for each, (_, secret) in zip(done, issued, strict=True):
            self._enter(each, max(one.accepted[secret] for one in witnesses))

    def _enter(self, done: Done, accepted: float) -> None:
        named = _WITHIN.search(done.err)
        assert named or done.err.endswith("It is refused from now on.\n"), done
        self.said.append(int(named[1]) if named else 0)
        self.late.append(accepted - done.ended)
        self.took.append(done.seconds)

    def check(self, record: Record) -> None:
        """Check that no token was accepted longer than its command said."""
        spare = [said - late for said, late in zip(self.said, self.late, strict=True)]
        assert min(spare) >= 0, sorted(zip(self.late, self.said, strict=True))
        record(revocations=len(self.said), named_with_a_number=sum(each > 0 for each in self.said))
        record(highest_number_s=max(self.said), least_spare_s=min(spare), commands_took_at_most_s=max(self.took))


@pytest.fixture
def setting(durable: Cluster, tables: str, operator_at: StartOperator, host: StartHost, rounds: int) -> Setting:
    """Start two hosts and ten operators."""
    operators = [operator_at(durable.url(tables)) for _ in range(AT_ONCE)]
    hosts = in_parallel(lambda _: host(durable, tables, FREEGPT_AUTH_LEASE=f"{LEASE:g}"), range(2))
    return Setting(hosts, operators, rounds)


@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_restarted_database(durable: Cluster, setting: Setting, how: str, record: Record) -> None:
    """The hosts have not reconnected yet: every command waits until they have."""

    def restart() -> None:
        getattr(durable, how)()
        durable.start()

    for _ in range(setting.rounds):
        setting.revoke_after(restart)
    setting.check(record)
    assert set(setting.said) == {0}


FAULTS: dict[str, tuple[Callable[[Proxy], None], Callable[[Proxy], None]]] = {
    "cut": (Proxy.refuse, Proxy.accept),
    "half open": (Proxy.lose, Proxy.mend),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("returns", [False, True], ids=["stays away", "returns"])
def test_lost_links(setting: Setting, fault: str, returns: bool, record: Record) -> None:  # noqa: FBT001
    """Hosts stay away: the command names the seconds. They return in a moment: the command waits for them."""
    begin, end = FAULTS[fault]

    def disturb() -> None:
        for act in (begin, end)[: 1 + returns]:
            for each in setting.hosts:
                act(each.proxy)

    for _ in range(setting.rounds):
        setting.revoke_after(disturb)
        if not returns:
            for each in setting.hosts:
                end(each.proxy)
        time.sleep(2.0)  # the hosts reconnect
    setting.check(record)
    assert returns or 0 < max(setting.said) <= LEASE - CONFIRMATION + 1
