"""One round of the benchmark of reading again: a process that has read nothing yet. It prints its figures as JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import sys
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import longest_turn

from freegpt_auth import BearerTokenMiddleware, FileTokenStore
from freegpt_auth.tokens import Token, digest_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CLIENTS = 20
"""Requests that are answered at the same time while the file is read, and as many that wait for it."""

STALE = 0.03
"""Seconds after which the store relies on its last look no more."""

MIB = 2**20


def secret_of(number: int) -> str:
    """Return the secret of a token."""
    return f"sk-{number:049}"


class Child:
    """One round: a process that has read nothing yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "api_tokens.json"
        self.names = cycle(("one", "two"))
        self.name, self.processor = "", 0.0
        self.folder = folder
        self.store = FileTokenStore(self.path)
        size = int((folder / "size").read_text())
        self.secret = secret_of(size - 1)
        self.digest = digest_of(self.secret)
        self.figures: dict[str, list[float]] = defaultdict(list)

    def replace(self) -> None:
        """Put the other file in the place of the token file."""
        self.name, new = next(self.names), self.folder / "new"
        new.unlink(missing_ok=True)
        os.link(self.folder / self.name, new)
        new.replace(self.path)

    def load(self) -> float:
        """Replace the file, and return the seconds that the store takes to know."""
        self.replace()
        began, worked = time.perf_counter(), time.process_time()
        token = self.store.resolve(self.digest)
        seconds = time.perf_counter() - began
        self.processor = time.process_time() - worked
        assert token is not None
        assert token.name == self.name
        return seconds

    def measure_loads(self, reloads: int) -> None:
        """Measure seconds and memory, at start and later."""
        gc.collect()
        forget_peak()
        before, peak_before = private_memory(), peak_memory()
        self.figures["first"].append(self.load())
        self.figures["kept"].append(private_memory() - before)
        self.figures["peak"].append(peak_memory() - peak_before)
        forget_peak()
        for _ in range(reloads):
            self.figures["later"].append(self.load())
            self.figures["processor"].append(self.processor)
        self.figures["kept_later"].append(private_memory() - before)
        self.figures["peak_later"].append(peak_memory() - peak_before)

    async def measure_gaps(self, reloads: int) -> None:
        """Measure how long the event loop is held, with requests meanwhile and without, and with nothing read at all."""
        guard = BearerTokenMiddleware(_application, store=self.store, public_paths=["/health"])
        waiting, answered = _asker(guard, "/v1/models", self.secret), _asker(guard, "/health", "")
        seconds = min(self.figures["later"])
        self.replace()
        await asyncio.sleep(STALE)
        await waiting()  # anyio imports its backend at the first use of a thread, which holds the loop 50 ms and more
        for _ in range(reloads):
            for load, clients, requests in (("idle", 0, 1), ("busy", CLIENTS, CLIENTS)):
                stop = asyncio.Event()
                others = [asyncio.create_task(_repeat(answered, stop)) for _ in range(clients)]
                self.figures[f"{load}_quiet"].append((await longest_turn(asyncio.sleep(seconds)))[1])
                self.replace()
                await asyncio.sleep(STALE)
                together = asyncio.gather(*(waiting() for _ in range(requests)))
                self.figures[f"{load}_reload"].append((await longest_turn(together))[1])
                token = self.store.peek(self.digest)
                assert isinstance(token, Token)
                assert token.name == self.name
                stop.set()
                await asyncio.gather(*others)


async def _repeat(ask: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    while not stop.is_set():
        await ask()
        await asyncio.sleep(0.001)


def _asker(app: Any, path: str, secret: str) -> Callable[[], Awaitable[None]]:
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {secret}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}

    async def ask() -> None:
        await app(dict(scope), _receive, _expect_success)

    return ask


async def _application(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _receive() -> Any:
    return {"type": "http.disconnect"}


async def _expect_success(message: Any) -> None:
    assert message.get("status", 200) == 200  # noqa: PLR2004


def private_memory() -> float:
    """Return the MiB that this process holds and shares with none."""
    kib = re.findall(r"Private_(?:Clean|Dirty): +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    return sum(map(int, kib)) * 1024 / MIB


def peak_memory() -> float:
    """Return the most MiB that this process held since :func:`forget_peak`."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib) * 1024 / MIB


def forget_peak() -> None:
    """Let :func:`peak_memory` begin with what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Be one round."""
    logging.getLogger("freegpt_auth").setLevel(logging.INFO)  # what is said of each reading is part of it
    logging.getLogger("freegpt_auth").addHandler(logging.NullHandler())
    folder, reloads = sys.argv[1:]
    child = Child(Path(folder))
    child.measure_loads(int(reloads))
    asyncio.run(child.measure_gaps(int(reloads)))
    print(json.dumps(child.figures))


if __name__ == "__main__":
    main()
