"""The lifespan: an application without one is completed, an application that fails stays failed."""

from __future__ import annotations

from typing import Any

import pytest

from freegpt_auth.guard.lifespan import Lifespan
from tests.helpers.asgi import LIFESPAN, ask

pytestmark = pytest.mark.anyio


async def live(application: str) -> list[str]:
    """Lead an application through the lifespan, and return the steps that a server sees.

    Args:
        application: its actions: ``receive``, ``raise``, or the type of a message to send.
    """
    steps: list[str] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        for action in application.split():
            if action == "raise":
                raise LookupError("no model")
            await (receive() if action == "receive" else send({"type": action}))

    async def lead(scope: Any, receive: Any, _send: Any) -> None:
        async def send(message: Any) -> None:
            steps.append(message["type"].removeprefix("lifespan."))

        async def stop(_: Lifespan) -> None:
            steps.append("stop")

        await Lifespan(receive, send, stop).run(app, scope)

    try:
        await ask(lead, type="lifespan", incoming=LIFESPAN)
    except LookupError:
        steps.append("LookupError")
    return steps


@pytest.mark.parametrize(
    "application",
    [
        "",
        "raise",
        "receive",
        "http.response.start",
        "receive http.response.start",
        "receive lifespan.startup.complete",
        "receive lifespan.startup.complete receive lifespan.shutdown.complete",
    ],
)
async def test_every_lifespan_is_completed(application: str) -> None:
    """Shutdown is seen for every behaviour of the application's lifespan, and usage is written before it completes."""
    assert await live(application) == ["startup.complete", "stop", "shutdown.complete"]


@pytest.mark.parametrize(
    ("application", "steps"),
    [
        ("receive lifespan.startup.failed", ["startup.failed"]),
        ("lifespan.startup.complete lifespan.shutdown.failed", ["startup.complete", "stop", "shutdown.failed"]),
        ("receive lifespan.startup.failed raise", ["startup.failed", "LookupError"]),
        ("receive raise", ["LookupError"]),
        ("receive lifespan.startup.complete raise", ["startup.complete", "LookupError"]),
    ],
)
async def test_failed_application_stays_failed(application: str, steps: list[str]) -> None:
    """A server learns of an application's own failure as it does without the middleware: the plain exception."""
    assert await live(application) == steps


async def test_skipped_startup_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """An application that raises before the startup may be broken, so the operator reads the reason."""
    await live("raise")
    reason = "the application raised LookupError('no model') before its startup"
    assert caplog.messages == [f"{reason}, and is served without a lifespan"]
