"""Sixteen commands at a time beside four busy workers: nothing is lost, nothing fails, every use is counted.

Each story is about one token. A command creates it, and then nothing ends it, or one command does, or two that race. It is
asked for after every step, and clients use the tokens of all stories meanwhile. Whoever asks knows whether the token's end
had been ordered when the answer came, and whether it was done when the request went out: the answer must fit.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


AT_ONCE = 16
WORKERS = 4
CLIENTS = 4

# Which worker answers is told to those it lets in. Counts are exact only where the server runs a lifespan.
APPLICATION = """
import os
from freegpt_auth import BearerTokenMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

app = BearerTokenMiddleware(Starlette(routes=[Route("/", lambda _: PlainTextResponse(str(os.getpid())))]))
"""

ENDS: list[tuple[str, ...]] = [
    (),
    ("revoke",),
    ("delete",),
    ("revoke", "revoke"),
    ("delete", "delete"),
    ("revoke", "delete"),
    ("delete", "revoke"),
]
"""How a token may end: the commands that race for it."""


class Ended(NamedTuple):
    """A command that has ended: how, and from when to when it ran."""

    kind: str
    status: int
    out: str
    err: str
    began: float
    ended: float


@dataclass
class Ticket:
    """A token, what becomes of it, and what is known of that by now.

    Attributes:
        token_id: its id.
        secret: its secret.
        end: the commands that race for it.
        ending: whether they have been started.
        ended_at: when the first of them had said that it did its work.
    """

    token_id: str
    secret: str
    end: tuple[str, ...]
    ending: bool = False
    ended_at: float = float("inf")

    @property
    def state(self) -> str:
        """What it is when all is over."""
        return "deleted" if "delete" in self.end else "revoked" if self.end else "active"


class Shell:
    """Runs commands, sixteen at a time.

    Attributes:
        most: how many have run at one time.
        ended: all that ran.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._running: set[int] = set()
        self.most = 0
        self.ended: list[Ended] = []

    def start(self, *arguments: str) -> Future[Ended]:
        """Run ``python -m freegpt_auth`` as soon as there is room."""
        return self._pool.submit(self._run, arguments)

    def _run(self, arguments: tuple[str, ...]) -> Ended:
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", "freegpt_auth", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self._running.add(process.pid)
            self.most = max(self.most, len(self._running))
            out, err = process.communicate(timeout=120)
            ended = Ended(arguments[0], process.returncode, out, err, began, time.monotonic())
            self._running.discard(process.pid)
        self.ended.append(ended)
        return ended


