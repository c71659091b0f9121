"""Eight server processes: the time until a revocation is in force, and no acceptance after its command returned."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from tests.helpers.fleet import issue_tokens
from tests.helpers.proxy import PLAIN
from tests.helpers.watch import Watch, in_parallel, percentile

if TYPE_CHECKING:
    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Operator, StartHost, StartOperator
    from tests.helpers.postgresql import Cluster

PROCESSES = 8
REVOCATIONS = 100
TARGET = 50.0
"""Milliseconds within which 99 of 100 revocations are in force in every process."""


class Times(NamedTuple):
    """One revocation, in seconds, and the number of requests that were accepted too late."""

    from_commit: float
    from_return: float
    command: float
    late: int
    request: float


def measure(cluster: Cluster, tables: str, operator: Operator, watch: Watch) -> list[Times]:
    """Revoke a hundred tokens, one after the other, each watched at every process."""
    times = []
    for number in range(REVOCATIONS):
        name = f"fading-{number}"
        token_id, secret = operator.create(name)
        watch.add(name, secret)
        watch.expect({name: 200})
        done = operator.revoke(token_id)
        watch.expect({name: 401})
        watch.remove(name)
        assert "In force everywhere" not in done.err
        accepted, answers = watch.accepted(name), [one for one in watch.answers if one.token == name]
        refused = [one for one in answers if one.status == 401]
        assert len(refused) + len(accepted) == len(answers)
        last = max(min(one.ended for one in refused if one.host == process) for process in range(PROCESSES))
        watch.check({name: 401}, last, range(PROCESSES))
        late = sum(one.began > done.ended for one in accepted)
        request = max(one.ended - one.began for one in accepted)
        times.append(Times(last - committed(cluster, tables, token_id), last - done.ended, done.seconds, late, request))
        watch.answers.clear()
    return times


def excess(times: list[Times]) -> float:
    """Return the milliseconds by which the 99th percentile misses the target.

    A change passes three processes that need a processor each, a request two. On a loaded machine a change may
    therefore take three requests longer.
    """
    return (
        percentile([one.from_commit for one in times], 0.99)
        - TARGET
        - 3 * percentile([one.request for one in times], 0.99)
    )


def committed(cluster: Cluster, tables: str, token_id: str) -> float:
    """Return the commit time of a token's record, by the monotonic clock."""
    epoch = "extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8"
    [(at,)] = cluster.sql(f"SELECT {epoch} FROM freegpt_auth.tokens WHERE id = '{token_id}'", tables)
    return float(at) - time.time() + time.monotonic()


def test_eight_processes_refuse_at_once(
    durable: Cluster, tables: str, operator_at: StartOperator, host: StartHost, rounds: int, record: Record
) -> None:
    """99 of 100 revocations are in force within 50 ms of the commit, and all when the command returns."""
    operator = operator_at(durable.url(tables))
    issue_tokens(operator)
    hosts = in_parallel(lambda _: host(durable, tables, url=durable.url(tables) + PLAIN), range(PROCESSES))
    watch = Watch(hosts, {}, pause=0.002)
    hundreds: list[list[Times]] = []
    # A loaded machine gets two more chances.
    try:
        while len(hundreds) < rounds or (min(map(excess, hundreds)) > 0 and len(hundreds) < rounds + 2):
            hundreds.append(measure(durable, tables, operator, watch))
    finally:
        watch.stop()
    times = [one for hundred in hundreds for one in hundred]
    record(revocations=len(times))
    for name in ("from_commit", "from_return", "command"):
        values = [getattr(one, name) for one in times]
        record(**{f"{name}_p50_p99_max_ms": [percentile(values, share) for share in (0.5, 0.99, 1)]})
    assert sum(one.late for one in times) == 0
    assert min(map(excess, hundreds)) <= 0
