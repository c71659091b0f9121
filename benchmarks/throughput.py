"""Behind uvicorn: requests a second, processor time and the slowest requests, with one worker and 1,000 tokens.

The servers of all contenders run at the same time and take turns. Servers have one core, the client has another. The
guard counts uses in a thread every 2 seconds: a turn is longer, so that the counting falls inside.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import results
from asking import Line, ask_until, request_with
from measure import in_turns, over, ratios
from served import BARE, FLOOR, GUARDED, SECRETS, USAGE_OFF
from serving import on_core, processor_time, serving
from token_file import write_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from serving import Server

TOKENS, USED = 1_000, 512
CONNECTIONS = 8
SECONDS = 2.5
"""Length of a turn."""


class Turn(NamedTuple):
    """The figures of one turn.

    Attributes:
        rate: requests a second.
        cost: processor time of the server, in microseconds for each request.
        p99: milliseconds within which 99 of 100 requests were answered.
    """

    rate: float
    cost: float
    p99: float


def measure(rounds: int) -> list[results.Row]:
    """Measure the contenders, and return their figures and those of the guards beside the bare application's."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = Path(folder, "api_tokens.json")
        secrets = write_tokens(store, TOKENS)
        store.with_name(SECRETS).write_text("\n".join(secrets))
        requests = [request_with(secret) for secret in random.sample(secrets, USED)]
        with on_core(0):
            servers = {
                name: stack.enter_context(serving(name, str(store))) for name in (BARE, FLOOR, GUARDED, USAGE_OFF)
            }
        stack.enter_context(on_core(1))
        contenders = {name: partial(_turn, server, cycle(requests)) for name, server in servers.items()}
        turns = in_turns(contenders, rounds)
    counting = ratios([turn.p99 for turn in turns[GUARDED]], [turn.p99 for turn in turns[USAGE_OFF]])
    rows = [row for name in turns for row in _rows(name, turns[name], turns[BARE])]
    return [*rows, results.row(f"{GUARDED}: p99 / usage off", "×", counting)]  # noqa: RUF001


def _turn(server: Server, requests: Iterator[bytes]) -> Turn:
    lines = [Line(server.port, next(requests)) for _ in range(CONNECTIONS)]
    worked, began = processor_time(server), time.monotonic()
    answers = ask_until(lambda: time.monotonic() > began + SECONDS, lines, requests)
    seconds, worked = time.monotonic() - began, processor_time(server) - worked
    for line in lines:
        line.close()
    p99 = statistics.quantiles([answer.ended - answer.began for answer in answers], n=100)[-1]
    return Turn(len(answers) / seconds, worked / len(answers) * 1e6, p99 * 1e3)


def _rows(name: str, turns: Sequence[Turn], bare: Sequence[Turn]) -> Iterator[results.Row]:
    rates, costs, slowest = zip(*turns, strict=True)
    bare_rates, bare_costs, bare_slowest = zip(*bare, strict=True)
    yield results.row(f"{name}: rate", "/s", rates)
    yield results.row(f"{name}: processor time", "µs", costs)
    yield results.row(f"{name}: p99", "ms", slowest)
    if name != BARE:
        yield results.row(f"{name}: rate / bare", "×", ratios(rates, bare_rates))  # noqa: RUF001
        yield results.row(f"{name}: processor time added", "µs", over(costs, bare_costs))
        yield results.row(f"{name}: p99 / bare", "×", ratios(slowest, bare_slowest))  # noqa: RUF001


if __name__ == "__main__":
    results.main("throughput", measure, rounds=15)
