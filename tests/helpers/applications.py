"""What the servers of the tests serve, as source text: each runs in a process of its own."""

from __future__ import annotations

LIFESPAN = """
async def lifespan(receive, send):
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
"""
"""Goes through the lifespan."""

HELLO = f"""
{LIFESPAN}
async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
    await send({{"type": "http.response.body", "body": b"ok"}})
"""
"""Lets everybody in."""
