"""The lifespan: an application without one is completed, an application that fails stays failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.guard.lifespan import Lifespan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.anyio

RESPONSE = {"type": "http.response.start", "status": 204, "headers": []}


async def rejects(_scope: Any, _receive: Any, _send: Any) -> None:
    """Reject the lifespan."""
    raise NotImplementedError("lifespan")


async def returns(_scope: Any, _receive: Any, _send: Any) -> None:
    """Ignore the lifespan."""


async def answers_http(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer every scope as a request: the README's application."""
    await send(RESPONSE)


async def reads_then_answers_http(_scope: Any, receive: Any, send: Any) -> None:
    """Answer every scope as a request with a body."""
    await receive()
    await send(RESPONSE)


async def reads_and_returns(_scope: Any, receive: Any, _send: Any) -> None:
    """Take the startup for a request that needs no answer."""
    await receive()


async def starts_only(_scope: Any, receive: Any, send: Any) -> None:
    """Answer the startup and leave."""
    await receive()
    await send({"type": "lifespan.startup.complete"})


async def takes_part(_scope: Any, receive: Any, send: Any) -> None:
    """Answer both events."""
    for event in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{event}"
        await send({"type": f"lifespan.{event}.complete"})


async def fails_startup(_scope: Any, receive: Any, send: Any) -> None:
    """Fail as Starlette does."""
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no model"})
    raise LookupError("no model")


async def raises_in_startup(_scope: Any, receive: Any, _send: Any) -> None:
    """Fail without an answer."""
    await receive()
    raise LookupError("no model")


async def raises_later(scope: Any, receive: Any, send: Any) -> None:
    """Fail while serving."""
    await starts_only(scope, receive, send)
    raise LookupError("no model")


@pytest.fixture
def live() -> Callable[[Any, list[str]], Awaitable[None]]:
    """Return a function that leads an application through the lifespan and returns the steps that a server sees."""

    async def run(app: Any, steps: list[str]) -> None:
        events = ["startup", "shutdown"]

        async def receive() -> Any:
            return {"type": f"lifespan.{events.pop(0)}"}

        async def send(message: Any) -> None:
            steps.append(message["type"].removeprefix("lifespan."))

        async def stop(_: Lifespan) -> None:
            steps.append("stop")

        await Lifespan(receive, send, stop).run(app, {"type": "lifespan"})

    return run


@pytest.mark.parametrize(
    "app", [rejects, returns, answers_http, reads_then_answers_http, reads_and_returns, starts_only, takes_part]
)
async def test_every_lifespan_is_completed(live: Any, app: Any) -> None:
    """Shutdown is seen for every behaviour of the application's lifespan, and usage is written before it completes."""
    steps: list[str] = []
    await live(app, steps)
    assert steps == ["startup.complete", "stop", "shutdown.complete"]


@pytest.mark.parametrize(
    ("app", "sent"),
    [(fails_startup, ["startup.failed"]), (raises_in_startup, []), (raises_later, ["startup.complete"])],
)
async def test_failed_application_stays_failed(live: Any, app: Any, sent: list[str]) -> None:
    """A server learns of an application's own failure as it does without the middleware: the plain exception."""
    steps: list[str] = []
    with pytest.raises(LookupError, match="no model"):
        await live(app, steps)
    assert steps == sent


async def test_skipped_startup_is_reported(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An application that raises before the startup may be broken, so the operator reads the reason."""
    await live(rejects, [])
    reason = "the application raised NotImplementedError('lifespan') before its startup"
    assert caplog.messages == [f"{reason}, and is served without a lifespan"]
