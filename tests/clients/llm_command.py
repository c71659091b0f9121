"""The ``llm`` command, which reads the ``usage`` of each answer.

Run it where that command is installed: ``python -m pytest tests/clients/llm_command.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import ChatServer

MODEL = """
- model_id: freegpt
  model_name: freegpt-4
  api_base: "{}/v1"
  api_key_name: freegpt
"""


@pytest.mark.parametrize("stream", [True, False])
def test_answer_with_usage(chat_server: ChatServer, *, stream: bool) -> None:
    """The command prints the answer, streamed or not, and its token counts."""
    home = Path("llm")
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(MODEL.format(chat_server.url))
    (home / "keys.json").write_text(json.dumps({"freegpt": chat_server.secrets["good"]}))
    command = [sys.executable, "-m", "llm", "-m", "freegpt", "-u", "Hello!", *([] if stream else ["--no-stream"])]
    environment = {**os.environ, "LLM_USER_PATH": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "You said: Hello!\n")
    assert "Token usage: 1 input, 3 output" in done.stderr
