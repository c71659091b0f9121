"""Parts of the tests of commands: run a command, write a token file, read the records that are left."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth.cli import main
from freegpt_auth.stores.file import store as file_store
from freegpt_auth.tokens import digest_of, prefix_of

TOKEN_FILE = Path("api_tokens.json")
USAGE_FILE = Path("api_tokens.usage.db")


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    status: int
    out: str
    err: str

    def failed_in_one_line(self, about: str = "") -> bool:
        """Return whether the command failed with one line for the operator, about *about*, and no data."""
        one_line = re.fullmatch(r"freegpt-auth: [^\n]+\n", self.err)
        return self.status == 1 and not self.out and bool(one_line) and about in self.err


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _no_wait_and_buffered_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the wait for servers, since none runs; buffer the output, so that a full disk is noticed late."""
    monkeypatch.setattr(file_store, "FRESHNESS", 0.0)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, with *stdin* in place of the terminal."""

    def call(*arguments: str, stdin: Any = None) -> Done:
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        try:
            status: Any = main(arguments)
        except SystemExit as exit_:
            status = exit_.code
        return Done(status, *capsys.readouterr())

    return call


def row(secret: str, **fields: Any) -> dict[str, Any]:
    """Return a record of the token file."""
    digest = digest_of(secret).hex()
    common = {"id": digest[:12], "name": "a-token", "prefix": prefix_of(secret), "digest": f"sha256${digest}"}
    return {**common, "created_at": "2025-11-26T10:30:00Z", **fields}


def put(*rows: dict[str, Any]) -> bytes:
    """Write a token file and return its content."""
    TOKEN_FILE.write_text(json.dumps({"version": 1, "tokens": rows}))
    return TOKEN_FILE.read_bytes()


def kept() -> list[dict[str, Any]]:
    """Return the records in the token file."""
    rows: list[dict[str, Any]] = json.loads(TOKEN_FILE.read_bytes())["tokens"]
    return rows
