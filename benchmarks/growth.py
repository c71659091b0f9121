"""Sends ten million requests through the middleware, in process, and prints the memory after each million.

It is a program of its own, since memory can only be told of a whole process.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resident import resident
from served import SECRETS, TOKENS

from freegpt_auth import BearerTokenMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MILLION = 1_000_000
MILLIONS = 10
RELOAD = 100_000
"""Requests after which the token file is written anew."""

INTERVAL = 0.2
"""Seconds between two writes of usage: a tenth of the default, since requests come ten times as fast as from a server."""

WRONG = 10
"""One request of so many presents a token that nobody has, and no two the same."""


async def application(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer, as little as can be."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def run(folder: Path) -> None:
    """Print the resident KiB after each million of requests."""
    app = BearerTokenMiddleware(application, store=folder / TOKENS, usage_interval=INTERVAL)
    credentials = _credentials((folder / SECRETS).read_text().split())
    for _ in range(MILLIONS):
        for _ in range(MILLION // RELOAD):
            await _send(app, credentials)
            (folder / TOKENS).write_bytes((folder / TOKENS).read_bytes())
            await asyncio.sleep(0.03)  # the next request looks at the file
        assert app._usage is not None  # noqa: SLF001
        await asyncio.to_thread(app._usage.flush)  # noqa: SLF001  else it depends on the moment what waits to be written
        gc.collect()
        print(resident("self"), flush=True)


async def _send(app: BearerTokenMiddleware, credentials: Iterator[bytes]) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "client": ("127.0.0.1", 50_000)}
    for _ in range(RELOAD):
        headers = [(b"host", b"localhost:8000"), (b"authorization", next(credentials)), (b"content-length", b"0")]
        await app({**scope, "headers": headers}, _receive, _ignore)


def _credentials(secrets: Iterable[str]) -> Iterator[bytes]:
    for number, secret in enumerate(cycle(secrets)):
        yield b"Bearer " + (secret.encode() if number % WRONG else b"sk-%d" % number)


async def _receive() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(_message: Any) -> None:
    pass


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
