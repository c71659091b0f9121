"""The README is a program: every block in it runs, in the order in which a reader meets it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import pytest
from starlette.testclient import TestClient

from freegpt_auth import BearerTokenMiddleware, FileTokenStore, Settings, Token
from freegpt_auth.guard.refusal import Reason
from freegpt_auth.tokens import digest_of
from freegpt_auth.variables import VARIABLES
from tests.helpers.pages import PROJECT, blocks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BLOCKS = blocks("README.md")
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "sh"]
OWN_TESTS = {"More than one host", "Run it", "Test it", "Send the token", "Add it to your server"}


def named(heading: str, language: str = "sh") -> str:
    """Return the one block of a language under a heading."""
    (code,) = [block.code for block in BLOCKS if (block.heading, block.language) == (heading, language)]
    return code


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs shell code in which ``python`` is this Python."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONEXECUTABLE": sys.executable, **environment}
        return subprocess.run(
            ["sh", "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
        )

    return run


def test_the_first_code_stands_within_twenty_lines() -> None:
    """A reader sees what to write before scrolling."""
    assert "```python" in (PROJECT / "README.md").read_text().splitlines()[:20]


@pytest.mark.anyio
@pytest.mark.parametrize("block", range(len(PYTHON)), ids=lambda place: f"{place + 1} {PYTHON[place].heading}")
async def test_every_python_block_is_a_protected_application(
    block: int, ask: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Python block, pasted as it is, gives an app that refuses a request without a token."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    names: dict[str, Any] = {}
    exec(PYTHON[block].code, names)
    scope = {"path": "/whoami", "http_version": "1.1", "query_string": b"", "server": ("x", 80), "scheme": "http"}
    assert (await ask(names["app"], **scope)).status == 401
    assert (await ask(names["app"], headers=[(b"x-api-key", b"a-key")], **scope)).status in (200, 204, 404)


# What the npm packages openai 6.49, @anthropic-ai/sdk 1.14 and, with x-api-key, 0.137 ask for in Chromium 156.
STAINLESS = ["arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version"]
COMMON = [f"x-stainless-{name}" for name in STAINLESS]
OPENAI = ["authorization", "content-type", *COMMON]
ANTHROPIC = [
    "anthropic-dangerous-direct-browser-access",
    "anthropic-version",
    "content-type",
    *COMMON,
    "x-stainless-timeout",
]
PREFLIGHTS = [
    ("/v1/chat/completions", "POST", OPENAI),
    ("/v1/models", "GET", ["authorization", *COMMON]),
    ("/v1/models/ft-1", "DELETE", ["authorization", *COMMON]),
    ("/v1/messages", "POST", [*ANTHROPIC, "authorization"]),
    ("/v1/messages", "POST", [*ANTHROPIC, "x-api-key"]),
]


@pytest.mark.parametrize(("path", "method", "asked"), PREFLIGHTS)
def test_pages_with_the_usual_clients_can_read_refusals(
    monkeypatch: pytest.MonkeyPatch, path: str, method: str, asked: list[str]
) -> None:
    """In the order that the README gives, the clients' preflights pass, and a refusal and its challenge are readable."""
    monkeypatch.setenv("FREEGPT_API_KEY", "a-key")
    names: dict[str, Any] = {}
    exec(named("With CORS", "python"), names)
    client = TestClient(names["app"], headers={"Origin": "https://chat.example"})
    headers = ",".join(sorted(asked))
    preflight = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    answer = client.options(path, headers=preflight)
    assert answer.status_code == 200
    assert {*asked} <= {*answer.headers["access-control-allow-headers"].split(",")}
    assert method in answer.headers["access-control-allow-methods"]
    refused = client.request(method, path)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert "WWW-Authenticate" in refused.headers["access-control-expose-headers"]


def test_every_shell_block_is_run_here() -> None:
    """No command in the README goes untested when somebody adds one."""
    assert {block.heading for block in SHELL} - OWN_TESTS == {
        "freegpt_auth",
        "The three modes",
        "The commands",
        "From a file of plain tokens",
    }


def test_the_command_beside_the_first_code(shell: Callable[..., Any]) -> None:
    """The command that the promise names creates a token and prints it."""
    assert re.fullmatch(r"sk-\w{49}\n", shell(named("freegpt_auth")).stdout)


