"""The README is executed: every block in it, in the order in which a reader meets it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from tests.helpers.pages import PROJECT, Shell, blocks, has_guarded_app, only

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.asgi import Ask

README = "README.md"
PYTHON = [block for block in blocks(README) if block.language == "python"]


def test_length_and_first_code() -> None:
    """A reader sees the first code before scrolling, and the end within 150 lines."""
    lines = (PROJECT / README).read_text().splitlines()
    assert "```python" in lines[:10]
    assert len(lines) <= 150


@pytest.mark.anyio
@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
async def test_python_block_is_protected(block: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block, pasted as it is, gives an app that refuses a request without a token."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    assert await has_guarded_app(block.code, ask)


def test_every_shell_block_has_a_test() -> None:
    """No command of the README goes untested when one is added; tests/test_docs.py and test_package.py run two."""
    headings = [block.heading for block in blocks(README) if block.language == "sh"]
    assert headings[:3] == ["freegpt_auth", "Run it", "The commands"]
    assert headings[3:] == ["Add it to your server", "Send the token", "Test it"]


def test_first_command() -> None:
    """The command beside the first code creates a token and prints it."""
    assert re.match(r"sk-\w{49}\n", Shell().run(only(README, "freegpt_auth", "sh")))


def test_commands_and_the_shown_list() -> None:
    """The four commands do as the README says, and list prints the very text that stands there."""
    # The tokens of the text, as the ancestor of this project kept them.
    first = {"name": "my-application", "created_at": "2025-11-26T10:30:00", "last_used": "2025-11-26T11:45:23"}
    second = {"name": "mobile-app", "created_at": "2025-11-25T15:20:00", "last_used": None}
    content = {"sk-a1b2c3d4e5f" + "6" * 38: first, "sk-x9y8z7w6v5u" + "4" * 38: second}
    Path("api_tokens.json").write_text(json.dumps(content))
    shell = Shell()
    assert shell.run("python -m freegpt_auth list") == only(README, "The commands", "text")
    shown = shell.run(only(README, "The commands", "sh"))
    assert "Revoked token sk-a1b2c3d4e5f... (my-application)" in shown
    assert "Deleted token sk-a1b2c3d4e5f... (my-application)" in shown
    (capture,) = re.findall(r"`(TOKEN=\$\(.+?\))`", (PROJECT / README).read_text())
    shell.run(capture)
    assert re.fullmatch(r"sk-\w{49}", shell.environment["TOKEN"])


def test_sending_the_token(serve: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """The curl command is answered 200 by the example, and 401 without the token."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    server = serve(script=PROJECT / "examples" / "chat_server.py")
    command = only(README, "Send the token", "sh").replace("http://localhost:8000", server.url)
    assert '"chat.completion"' in Shell(TOKEN=secret).run(command)
    assert "Invalid API key provided" in Shell(TOKEN="wrong").run(command)


def test_run_it(tmp_path: Path) -> None:
    """The command installs into an empty environment, serves, and prints a request that works; twice is one token."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "api_tokens*", "dist", "build")
    checkout = shutil.copytree(PROJECT, tmp_path / "checkout", ignore=ignored)
    with closing(Shell()) as shell:
        for name in [each for each in shell.environment if each.startswith(("PYTHON", "COVERAGE"))]:
            del shell.environment[name]
        for _ in range(2):
            shown = shell.serve(f"cd checkout && exec {only(README, 'Run it', 'sh').strip()} 8000")
            pasted = "curl " + shown.partition("curl ")[2].partition("\n\n")[0]
            without = "\n".join(line for line in pasted.splitlines() if "Authorization" not in line)
            assert shell.run(pasted).count("HTTP/1.1 200 OK") == 1
            assert "You didn't provide an API key" in shell.run(without)
            shell.close()
    assert len(FileTokenStore(checkout / "api_tokens.json").tokens()) == 1


def test_run_it_on_a_busy_port(tmp_path: Path) -> None:
    """No token is made for a request that would take it to another program's port."""
    (tmp_path / "examples").mkdir()
    script = shutil.copy(PROJECT / "examples" / "try_it.sh", tmp_path / "examples")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finished = subprocess.run(["sh", script, str(port)], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"Port {port} of 127.0.0.1 cannot be used. Give a free one: ")
    assert not (tmp_path / "api_tokens.json").exists()
