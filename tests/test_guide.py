"""The user's guide, sentence by sentence: its commands, outputs, modes and remedies, on a real server."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.cli import main
from freegpt_auth.tokens import generate_secret

if TYPE_CHECKING:
    from collections.abc import Callable


APP = """
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from freegpt_auth import BearerTokenMiddleware


async def answer(request):
    body = await request.json() if request.method == "POST" else {}
    return JSONResponse({"model": body.get("model"), "user": request.user.display_name})


app = Starlette(
    routes=[Route("/v1/models", answer), Route("/v1/chat/completions", answer, methods=["POST"])],
    middleware=[Middleware(BearerTokenMiddleware)],
)
"""

EXAMPLE = """\
Found 2 token(s):

1. sk-a1b2c3d4e5f...
   Name: my-application
   Status: ✓ Active
   Created: 2025-11-26T10:30:00
   Last used: 2025-11-26T11:45:23

2. sk-x9y8z7w6v5u...
   Name: mobile-app
   Status: ✓ Active
   Created: 2025-11-25T15:20:00
   Last used: Never
"""

PRACTICES = ["production-web-app", "staging-mobile-app", "john-dev-testing"]
NAMES = ["my-application", "test", *PRACTICES, "webapp-production", "mobile-ios", "dev-testing", "github-actions"]


@pytest.fixture
def start(serve: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts, or restarts, a protected server with these variables."""
    (tmp_path / "app.py").write_text(APP)
    return lambda *arguments, **environment: serve("app:app", *arguments, **environment)


