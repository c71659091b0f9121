"""How a refusal reaches a client that may be in the middle of an upload, or about to open a WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from .denials import Denial

BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of a refused request's body that are received and dropped before its connection is given up."""

BODY_TIMEOUT = 5.0
"""Seconds for which they are."""

_LONG = len("999999")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


async def deny_http(scope: Scope, send: Send, denial: Denial) -> bool:
    """Send the whole answer at once, and tell whether the response is still to be ended: see :func:`end_http`."""
    body = b"" if scope["method"] == "HEAD" else denial.body
    headers = [*denial.headers]
    uploads, may_be_long = _upload(scope)
    if may_be_long:
        headers.append((b"connection", b"close"))  # else uvicorn goes on receiving after the response, for ever
    await send({"type": "http.response.start", "status": denial.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": uploads})
    return uploads


def _upload(scope: Scope) -> tuple[bool, bool]:
    """Tell whether a body may come, and whether it may be a megabyte or more that only closing the connection ends."""
    if not scope.get("http_version", "1.1").startswith("1"):
        return True, False  # HTTP/2 need not tell a length, and ends a stream
    uploads = may_be_long = False  # without either header there is no body: RFC 9112, 6.3
    for name, value in scope["headers"]:
        if name in _FRAMING:
            uploads = uploads or value != b"0"
            may_be_long = may_be_long or name == b"transfer-encoding" or len(value) > _LONG
    return uploads, may_be_long


async def end_http(receive: Receive, send: Send) -> None:
    """End the response when the request has ended.

    A server closes a connection whose response ends before its request, and a client that is still uploading then sees
    a reset in place of the answer. Draining first would answer ``Expect: 100-continue`` with a "go on".
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
    """Refuse before the upgrade: as a real HTTP response where the server can send one, else by closing."""
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        # The server frames this response: uvicorn 0.50 adds a length of its own, and clients refuse a response with two.
        headers = [header for header in denial.headers if header[0] != b"content-length"]
        await send({"type": "websocket.http.response.start", "status": denial.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": denial.body, "more_body": False})
    else:
        await send({"type": "websocket.close", "code": 1008})
