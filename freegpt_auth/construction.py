"""Where a middleware is constructed: in a program, or within the first call of a server's application."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from anyio import NoEventLoopError
from anyio.lowlevel import current_token

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import Receive, Scope, Send

_logger = logging.getLogger("freegpt_auth")


class Unusable:
    """The reason for which a middleware cannot serve, kept until the lifespan or the first request.

    Args:
        error: raised by the settings or by the token source.

    Attributes:
        message: the reason in one sentence.

    Raises:
        Exception: *error*, if no event loop runs: no server is constructing the middleware then.
    """

    def __init__(self, error: Exception) -> None:
        if not _in_event_loop():
            raise error
        self.message: str = str(error)
        if not isinstance(error, ConfigurationError):
            self.message = f"the middleware cannot be constructed: {type(error).__name__}: {error}"
        self._is_reported = False
        if _scope_type() is None:  # a mounted application that is being imported: no lifespan will show the message
            self.report()

    async def fail(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Fail the startup of the lifespan: the server shows the message and ends.

        Raises:
            ConfigurationError: *scope* has no ``asgi`` entry: it comes from Starlette's ``TestClient``, not a server.
                That client waits for ever for an application that returns after a failed startup.
        """
        await receive()
        await send({"type": "lifespan.startup.failed", "message": self.message})
        if "asgi" not in scope:
            raise ConfigurationError(self.message)

    def report(self) -> None:
        """Log the message, once."""
        if not self._is_reported:
            self._is_reported = True
            _logger.error("every request is answered 503 until the server is restarted: %s", self.message)


def warn_if_late() -> None:
    """Log a warning if a request is being handled: the middleware has missed every event since the server's start."""
    if _scope_type() in {"http", "websocket"}:
        _logger.warning(
            "the middleware was constructed at the first request: a token file that was removed after the start of the "
            'server is unknown to it. Wrap the application instead, as in app.mount("/v1", BearerTokenMiddleware(api))'
        )


def _in_event_loop() -> bool:
    try:
        current_token()
    except NoEventLoopError:
        return False
    return True


def _scope_type() -> str | None:
    """Return the type of the ASGI scope that is being handled, by the innermost ``scope`` on the stack.

    Starlette constructs its middleware within the application's first call. The first scope that the middleware
    receives does not show when that was: on a server without lifespans it is always a request.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        # Before Python 3.13 a frame keeps its f_locals, and with them every object that they hold.
        scope = frame.f_locals.get("scope") if "scope" in frame.f_code.co_varnames else None
        if isinstance(scope, MutableMapping) and isinstance(scope.get("type"), str):
            return str(scope["type"])
        frame = frame.f_back
    return None
