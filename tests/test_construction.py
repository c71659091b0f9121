"""Where a middleware is constructed: settings that cannot be used stop a server, a late construction is reported."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from freegpt_auth import BearerTokenMiddleware, ConfigurationError, FileTokenStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Ask = Callable[..., Awaitable[Any]]

PREFLIGHT = [(b"origin", b"https://ui.test"), (b"access-control-request-method", b"POST")]

pytestmark = pytest.mark.anyio


class Broken:
    """A token source that fails when it is surveyed."""

    def peek(self, _digest: bytes) -> None:
        """Find nothing."""

    resolve = peek

    def survey(self) -> Any:
        """Fail as a third-party library does."""
        raise RuntimeError("no route to the directory")


class Site:
    """An application with a lifespan, and the middleware as Starlette constructs it: in the first call."""

    def __init__(self, **arguments: Any) -> None:
        self.steps: list[str] = []
        routes = [Route("/", lambda _: PlainTextResponse("ok"))]
        middleware = [Middleware(BearerTokenMiddleware, **arguments)]
        self.app = Starlette(routes=routes, middleware=middleware, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Any) -> Any:
        self.steps.append("started")
        yield

    async def live(self) -> list[Any]:
        """Lead it through a lifespan, and return its answers."""
        events, answers = ["startup", "shutdown"], []

        async def receive() -> Any:
            return {"type": f"lifespan.{events.pop(0)}"}

        async def send(message: Any) -> None:
            answers.append(message)

        await self.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        return answers


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"required": True}, "authentication is required, but no environment key is set"),
        ({"public_paths": ["health"]}, "the public path 'health' does not start with a slash"),
        ({"store": Broken()}, "the middleware cannot be constructed: RuntimeError: no route to the directory"),
    ],
)
async def test_unusable_settings_fail_the_startup(
    ask: Ask, caplog: pytest.LogCaptureFixture, arguments: Any, reason: str
) -> None:
    """The server reads the reason and ends; the application does not start, and no request reaches it all the same."""
    site = Site(**arguments)
    (answer,) = await site.live()
    assert answer["type"] == "lifespan.startup.failed"
    assert answer["message"].startswith(reason)
    assert caplog.messages == []
    for request in ({}, {"path": "/health"}, {"method": "OPTIONS", "headers": PREFLIGHT}):
        assert (await ask(site.app, **request)).status == 503
    assert site.steps == []
    with pytest.raises(NotImplementedError):
        await ask(BearerTokenMiddleware(site.app, **arguments), type="webtransport")


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_no_lifespan_is_one_line_and_503(ask: Ask, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Without a lifespan each request is answered 503, and the reason is logged once: tokens created later change nothing."""
    caplog.set_level(logging.WARNING, "freegpt_auth")
    site, extensions = Site(required=True), {"websocket.http.response": {}}
    for _ in range(3):
        answer = await ask(site.app, type=kind, extensions=extensions)
        assert answer.status == 503
    (line,) = caplog.messages
    assert line.startswith("every request is answered 503 until the server is restarted: authentication is required")


async def test_unusable_import_is_reported_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A mounted application that a server imports in its event loop receives no lifespan: the reason is logged."""
    BearerTokenMiddleware(Site().app, required=True)
    assert len(caplog.messages) == 1


def test_unusable_settings_raise_without_a_loop() -> None:
    """A program that constructs the middleware reads the plain exception."""
    with pytest.raises(ConfigurationError, match="authentication is required"):
        BearerTokenMiddleware(Site().app, required=True)
    with pytest.raises(RuntimeError, match="no route"):
        BearerTokenMiddleware(Site().app, store=Broken())  # type: ignore[arg-type]


LATE = "the middleware was constructed at the first request"


async def test_late_construction_is_reported(ask: Ask, caplog: pytest.LogCaptureFixture, keep: Any) -> None:
    """A mounted application constructs its middleware at the first request: one warning names the form to use."""
    keep(FileTokenStore("api_tokens.json"))
    site = Starlette(routes=[Mount("/v1", Site().app)])
    for _ in range(2):
        assert (await ask(site, path="/v1/")).status == 401
    (line,) = caplog.messages
    assert line.startswith(LATE)
    assert 'app.mount("/v1", BearerTokenMiddleware(api))' in line


async def test_early_construction_is_not_reported(ask: Ask, caplog: pytest.LogCaptureFixture, keep: Any) -> None:
    """Neither a lifespan nor a wrapped application, mounted or served without a lifespan, is a late construction."""
    keep(FileTokenStore("api_tokens.json"))
    site = Site()
    assert [answer["type"] for answer in await site.live()] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    mounted = Starlette(routes=[Mount("/v1", BearerTokenMiddleware(Site().app))])
    assert (await ask(site.app)).status == (await ask(mounted, path="/v1/")).status == 401
    assert caplog.messages == []


async def test_unusable_settings_reach_test_clients() -> None:
    """Starlette's test client raises the reason, and does not hang."""
    client = TestClient(Site(required=True).app)
    with pytest.raises(ConfigurationError, match="authentication is required"):
        await to_thread.run_sync(client.__enter__)
