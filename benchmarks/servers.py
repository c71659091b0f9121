"""What guarding costs behind a real server: requests a second, the slowest of a hundred, and long streams.

All contenders' servers are up at the same time and take turns; the one worker of each has a core, the load another.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from load import Load, load, stream
from measure import TIMES, Result, in_turns, ratio, spread
from rivals import RIVALS
from served import BARE, BODY, FLOOR, OURS, STREAM
from serving import SERVERS, make_tokens, on_core, processor_time, requests, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from serving import Server, Tokens

SIZE = 1_000
CONTENDERS = (BARE, FLOOR, OURS, "starlette", "vllm", "base-http")
STREAMING = (BARE, OURS, "starlette", "base-http")
ROUNDS = 31
STREAMS = 31
TURN = 0.1
"""Seconds of one turn: short against the drift of a machine's speed, hundreds of requests for the slowest of a hundred."""

RATE = "requests a second"
NOTE = (
    "The floor's ratio says what can be reached. To find the secret among the headers and to digest it takes 4 µs of a "
    "server's core, whose caches hold other things, and 1.1 µs in a loop."
)
"""Where the time goes, by an application that does that and nothing else."""


class Turn(NamedTuple):
    """What came of one turn.

    Attributes:
        load: what the client saw.
        worked: microseconds of a core that the server took for a request.
    """

    load: Load
    worked: float


def measure() -> Iterator[Result]:
    """Measure behind each server."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_tokens(folder, SIZE)
        for title, command in SERVERS.items():
            section = f"Behind {title}: one worker, {SIZE:,} tokens"
            with contextlib.ExitStack() as stack:
                servers = {name: stack.enter_context(serve(command, name, tokens)) for name in CONTENDERS}
                stack.enter_context(on_core(1))
                yield from _small(section, servers, tokens)
                yield from _streams(section, {name: servers[name] for name in STREAMING}, tokens)


def _small(section: str, servers: dict[str, Server], tokens: Tokens) -> Iterator[Result]:
    """Measure small answers."""
    turns = in_turns({name: _loaded(server, tokens.secrets) for name, server in servers.items()}, ROUNDS)
    rates = {name: [turn.load.rate for turn in values] for name, values in turns.items()}
    worked = {name: [turn.worked for turn in values] for name, values in turns.items()}
    slowest = {name: [turn.load.p99 / 1e3 for turn in values] for name, values in turns.items()}
    waited = spread([100 * turn.load.waited for turn in turns[BARE]])
    yield Result(section, "the load waits for the bare application", waited, "% of the time")
    yield from _plain(section, RATE, rates, "/s")
    yield from _ratios(section, RATE, rates, 0.96, at_least=True)
    yield from _ratios(section, "time of the core for a request", worked)
    yield from _plain(section, "99 of 100 answered within", slowest, "ms")
    yield from _ratios(section, "99 of 100 answered within", slowest, 1.1)


def _streams(section: str, servers: dict[str, Server], tokens: Tokens) -> Iterator[Result]:
    """Measure long answers."""
    request = requests(tokens.secrets[:1], STREAM)[0]
    figures = in_turns({name: _streamed(server.port, request) for name, server in servers.items()}, STREAMS)
    yield from _plain(section, "a stream of 10,000 chunks", figures, "ms")
    yield from _ratios(section, "a stream of 10,000 chunks", figures, 1.01)


def _plain(section: str, what: str, figures: dict[str, list[float]], unit: str) -> Iterator[Result]:
    for name, values in figures.items():
        yield Result(section, f"{what}: {_title(name)}", spread(values), unit)


def _ratios(
    section: str, what: str, figures: dict[str, list[float]], target: float | None = None, *, at_least: bool = False
) -> Iterator[Result]:
    for name, values in figures.items():
        if name != BARE:
            compared = f"{what}: {_title(name)} / {BARE}"
            bound = target if name == OURS else None
            note = NOTE if name == OURS and what == RATE else ""
            yield Result(section, compared, ratio(values, figures[BARE]), TIMES, bound, at_least=at_least, note=note)


def _title(name: str) -> str:
    return RIVALS[name].title if name in RIVALS else name


def _loaded(server: Server, secrets: Sequence[str]) -> Callable[[], Turn]:
    each = itertools.cycle(requests(secrets))

    def take_turn() -> Turn:
        before = processor_time(server)
        came = load(server.port, each, BODY, TURN)
        return Turn(came, (processor_time(server) - before) / came.answered * 1e6)

    return take_turn


def _streamed(port: int, request: bytes) -> Callable[[], float]:
    return lambda: stream(port, request) * 1e3
