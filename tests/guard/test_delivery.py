"""The delivery of a denial to a client that uploads. test_servers.py and attacks/test_floods.py use real servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from freegpt_auth.guard import delivery
from freegpt_auth.guard.delivery import deny_http, end_http
from freegpt_auth.guard.denials import denial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POST: Any = {"type": "http", "method": "POST", "path": "/v1/files", "headers": [(b"content-length", b"5000")]}
REFUSED = denial(POST, "missing")

pytestmark = pytest.mark.anyio


ANSWERED, ENDED = ["start 401", "True True"], ["False False"]


async def upload(receive: Callable[[], Awaitable[Any]]) -> list[str]:
    """Send an upload without a token, and return the events in order."""
    events: list[str] = []

    async def listen() -> Any:
        events.append("receive")
        return await receive()

    async def send(message: Any) -> None:
        more = message.get("more_body")
        events.append(f"start {message['status']}" if more is None else f"{len(message['body']) > 0} {more}")

    with anyio.fail_after(60):
        assert await deny_http(POST, send, REFUSED)
        await end_http(listen, send)
    return events


@pytest.mark.parametrize("last", [{"type": "http.request", "body": b"end"}, {"type": "http.disconnect"}])
async def test_upload_is_answered_at_once_and_dropped(last: Any) -> None:
    """A client that is still uploading has its whole answer before a byte of it is read, and no reset afterwards."""
    messages = [{"type": "http.request", "body": b"x" * 1000, "more_body": True}] * 3 + [last]

    async def receive() -> Any:
        return messages.pop(0)

    assert await upload(receive) == [*ANSWERED, *["receive"] * 4, *ENDED]


async def test_an_endless_or_stalled_upload_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can keep a server busy with the body of a refused request: it has 64 MiB or 5 seconds."""
    assert (delivery.BODY_LIMIT, delivery.BODY_TIMEOUT) == (64 * 1024 * 1024, 5.0)
    monkeypatch.setattr(delivery, "BODY_LIMIT", 10_000)

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    assert await upload(receive) == [*ANSWERED, *["receive"] * 10, *ENDED]
    monkeypatch.setattr(delivery, "BODY_TIMEOUT", 0.05)
    assert await upload(anyio.sleep_forever) == [*ANSWERED, "receive", *ENDED]


@pytest.mark.parametrize(
    ("version", "header", "uploads", "closes"),
    [
        ("1.1", (b"content-length", b"1000000"), True, True),
        ("1.1", (b"transfer-encoding", b"chunked"), True, True),
        ("1.0", (b"content-length", b"9" * 5000), True, True),
        ("1.1", (b"content-length", b"999999"), True, False),
        ("1.1", (b"content-length", b"0"), False, False),
        ("1.1", (b"accept", b"*/*"), False, False),
        ("2", (b"content-length", b"1000000"), True, False),
        ("2", (b"accept", b"*/*"), True, False),
    ],
)
async def test_how_much_may_come(version: str, header: tuple[bytes, bytes], *, uploads: bool, closes: bool) -> None:
    """Without a body the answer is the end. A short body leaves the connection usable; a long one closes it."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {**POST, "http_version": version, "headers": [(b"host", b"x"), header]}
    assert await deny_http(scope, send, REFUSED) is uploads
    assert sent[1]["more_body"] is uploads
    assert ((b"connection", b"close") in sent[0]["headers"]) is closes
    assert (b"connection", b"close") not in REFUSED.headers
