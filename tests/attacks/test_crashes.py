"""Commands that are killed at any moment: their output is true, and the next command works at once.

A launcher starts two to four commands at once and kills each with SIGKILL at a random moment: in the whole life of a
command, in its first part, or in the milliseconds after its temporary file appeared, while it replaces the token file.
A temporary file that is left behind proves that a kill fell into that time.
"""

from __future__ import annotations

import json
import random
import stat
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from freegpt_auth.stores.file.store import FRESHNESS, LOCK_TIMEOUT
from tests.helpers.programs import Program
from tests.helpers.watch import in_parallel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.attacks.conftest import Record
    from tests.helpers.servers import Serve, Server

# One batch a line. A warm command is a fork of this process, which has imported everything and has no threads; a cold
# one is a new interpreter. All commands wait at a gate. An alarm ends a command that hangs.
LAUNCHER = """
import json, os, signal, sys, time, traceback
import filelock
from freegpt_auth.cli import main

def start(arguments, cold, gate, opener):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(60)
            os.close(opener)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.read(gate, 1)
            if cold:
                os.execv(sys.executable, [sys.executable, "-m", "freegpt_auth", *arguments])
            status = main(arguments)
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    return child, reading

def lives(children):
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, child, ended) is None for child, _ in children)

for line in sys.stdin:
    signal.alarm(120)
    batch = json.loads(line)
    gate, opener = os.pipe()
    children = [start(arguments, batch["cold"], gate, opener) for arguments, _ in batch["commands"]]
    os.close(gate)
    os.close(opener)
    began = time.perf_counter()
    while batch["at_sight"] and not any(name.endswith(".tmp") for name in os.listdir("tokens")) and lives(children):
        pass
    now = time.perf_counter()
    pairs = zip(children, batch["commands"])
    kills = sorted((now + after, child) for (child, _), (_, after) in pairs if after is not None)
    for moment, child in kills:
        time.sleep(max(0, moment - time.perf_counter()))
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    seconds = time.perf_counter() - began
    outputs = [os.read(reading, 4096).decode() for _, reading in children]
    for _, reading in children:
        os.close(reading)
    print(json.dumps([seconds, list(zip(statuses, outputs))]), flush=True)
"""

APPLICATION = """
from freegpt_auth import BearerTokenMiddleware
from starlette.responses import PlainTextResponse

app = BearerTokenMiddleware(PlainTextResponse("served"))
"""

KILLED = -9
SAMPLE = 8
"""Tokens of each kind that are presented to the server between two rounds."""


class Order(NamedTuple):
    """A command, and the name of its token."""

    kind: str
    name: str
    arguments: list[str]

    def is_done(self, before: Any, after: Any) -> bool:
        """Return whether the command turns the record *before* into the record *after*."""
        if self.kind == "create":
            return before is None and after is not None and after["revoked_at"] is None
        if self.kind == "delete":
            return after is None
        revoked_at = before["revoked_at"] or (after or {}).get("revoked_at") or "an instant"
        return bool(after == {**before, "revoked_at": revoked_at})


class Outcome(NamedTuple):
    """The exit status and the output of a command."""

    status: int
    output: str


