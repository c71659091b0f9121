"""Token files with any number of tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from freegpt_auth.stores.file.document import Document
from freegpt_auth.tokens import digest_of, issue

if TYPE_CHECKING:
    from pathlib import Path


def write_tokens(path: Path, size: int, expires_at: datetime | None = None) -> list[str]:
    """Write a file of tokens named ``client 0``, ``client 1`` …, and return their secrets."""
    document, secrets = Document(None), []
    for number in range(size):
        token, secret = issue(f"client {number}", now=datetime.now(UTC), expires_at=expires_at)
        document.append(digest_of(secret), token)
        secrets.append(secret)
    path.write_bytes(document.encode())
    path.chmod(0o600)
    return secrets
