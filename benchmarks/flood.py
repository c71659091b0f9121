"""What a flood of unknown tokens does to good requests, where each unknown token is a question to the database.

One worker of uvicorn has a core, the clients and the database another. Good requests come at a steady rate and are counted
from when they were due.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from askers import request_with
from database import cluster, make, secret_of
from load import wait_until_ready
from measure import TIMES, Result, in_turns, ratio, single, spread
from serving import on_core
from steady import Answers, Order, work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SECTION = "A fleet on PostgreSQL: a flood of unknown tokens"
SIZE, CACHE, GOOD = 10_000, 1_000, 100
RATE = 500.0
"""Good requests a second."""

FLOODS = (300.0, 1_000.0, 0.0)
"""Unknown tokens a second; 0 for as many as are answered over all connections."""

COLD = 20.0
"""Requests a second whose tokens are good, and not in memory."""

ROUNDS = 12
SECONDS = 1.0
LINES = 300
"""Connections of the flood: more than may wait for the database at the same time."""

IN_PART, COMPLETE = "a table larger than memory", "a table in memory"
LIMITS = {IN_PART: CACHE, COMPLETE: 2 * SIZE}
_COMMAND = ("uvicorn", "guarded_app:app", "--no-access-log", "--log-level", "critical", "--timeout-keep-alive", "600")


class Clients(NamedTuple):
    """The clients of one server, by what they present."""

    good: Connection
    cold: Connection
    unknown: Connection


class Case(NamedTuple):
    """What one turn is about.

    Attributes:
        table: which server is asked.
        rate: of the flood; ``None`` where there is none.
        cold: it is about good tokens that are not in memory.
    """

    table: str
    rate: float | None
    cold: bool = False


CASES = (
    *(Case(IN_PART, rate) for rate in FLOODS),
    Case(COMPLETE, 1_000.0),
    *(Case(IN_PART, rate, cold=True) for rate in FLOODS[1:]),
)


class Asked(NamedTuple):
    """What came of asking at the same time, in the order of :class:`Clients`."""

    good: Answers
    cold: Answers | None
    unknown: Answers | None


class Turn(NamedTuple):
    """What came of one turn: without the flood, and with it. Each comes first in every other turn."""

    quiet: Asked
    flooded: Asked


def measure() -> Iterator[Result]:
    """Measure with a table that is larger than the cache, and with one that is not."""
    with contextlib.ExitStack() as stack, on_core(1):
        url = make(stack.enter_context(cluster()), "flooded", SIZE)
        clients = {name: stack.enter_context(_clients(url, limit)) for name, limit in LIMITS.items()}
        figures = in_turns({case: _turn(clients[case.table], case) for case in CASES}, ROUNDS)
    for case, turns in figures.items():
        answered = statistics.median(turn.flooded.unknown.rate for turn in turns if turn.flooded.unknown)
        flood = f"{answered:,.0f} unknown a second{'' if case.rate else ', all that will go'}"
        yield from (_cold if case.cold else _warm)(f"{case.table}, {flood}", case, turns)


def _warm(title: str, case: Case, turns: list[Turn]) -> Iterator[Result]:
    """Tell of good requests that memory answers."""
    assert all(set(asked.good.statuses) == {200} for turn in turns for asked in turn)
    quiet, flooded = ([getattr(turn, half).good.times for turn in turns] for half in Turn._fields)
    yield Result(SECTION, f"{title}: half of the good ones, quiet", spread(list(map(statistics.median, quiet))), "ms")
    yield Result(SECTION, f"{title}: half of the good ones", spread(list(map(statistics.median, flooded))), "ms")
    before, after = list(map(_p99, quiet)), list(map(_p99, flooded))
    yield Result(SECTION, f"{title}: 99 of 100, quiet", spread(before), "ms")
    yield Result(SECTION, f"{title}: 99 of 100", spread(after), "ms")
    target = 2.0 if case.rate else None
    yield Result(SECTION, f"{title}: 99 of 100 / quiet", ratio(after, before), TIMES, target)


def _cold(title: str, _case: Case, turns: list[Turn]) -> Iterator[Result]:
    """Tell of good requests for which the database is asked, as it is for the flood."""
    for half, words in (("quiet", "good ones not in memory, quiet"), ("flooded", "good ones not in memory")):
        cold = [getattr(turn, half).cold for turn in turns]
        yield Result(SECTION, f"{title}: {words}", spread([statistics.median(one.times) for one in cold]), "ms")
        refused, asked = sum(one.statuses[503] for one in cold), sum(len(one.times) for one in cold)
        yield Result(SECTION, f"{title}: {words}, answered 503", single(100 * refused / asked), "%")


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[-1]


def _turn(clients: Clients, case: Case) -> Callable[[], Turn]:
    quiet_first = itertools.cycle((True, False))

    def take_turn() -> Turn:
        if next(quiet_first):
            quiet = _asked(clients, case._replace(rate=None))
            return Turn(quiet, _asked(clients, case))
        flooded = _asked(clients, case)
        return Turn(_asked(clients, case._replace(rate=None)), flooded)

    return take_turn


def _asked(clients: Clients, case: Case) -> Asked:
    orders = (Order(RATE, SECONDS), Order(COLD, SECONDS) if case.cold else None)
    flood = None if case.rate is None else Order(case.rate, SECONDS)
    busy = [(client, order) for client, order in zip(clients, (*orders, flood), strict=True) if order]
    for client, order in busy:
        client.send(order)
    came = {id(client): client.recv() for client, _ in busy}
    return Asked(*(came.get(id(client)) for client in clients))


@contextlib.contextmanager
def _clients(url: str, limit: int) -> Iterator[Clients]:
    good = itertools.cycle([request_with(secret_of(number)) for number in range(GOOD)])
    cold = (request_with(secret_of(number)) for number in itertools.cycle(range(GOOD, SIZE)))
    unknown = (request_with(f"sk-unknown-{number:040}") for number in itertools.count())
    with _served(url, limit) as port, contextlib.ExitStack() as stack:
        lines = ((good, 8), (cold, 8), (unknown, LINES))
        yield Clients(*(stack.enter_context(_client(port, requests, number)) for requests, number in lines))


@contextlib.contextmanager
def _client(port: int, requests: Iterator[bytes], connections: int) -> Iterator[Connection]:
    orders, theirs = multiprocessing.Pipe()
    # Forked, so that a client has its own copy of what it is to send.
    client = multiprocessing.get_context("fork").Process(target=work, args=(theirs, port, requests, connections))
    client.start()
    try:
        yield orders
        orders.send(None)
        client.join(30)
    finally:
        client.kill()
        client.join()


@contextlib.contextmanager
def _served(url: str, limit: int) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "FREEGPT_AUTH_STORE": url,
        "FREEGPT_AUTH_CACHE": str(limit),
    }
    with on_core(0):
        process = subprocess.Popen([sys.executable, "-m", *_COMMAND, "--port", str(port)], env=environment)  # noqa: S603
    try:
        wait_until_ready(port, request_with(secret_of(0)), b"")
        yield port
    finally:
        process.terminate()
        process.wait(30)