def test_the_commands_and_the_list_they_show(shell: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The four commands do what the README says, and list prints the very text that stands there."""
    monkeypatch.setenv("TZ", "UTC")
    created = datetime(2025, 11, 26, 10, 30, tzinfo=UTC)
    store = FileTokenStore("api_tokens.json")
    first = Token(id="1", name="my-application", prefix="sk-a1b2c3d4e5f", created_at=created)
    first = msgspec.structs.replace(first, last_used_at=created + timedelta(hours=1, minutes=15, seconds=23))
    store.add(digest_of("one"), first)
    second = datetime(2025, 11, 25, 15, 20, tzinfo=UTC)
    store.add(digest_of("two"), Token(id="2", name="mobile-app", prefix="sk-x9y8z7w6v5u", created_at=second))
    assert shell("python -m freegpt_auth list").stdout == named("The commands", "text")

    script, capture = [block.code for block in SHELL if block.heading == "The commands"]
    finished = shell(f"set -e\n{script}")
    assert finished.returncode == 0, finished.stderr
    assert "Revoked token sk-a1b2c3d4e5f... (my-application)" in finished.stderr
    assert "Deleted token sk-a1b2c3d4e5f... (my-application)" in finished.stderr
    assert re.fullmatch(r"sk-\w{49}\n", shell(f"{capture}\necho $TOKEN").stdout)


def test_turning_authentication_off(shell: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """The commands move the token file away, and nothing is left that would ask for a token at the next start."""
    keep(FileTokenStore("api_tokens.json"))
    names = ["FREEGPT_API_KEY", "FREEGPT_API_KEY_FILE", "OPENAI_API_KEY", "FREEGPT_AUTH_STORE", "FREEGPT_AUTH_REQUIRED"]
    finished = shell(f"{named('The three modes')}\nenv", **dict.fromkeys(names, "x"))
    assert finished.returncode == 0, finished.stderr
    assert not re.findall("^(?:FREEGPT|OPENAI)_.*", finished.stdout, re.MULTILINE)
    assert Path("api_tokens.json.backup").exists()
    assert FileTokenStore("api_tokens.json").survey().configured is False


def test_sending_the_token(shell: Callable[..., Any], serve: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """The curl command is answered 200 by the example, which greets back, and 401 without the token."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    server = serve(script=PROJECT / "examples" / "chat_server.py")
    command = named("Send the token").replace("http://localhost:8000", server.url)
    assert '"chat.completion"' in shell(command, TOKEN=secret).stdout
    assert "Invalid API key provided" in shell(command, TOKEN="wrong").stdout


def test_fail2ban_bans_who_guesses_and_nobody_else() -> None:
    """The log that the README sets up is one that its filter reads; no path makes it ban somebody else."""
    (block,) = [block.code for block in PYTHON if block.heading == "Refusals in the log"]
    paths = ["/v1/models", "/x%0A2025-11-26 11:45:23,120 INFO freegpt_auth refused 9.9.9.9 /: unknown"]
    program = (
        f"{block}\n"
        "from starlette.testclient import TestClient\n"
        "client = TestClient(app, client=('203.0.113.7', 1))\n"
        f"for path in {paths}:\n"
        "    for headers in ({}, {'x-api-key': 'guess'}, [('x-api-key', 'a'), ('x-api-key', 'b')]):\n"
        "        client.get(path, headers=headers)\n"
    )
    environment = {**os.environ, "FREEGPT_API_KEY": "a-key", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)
    lines = Path("freegpt_auth.log").read_text().splitlines()
    rule = next(block.code for block in BLOCKS if block.language == "ini").split("failregex = ")[1].strip()
    rule = rule.replace("<ADDR>", r"(?P<address>[0-9a-f:.]+)")
    # fail2ban takes the time out of a line before it looks at the rest.
    found = [re.search(rule, re.sub(r"^[\d-]+ [\d:,]+", "", line)) for line in lines]
    assert [match["address"] for match in found if match] == ["203.0.113.7"] * 2 * len(paths)
    example = named("Refusals in the log", "text").splitlines()
    ours = [line for line in lines if " freegpt_auth refused " in line]
    assert re.sub("[0-9]", "0", ours[1]) == re.sub("[0-9]", "0", example[0].replace("chat/completions", "models"))


def test_a_server_that_takes_a_middleware_by_name() -> None:
    """The name given to vLLM is that of a class which is complete with nothing but an application.

    vLLM imports the name's module, takes the attribute, and adds a class by ``app.add_middleware(class)``.
    """
    variable, serve = named("Add it to your server").splitlines()
    paths = variable.removeprefix("export FREEGPT_AUTH_PUBLIC_PATHS=")
    assert Settings.from_env(environ={"FREEGPT_AUTH_PUBLIC_PATHS": paths}).public_paths == {
        "/health",
        "/ping",
        "/metrics",
    }
    name = serve.split("--middleware ")[1].strip()
    code = (
        "import importlib, inspect, fastapi\n"
        f"module, _, attribute = {name!r}.rpartition('.')\n"
        "found = getattr(importlib.import_module(module), attribute)\n"
        "assert inspect.isclass(found)\n"
        "app = fastapi.FastAPI()\n"
        "app.add_middleware(found)\n"
        "app.build_middleware_stack()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def test_settings_that_cannot_be_used_stop_uvicorn(tmp_path: Path) -> None:
    """Uvicorn stops, as the README says, and names the variable."""
    (tmp_path / "app.py").write_text(PYTHON[0].code)
    finished = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FREEGPT_API_KEY": ""},
    )
    assert finished.returncode == 3
    assert "FREEGPT_API_KEY is set but empty" in finished.stderr


def test_from_a_file_of_plain_tokens(shell: Callable[..., Any]) -> None:
    """The ancestor's file is converted by the command, its tokens go on working, and no plain token is left."""
    entry = {"name": "old", "created_at": "2025-11-26T10:30:00", "last_used": None, "active": True}
    Path("old_tokens.json").write_bytes(msgspec.json.encode({"sk-from-before-0123456789": entry}))
    finished = shell(named("From a file of plain tokens"))
    assert finished.returncode == 0, finished.stderr
    store = FileTokenStore("old_tokens.json")
    assert [token.name for token in store.tokens().values()] == ["old", "the-first-new-one"]
    assert store.resolve(digest_of("sk-from-before-0123456789")) is not None
    assert b"sk-from-before-0123456789" not in Path("old_tokens.json").read_bytes()


def test_run_it(tmp_path: Path) -> None:
    """The command under "Run it" installs into an empty environment, serves, and names a curl command that works."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "api_tokens*", "dist", "build")
    shutil.copytree(PROJECT, checkout, ignore=ignored)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["sh", "-c", f"exec {named('Run it').strip()} 0"],
            cwd=checkout,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        wait_for("Uvicorn running on", log, server)
        command = re.search(r"^(curl .*?)\n\n", log.read_text(), re.MULTILINE | re.DOTALL)
        address = re.search(r"running on (http://[\d.:]+)", log.read_text())
        assert command is not None
        assert address is not None
        pasted = command[1].replace("http://127.0.0.1:0", address[1])
        answer = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, timeout=120, check=False)
        assert answer.stdout.startswith("HTTP/1.1 200 OK"), answer
        without = "\n".join(line for line in pasted.splitlines() if "Authorization" not in line)
        answer = subprocess.run(["sh", "-c", without], capture_output=True, text=True, timeout=120, check=False)
        assert answer.stdout.startswith("HTTP/1.1 401 "), answer
        assert "You didn't provide an API key" in answer.stdout
    finally:
        server.terminate()
        server.wait(timeout=120)


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


def wait_for(words: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has said something."""
    deadline = time.monotonic() + 600
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_settings_table_is_complete() -> None:
    """The README names each variable, and each argument of the middleware."""
    section = (PROJECT / "README.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    assert {*re.findall(r"`(\w+)`", " ".join(row[1] for row in rows))} == {*VARIABLES}
    arguments = {*re.findall(r"`(\w+)`", " ".join(row[2] for row in rows))}
    assert arguments == {*BearerTokenMiddleware.__init__.__annotations__} - {"app", "return"}


def test_every_reason_of_a_refusal_is_named() -> None:
    """A program that reads the log finds each reason in the README."""
    (row,) = re.findall(r"^\| `reason` \|.*$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    assert {*get_args(Reason)} == {*re.findall(r"`([a-z]+)`", row)} - {"reason"}
