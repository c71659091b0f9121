"""How much memory guarding takes, and that it does not grow."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from load import load
from measure import Result, in_turns, over, spread
from resident import resident
from served import BARE, BODY, OURS
from serving import SERVERS, make_tokens, requests, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serving import Tokens

SIZE = 1_000
ROUNDS = 3
REQUESTS = 50_000
SLICE = 0.5
"""Seconds of load between two looks at how many requests were answered."""

SETTLING = 2.5
"""Seconds after which the last uses are written."""

GROWTH_LIMIT = 100.0
"""KiB of each million requests: a tenth of a byte a request. To keep one byte of each would be 977."""

SERVER = "uvicorn with httptools and uvloop"
GROWTH = "No growth over ten million requests"


class Worker(NamedTuple):
    """The resident MiB of a worker.

    Attributes:
        idle: when it has started.
        loaded: after its requests.
    """

    idle: float
    loaded: float


def measure() -> Iterator[Result]:
    """Measure a worker of a server, and then a process that goes on and on."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_tokens(folder, SIZE)
        yield from _workers(tokens)
        yield from _growth(tokens)


def _workers(tokens: Tokens) -> Iterator[Result]:
    section = f"Resident memory of a worker of {SERVER}, {SIZE:,} tokens"
    workers = in_turns({name: _started(name, tokens) for name in (BARE, OURS)}, ROUNDS)
    idle = {name: [worker.idle for worker in values] for name, values in workers.items()}
    loaded = {name: [worker.loaded for worker in values] for name, values in workers.items()}
    for state, figures in (("idle", idle), (f"after {REQUESTS:,} requests", loaded)):
        for name, values in figures.items():
            yield Result(section, f"{name}, {state}", spread(values), "MiB")
        yield Result(section, f"added by {OURS}, {state}", spread(over(figures[OURS], figures[BARE])), "MiB")


def _started(name: str, tokens: Tokens) -> Callable[[], Worker]:
    """Return what starts a worker and tells its memory."""

    def take_turn() -> Worker:
        with serve(SERVERS[SERVER], name, tokens) as server:
            idle = resident(server.process.pid)
            each, answered = itertools.cycle(requests(tokens.secrets)), 0
            while answered < REQUESTS:
                answered += load(server.port, each, BODY, SLICE).answered
            time.sleep(SETTLING)
            return Worker(idle / 1024, resident(server.process.pid) / 1024)

    return take_turn


def _growth(tokens: Tokens) -> Iterator[Result]:
    program = [sys.executable, str(Path(__file__).with_name("growth.py")), str(tokens.folder)]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout  # noqa: S603
    readings = [int(line) for line in output.split()]
    yield Result(GROWTH, "resident after each million", spread([reading / 1024 for reading in readings]), "MiB")
    # Between any two readings, since a single one holds what Python keeps of its last peak.
    growth = [
        (later - earlier) / (second - first)
        for (first, earlier), (second, later) in itertools.combinations(enumerate(readings), 2)
    ]
    yield Result(GROWTH, "more with each million", spread(growth), "KiB", GROWTH_LIMIT)
