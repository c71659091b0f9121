"""The application that the benchmarks guard, in process or behind a server, which calls :func:`app`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floor import Floor

from freegpt_auth import BearerTokenMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp

BARE, FLOOR, GUARDED, USAGE_OFF = "bare", "floor", "freegpt_auth", "usage off"
CONTENDER = "BENCHMARK_CONTENDER"
"""The environment variable that names the guard to serve: one of the four above."""

STORE = "FREEGPT_AUTH_STORE"
SECRETS = "secrets.txt"
"""The file beside the token file from which the floor reads its secrets."""

WORKER = b"worker"
"""The response header with the number of the process that answered."""

BODY = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"content":"Hello"}}]}'
_HEADERS = [(b"content-length", str(len(BODY)).encode()), (WORKER, str(os.getpid()).encode())]


def app() -> ASGIApp:
    """Return the application behind the guard that the environment names."""
    name = os.environ[CONTENDER]
    if name == BARE:
        return application
    if name in (GUARDED, USAGE_OFF):
        return BearerTokenMiddleware(application, usage="off" if name == USAGE_OFF else None)
    store = Path(os.environ[STORE])
    return Floor(application, store.with_name(SECRETS).read_text().split(), str(store))


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the request and send a short answer, or pass the lifespan."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def scope_with(secret: str, path: str = "/v1/models") -> Any:
    """Return the ASGI scope of a short request that presents *secret*."""
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {secret}".encode())]
    return {"type": "http", "method": "GET", "path": path, "headers": headers}


async def receive_nothing() -> Any:
    """Return the end of an empty request body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def expect_success(message: Any) -> None:
    """Take a message of the response, which must not be a refusal."""
    assert message.get("status", 200) == 200, message  # noqa: PLR2004
