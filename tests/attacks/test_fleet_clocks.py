"""Hosts whose clocks are five minutes apart: there is one clock, and that is the database's."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.fleet import USUAL, Operator, people, together, until, usage_of

if TYPE_CHECKING:
    from tests.helpers.fleet import Record

pytestmark = pytest.mark.slow

AHEAD = (300.0, -300.0, 0.0)
LIFE = 4


def listed(operator: Operator, token_id: str) -> dict[str, Any]:
    """Return what an operator sees of a token."""
    return next(one for one in json.loads(operator.run("list", "--json").out) if one["id"] == token_id)


@pytest.mark.parametrize("ahead", AHEAD[:2])
def test_a_token_ends_everywhere_at_the_same_moment(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, ahead: float, record_property: Record
) -> None:
    """Whatever the clock of a server says, and of the host at which it was created, a token ends by the database's."""
    operator, other = office(durable.url(tables), ahead), office(durable.url(tables), -ahead)
    secrets, ids = people(operator)
    hosts = [*together(lambda each: host(durable, tables, AHEAD=str(each)), AHEAD)]
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
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
    until(lambda: time.time() > ends_at)
    assert listed(other, token_id)["status"] == "expired"
    operator.revoke(ids["valid"])
    watch.expect({"valid": 401})
    watch.leave()
    until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))
    seen = listed(operator, ids["valid"])
    used = max(watch.last("valid", number) for number in range(3)) + time.time() - time.monotonic()
    assert abs(datetime.fromisoformat(seen["last_used_at"]).timestamp() - used) < 1.5 + watch.delay()
    assert abs(datetime.fromisoformat(seen["revoked_at"]).timestamp() - used) < 2 + watch.delay()
    record_property("seconds before its end at which each host accepted it last", [round(ends_at - x, 3) for x in last])
