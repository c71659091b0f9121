"""Requests to an ASGI application in this process."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Answer:
    """The scope that an application received, and the messages that it sent."""

    scope: Scope
    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The status code of the response."""
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The whole body of the response."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])


Ask = Callable[..., Awaitable[Answer]]
"""The type of :func:`ask`, for tests that take it as a fixture."""

Headers = list[tuple[bytes, bytes]]

LIFESPAN: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
"""The messages that an application receives in its lifespan."""


def bearer(secret: str) -> Headers:
    """Return the header of a client that presents a secret."""
    return [(b"authorization", f"Bearer {secret}".encode())]


async def ask(
    app: ASGIApp,
    *,
    path: str = "/v1/models",
    headers: Headers | None = None,
    incoming: list[Message] | None = None,
    **scope_items: Any,
) -> Answer:
    """Send one request to *app* and return its answer.

    Args:
        app: the application.
        path: the path of the request.
        headers: the headers of the request.
        incoming: the messages that the application receives; by default one empty body, or a WebSocket's connect.
        scope_items: further items of the scope: ``method="POST"``, ``type="websocket"``.
    """
    kind = scope_items.setdefault("type", "http")
    scope: Scope = {"path": path, "headers": headers or [], "client": ("127.0.0.1", 50000), **scope_items}
    if kind == "http":
        scope.setdefault("method", "GET")
    first = {"type": "http.request", "body": b"", "more_body": False}
    messages = list(incoming or [first if kind == "http" else {"type": f"{kind}.connect"}])
    answer = Answer(scope)

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        answer.messages.append(message)

    await app(scope, receive, send)
    return answer


async def statuses(app: ASGIApp, *secrets: str | None) -> list[int]:
    """Present each secret in a request of its own, and return the status codes."""
    return [(await ask(app, headers=[] if secret is None else bearer(secret))).status for secret in secrets]


async def plain(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer 200, as an application does that knows nothing of authentication."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})


async def hello(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer 200 and the caller: ``{"user": …, "identity": …, "scopes": […]}``."""
    user = scope["user"]
    content = {"user": user.display_name, "identity": user.identity, "scopes": scope["auth"].scopes}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
