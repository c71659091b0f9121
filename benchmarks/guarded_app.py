"""What the servers of the suite serve, guarded: it answers, as little as can be, which process answered."""

from __future__ import annotations

import os
from typing import Any

from served import live

from freegpt_auth import BearerTokenMiddleware

WORKER = b"worker"
"""The header that names the process."""


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Go through the lifespan, and answer whatever is asked."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    headers = [(WORKER, str(os.getpid()).encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


app = BearerTokenMiddleware(application)
