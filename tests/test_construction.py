"""Where a middleware is constructed: settings that cannot be used stop a server, a late construction is reported."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.testclient import TestClient

from freegpt_auth import BearerTokenMiddleware, ConfigurationError, FileTokenStore, MemoryTokenStore
from tests.helpers.asgi import LIFESPAN, ask

PREFLIGHT = [(b"origin", b"https://ui.test"), (b"access-control-request-method", b"POST")]
EXTENSIONS: dict[str, Any] = {"websocket.http.response": {}}

pytestmark = pytest.mark.anyio


class Broken(MemoryTokenStore):
    """A token source that fails when it is surveyed, as a third-party library does."""

    def survey(self) -> Any:
        """Fail."""
        raise RuntimeError("no route to the directory")


@asynccontextmanager
async def lifespan(app: Any) -> Any:
    """Note that the application was started."""
    app.state.is_started = True
    yield


def site(**arguments: Any) -> Starlette:
    """Return an application, and the middleware as Starlette constructs it: in the first call."""
    return Starlette(middleware=[Middleware(BearerTokenMiddleware, **arguments)], lifespan=lifespan)


async def live(app: Any) -> list[Any]:
    """Lead an application through its lifespan as a server does, and return its answers."""
    return (await ask(app, type="lifespan", asgi={"version": "3.0"}, incoming=LIFESPAN)).messages


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"required": True}, "authentication is required, but no environment key is set"),
        ({"public_paths": ["health"]}, "the public path 'health' does not start with a slash"),
        ({"store": Broken()}, "the middleware cannot be constructed: RuntimeError: no route to the directory"),
    ],
)
async def test_unusable_settings_fail_the_startup(
    caplog: pytest.LogCaptureFixture, arguments: Any, reason: str
) -> None:
    """The server reads the reason and ends; the application does not start, and no request reaches it all the same."""
    app = site(**arguments)
    (answer,) = await live(app)
    assert answer["type"] == "lifespan.startup.failed"
    assert answer["message"].startswith(reason)
    assert caplog.messages == []
    requests: list[Any] = [{}, {"path": "/health"}, {"method": "OPTIONS", "headers": PREFLIGHT}]
    assert [(await ask(app, **request)).status for request in requests] == [503] * 3
    assert not hasattr(app.state, "is_started")
    with pytest.raises(NotImplementedError):
        await ask(BearerTokenMiddleware(app, **arguments), type="webtransport")


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_no_lifespan_is_one_line_and_503(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Without a lifespan each request is answered 503, and the reason is logged once."""
    app = site(required=True)
    assert [(await ask(app, type=kind, extensions=EXTENSIONS)).status for _ in range(3)] == [503] * 3
    (line,) = caplog.messages
    assert line.startswith("every request is answered 503 until the server is restarted: authentication is required")


async def test_unusable_import_is_reported_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A mounted application that a server imports in its event loop receives no lifespan: the reason is logged."""
    BearerTokenMiddleware(site(), required=True)
    assert len(caplog.messages) == 1


def test_unusable_settings_reach_programs() -> None:
    """A program that constructs the middleware, or runs Starlette's test client, raises the reason and never hangs."""
    with pytest.raises(ConfigurationError, match="authentication is required"):
        BearerTokenMiddleware(site(), required=True)
    with pytest.raises(RuntimeError, match="no route"):
        BearerTokenMiddleware(site(), store=Broken())
    with pytest.raises(ConfigurationError, match="authentication is required"):
        TestClient(site(required=True)).__enter__()


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_late_construction_is_reported(caplog: pytest.LogCaptureFixture, keep: Any, kind: str) -> None:
    """A mounted application constructs its middleware at the first request: one warning names the form to use."""
    keep(FileTokenStore("api_tokens.json"))
    app = Starlette(routes=[Mount("/v1", site())])
    assert [(await ask(app, path="/v1/", type=kind, extensions=EXTENSIONS)).status for _ in range(2)] == [401] * 2
    (line,) = caplog.messages
    assert line.startswith("the middleware was constructed at the first request")
    assert 'app.mount("/v1", BearerTokenMiddleware(api))' in line


async def test_early_construction_is_not_reported(caplog: pytest.LogCaptureFixture, keep: Any) -> None:
    """Neither a lifespan nor a wrapped application, mounted or served without a lifespan, is a late construction."""
    keep(FileTokenStore("api_tokens.json"))
    app = site()
    assert [answer["type"] for answer in await live(app)] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert app.state.is_started
    mounted = Starlette(routes=[Mount("/v1", BearerTokenMiddleware(site()))])
    assert (await ask(app)).status == (await ask(mounted, path="/v1/")).status == 401
    assert caplog.messages == []
