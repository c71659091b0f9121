"""Revocations just after servers lost the database: no token is accepted longer than the command says.

A server without its connection relies on its cache until its lease is over, and no command can reach it. The command
waits for that server, or names the seconds. Both must hold for every token at every host.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from freegpt_auth.stores.postgres.confirmation import CONFIRMATION
from tests.helpers.proxy import FAULTS
from tests.helpers.watch import Watch, in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Operator, StartHost, StartOperator
    from tests.helpers.postgresql import Cluster
    from tests.helpers.proxy import Proxy

AT_ONCE = 10
"""Simultaneous revocations after each disturbance. ``--rounds 30`` makes 300 of each kind."""

LEASE = 8.0
"""Longer than a command waits: the command names a host that stays away."""

_WITHIN = re.compile(r" In force everywhere within (\d+) s: ([12]) server process\(es\) have not confirmed it\.\n$")


@dataclass
class Setting:
    """Clients at two hosts, ten operators with intact links, and the figures of all revocations.

    Attributes:
        said: the seconds that each command named; 0 for "from now on".
        late: the seconds for which each token was accepted after its command returned.
        took: the seconds that each command took.
    """

    watch: Watch
    operators: list[Operator]
    rounds: int
    said: list[int] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def act(self, act: Callable[[Proxy], None]) -> None:
        """Do something to the link of each host."""
        for each in self.watch.hosts:
            act(each.proxy)

    def revoke_after(self, disturb: Callable[[], None]) -> None:
        """Create a token for each operator, disturb the hosts once they know it, and revoke all tokens at once."""
        issued = {f"fading-{number}": operator.create("one") for number, operator in enumerate(self.operators)}
        for name, (_, secret) in issued.items():
            self.watch.add(name, secret)
        self.watch.expect(dict.fromkeys(issued, 200))
        disturb()
        orders = [(operator, token_id) for operator, (token_id, _) in zip(self.operators, issued.values(), strict=True)]
        # A command that gets no reply in time fails and promises nothing: it is repeated.
        done = in_parallel(lambda order: order[0].revoke(order[1], attempts=5), orders)
        time.sleep(LEASE)  # a host that was cut off may accept tokens for so long
        self.watch.stop()
        for name, each in zip(issued, done, strict=True):
            named = _WITHIN.search(each.err)
            assert named or each.err.endswith("It is refused from now on.\n"), each
            self.said.append(int(named[1]) if named else 0)
            self.late.append(max(one.began for one in self.watch.accepted(name)) - each.ended)
            self.took.append(each.seconds)

    def check(self, record: Record) -> None:
        """Check that no token was accepted longer than its command said."""
        spare = [said - late for said, late in zip(self.said, self.late, strict=True)]
        assert min(spare) >= 0, sorted(zip(self.late, self.said, strict=True))
        record(revocations=len(self.said), named_with_a_number=sum(each > 0 for each in self.said))
        record(highest_number_s=max(self.said), least_spare_s=min(spare), commands_took_at_most_s=max(self.took))


@pytest.fixture
def setting(
    durable: Cluster, tables: str, operator_at: StartOperator, host: StartHost, rounds: int
) -> Iterator[Setting]:
    """Start two hosts and ten operators."""
    operators = [operator_at(durable.url(tables)) for _ in range(AT_ONCE)]
    watch = Watch([host(durable, tables, FREEGPT_AUTH_LEASE=f"{LEASE:g}") for _ in range(2)], {}, pause=0.05)
    yield Setting(watch, operators, rounds)
    watch.stop()


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


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refused", "vanishing"])
@pytest.mark.parametrize("returns", [False, True], ids=["stays away", "returns"])
def test_lost_links(setting: Setting, fault: str, returns: bool, record: Record) -> None:  # noqa: FBT001
    """Hosts stay away: the command names the seconds. They return in a moment: the command waits for them."""
    begin, end = FAULTS[fault]

    def disturb() -> None:
        setting.act(begin)
        if returns:
            setting.act(end)

    for _ in range(setting.rounds):
        setting.revoke_after(disturb)
        if not returns:
            setting.act(end)
        time.sleep(2.0)  # the hosts reconnect
    setting.check(record)
    assert returns or 0 < max(setting.said) <= LEASE - CONFIRMATION + 1