@pytest.fixture
def manage(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command of the guide and returns its output."""

    def call(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out.removesuffix("\n" if arguments[0] == "create" else "")

    return call


def chat(server: Any, token: str | None = None) -> tuple[int, Any]:
    """Send the guide's request, and return status and content."""
    body = {"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}
    request = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def statuses(server: Any, *tokens: str | None) -> list[int]:
    """Return the status of one request with each of these tokens."""
    return [server.get(token=token) for token in tokens]


# --- Creating API Tokens


def test_create(manage: Callable[..., str]) -> None:
    """Every name in the guide gets an active, unused token, whose secret is never shown again."""
    before = datetime.now().astimezone().replace(tzinfo=None, microsecond=0)
    for number, name in enumerate(NAMES, start=1):
        secret = manage("create", name)
        assert secret.startswith("sk-")
        listed = manage("list")
        assert secret[14:] not in listed + manage("list", "--json") + Path("api_tokens.json").read_text()
        entry = listed.split("\n\n")[-1].splitlines()
        created = datetime.fromisoformat(entry.pop(3).removeprefix("   Created: "))
        assert before <= created <= datetime.now().astimezone().replace(tzinfo=None)
        assert entry == [
            f"{number}. {secret[:14]}...",
            f"   Name: {name}",
            "   Status: ✓ Active",
            "   Last used: Never",
        ]


def test_list_revoke_and_delete(manage: Callable[..., str]) -> None:
    """The list is the guide's to the character; revoke by the shown prefix keeps the record, delete removes it."""
    # The two tokens of the example, as the ancestor of this project kept them.
    first = {"name": "my-application", "created_at": "2025-11-26T10:30:00", "last_used": "2025-11-26T11:45:23"}
    second = {"name": "mobile-app", "created_at": "2025-11-25T15:20:00", "last_used": None}
    records = {"sk-a1b2c3d4e5f" + "6" * 38: first, "sk-x9y8z7w6v5u" + "4" * 38: second}
    Path("api_tokens.json").write_text(json.dumps({key: {**each, "active": True} for key, each in records.items()}))
    assert manage("list") == EXAMPLE
    manage("revoke", "sk-a1b2c3d4e5f")
    assert manage("list") == EXAMPLE.replace("✓ Active", "✗ Revoked", 1)
    manage("delete", "sk-a1b2c3d4e5f")
    assert manage("list") == "Found 1 token(s):\n\n1. " + EXAMPLE.partition("2. ")[2]


# --- Using Tokens


def test_key_in_env_file(start: Callable[..., Any]) -> None:
    """Method 1: a server that loads ``.env`` accepts the key in it, and only that key."""
    secret = generate_secret()
    Path(".env").write_text(f"FREEGPT_API_KEY={secret}\n")
    server = start("--env-file", ".env")
    assert [chat(server, token)[0] for token in (secret, generate_secret(), None)] == [200, 401, 401]


def test_requests_with_a_token(start: Callable[..., Any], manage: Callable[..., str]) -> None:
    """Methods 2 and 3: the guide's request passes with a token, whose use list then shows."""
    secret, unused = manage("create", "my-application"), manage("create", "unused")
    server = start()
    assert chat(server, secret) == (200, {"model": "freegpt-4", "user": "my-application"})
    status, content = chat(server, generate_secret())
    assert status == 401
    assert content["error"]["message"].startswith("Invalid API key provided")
    assert "open mode" not in server.stop()
    record = json.loads(manage("list", "--json"))[0]
    assert record["use_count"] == 1
    used = datetime.fromisoformat(record["last_used_at"])
    assert used >= datetime.fromisoformat(record["created_at"])
    _, first, second = manage("list").split("\n\n")
    assert f"   Last used: {used.astimezone().replace(tzinfo=None).isoformat()}" in first
    assert second.endswith("   Last used: Never\n")
    manage("revoke", second.split()[1])
    assert f"2. {unused[:14]}...\n   Name: unused\n   Status: ✗ Revoked\n" in manage("list")


# --- Authentication Modes


def test_open_mode(start: Callable[..., Any], manage: Callable[..., str]) -> None:
    """Mode 1: with nothing configured every request passes, with a warning; the first token closes the server."""
    server = start()
    assert statuses(server, None, "whatever") == [200, 200]
    assert "open mode" in server.log.read_text()
    secret = manage("create", "first")
    assert statuses(server, None, secret) == [401, 200]


@pytest.mark.parametrize("names", [["OPENAI_API_KEY"], ["FREEGPT_API_KEY", "OPENAI_API_KEY"]], ids=["one", "both"])
def test_environment_mode(start: Callable[..., Any], names: list[str]) -> None:
    """Mode 2: only the key in the environment works, and FREEGPT_API_KEY wins over the other."""
    server = start(**{name: f"key of {name}" for name in names})
    presented = [*(f"key of {name}" for name in names), generate_secret(), None]
    assert statuses(server, *presented) == [200] + [401] * len(names) + [401]


def test_token_file_mode(start: Callable[..., Any], manage: Callable[..., str]) -> None:
    """Mode 3: key and tokens work together; a revoked or deleted token is refused, all others still pass."""
    first, second, third = (manage("create", name) for name in ("webapp-production", "mobile-ios", "github-actions"))
    server = start(FREEGPT_API_KEY="key-one")
    assert statuses(server, "key-one", first, second, third, "other", None) == [200, 200, 200, 200, 401, 401]
    listed = manage("list")
    for way, compromised in (("revoke", first), ("delete", second)):
        prefix = f"{compromised[:14]}..."
        assert f" {prefix}\n" in listed
        manage(way, prefix)
        assert server.get(token=compromised) == 401
    assert statuses(server, "key-one", first, second, third) == [200, 401, 401, 200]


# --- Security Best Practices, Troubleshooting


def test_invalid_key_and_rotation(start: Callable[..., Any], manage: Callable[..., str]) -> None:
    """After "Invalid API key provided" a new token works; a replaced one overlaps with it until it is revoked."""
    manage("create", "somebody-else")
    server = start(FREEGPT_API_KEY="key-one")
    status, content = chat(server, "sk-mistyped")
    assert status == 401
    assert content["error"]["message"].startswith("Invalid API key provided")
    assert "FREEGPT_API_KEY" not in json.dumps(content)
    assert "   Name: somebody-else\n   Status: ✓ Active\n" in manage("list")
    old = manage("create", "test")
    assert chat(server, old) == (200, {"model": "freegpt-4", "user": "test"})
    new = manage("create", "test-2")
    assert statuses(server, new, old) == [200, 200]
    manage("revoke", old[:14])
    assert statuses(server, new, old) == [200, 401]


def test_disable_authentication(
    start: Callable[..., Any], manage: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variables unset and the token file renamed, a restart opens the server; the renaming alone does not."""
    monkeypatch.setenv("FREEGPT_API_KEY", "key-one")
    monkeypatch.setenv("OPENAI_API_KEY", "key-two")
    secret = manage("create", "mobile-app")
    server = start()
    assert statuses(server, secret, None) == [200, 401]
    monkeypatch.delenv("FREEGPT_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    Path("api_tokens.json").rename("api_tokens.json.backup")
    deadline = time.monotonic() + 60
    while server.get(token=secret) != 401:
        assert time.monotonic() < deadline
    assert statuses(server, None, "key-one") == [401, 200]
    server.stop()
    assert chat(start())[0] == 200
