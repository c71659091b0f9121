"""The user's guide, sentence by sentence: its commands, its outputs, its three modes, its ways out of trouble."""

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


async def models(request):
    return JSONResponse({"object": "list", "data": []})


async def chat(request):
    body = await request.json()
    return JSONResponse({"object": "chat.completion", "model": body["model"], "user": request.user.display_name})


app = Starlette(
    routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])],
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

NAMES = [
    "my-application",
    "production-web-app",
    "staging-mobile-app",
    "john-dev-testing",
    "test",
    "webapp-production",
    "mobile-ios",
    "dev-testing",
    "github-actions",
]


@pytest.fixture
def start(serve: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts, or restarts, a protected server with these variables."""
    (tmp_path / "app.py").write_text(APP)
    return lambda *arguments, **environment: serve("app:app", *arguments, **environment)


@pytest.fixture
def create(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a function that creates a token and returns its secret."""

    def call(name: str) -> str:
        assert main(["create", name]) == 0
        return capsys.readouterr().out.strip()

    return call


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """Return a function that returns the lines which list shows for the token of this name."""

    def call(name: str) -> list[str]:
        assert main(["list"]) == 0
        entries = capsys.readouterr().out.split("\n\n")[1:]
        return next(entry.splitlines() for entry in entries if f"   Name: {name}\n" in entry)

    return call


def chat(server: Any, token: str | None = None) -> tuple[int, Any]:
    """Send the guide's request, as curl and the Python client of the guide do, and return status and content."""
    body = {"model": "freegpt-4", "messages": [{"role": "user", "content": "Hello!"}]}
    request = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def write_example() -> None:
    """Write the two tokens of the guide's example, as the ancestor of this project kept them."""
    records = {
        "sk-a1b2c3d4e5f" + "6" * 38: {
            "name": "my-application",
            "created_at": "2025-11-26T10:30:00",
            "last_used": "2025-11-26T11:45:23",
            "active": True,
        },
        "sk-x9y8z7w6v5u" + "4" * 38: {
            "name": "mobile-app",
            "created_at": "2025-11-25T15:20:00",
            "last_used": None,
            "active": True,
        },
    }
    Path("api_tokens.json").write_text(json.dumps(records))


# --- Creating API Tokens


def test_create_tokens_with_the_names_of_the_guide(
    create: Callable[[str], str], shown: Callable[[str], list[str]]
) -> None:
    """Every name in the guide gets a token like ``sk-a1b2c3d4e5f6...``, active and never used."""
    before = datetime.now().astimezone().replace(tzinfo=None, microsecond=0)
    for number, name in enumerate(NAMES, start=1):
        secret = create(name)
        assert secret.startswith("sk-")
        entry = shown(name)
        created = datetime.fromisoformat(entry.pop(3).removeprefix("   Created: "))
        assert entry == [
            f"{number}. {secret[:14]}...",
            f"   Name: {name}",
            "   Status: ✓ Active",
            "   Last used: Never",
        ]
        assert before <= created <= datetime.now().astimezone().replace(tzinfo=None)


def test_a_token_is_not_shown_again(create: Callable[[str], str], command: Callable[..., Any]) -> None:
    """A token that was not saved is gone: neither the list nor the file can give it back."""
    secret = create("my-application")
    assert secret[14:] not in command("list").stdout + command("list", "--json").stdout
    assert secret[14:] not in Path("api_tokens.json").read_text()


def test_view_all_tokens(command: Callable[..., Any]) -> None:
    """The list looks exactly as the guide's example output, to the character."""
    write_example()
    done = command("list")
    assert (done.returncode, done.stdout, done.stderr) == (0, EXAMPLE, "")


def test_revoke_keeps_and_delete_removes(command: Callable[..., Any]) -> None:
    """The guide's revoke and delete take the prefix that its list shows; the one keeps the record, the other does not."""
    write_example()
    assert command("revoke", "sk-a1b2c3d4e5f").returncode == 0
    assert command("list").stdout == EXAMPLE.replace("✓ Active", "✗ Revoked", 1)
    assert command("delete", "sk-a1b2c3d4e5f").returncode == 0
    second = EXAMPLE.partition("2. ")[2]
    assert command("list").stdout == f"Found 1 token(s):\n\n1. {second}"


# --- Using Tokens


def test_a_token_in_the_env_file_of_a_server(start: Callable[..., Any]) -> None:
    """Method 1: the key in the ``.env`` file that a server loads is the one that works."""
    secret = generate_secret()
    Path(".env").write_text(f"FREEGPT_API_KEY={secret}\n")
    server = start("--env-file", ".env")
    assert [chat(server, token)[0] for token in (secret, generate_secret(), None)] == [200, 401, 401]


def test_requests_with_a_token(
    start: Callable[..., Any], create: Callable[[str], str], command: Callable[..., Any]
) -> None:
    """Methods 2 and 3: the guide's request passes with a token, and list then shows when it was used last."""
    secret = create("my-application")
    server = start()
    status, content = chat(server, secret)
    assert (status, content["model"], content["user"]) == (200, "freegpt-4", "my-application")
    status, content = chat(server, generate_secret())
    assert status == 401
    assert "Invalid API key provided" in content["error"]["message"]
    assert "open mode" not in server.stop()
    (record,) = json.loads(command("list", "--json").stdout)
    assert record["use_count"] == 1
    used = datetime.fromisoformat(record["last_used_at"])
    assert used >= datetime.fromisoformat(record["created_at"])
    local = used.astimezone().replace(tzinfo=None).isoformat()
    assert f"   Last used: {local}\n" in command("list").stdout


# --- Authentication Modes


def test_without_keys_and_tokens_all_requests_are_allowed(
    start: Callable[..., Any], create: Callable[[str], str]
) -> None:
    """Mode 1: with nothing configured every request passes and the log says so; the first token closes the server."""
    server = start()
    assert chat(server)[0] == 200
    assert chat(server, "whatever")[0] == 200
    assert "open mode" in server.log.read_text()
    secret = create("first")
    assert chat(server)[0] == 401
    assert chat(server, secret)[0] == 200


@pytest.mark.parametrize(
    ("variables", "valid"),
    [
        ({"OPENAI_API_KEY": "key-two"}, "key-two"),
        ({"FREEGPT_API_KEY": "key-one", "OPENAI_API_KEY": "key-two"}, "key-one"),
    ],
    ids=["openai", "both"],
)
def test_with_a_variable_only_that_key_works(start: Callable[..., Any], variables: dict[str, str], valid: str) -> None:
    """Mode 2: with a key in the environment that one key works and nothing else does."""
    server = start(**variables)
    presented = ["key-one", "key-two", generate_secret(), None]
    assert {key: server.get(token=key) for key in presented} == {key: 200 if key == valid else 401 for key in presented}


def test_with_both_any_valid_token_authenticates(
    start: Callable[..., Any], create: Callable[[str], str], command: Callable[..., Any]
) -> None:
    """Mode 3: the key and every token of the file are valid together, and losing one leaves the others."""
    first, second = create("first"), create("second")
    server = start(FREEGPT_API_KEY="key-one")
    assert [server.get(token=token) for token in ("key-one", first, second, "other", None)] == [200, 200, 200, 401, 401]
    assert command("revoke", first[:14]).returncode == 0
    assert [server.get(token=token) for token in ("key-one", first, second)] == [200, 401, 200]


# --- Security Best Practices


def test_rotating_a_token_interrupts_nobody(
    start: Callable[..., Any], create: Callable[[str], str], command: Callable[..., Any]
) -> None:
    """Create a new token, update the clients, revoke the old one: at no step is a client refused, nothing restarts."""
    old = create("production-web-app")
    server = start()
    assert chat(server, old)[0] == 200
    new = create("production-web-app-2")
    assert [chat(server, token)[0] for token in (new, old)] == [200, 200]
    assert command("revoke", f"{old[:14]}...").returncode == 0
    # No waiting: when the command has returned, the old token is refused.
    assert [chat(server, token)[0] for token in (old, new)] == [401, 200]


def test_unused_tokens_can_be_found_and_revoked(
    create: Callable[[str], str], shown: Callable[[str], list[str]]
) -> None:
    """A token that list shows as never used can be revoked by what stands in its entry."""
    create("unused")
    entry = shown("unused")
    assert entry[4] == "   Last used: Never"
    assert main(["revoke", entry[0].removeprefix("1. ")]) == 0
    assert shown("unused")[2] == "   Status: ✗ Revoked"


# --- Troubleshooting


def test_from_an_invalid_key_to_a_valid_one(
    start: Callable[..., Any], create: Callable[[str], str], command: Callable[..., Any]
) -> None:
    """Who meets "Invalid API key provided" finds the way out: look at the variables, list, create, try again."""
    create("somebody-else")
    server = start(FREEGPT_API_KEY="key-one")
    status, content = chat(server, "sk-mistyped")
    assert status == 401
    assert content["error"]["message"].startswith("Invalid API key provided")
    assert "environment key from FREEGPT_API_KEY" not in json.dumps(content)
    listed = command("list").stdout
    assert "   Name: somebody-else\n   Status: ✓ Active\n" in listed
    secret = command("create", "test").stdout.strip()
    assert chat(server, secret) == (200, {"object": "chat.completion", "model": "freegpt-4", "user": "test"})


def test_disabling_authentication_completely(
    start: Callable[..., Any], create: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unset the variables, rename the token file, restart: open. Before the restart the renaming opens nothing."""
    monkeypatch.setenv("FREEGPT_API_KEY", "key-one")
    monkeypatch.setenv("OPENAI_API_KEY", "key-two")
    secret = create("mobile-app")
    server = start()
    assert [server.get(token=token) for token in (secret, None)] == [200, 401]
    monkeypatch.delenv("FREEGPT_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    Path("api_tokens.json").rename("api_tokens.json.backup")
    deadline = time.monotonic() + 2
    while server.get(token=secret) != 401:
        assert time.monotonic() < deadline
    assert [server.get(token=token) for token in (None, "key-one")] == [401, 200]
    server.stop()
    assert chat(start())[0] == 200


# --- Examples


def test_a_compromised_token_is_out_at_once(
    start: Callable[..., Any], create: Callable[[str], str], command: Callable[..., Any]
) -> None:
    """List, find the prefix, revoke or delete: when the command has returned the token is refused, all others pass."""
    secrets = [create(name) for name in ("webapp-production", "mobile-ios", "github-actions")]
    server = start()
    assert [server.get(token=token) for token in secrets] == [200, 200, 200]
    listed = command("list").stdout
    for way, compromised in zip(("revoke", "delete"), secrets, strict=False):
        prefix = f"{compromised[:14]}..."
        assert f" {prefix}\n" in listed
        assert command(way, prefix).returncode == 0
        assert server.get(token=compromised) == 401
    assert [server.get(token=token) for token in secrets] == [401, 401, 200]