class Clients:
    """Use tokens, and count what the server must have counted.

    Attributes:
        counted: the accepted requests of each token, by its id.
        answers: how often each status code was answered.
        workers: all that have let somebody in.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self.counted: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.workers: set[bytes] = set()

    def use(self, ticket: Ticket) -> None:
        """Ask for a token, on a connection of its own, and see that the answer is one that may be given."""
        began = time.monotonic()
        status, body = self._get(ticket.secret)
        right = {401} if began > ticket.ended_at else {200, 401} if ticket.ending else {200}
        assert status in right, (ticket, began, time.monotonic())
        with self._lock:
            self.answers[status] += 1
            if status == 200:
                self.counted[ticket.token_id] += 1
                self.workers.add(body)

    def _get(self, secret: str) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
            connection.request("GET", "/", headers={"Authorization": f"Bearer {secret}"})
            response = connection.getresponse()
            return response.status, response.read()


def create(shell: Shell, end: tuple[str, ...]) -> Ticket:
    """Create a token. All have one name: that hinders nobody."""
    created = shell.start("create", "one of many", "--json").result()
    assert created.status == 0, created
    issued = json.loads(created.out)
    return Ticket(issued["id"], issued["token"], end)


def tell(shell: Shell, clients: Clients, tickets: list[Ticket], end: tuple[str, ...]) -> None:
    """Play the story of one token, and ask for it as soon as a command has returned."""
    ticket = create(shell, end)
    tickets.append(ticket)
    for _ in range(WORKERS):
        clients.use(ticket)
    ticket.ending = bool(end)
    outcomes = []
    for future in as_completed([shell.start(kind, ticket.token_id) for kind in end]):
        outcomes.append(future.result())
        if outcomes[-1].status == 0:
            ticket.ended_at = min(ticket.ended_at, time.monotonic())
            for _ in range(2 * WORKERS):
                clients.use(ticket)
    check(outcomes)


def check(outcomes: list[Ended]) -> None:
    """See that all commands of a race succeeded, but for those that came after a deletion and found no token."""
    done = Counter(outcome.kind for outcome in outcomes if outcome.status == 0)
    deletions = [outcome for outcome in outcomes if outcome.kind == "delete"]
    assert done["delete"] == min(1, len(deletions)), outcomes
    for outcome in outcomes:
        found_none = outcome.status == 1 and "no token" in outcome.err and outcome.err.count("\n") == 1
        assert outcome.status == 0 or (deletions and found_none), outcomes


def pour(clients: Clients, stable: list[Ticket], tickets: list[Ticket], over: threading.Event) -> None:
    """Use the stable tokens and those of the latest stories until all stories are told."""
    while not over.is_set():
        clients.use(random.choice(stable))
        clients.use(random.choice([*stable, *tickets[-2 * AT_ONCE :]]))
        over.wait(0.005)  # leave the commands some of the machine


def compare(tickets: list[Ticket], counted: Counter[str], listed: list[dict[str, Any]]) -> None:
    """See that the file, the list and the usage hold what the commands and the clients know, and nothing else."""
    kept = {ticket.token_id: ticket for ticket in tickets if ticket.state != "deleted"}
    assert {record["id"]: (record["status"], record["use_count"]) for record in listed} == {
        token_id: (ticket.state, counted[token_id]) for token_id, ticket in kept.items()
    }
    assert {token.id: digest for digest, token in FileTokenStore("api_tokens.json").tokens().items()} == {
        token_id: digest_of(ticket.secret) for token_id, ticket in kept.items()
    }
    usage = UsageDatabase("api_tokens.usage.db").read()
    assert {token_id: used.use_count for token_id, used in usage.items()} == {
        token_id: count for token_id, count in counted.items() if token_id in kept
    }


def test_sixteen_writers_and_four_workers_lose_nothing(
    tmp_path: Path,
    serve: Callable[..., Any],
    command: Callable[..., subprocess.CompletedProcess[str]],
    rounds: int,
    record_property: Callable[[str, object], None],
) -> None:
    """No command fails for contention, each is in force when it returns, and tokens and uses are exact in the end."""
    (tmp_path / "app.py").write_text(APPLICATION)
    shell, over = Shell(), threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        stable = [*pool.map(lambda _: create(shell, ()), range(AT_ONCE))]
    server = serve("app:app", "--workers", str(WORKERS), "--log-level", "warning")
    clients, tickets = Clients(int(server.url.rpartition(":")[2])), [*stable]
    ends = [ENDS[number % len(ENDS)] for number in range(90 * rounds)]
    with ThreadPoolExecutor(CLIENTS) as crowd:
        pouring = [crowd.submit(pour, clients, stable, tickets, over) for _ in range(CLIENTS)]
        try:
            with ThreadPoolExecutor(2 * AT_ONCE) as stories:  # so that there is always a command that waits for room
                [*stories.map(lambda end: tell(shell, clients, tickets, end), ends)]
        finally:
            over.set()
    for one in pouring:
        one.result()
    said = server.stop()
    assert "cannot be used" not in said, said
    assert "Traceback" not in said, said
    compare(tickets, clients.counted, json.loads(command("list", "--json").stdout))
    assert len(clients.workers) == WORKERS
    assert shell.most == AT_ONCE
    record_property("commands", len(shell.ended))
    record_property("found no token", sum(ended.status == 1 for ended in shell.ended))
    record_property("longest command", round(max(ended.ended - ended.began for ended in shell.ended), 3))
    record_property("answers", dict(clients.answers))
