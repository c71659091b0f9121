"""Sending of a denial to a client that may still upload a body, or that opens a WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from .denials import Denial

BODY_LIMIT = 64 * 1024 * 1024
"""Most bytes of a refused request's body that are received and dropped before the response ends."""

BODY_TIMEOUT = 5.0
"""Longest time for that, in seconds."""

_LONG = len("999999")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


async def deny_http(scope: Scope, send: Send, denial: Denial) -> bool:
    """Send the denial at once, and return whether :func:`end_http` must end the response."""
    body = b"" if scope["method"] == "HEAD" else denial.body
    headers = [*denial.headers]
    uploads, may_be_long = _upload(scope)
    if may_be_long:
        headers.append((b"connection", b"close"))  # without it uvicorn receives the rest of the body, without a limit
    await send({"type": "http.response.start", "status": denial.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": uploads})
    return uploads


def _upload(scope: Scope) -> tuple[bool, bool]:
    """Return whether the request may have a body, and whether it may be so long that the connection must close."""
    if not scope.get("http_version", "1.1").startswith("1"):
        return True, False  # HTTP/2: the length is optional, and a stream ends without its connection
    uploads = may_be_long = False  # without either header there is no body: RFC 9112, 6.3
    for name, value in scope["headers"]:
        if name in _FRAMING:
            uploads = uploads or value != b"0"
            may_be_long = may_be_long or name == b"transfer-encoding" or len(value) > _LONG
    return uploads, may_be_long


async def end_http(receive: Receive, send: Send) -> None:
    """End the response once the request has ended, or a limit is reached.

    A server closes a connection if the response ends before the request: a client in mid-upload then sees a reset in
    place of the response. The denial is sent before the body is drained: draining first would send ``100 Continue`` to
    a client that waits for it.
    """
    received = 0
    with anyio.move_on_after(BODY_TIMEOUT):
        while received < BODY_LIMIT:
            message = await receive()
            if not message.get("more_body", False):
                break
            received += len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def deny_websocket(scope: Scope, receive: Receive, send: Send, denial: Denial) -> None:
    """Deny the upgrade: by an HTTP response if the server supports it, else by closing with code 1008."""
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        # uvicorn 0.50 adds its own Content-Length, and clients reject a response with two.
        headers = [header for header in denial.headers if header[0] != b"content-length"]
        await send({"type": "websocket.http.response.start", "status": denial.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": denial.body, "more_body": False})
    else:
        await send({"type": "websocket.close", "code": 1008})
