"""Fixtures for real clients: the example server, a valid token, and four refused credentials."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import generate_secret
from tests.helpers.asking import status
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from tests.conftest import Keep
    from tests.helpers.servers import Serve

PROJECT = Path(__file__).parent.parent.parent


@dataclass
class ChatServer:
    """The example server, and secrets to present to it."""

    url: str
    log: Path
    secrets: dict[str, str]
    """By the reason for the refusal; ``good`` is valid, and ``missing`` is empty."""

    def refusals(self, path: str) -> list[str]:
        """Return the reason of each refused request to *path*, retries included.

        A refusal is logged after it is sent. The method therefore waits until the log has the refusal of one more
        request.
        """
        last = f"/{time.monotonic_ns()}"
        status(self.url + last)
        wait_until(lambda: f" {last}: " in self.log.read_text())
        return re.findall(rf"refused 127\.0\.0\.1 {re.escape(path)}: (\w+)", self.log.read_text())


@pytest.fixture
def chat_server(serve: Serve, keep: Keep, tmp_path: Path) -> ChatServer:
    """Start the example server with a token file."""
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
    """Return each reason for a refusal."""
    return str(request.param)
