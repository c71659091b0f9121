"""A database that is killed, stopped, or absent when servers start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.fleet import LEASE, POLL, usage_of
from tests.helpers.programs import GUNICORN
from tests.helpers.watch import CLOSED, USUAL, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import Host, StartFleet
    from tests.helpers.postgresql import Cluster


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_restart_undoes_nothing(durable: Cluster, fleet: StartFleet, end: str, rounds: int, record: Record) -> None:
    """A restarted database keeps every revocation and use; hosts close after the lease and reopen by themselves."""
    ours = fleet({}, {})
    watch, back, revoked = ours.watch, [], []
    for number in range(2 * rounds):
        token_id = ours.issue_fading()
        revoked.append(watch.secrets["fading"])
        done = ours.operator.revoke(token_id)
        getattr(durable, end)()
        gone = time.monotonic()
        try:
            if number % 2:
                watch.expect({**CLOSED, "fading": 503})
                watch.check({"valid": 503, "fading": 503}, gone + LEASE + 0.05, range(2))
                watch.hold({**CLOSED, "fading": 503}, POLL)
        finally:
            durable.start()
        back.append(watch.expect({**USUAL, "fading": 401}))
        assert not [one for one in watch.accepted("fading") if one.began > done.ended]
    for secret in revoked:
        assert {each.server.get("/", secret) for each in ours.hosts} == {401}
    ours.end()
    record(restarts=2 * rounds, back_after_at_most=max(back), slowest_answer=watch.slowest())


def test_killed_server_invents_no_use(fleet: StartFleet, record: Record) -> None:
    """A killed server loses at most the uses since its last write."""
    ours = fleet({"INTERVAL": "1.0"}, may_break=True)
    watch, valid = ours.watch, ours.ids["valid"]
    wait_until(lambda: usage_of(ours.url, valid) > 0)
    watch.hold({"valid": 200}, 1.5)
    process = ours.hosts[0].server.process
    process.kill()
    process.wait()
    died = time.monotonic()
    watch.end()
    lost = len(watch.accepted("valid")) - usage_of(ours.url, valid)
    recent = sum(one.began > died - 1.5 for one in watch.accepted("valid"))
    assert 0 <= lost <= recent
    record(uses=len(watch.accepted("valid")), in_the_last_interval=recent, lost=lost)


PROGRAMS = {
    "uvicorn": "",
    "uvicorn --workers": pytest.param("--workers 2", marks=pytest.mark.slow),
    "gunicorn --preload": pytest.param("--preload", marks=pytest.mark.slow),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_server_starts_closed_without_database(tmp_path: Path, fleet: StartFleet, program: str, record: Record) -> None:
    """The server answers 503, logs one line per process, and recovers when the database is reachable."""
    options: dict[str, Any] = {"away": True, "arguments": tuple(program.split())}
    if program == "--preload":
        options["script"] = tmp_path / "launch.py"
        options["script"].write_text(GUNICORN)
    ours = fleet(options, may_break=program == "--preload", expected=CLOSED)
    alone: Host = ours.hosts[0]
    ours.watch.hold(CLOSED, 1.5)
    for process, lines in alone.warnings_by_process().items():
        assert len(lines) == 1, (process, lines)
        assert "Its tokens are answered 503 until this is mended" in lines[0]
    alone.proxy.accept()
    back = ours.watch.expect(USUAL)
    ours.watch.hold(USUAL, 0.5)
    ours.end()
    record(processes=len(alone.warnings_by_process()), back_after=back)
