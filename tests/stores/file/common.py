"""Token files for the tests in this folder."""

from __future__ import annotations

import gc
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from freegpt_auth.tokens import Token, digest_of, issue

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
INSTANT = "2025-06-01T12:00:00Z"


def issued(name: str = "ci", **changes: Any) -> tuple[bytes, Token]:
    """Return a new token after its digest."""
    token, secret = issue(name, now=NOW, **changes)
    return digest_of(secret), token


def row(number: int = 0, **changes: object) -> dict[str, Any]:
    """Return a record as in a file; a change to ``None`` omits the field."""
    known = {"id": f"id{number}", "name": f"name {number}", "prefix": "sk-a1b2c3d4e5f", "created_at": INSTANT}
    fields = {**known, "digest": f"sha256${number:064x}", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def in_lines(*rows: object) -> bytes:
    """Return a file in this library's own layout: one record a line."""
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(each).encode() for each in rows) + b"\n]}\n"


def indented(*rows: object) -> bytes:
    """Return the same file in an editor's layout."""
    return json.dumps({"version": 1, "tokens": rows}, indent=2).encode()


def open_files() -> int:
    """Count the descriptors of this process, without those that earlier tests left to the garbage collector."""
    gc.collect()
    return len([*Path("/proc/self/fd").iterdir()])
