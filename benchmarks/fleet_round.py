"""One worker of the benchmark of memory: it looks up five times as many tokens as it keeps, and prints what it holds.

Memory that was used before is no measure of memory, so each limit has a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

from database import secret_of
from request_path import application, bearer
from resident import resident

from freegpt_auth import BearerTokenMiddleware
from freegpt_auth.stores.postgres import PostgresTokenStore

ROUNDS = 5
"""How many times as many tokens as are kept are looked up."""

CLIENTS = 8
"""Requests under way at the same time."""


async def main(url: str, limit: int) -> None:
    """Fill the cache, and go on."""
    store = PostgresTokenStore(url, cache_limit=limit)
    guard = BearerTokenMiddleware(application, store=store)
    await _ask(guard, range(limit, limit + 2 * CLIENTS))  # whatever is made on first use, and what is read at start
    readings, began = [_kib()], time.perf_counter()
    for number in range(1, ROUNDS + 1):
        await _ask(guard, range(number * limit, (number + 1) * limit))
        readings.append(_kib())
    seconds = time.perf_counter() - began
    held = len(store._cache)  # noqa: SLF001
    store.close()
    print(json.dumps({"readings": readings, "rate": ROUNDS * limit / seconds, "held": held}))


async def _ask(guard: Any, numbers: range) -> None:
    each = iter(numbers)

    async def client() -> None:
        for number in each:
            scope = {"type": "http", "method": "GET", "path": "/", "headers": [bearer(secret_of(number))]}
            await guard(scope, _nothing, _accepted)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


async def _accepted(message: Any) -> None:
    assert message.get("status", 200) == 200  # noqa: PLR2004


def _kib() -> int:
    gc.collect()
    return resident("self")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
