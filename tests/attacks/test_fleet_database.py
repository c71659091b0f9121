"""What becomes of a database under servers that are asked without a pause: killed, stopped, away when they start."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.fleet import CLOSED, USUAL, people, together, until, usage_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.fleet import Record

LEASE = 5.0
POLL = 1.0

GUNICORN = """
import os, sys
os.environ["HOME"] = os.getcwd()  # gunicorn keeps a socket there
*_, host, _, port = sys.argv
sys.argv = ["gunicorn", "app:app", "--preload", "--workers", "2", "--bind", f"{host}:{port}"]
sys.argv += ["--worker-class", "uvicorn_worker.UvicornWorker"]
sys.path.insert(0, os.getcwd())
from gunicorn.app.wsgiapp import run
run()
"""


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_database_that_goes_and_comes_undoes_nothing(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, end: str, rounds: int, record_property: Record
) -> None:
    """Killed or stopped, for less or more than the lease, it keeps every revocation and use; hosts follow by themselves."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator)
    hosts = together(lambda _: host(durable, tables), range(2))
    watch = watched(hosts, secrets)
    watch.expect(USUAL)
    back, revoked = [], {}
    for number in range(2 * rounds):
        token_id, fading = operator.create(f"fading-{number}")
        watch.forget("fading")
        watch.add("fading", fading)
        watch.expect({"fading": 200})
        done = operator.revoke(token_id)
        revoked[token_id] = fading
        getattr(durable, end)()
        gone = time.monotonic()
        try:
            if number % 2:
                watch.expect({**CLOSED, "fading": 503})
                watch.see({"valid": 503, "fading": 503}, gone + LEASE + 0.05, range(2))
                watch.hold({**CLOSED, "fading": 503}, POLL)
        finally:
            durable.start()
        back.append(watch.expect({**USUAL, "fading": 401}))
        assert not [one for one in watch.given if one.who == "fading" and one.status == 200 and one.began > done.ended]
    for secret in revoked.values():
        assert {each.server.get("/", secret) for each in hosts} == {401}
    watch.end()
    until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))
    record_property("times", 2 * rounds)
    record_property("back after at most", round(max(back), 2))
    record_property("slowest answer", round(watch.slowest(), 2))
    record_property("uses, all counted once", watch.accepted("valid"))


def test_a_killed_server_loses_what_it_had_not_written(
    durable: Any, tables: str, office: Any, host: Any, watched: Any, record_property: Record
) -> None:
    """What a server that is killed has counted since it last wrote is lost, and nothing is invented; a stopped one loses none."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator)
    killed = host(durable, tables, INTERVAL="1.0")
    watch = watched([killed], secrets, may_break=True)
    watch.expect(USUAL)
    until(lambda: usage_of(durable.url(tables), ids["valid"]) > 0)
    watch.hold({"valid": 200}, 1.5)
    os.kill(killed.server.process.pid, signal.SIGKILL)
    killed.server.process.wait()
    died = time.monotonic()
    watch.end()
    accepted, known = watch.accepted("valid"), usage_of(durable.url(tables), ids["valid"])
    of_late = sum(one.who == "valid" and one.status == 200 and one.began > died - 1.5 for one in watch.given)
    assert 0 <= accepted - known <= of_late
    stopped = host(durable, tables, INTERVAL="100")
    again = watched([stopped], secrets)
    again.expect(USUAL)
    again.end()
    stopped.server.stop()
    assert usage_of(durable.url(tables), ids["valid"]) == known + again.accepted("valid")
    record_property("uses accepted", accepted)
    record_property("of them in the last interval and the write after it", of_late)
    record_property("lost", accepted - known)


@pytest.mark.parametrize("program", ["uvicorn", "uvicorn --workers", "gunicorn --preload"])
def test_a_server_that_starts_without_its_database_is_closed(
    tmp_path: Path,
    durable: Any,
    tables: str,
    office: Any,
    host: Any,
    watched: Any,
    program: str,
    record_property: Record,
) -> None:
    """It answers 503 and says so once in each process, and recovers by itself as soon as the database is there."""
    operator = office(durable.url(tables))
    secrets, ids = people(operator)
    (tmp_path / "launch.py").write_text(GUNICORN)
    script = tmp_path / "launch.py" if program.startswith("gunicorn") else None
    alone = host(durable, tables, *(("--workers", "2")[: 2 * program.endswith("--workers")]), script=script, away=True)
    watch = watched([alone], secrets, may_break=script is not None)
    watch.expect(CLOSED)
    watch.hold(CLOSED, 1.5)
    for process, lines in alone.told().items():
        assert len(lines) == 1, (process, lines)
        assert "Its tokens are answered 503 until this is mended" in lines[0]
    alone.proxy.accept()
    back = watch.expect(USUAL)
    watch.hold(USUAL, 0.5)
    watch.end()
    until(lambda: usage_of(durable.url(tables), ids["valid"]) == watch.accepted("valid"))
    record_property("processes", len(alone.told()))
    record_property("back after", round(back, 2))
