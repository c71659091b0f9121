"""What it costs to know when and how often each token was used: to record it, and to write it."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Result, in_turns, longest_turn, over, single, spread

from freegpt_auth.stores.file.usage import UsageDatabase, read_usage
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

SECTION = "Usage"
TOKENS, USED = 100_000, 1_000
RECORDED = 2_000
"""Uses of one turn: what a server records from one write to the next at 1,000 requests per second."""

RECORD_ROUNDS, FLUSH_ROUNDS, CROWD_ROUNDS = 200, 25, 25
PROCESSES = 4
NEVER = 1e6
TIME_LIMIT = 300.0

# One of several processes: at each line it records and writes, at the moment that the line says, and tells how long it took.
_WORKER = f"""
import random, sys, time
from freegpt_auth.usage.recorder import UsageRecorder
from freegpt_auth.stores.file.usage import UsageDatabase
path, *ids = sys.stdin.readline().split()
recorder = UsageRecorder(UsageDatabase(path), interval={NEVER})
for line in sys.stdin:
    for token_id in random.sample(ids, {USED}):
        recorder.record((token_id, time.time()))
    time.sleep(max(0.0, float(line) - time.monotonic()))
    began = time.monotonic()
    recorder.flush()
    print(time.monotonic() - began, flush=True)
"""


def measure() -> Iterator[Result]:
    """Measure one use, one write, and the writes of several processes at once."""
    with database() as (path, ids):
        recorder = UsageRecorder(UsageDatabase(path), interval=NEVER)
        recording = in_turns(_recording(recorder), RECORD_ROUNDS)
        recorder.flush()
        figures = in_turns(_flushing(recorder, ids), FLUSH_ROUNDS)
    cost = over(recording["recorded"], recording["nothing"])
    yield Result(SECTION, "recording one use", spread(cost), "µs", 0.15)
    name = f"writing {USED:,} used tokens among {TOKENS:,}"
    yield Result(SECTION, name, spread(figures["written"]), "ms", 20.0)
    yield Result(SECTION, f"{name}, beside an event loop that is always busy", spread(figures["beside"]), "ms")
    yield Result(SECTION, "longest that this event loop was held meanwhile", spread(figures["held"]), "ms")
    yield Result(SECTION, "longest that it is held where nothing is written", spread(figures["idle"]), "ms")
    yield from _crowd()


def _recording(recorder: UsageRecorder) -> dict[str, Callable[[], float]]:
    recorder.record(("first", 0.0))
    pending = recorder._pending  # noqa: SLF001
    token_id, now = os.urandom(6).hex(), time.time()

    def recorded() -> float:
        began = time.perf_counter()
        for _ in itertools.repeat(None, RECORDED):
            recorder.record((token_id, now))
        seconds = time.perf_counter() - began
        pending.clear()
        return seconds / RECORDED * 1e6

    def nothing() -> float:
        began = time.perf_counter()
        for _ in itertools.repeat(None, RECORDED):
            pass
        return (time.perf_counter() - began) / RECORDED * 1e6

    return {"recorded": recorded, "nothing": nothing}


@contextmanager
def database() -> Generator[tuple[str, list[str]]]:
    """Make a usage database in which every token has been used."""
    with tempfile.TemporaryDirectory() as folder:
        ids = [os.urandom(6).hex() for _ in range(TOKENS)]
        path = str(Path(folder, "api_tokens.usage.db"))
        UsageDatabase(path).add(Batch("bench", 1, dict.fromkeys(ids, (1, time.time()))), 5.0)
        yield path, ids


def _flushing(recorder: UsageRecorder, ids: list[str]) -> dict[str, Callable[[], float]]:
    def write() -> float:
        for token_id in random.sample(ids, USED):
            recorder.record((token_id, time.time()))
        began = time.perf_counter()
        recorder.flush()
        return (time.perf_counter() - began) * 1000

    def idle() -> float:
        time.sleep(0.02)
        return 0.0

    return {
        "written": write,
        "beside": lambda: _watched(write)[0],
        "held": lambda: _watched(write)[1],
        "idle": lambda: _watched(idle)[1],
    }


def _watched(work: Callable[[], float]) -> tuple[float, float]:
    """Return what *work* returns, which another thread does, and how long an event loop was held meanwhile."""
    return asyncio.run(longest_turn(asyncio.to_thread(work)))


def _crowd() -> Iterator[Result]:
    with database() as (path, ids), ExitStack() as stack:
        workers = [stack.enter_context(_worker(path, ids)) for _ in range(PROCESSES)]
        alone, together = [], []
        for _ in range(CROWD_ROUNDS):
            for worker in workers:
                alone += _flush_at_once([worker])
            together += _flush_at_once(workers)
        counted = sum(usage.use_count for usage in read_usage(path).values())
    own = statistics.median(alone)
    waits = [max(0.0, one - own) for one in together]
    crowd = f"{PROCESSES} processes that write at once"
    lost = float(TOKENS + 2 * CROWD_ROUNDS * PROCESSES * USED - counted)
    yield Result(SECTION, "one process that writes alone", spread(alone), "ms")
    yield Result(SECTION, crowd, spread(together), "ms")
    note = "the time of a write beyond that of one that is alone"
    yield Result(SECTION, f"{crowd}: how long one waits", spread(waits), "ms", note=note)
    yield Result(SECTION, f"{crowd}: the longest that one waited", single(max(waits)), "ms", 100.0)
    yield Result(SECTION, f"{crowd}: uses lost", single(lost), "", 0.0)


@contextmanager
def _worker(path: str, ids: list[str]) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-c", _WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as worker:  # noqa: S603
        limit = threading.Timer(TIME_LIMIT, worker.kill)
        limit.start()
        try:
            assert worker.stdin
            print(path, *ids, file=worker.stdin, flush=True)
            yield worker
        finally:
            worker.communicate()
            limit.cancel()


def _flush_at_once(workers: list[subprocess.Popen[str]]) -> list[float]:
    """Let each write at the same moment, and return the milliseconds of each."""
    moment = time.monotonic() + 0.02
    for worker in workers:
        print(moment, file=worker.stdin, flush=True)
    return [float(worker.stdout.readline()) * 1000 for worker in workers if worker.stdout]
