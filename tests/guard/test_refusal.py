"""The decision about a request that presents credentials with a visible mistake, alone and beside others."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import BearerTokenMiddleware, MemoryTokenStore
from freegpt_auth.guard.credentials import SUBPROTOCOL
from freegpt_auth.tokens import digest_of, issue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REVOKED_TOKEN, REVOKED = issue("revoked", now=datetime.now(UTC))
LIVE_TOKEN, LIVE = issue("live", now=datetime.now(UTC))

pytestmark = pytest.mark.anyio


@pytest.fixture
def guarded(hello: Any) -> BearerTokenMiddleware:
    """Return an application behind a store with a live and a revoked token."""
    store = MemoryTokenStore()
    store.add(digest_of(LIVE), LIVE_TOKEN)
    store.add(digest_of(REVOKED), REVOKED_TOKEN)
    store.revoke(REVOKED_TOKEN.id, datetime.now(UTC))
    return BearerTokenMiddleware(hello, store=store)


@pytest.mark.parametrize(
    ("headers", "reason", "words"),
    [
        ([b"authorization: Bearer Bearer %s"], "prefixed", "begins with the word Bearer"),
        ([b"x-api-key: bearer %s"], "prefixed", "begins with the word Bearer"),
        ([b'authorization: Bearer "%s"'], "quoted", "wrapped in quotation marks"),
        ([b"api-key: '%s'"], "quoted", "wrapped in quotation marks"),
        ([b'x-api-key: "%s"', b"authorization: Bearer sk-else"], "quoted", "wrapped in quotation marks"),
        ([b'x-api-key: "%s"', b"authorization: Bearer " + REVOKED.encode()], "revoked", "unknown, revoked or expired"),
        ([b'x-api-key: "%s"', b"authorization: Bearer %s"], None, ""),
    ],
)
async def test_mistakes_are_named(
    ask: Callable[..., Awaitable[Any]],
    guarded: BearerTokenMiddleware,
    caplog: pytest.LogCaptureFixture,
    headers: list[bytes],
    reason: str | None,
    words: str,
) -> None:
    """A client that doubles the scheme or sends quotation marks reads that, unless another of its credentials counts."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    lines = [tuple(line.replace(b"%s", LIVE.encode()).split(b": ")) for line in headers]
    answer = await ask(guarded, headers=lines)
    assert answer.status == (401 if reason else 200)
    assert [record.reason for record in caplog.records if "refused" in record.msg] == [reason] * bool(reason)
    assert words in answer.body.decode()
    assert LIVE not in answer.body.decode() + caplog.text


async def test_mistakes_in_subprotocols_are_named(
    ask: Callable[..., Awaitable[Any]], guarded: BearerTokenMiddleware
) -> None:
    """The secret of a subprotocol is read like any other."""
    offers = [f'{SUBPROTOCOL}"{LIVE}"']
    extensions = {"websocket.http.response": {}}
    answer = await ask(guarded, type="websocket", subprotocols=offers, extensions=extensions)
    assert "wrapped in quotation marks" in answer.error["message"]