class Launcher(Program):
    """The process that starts commands and kills them."""

    cold = False

    def run(
        self, orders: list[Order], kills: list[float | None], *, at_sight: bool = False
    ) -> tuple[float, list[Outcome]]:
        """Start the commands at once, kill each after its seconds; return the duration of all, and the outcomes."""
        commands = [(order.arguments, after) for order, after in zip(orders, kills, strict=True)]
        self.send({"commands": commands, "cold": self.cold, "at_sight": at_sight})
        seconds, outcomes = self.receive()
        assert {status for status, _ in outcomes} <= {0, KILLED}, outcomes
        return seconds, [Outcome(*outcome) for outcome in outcomes]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["warm", "cold"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """Run the launcher, of forks that start within a millisecond, or of new interpreters."""
    with Launcher(LAUNCHER) as launcher:
        launcher.cold = request.param
        yield launcher
        assert launcher.communicate() == ("", "")


class Ledger:
    """The expected contents of the token file, from the output of the commands and the effects of killed ones.

    Attributes:
        live: the printed secrets that must work, by name.
        dead: the revoked and deleted secrets.
        tally: counts of the commands.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Any] = {}
        self._issued = 0
        self.live: dict[str, str] = {}
        self.dead: list[str] = []
        self.tally: Counter[str] = Counter()

    def create(self) -> Order:
        """Return a command that creates a token of a new name."""
        self._issued += 1
        name = f"token-{self._issued}"
        return Order("create", name, ["--store", str(self._path), "create", name])

    def plan(self, count: int) -> list[Order]:
        """Return random commands for different tokens, in proportions that keep some tens of tokens."""
        number = len(self._rows)
        kinds = random.choices(("create", "revoke", "delete"), (max(45 - number, 0), 12, number / 2), k=count)
        targets = random.sample(sorted(self._rows), count)
        return [
            self.create() if kind == "create" else self._order(kind, target)
            for kind, target in zip(kinds, targets, strict=True)
        ]

    def plan_a_change(self) -> Order:
        """Return a command that must write."""
        if len(self._rows) < 40 or not self.live:
            return self.create()
        return self._order(random.choice(("revoke", "delete")), random.choice(sorted(self.live)))

    def _order(self, kind: str, name: str) -> Order:
        return Order(kind, name, ["--store", str(self._path), kind, self._rows[name]["id"]])

    def settle(self, orders: list[Order], outcomes: list[Outcome]) -> None:
        """Compare the file with the output of the commands; a killed command may have been done or not."""
        rows, others = self._read(), dict(self._rows)
        untouched = dict(rows)
        for order, outcome in zip(orders, outcomes, strict=True):
            before, after = others.pop(order.name, None), untouched.pop(order.name, None)
            done, killed = order.is_done(before, after), outcome.status == KILLED
            # A whole line is a promise, also if the command was killed after it.
            acknowledged = outcome.output.endswith("\n")
            assert done or (not acknowledged and after == before), (order, outcome, before, after)
            assert acknowledged or killed, (order, outcome)
            if acknowledged and order.kind == "create":
                self.live[order.name] = outcome.output.partition("\n")[0]
            elif done and order.name in self.live:
                self.dead.append(self.live.pop(order.name))
            self.tally.update(
                commands=1, acknowledged=acknowledged, killed=killed, killed_after_the_change=killed and after != before
            )
        # All other records are unchanged, in the same order.
        assert list(untouched.items()) == list(others.items())
        self._rows = rows

    def leftovers(self) -> int:
        """Return the number of temporary files; check that there are no other files."""
        names = {path.name for path in self._path.parent.iterdir()} - {self._path.name, f"{self._path.name}.lock"}
        assert all(name.endswith(".tmp") for name in names), names
        return len(names)

    def _read(self) -> dict[str, Any]:
        rows = json.loads(self._path.read_bytes())["tokens"]
        for unique in ("name", "id", "digest"):
            assert len({row[unique] for row in rows}) == len(rows)
        assert {stat.S_IMODE(path.stat().st_mode) for path in self._path.parent.iterdir()} == {0o600}
        return {row["name"]: row for row in rows}


class Round:
    """Kills some commands, and then runs one to its end.

    Attributes:
        longest: the longest command after killed ones, in seconds.
    """

    def __init__(self, launcher: Launcher, ledger: Ledger) -> None:
        self._launcher = launcher
        self._ledger = ledger
        self._life = statistics.median(self.leave_alone() for _ in range(15))
        self.longest = 0.0

    def leave_alone(self) -> float:
        """Run one command to its end and return its seconds; it removes temporary files of killed ones."""
        order = self._ledger.plan_a_change()
        seconds, outcomes = self._launcher.run([order], [None])
        assert outcomes[0].status == 0, outcomes
        self._ledger.settle([order], outcomes)
        assert self._ledger.leftovers() == 0
        return seconds

    def play(self) -> None:
        """Kill two to four commands, and check that the next one works."""
        orders = self._ledger.plan(random.randint(2, 4))
        aim = random.choice(("life", "work", "write", "write"))
        _, outcomes = self._launcher.run(orders, [self._moment(aim) for _ in orders], at_sight=aim == "write")
        left = self._ledger.leftovers()
        self._ledger.tally.update(rounds=1, rounds_killed_in_a_write=left > 0, leftovers=left)
        self._ledger.settle(orders, outcomes)
        self.longest = max(self.longest, self.leave_alone())

    def _moment(self, aim: str) -> float | None:
        if aim == "write":  # from 10 us to 10 ms after the temporary file appeared
            return 10 ** random.uniform(-5, -2)
        if aim == "work":  # before the wait for the servers at the end of a command
            return random.uniform(0, self._life - 2 * FRESHNESS)
        return random.uniform(0, 1.2 * self._life) if random.random() < 0.8 else None


def check_server(server: Server, live: list[str], dead: list[str]) -> None:
    """Check that a running server accepts every secret of *live* and none of *dead*."""
    assert set(in_parallel(lambda secret: server.get(token=secret), live)) <= {200}
    assert set(in_parallel(lambda secret: server.get(token=secret), dead)) <= {401}


def test_killed_writers_break_no_promise(
    launcher: Launcher, tmp_path: Path, serve: Serve, rounds: int, record: Record
) -> None:
    """A killed command has done all or nothing, its output holds, and the next command works at once.

    The token file shows that, and so does a server of two workers that reads it meanwhile.
    """
    rounds *= 30 if launcher.cold else 60
    folder = tmp_path / "tokens"
    folder.mkdir()
    ledger = Ledger(folder / "api_tokens.json")
    one = Round(launcher, ledger)
    (tmp_path / "app.py").write_text(APPLICATION)
    environment = {
        "FREEGPT_AUTH_STORE": str(folder / "api_tokens.json"),
        "FREEGPT_AUTH_USAGE": str(tmp_path / "usage.db"),
    }
    server = serve("app:app", "--workers", "2", "--log-level", "warning", **environment)
    for number in range(rounds):
        one.play()
        if number % 3 == 0:
            check_server(server, [*ledger.live.values()][-SAMPLE:], ledger.dead[-SAMPLE:])
    check_server(server, [*ledger.live.values()], ledger.dead)
    log = server.stop()
    record(**ledger.tally, longest_next_command=one.longest)
    assert "cannot be used" not in log, log
    assert "Traceback" not in log, log
    assert one.longest < LOCK_TIMEOUT
    # A test that never kills during a write proves nothing. About two rounds in five leave a temporary file: later
    # writers of the same round remove files, and a command that was killed before its first write leaves none.
    assert ledger.tally["rounds_killed_in_a_write"] >= rounds / 20
    assert ledger.tally["killed_after_the_change"] >= rounds / 30
