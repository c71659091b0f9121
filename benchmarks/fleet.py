"""What tokens in PostgreSQL cost a request: one that memory answers, and one that the database does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter, to_thread
from database import cluster, make, secret_of
from measure import TIMES, Result, in_turns, over, ratio, single, spread
from request_path import BARE, NEVER, Turn, application, bearer, clocked
from token_file import write_tokens

from freegpt_auth import BearerTokenMiddleware, FileTokenStore
from freegpt_auth.stores.postgres import PostgresTokenStore, reads
from freegpt_auth.tokens import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster

SIZES = (1, 1_000, 100_000)
ROUNDS = 25
FILE, COMPLETE, IN_PART = (
    "a token file",
    "PostgreSQL, all tokens in memory",
    "PostgreSQL, memory for half of the tokens",
)

SMALL, LARGE = 1_000, 10_000_000
CACHE = 100
"""Tokens in memory while look-ups are measured: so few that each is of a token that is not there."""

LOOK_UPS, LOOK_UP_ROUNDS = 10, 60
LOOK_UP = "A fleet on PostgreSQL: a request that the database answers"
GUARDED, RESOLVED = "a request whose token is not in memory", "its look-up alone, in the thread that does it"

LIMITS = (1_000, 10_000, 100_000)
"""How many tokens a worker keeps in memory, where its memory is measured."""

TIME_LIMIT = 900.0


def measure() -> Iterator[Result]:
    """Measure requests that memory answers, and then requests that it does not."""
    with cluster() as server:
        for size in SIZES:
            yield from _cached(server, size)
        began = time.perf_counter()
        make(server, "large", LARGE)
        seconds = time.perf_counter() - began
        make(server, "small", SMALL)
        yield from _looked_up(server)
        yield Result(LOOK_UP, f"making {LARGE:,} tokens by SQL", single(seconds), "s")
        for limit in LIMITS:
            yield from _remembered(server.url("large"), limit)


# --- from memory


def _cached(server: Cluster, size: int) -> Iterator[Result]:
    section = f"A fleet on PostgreSQL: a request that memory answers, {size:,} token{'s' * (size > 1)}"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "api_tokens.json")
        secrets = write_tokens(path, size)
        url = make(server, f"cached_{size}")
        PostgresTokenStore(url).merge(FileTokenStore(path).tokens())
        limits = {COMPLETE: size, IN_PART: size // 2}
        ours = {name: PostgresTokenStore(url, cache_limit=limit) for name, limit in limits.items() if limit}
        for store in ours.values():
            stack.callback(store.close)
        usage = {FILE: str(path.with_suffix(".usage.db"))}
        header = bearer(secrets[len(secrets) // 2])
        turns = {BARE: Turn(application, header)}
        for name, store in {FILE: FileTokenStore(path), **ours}.items():
            guard = BearerTokenMiddleware(application, store=store, usage=usage.get(name, url), usage_interval=NEVER)
            assert guard._usage is not None  # noqa: SLF001
            turns[name] = Turn(guard, header, after=guard._usage._pending.clear)  # noqa: SLF001
        loop = asyncio.new_event_loop()
        figures = in_turns({name: clocked(loop, turn) for name, turn in turns.items()}, ROUNDS)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    added = {name: over(values, figures[BARE]) for name, values in figures.items() if name != BARE}
    for name, values in added.items():
        yield Result(section, f"added with {name}", spread(values), "µs")
    for name, values in added.items():
        if name != FILE:
            yield Result(section, f"{name} / {FILE}", ratio(values, added[FILE]), TIMES, 1.1)


# --- from the database


def _looked_up(server: Cluster) -> Iterator[Result]:
    loop = asyncio.new_event_loop()
    with contextlib.ExitStack() as stack:
        turns: dict[tuple[str, int], Callable[[], float]] = {}
        for name, size in (("small", SMALL), ("large", LARGE)):
            store = PostgresTokenStore(server.url(name), cache_limit=CACHE)
            stack.callback(store.close)
            link = stack.enter_context(contextlib.closing(store._address.connect()))  # noqa: SLF001
            for part, turn in _parts(loop, store, link, size).items():
                turns[part, size] = turn
        figures = in_turns(turns, LOOK_UP_ROUNDS)
    loop.close()
    for (part, size), values in figures.items():
        target = 2.0 if part in (GUARDED, RESOLVED) else None
        yield Result(LOOK_UP, f"{part}; {size:,} tokens", spread(values), "ms", target)
    for part in (GUARDED, RESOLVED):
        both = ratio(figures[part, LARGE], figures[part, SMALL])
        yield Result(LOOK_UP, f"{part}: {LARGE:,} tokens / {SMALL:,}", both, TIMES)


def _parts(
    loop: asyncio.AbstractEventLoop, store: PostgresTokenStore, link: Connection, size: int
) -> dict[str, Callable[[], float]]:
    """Return what takes a look-up's time, as a whole and in parts: each returns the ms of one."""
    secrets = map(secret_of, itertools.cycle(random.sample(range(size), min(size, 50_000))))
    guard = BearerTokenMiddleware(application, store=store)
    limiter = CapacityLimiter(1)

    def look_up() -> None:
        _, token = reads.look_up(link, digest_of(next(secrets)))
        assert token is not None

    async def request() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [bearer(next(secrets))]}
        await guard(scope, _nothing, _accepted)

    async def hop() -> None:
        await to_thread.run_sync(tuple, limiter=limiter)

    def resolve() -> None:
        assert store.resolve(digest_of(next(secrets))) is not None

    loop.run_until_complete(request())
    return {
        GUARDED: lambda: loop.run_until_complete(_each(request)),
        RESOLVED: lambda: _timed(resolve),
        "the query, and a token made of its row": lambda: _timed(look_up),
        "the shortest query there is": lambda: _timed(lambda: link.run("SELECT 1")),
        "to a thread and back": lambda: loop.run_until_complete(_each(hop)),
    }


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(LOOK_UPS):
        work()
    return (time.perf_counter() - began) / LOOK_UPS * 1e3


async def _each(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(LOOK_UPS):
        await work()
    return (time.perf_counter() - began) / LOOK_UPS * 1e3


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


async def _accepted(message: Any) -> None:
    assert message.get("status", 200) == 200  # noqa: PLR2004


# --- in memory


def _remembered(url: str, limit: int) -> Iterator[Result]:
    """Let a worker look up five times as many tokens as it keeps."""
    section = f"A fleet on PostgreSQL: memory of a worker that keeps {limit:,} of {LARGE:,} tokens"
    output = subprocess.run(  # noqa: S603
        [sys.executable, str(Path(__file__).with_name("fleet_round.py")), url, str(limit)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=TIME_LIMIT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    worker = json.loads(output)
    before, *resident = (kib / 1024 for kib in worker["readings"])
    yield Result(section, "resident at start", single(before), "MiB")
    for times, mib in enumerate(resident, start=1):
        yield Result(section, f"resident after {times * limit:,} tokens were looked up", single(mib), "MiB")
    grown = single(resident[-1] / resident[1])
    yield Result(section, f"after {5 * limit:,} tokens / after {2 * limit:,}", grown, TIMES, 1.1)
    yield Result(section, "look-ups, of 8 requests at the same time", single(worker["rate"]), "/s")
