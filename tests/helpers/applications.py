"""Source text of the ASGI applications that test servers run in processes of their own."""

from __future__ import annotations

LIFESPAN = """
async def lifespan(receive, send):
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
"""
"""Completes the lifespan protocol."""

HELLO = f"""
{LIFESPAN}
async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
    await send({{"type": "http.response.body", "body": b"ok"}})
"""
"""Answers every request with 200 and ``ok``."""
