"""What the tests of real clients share: the example server, one token that works, and four that do not."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import generate_secret

if TYPE_CHECKING:
    from collections.abc import Callable

PROJECT = Path(__file__).parent.parent.parent


@dataclass
class ChatServer:
    """The example server, and what to present to it."""

    url: str
    log: Path
    secrets: dict[str, str]
    """By why the server refuses them; the good one is ``good``, and what is not sent at all is empty."""

    def refusals(self, path: str) -> list[str]:
        """Return the reasons for which requests to *path* were refused: one for each that came, retries included.

        A refusal is logged after it was sent, so another one is sent, and waited for in the log.
        """
        last = f"/{time.monotonic_ns()}"
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(self.url + last, timeout=60)
        deadline = time.monotonic() + 60
        told = False
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            told = f" {last}: " in self.log.read_text()
        return re.findall(rf"refused 127\.0\.0\.1 {re.escape(path)}: (\w+)", self.log.read_text())


@pytest.fixture
def chat_server(serve: Callable[..., Any], keep: Callable[..., Any], tmp_path: Path) -> ChatServer:
    """Start the example server beside a token file."""
    store = FileTokenStore(tmp_path / "api_tokens.json")
    _, good = keep(store, "good")
    token, revoked = keep(store, "revoked")
    store.revoke(token.id, datetime.now(UTC))
    _, expired = keep(store, "expired", datetime.now(UTC) - timedelta(seconds=1))
    secrets = {"good": good, "unknown": generate_secret(), "revoked": revoked, "expired": expired, "missing": ""}
    server = serve(script=PROJECT / "examples" / "chat_server.py")
    return ChatServer(server.url, server.log, secrets)


@pytest.fixture(params=["unknown", "revoked", "expired", "missing"])
def reason(request: pytest.FixtureRequest) -> str:
    """Each reason for which a token is refused."""
    return str(request.param)
