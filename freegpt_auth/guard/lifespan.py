"""The lifespan of the wrapped application, completed for an application that has none.

ASGI allows an application to reject the lifespan: the server then sends no shutdown, and the last uses would be lost.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STOPPED = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})
_LAST = _STOPPED | {"lifespan.startup.failed"}

_logger = logging.getLogger("freegpt_auth")


class Lifespan:
    """Forwards the lifespan to an application, and completes it in place of an application that has none.

    An application has no lifespan if it returns without an answer, sends a message of another protocol, or raises
    before it has received ``lifespan.startup``. Any other exception is the application's failure and reaches the
    server.

    Args:
        receive: of the server.
        send: of the server.
        stop: awaited before the answer to the shutdown is forwarded: the server stops its event loop on that message.
    """

    def __init__(self, receive: Receive, send: Send, stop: Callable[[Lifespan], Awaitable[None]]) -> None:
        self._receive = receive
        self._send = send
        self._stop = stop
        self._due: str | None = None  # the event without an answer yet
        self._has_answered = False
        self._is_over = False
        self._is_foreign = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run *app* through the lifespan."""
        try:
            await app(scope, self._forward_event, self._forward_answer)
        except Exception as error:
            if self._has_answered or (self._due and not self._is_foreign):
                raise
            if not self._is_foreign:
                _logger.warning("the application raised %r before its startup, and is served without a lifespan", error)
        while not self._is_over:
            event = self._due or (await self._forward_event())["type"]
            await self._forward_answer({"type": f"{event}.complete"})

    async def _forward_event(self) -> Message:
        message = await self._receive()
        self._due = message["type"]
        return message

    async def _forward_answer(self, message: Message) -> None:
        kind = message["type"]
        if not kind.startswith("lifespan."):
            self._is_foreign = True
            raise RuntimeError(f"{kind} is no answer to a lifespan event")
        self._due, self._has_answered, self._is_over = None, True, kind in _LAST
        if kind in _STOPPED:
            await self._stop(self)
        await self._send(message)
