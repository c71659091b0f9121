"""Worker processes of real servers that share one token file and one usage database."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from tests.helpers.applications import LIFESPAN

if TYPE_CHECKING:
    from collections.abc import Callable

USAGE = "api_tokens.usage.db"
APPLICATION = (
    LIFESPAN
    + """
import json, os
from freegpt_auth import BearerTokenMiddleware

async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    body = json.dumps({"worker": os.getpid()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})

app = BearerTokenMiddleware(application, usage_interval=0.3)
"""
)


@pytest.fixture(autouse=True)
def _application() -> None:
    Path("app.py").write_text(APPLICATION)


def workers(serve: Callable[..., Any], token: str, *arguments: str) -> Any:
    """Start a server of four workers, and wait until each of them has answered."""
    server = serve("app:app", "--workers", "4", *arguments)
    request = urllib.request.Request(server.url, headers={"Authorization": f"Bearer {token}"})
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) < 4:
        assert time.monotonic() < deadline, seen
        with urllib.request.urlopen(request, timeout=60) as response:
            seen.add(int(json.load(response)["worker"]))
    return server


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_commands_are_in_force_in_every_worker(
    serve: Callable[..., Any], keep: Callable[..., Any], command: Callable[..., Any], lifespan: str
) -> None:
    """Once ``revoke`` has returned every worker refuses the token; a new token is accepted at once by every worker."""
    _, first = keep(FileTokenStore("api_tokens.json"), "first")
    server = workers(serve, first, "--lifespan", lifespan)
    for _ in range(5):
        new = command("create", "another").stdout.strip()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _, token=new: server.get(token=token), range(40))) == {200}
            assert command("revoke", new).returncode == 0
            assert set(pool.map(lambda _, token=new: server.get(token=token), range(40))) == {401}
    assert server.get(token=first) == 200


def test_usage_is_exact_after_a_graceful_stop(
    serve: Callable[..., Any], keep: Callable[..., Any], command: Callable[..., Any]
) -> None:
    """``list --json`` counts every request of every worker, to the last."""
    store = FileTokenStore("api_tokens.json")
    _, first = keep(store, "first")
    token, secret = keep(store, "counted")
    server = workers(serve, first)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: server.get(token=secret), range(500))) == {200}
    server.stop()
    records = {record["id"]: record for record in json.loads(command("list", "--json").stdout)}
    assert records[token.id]["use_count"] == 500
    assert records[token.id]["last_used_at"] is not None


def test_usage_beside_a_read_only_token_file(
    tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any]
) -> None:
    """A server that may not write the folder of its tokens accepts them, and counts in FREEGPT_AUTH_USAGE."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    token, secret = keep(FileTokenStore(folder / "api_tokens.json"))
    (folder / "api_tokens.json").chmod(0o400)
    folder.chmod(0o500)
    server = serve("app:app", FREEGPT_AUTH_STORE=str(folder / "api_tokens.json"), FREEGPT_AUTH_USAGE=USAGE)
    assert [server.get(token=secret) for _ in range(3)] == [200, 200, 200]
    server.stop()
    assert UsageDatabase(USAGE).read()[token.id].use_count == 3
    assert sorted(path.name for path in folder.iterdir()) == ["api_tokens.json", "api_tokens.json.lock"]


def test_killed_server_loses_one_interval_of_usage(serve: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """After SIGKILL every use that is older than the interval is counted, and no use is invented."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    server = serve("app:app")
    for _ in range(5):
        server.get(token=secret)
    deadline = time.monotonic() + 60
    while UsageDatabase(USAGE).read().get(token.id, (0,))[0] < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(5):
        server.get(token=secret)
    server.process.kill()
    server.process.wait()
    assert 5 <= UsageDatabase(USAGE).read()[token.id].use_count <= 10
