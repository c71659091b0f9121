"""Token files with any number of tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import digest_of, issue

if TYPE_CHECKING:
    from pathlib import Path


def write_tokens(path: Path, size: int, expires_at: datetime | None = None) -> list[str]:
    """Write a file of tokens named ``client 0``, ``client 1`` …, and return their secrets in this order."""
    issued = [issue(f"client {number}", now=datetime.now(UTC), expires_at=expires_at) for number in range(size)]
    FileTokenStore(path).merge({digest_of(secret): token for token, secret in issued})
    return [secret for _, secret in issued]
