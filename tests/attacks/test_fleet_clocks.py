"""Hosts whose clocks differ by five minutes: only the database's clock counts."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Operator, StartFleet, StartOperator
    from tests.helpers.postgresql import Cluster

LIFE = 4


def listed(operator: Operator, token_id: str) -> Any:
    """Return a token as ``list`` shows it."""
    return next(one for one in json.loads(operator.run("list", "--json").out) if one["id"] == token_id)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [300.0, -300.0])
def test_expiry_ignores_host_clocks(
    durable: Cluster, tables: str, operator_at: StartOperator, fleet: StartFleet, ahead: float, record: Record
) -> None:
    """A token expires at every host by the database's clock; the clocks of hosts and operators do not count."""
    operator, other = operator_at(durable.url(tables), ahead), operator_at(durable.url(tables), -ahead)
    ours = fleet(*({"AHEAD": str(each)} for each in (300.0, -300.0, 0.0)), tables=tables)
    watch = ours.watch
    began = time.time()
    token_id, fading = operator.create("fading", "--expires-in", f"{LIFE}s")
    watch.add("fading", fading)
    ends_at = datetime.fromisoformat(listed(other, token_id)["expires_at"]).timestamp()
    assert began + LIFE - 1 <= ends_at <= time.time() + LIFE
    watch.expect({"fading": 200})
    assert listed(other, token_id)["status"] == "active"
    watch.expect({"fading": 401})
    last = [watch.last("fading", number) + time.time() - time.monotonic() for number in range(3)]
    assert all(ends_at - 1 - watch.delay() < one <= ends_at for one in last)
    wait_until(lambda: time.time() > ends_at)
    assert listed(other, token_id)["status"] == "expired"
    operator.revoke(ours.ids["valid"])
    watch.expect({"valid": 401})
    watch.stop()
    ours.check_usage()
    seen = listed(operator, ours.ids["valid"])
    used = max(watch.last("valid", number) for number in range(3)) + time.time() - time.monotonic()
    assert abs(datetime.fromisoformat(seen["last_used_at"]).timestamp() - used) < 1.5 + watch.delay()
    assert abs(datetime.fromisoformat(seen["revoked_at"]).timestamp() - used) < 2 + watch.delay()
    record(accepted_last_before_expiry_by_s=[round(ends_at - one, 3) for one in last])
