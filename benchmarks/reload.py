"""Reading a changed token file of 100,000 tokens: time, memory, and the longest hold of the event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import results
from measure import longest_turn
from served import application, expect_success, receive_nothing, scope_with
from token_file import write_tokens

from freegpt_auth import BearerTokenMiddleware, FileTokenStore
from freegpt_auth.tokens import digest_of

TOKENS = 100_000
RELOADS = 6
CLIENTS = 20
"""Requests under way during a reload."""

PUBLIC = "/health"
_LAST, _RENAMED = f"client {TOKENS - 1}", "renamed"
"""The name of the last token in each of two files."""

STALE = 0.03
"""Seconds after which the store checks the file again at the next request."""

_UNITS = {"first": "s", "reload": "s", "memory": "MiB", "held": "ms", "held without a reading": "ms"}


class TwoFiles:
    """Two token files that differ in the name of the last token, and replace each other.

    Attributes:
        path: the token file of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "api_tokens.json"
        self._folder = folder
        self._names = cycle((("one", _LAST), ("two", _RENAMED)))

    def replace(self) -> str:
        """Replace the token file by the other one, and return the name of its last token."""
        file, name = next(self._names)
        new = self._folder / "new"
        new.unlink(missing_ok=True)
        os.link(self._folder / file, new)
        new.replace(self.path)
        return name


def measure(rounds: int) -> list[results.Row]:
    """Measure in *rounds* new processes: memory that a process has used before hides a part of the growth."""
    figures: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        secret = write_tokens(one, TOKENS)[-1]
        two.write_bytes(one.read_bytes().replace(_LAST.encode(), _RENAMED.encode()))
        two.chmod(0o600)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for _ in range(rounds):
                for name, values in pool.submit(_round, Path(folder), secret).result().items():
                    figures[name] += values
    return [results.row(name, unit, figures[name]) for name, unit in _UNITS.items()]


def _round(folder: Path, secret: str) -> dict[str, list[float]]:
    """Return the figures of one process, which has read nothing yet."""
    files = TwoFiles(folder)
    store, digest = FileTokenStore(files.path), digest_of(secret)
    figures: dict[str, list[float]] = defaultdict(list)

    def load() -> float:
        name = files.replace()
        began = time.perf_counter()
        token = store.resolve(digest)
        seconds = time.perf_counter() - began
        assert token is not None
        assert token.name == name
        return seconds

    gc.collect()
    before = private_memory()
    figures["first"].append(load())
    figures["memory"].append(private_memory() - before)
    for _ in range(RELOADS):
        figures["reload"].append(load())
    asyncio.run(_hold(store, secret, files, figures))
    return figures


async def _hold(store: FileTokenStore, secret: str, files: TwoFiles, figures: dict[str, list[float]]) -> None:
    """Measure the holds of the event loop while the file is read and other requests are answered."""
    guard = BearerTokenMiddleware(application, store=store, public_paths=[PUBLIC])
    stop = asyncio.Event()

    async def ask(path: str, presented: str) -> None:
        await guard(scope_with(presented, path), receive_nothing, expect_success)

    async def repeat() -> None:
        while not stop.is_set():
            await ask(PUBLIC, "")
            await asyncio.sleep(0.001)

    async def reload() -> None:
        files.replace()
        await asyncio.sleep(STALE)
        figures["held"].append((await longest_turn(asyncio.gather(*(ask("/", secret) for _ in range(CLIENTS)))))[1])

    await reload()  # the first use of a thread imports anyio's backend, which holds the loop for 50 ms
    figures["held"].clear()
    others = [asyncio.create_task(repeat()) for _ in range(CLIENTS)]
    for _ in range(RELOADS):
        await reload()
        idle = longest_turn(asyncio.sleep(min(figures["reload"])))
        figures["held without a reading"].append((await idle)[1])
    stop.set()
    await asyncio.gather(*others)


def private_memory() -> float:
    """Return the memory in MiB that this process holds and shares with no other."""
    kib = re.findall(r"Private_(?:Clean|Dirty): +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    return sum(map(int, kib)) / 1024


if __name__ == "__main__":
    results.main("reload", measure, rounds=5)
