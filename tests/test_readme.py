"""The README is executed: every block in it, in the order in which a reader meets it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from freegpt_auth import FileTokenStore, Token
from freegpt_auth.tokens import digest_of
from tests.helpers.pages import PROJECT, Shell, blocks, only

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

README = "README.md"
PYTHON = [block for block in blocks(README) if block.language == "python"]


def test_length_and_first_code() -> None:
    """A reader sees the first code before scrolling, and the end within 150 lines."""
    lines = (PROJECT / README).read_text().splitlines()
    assert "```python" in lines[:10]
    assert len(lines) <= 150


@pytest.mark.anyio
@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
async def test_python_block_is_protected(
    block: Any, ask: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Python block, pasted as it is, gives an app that refuses a request without a token."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    names: dict[str, Any] = {}
    exec(block.code, names)
    scope = {"http_version": "1.1", "query_string": b"", "server": ("x", 80), "scheme": "http"}
    assert (await ask(names["app"], **scope)).status == 401
    assert (await ask(names["app"], headers=[(b"x-api-key", b"a-key")], **scope)).status in (200, 204, 404)


def test_every_shell_block_has_a_test() -> None:
    """No command of the README goes untested when one is added; tests/test_docs.py and test_package.py run two."""
    assert [block.heading for block in blocks(README) if block.language == "sh"] == [
        "freegpt_auth",
        "Run it",
        "The commands",
        "Add it to your server",
        "Send the token",
        "Test it",
    ]


def test_first_command() -> None:
    """The command beside the first code creates a token and prints it."""
    assert re.match(r"sk-\w{49}\n", Shell().run(only(README, "freegpt_auth", "sh")).stdout)


def test_commands_and_the_shown_list() -> None:
    """The four commands do as the README says, and list prints the very text that stands there."""
    created = datetime(2025, 11, 26, 10, 30, tzinfo=UTC)
    store = FileTokenStore("api_tokens.json")
    first = Token(id="1", name="my-application", prefix="sk-a1b2c3d4e5f", created_at=created)
    first = msgspec.structs.replace(first, last_used_at=created + timedelta(hours=1, minutes=15, seconds=23))
    store.add(digest_of("one"), first)
    second = datetime(2025, 11, 25, 15, 20, tzinfo=UTC)
    store.add(digest_of("two"), Token(id="2", name="mobile-app", prefix="sk-x9y8z7w6v5u", created_at=second))
    shell = Shell()
    assert shell.run("python -m freegpt_auth list").stdout == only(README, "The commands", "text")
    done = shell.run(only(README, "The commands", "sh"))
    assert done.returncode == 0, done.stdout
    assert "Revoked token sk-a1b2c3d4e5f... (my-application)" in done.stdout
    assert "Deleted token sk-a1b2c3d4e5f... (my-application)" in done.stdout
    (capture,) = re.findall(r"`(TOKEN=\$\(.+?\))`", (PROJECT / README).read_text())
    assert shell.run(capture).returncode == 0
    assert re.fullmatch(r"sk-\w{49}", shell.environment["TOKEN"])


def test_sending_the_token(serve: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """The curl command is answered 200 by the example, and 401 without the token."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    server = serve(script=PROJECT / "examples" / "chat_server.py")
    command = only(README, "Send the token", "sh").replace("http://localhost:8000", server.url)
    assert '"chat.completion"' in Shell(TOKEN=secret).run(command).stdout
    assert "Invalid API key provided" in Shell(TOKEN="wrong").run(command).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the project, as a clone has it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "api_tokens*", "dist", "build")
    return Path(shutil.copytree(PROJECT, tmp_path / "checkout", ignore=ignored))


@pytest.fixture
def try_it(checkout: Path) -> Iterator[Callable[[], str]]:
    """Return a function that runs the command under "Run it" until it serves, and returns the command that it prints."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    log = checkout / "log"
    running: list[subprocess.Popen[bytes]] = []

    def run() -> str:
        while running:
            stop(running.pop())
        with log.open("wb") as output:
            command = ["sh", "-c", f"exec {only(README, 'Run it', 'sh').strip()} {port}"]
            running.append(subprocess.Popen(command, cwd=checkout, stdout=output, stderr=output, env=environment))
        deadline = time.monotonic() + 600
        while "Uvicorn running on" not in log.read_text():
            assert running[0].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return log.read_text().partition("curl ")[2].partition("\n\n")[0]

    yield run
    stop(running.pop())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server as Ctrl-C does."""
    process.terminate()
    process.wait(timeout=120)


def test_run_it(try_it: Callable[[], str], checkout: Path) -> None:
    """The command installs into an empty environment, serves, and prints a request that works; twice is one token."""
    for _ in range(2):
        pasted = try_it()
        assert Shell().run(f"curl {pasted}").stdout.count("HTTP/1.1 200 OK") == 1
        without = "\n".join(line for line in pasted.splitlines() if "Authorization" not in line)
        assert "You didn't provide an API key" in Shell().run(f"curl {without}").stdout
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
