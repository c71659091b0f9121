"""Sixteen commands at a time beside four busy workers: nothing is lost, no command fails, every use is counted.

Each story has one token. A command creates it; then it stays, or one command ends it, or two commands race for its end.
The token is presented after every step, and clients use the tokens of all stories meanwhile. Each client knows whether
an end was ordered before the answer, and whether it was done before the request: the answer must agree.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of
from tests.helpers.watch import in_parallel, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from tests.attacks.conftest import Record
    from tests.helpers.servers import Serve

    Ended = subprocess.CompletedProcess[str]
    Command = Callable[..., Ended]


AT_ONCE, WORKERS, CLIENTS = 16, 4, 4

# The body names the worker. Counts are exact only with a lifespan.
APPLICATION = """
import os
from freegpt_auth import BearerTokenMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

app = BearerTokenMiddleware(Starlette(routes=[Route("/", lambda _: PlainTextResponse(str(os.getpid())))]))
"""

ENDS = [end for count in range(3) for end in product(("revoke", "delete"), repeat=count)]
"""The commands that race for the end of a token."""


@dataclass
class Ticket:
    """A token and its end.

    Attributes:
        token_id: the id.
        secret: the secret.
        end: the commands that race for the end of the token.
        ending: whether they have started.
        ended_at: the time at which the first of them had succeeded.
    """

    token_id: str
    secret: str
    end: tuple[str, ...]
    ending: bool = False
    ended_at: float = float("inf")

    @property
    def state(self) -> str:
        """The state of the token after its story."""
        return "deleted" if "delete" in self.end else "revoked" if self.end else "active"


class Shell:
    """Runs commands, sixteen at a time.

    Attributes:
        most: the largest number of simultaneous commands.
        ended: all finished commands.
        seconds: their durations.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._running: list[object] = []
        self.most = 0
        self.ended: list[Ended] = []
        self.seconds: list[float] = []

    def start(self, *arguments: str) -> Future[Ended]:
        """Run ``python -m freegpt_auth`` once fewer than sixteen commands run."""
        return self._pool.submit(self._run, arguments)

    def _run(self, arguments: tuple[str, ...]) -> Ended:
        began = time.monotonic()
        self._running.append(arguments)
        self.most = max(self.most, len(self._running))
        ended = self._command(*arguments)
        self._running.remove(arguments)
        self.seconds.append(time.monotonic() - began)
        self.ended.append(ended)
        return ended


class Clients:
    """Use tokens, and count their accepted requests.

    Attributes:
        counted: the number of accepted requests of each token id.
        answers: the number of answers of each status.
        workers: the workers that accepted a request.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._lock = threading.Lock()
        self.counted: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.workers: set[bytes] = set()

    def use(self, ticket: Ticket) -> None:
        """Present a token on a new connection, and check the answer."""
        began = time.monotonic()
        with closing(http.client.HTTPConnection(*self._address, timeout=60)) as connection:
            connection.request("GET", "/", headers={"Authorization": f"Bearer {ticket.secret}"})
            response = connection.getresponse()
            status, body = response.status, response.read()
        right = {401} if began > ticket.ended_at else {200, 401} if ticket.ending else {200}
        assert status in right, (ticket, began, time.monotonic())
        with self._lock:
            self.answers[status] += 1
            if status == 200:
                self.counted[ticket.token_id] += 1
                self.workers.add(body)


def create(shell: Shell, end: tuple[str, ...]) -> Ticket:
    """Create a token; all tokens have the same name."""
    created = shell.start("create", "one of many", "--json").result()
    assert created.returncode == 0, created
    issued = json.loads(created.stdout)
    return Ticket(issued["id"], issued["token"], end)


def play(shell: Shell, clients: Clients, tickets: list[Ticket], end: tuple[str, ...]) -> None:
    """Play the story of one token, and present it after each command."""
    ticket = create(shell, end)
    tickets.append(ticket)
    for _ in range(WORKERS):
        clients.use(ticket)
    ticket.ending = bool(end)
    outcomes = []
    for future in as_completed([shell.start(kind, ticket.token_id) for kind in end]):
        outcomes.append(future.result())
        if outcomes[-1].returncode == 0:
            ticket.ended_at = min(ticket.ended_at, time.monotonic())
            for _ in range(2 * WORKERS):
                clients.use(ticket)
    check(outcomes)


def check(outcomes: list[Ended]) -> None:
    """Check that all commands of a race succeeded, except those that found no token after a deletion."""
    deletions = [outcome for outcome in outcomes if "delete" in outcome.args]
    assert len([one for one in deletions if one.returncode == 0]) == min(1, len(deletions)), outcomes
    for outcome in outcomes:
        found_none = outcome.returncode == 1 and "no token" in outcome.stderr and outcome.stderr.count("\n") == 1
        assert outcome.returncode == 0 or (deletions and found_none), outcomes


def use_all(clients: Clients, stable: list[Ticket], tickets: list[Ticket], over: threading.Event) -> None:
    """Use the stable tokens and those of the latest stories until all stories are over."""
    while not over.is_set():
        clients.use(random.choice(stable))
        clients.use(random.choice([*stable, *tickets[-2 * AT_ONCE :]]))
        over.wait(0.005)  # leave the commands some of the machine


def compare(tickets: list[Ticket], counted: Counter[str], listed: list[dict[str, Any]]) -> None:
    """Check the file, the list and the usage against the results of the commands and the clients."""
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


def test_concurrent_commands_lose_nothing(
    tmp_path: Path, serve: Serve, command: Command, rounds: int, record: Record
) -> None:
    """No command fails for contention, each is in force when it returns, and tokens and uses are exact at the end."""
    (tmp_path / "app.py").write_text(APPLICATION)
    shell, over = Shell(command), threading.Event()
    stable = in_parallel(lambda _: create(shell, ()), range(AT_ONCE))
    server = serve("app:app", "--workers", str(WORKERS), "--log-level", "warning")
    clients, tickets = Clients(server.address), [*stable]
    clients.use(stable[0])
    # Without a usage database delete leaves no note of the deleted id for uses that are still to be written.
    wait_until(Path("api_tokens.usage.db").exists)
    ends = [ENDS[number % len(ENDS)] for number in range(3 * len(ENDS) * rounds)]
    with ThreadPoolExecutor(CLIENTS) as crowd:
        pouring = [crowd.submit(use_all, clients, stable, tickets, over) for _ in range(CLIENTS)]
        try:
            in_parallel(lambda end: play(shell, clients, tickets, end), ends)  # some commands always wait for room
        finally:
            over.set()
    for one in pouring:
        one.result()
    log = server.stop()
    assert "cannot be used" not in log, log
    assert "Traceback" not in log, log
    compare(tickets, clients.counted, json.loads(command("list", "--json").stdout))
    assert len(clients.workers) == WORKERS
    assert shell.most == AT_ONCE
    found_none = sum(ended.returncode == 1 for ended in shell.ended)
    record(
        commands=len(shell.ended),
        found_no_token=found_none,
        longest_command=max(shell.seconds),
        answers=dict(clients.answers),
    )
