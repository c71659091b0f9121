"""What the benchmark's servers serve: they call :func:`app` in their own process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp

BARE, OURS, FLOOR = "no guard", "freegpt_auth", "the floor"
CONTENDER, FOLDER = "BENCHMARK_CONTENDER", "BENCHMARK_FOLDER"
TOKENS, SECRETS = "api_tokens.json", "secrets.txt"

BODY = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"content":"Hello"}}]}'
CHUNKS = 10_000
CHUNK = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"delta":{"content":"Hello"}}]}\n\n'
STREAM = "/v1/stream"

_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
_STREAM_HEADERS = [(b"content-type", b"text/event-stream")]


def app() -> ASGIApp:
    """Return the contender that the environment names, ready to be served."""
    name, folder = os.environ[CONTENDER], Path(os.environ[FOLDER])
    # Each process imports only what it serves: memory is measured too.
    if name == BARE:
        return application
    if name == OURS:
        from freegpt_auth import BearerTokenMiddleware  # noqa: PLC0415

        return BearerTokenMiddleware(application, store=folder / TOKENS)
    secrets = (folder / SECRETS).read_text().split()
    if name == FLOOR:
        from floor import Floor  # noqa: PLC0415

        return Floor(application, secrets, str(folder / TOKENS))
    from rivals import RIVALS  # noqa: PLC0415

    return RIVALS[name].build(secrets, application)


async def live(receive: Any, send: Any) -> None:
    """Go through the lifespan."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the request, and answer it with little or with a long stream."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == STREAM:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        for _ in range(CHUNKS):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": BODY})
