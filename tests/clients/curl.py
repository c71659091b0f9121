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


@pytest.mark.parametrize("is_streamed", [False, True])
def test_command(chat_server: ChatServer, *, is_streamed: bool) -> None:
    """The command works as the guide prints it; with "stream" in its body it prints server-sent events."""
    line = LINE.replace('"freegpt-4",', '"freegpt-4", "stream": true,') if is_streamed else LINE
    status, body = run(chat_server, line.replace("sk-a1b2c3d4e5f6...", chat_server.secrets["good"]))
    assert status == 200
    if is_streamed:
        assert (body[:7], body[-16:]) == ("data: {", "\n\ndata: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == "You said: Hello!"


def test_command_refused(chat_server: ChatServer, reason: str) -> None:
    """A refused token gets the error that the guide names; without its header the command learns how to send one."""
    line = LINE.replace(HEADER, "") if reason == "missing" else LINE
    status, body = run(chat_server, line.replace("sk-a1b2c3d4e5f6...", chat_server.secrets[reason]))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert "Invalid API key provided" in error["message"]
    assert "Authorization: Bearer" in error["message"] or reason != "missing"
    assert chat_server.refusals(CHAT) == [reason]
