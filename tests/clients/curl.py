"""The guide's curl command, run by the shell.

Run it where curl is installed: ``python -m pytest tests/clients/curl.py``.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.conftest import ChatServer

CHAT = "/v1/chat/completions"
HEADER = '  -H "Authorization: Bearer sk-a1b2c3d4e5f6..." \\\n'
LINE = f"""\
curl -X POST http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
{HEADER}  -d '{{
    "model": "freegpt-4",
    "messages": [{{"role": "user", "content": "Hello!"}}]
  }}'
"""


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make curl write the status after the body, by its settings file: the command stays as printed."""
    (tmp_path / ".curlrc").write_text('silent\nshow-error\nwrite-out = "\\n%{http_code}"\n')
    monkeypatch.setenv("CURL_HOME", str(tmp_path))


def run(server: ChatServer, line: str) -> tuple[int, str]:
    """Run a curl command against a server and return the status and the body of the answer."""
    command = line.replace("http://localhost:8000", server.url)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    body, _, status = done.stdout.rpartition("\n")
    assert done.stderr == ""
    return int(status), body


def test_command(chat_server: ChatServer) -> None:
    """The command works as the guide prints it."""
    status, body = run(chat_server, LINE.replace("sk-a1b2c3d4e5f6...", chat_server.secrets["good"]))
    assert status == 200
    assert json.loads(body)["choices"][0]["message"]["content"] == "You said: Hello!"


def test_command_streamed(chat_server: ChatServer) -> None:
    """With "stream" in its body the command prints the answer as server-sent events."""
    line = LINE.replace('"freegpt-4",', '"freegpt-4", "stream": true,')
    status, body = run(chat_server, line.replace("sk-a1b2c3d4e5f6...", chat_server.secrets["good"]))
    assert status == 200
    assert body.startswith("data: {")
    assert body.endswith("data: [DONE]\n\n")


def test_command_refused(chat_server: ChatServer, reason: str) -> None:
    """A refused token gets the error that the guide's section on troubleshooting names."""
    status, body = run(chat_server, LINE.replace("sk-a1b2c3d4e5f6...", chat_server.secrets[reason]))
    error = json.loads(body)["error"]
    assert status == 401
    assert "Invalid API key provided" in error["message"]
    assert error["code"] == "invalid_api_key"
    assert chat_server.refusals(CHAT) == [reason]


def test_command_without_its_header(chat_server: ChatServer) -> None:
    """The answer to a request without a token explains how to send one."""
    status, body = run(chat_server, LINE.replace(HEADER, ""))
    error = json.loads(body)["error"]
    assert status == 401
    assert "Invalid API key provided" in error["message"]
    assert "Authorization: Bearer" in error["message"]
    assert error["code"] == "invalid_api_key"
    assert chat_server.refusals(CHAT) == ["missing"]
