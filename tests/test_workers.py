"""Worker processes of real servers that share one token file and one usage database."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from tests.helpers.applications import LIFESPAN
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from tests.conftest import Keep
    from tests.helpers.servers import Serve, Server

USAGE = "api_tokens.usage.db"
APPLICATION = f"""
import os
from freegpt_auth import BearerTokenMiddleware
{LIFESPAN}
async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]}})
    await send({{"type": "http.response.body", "body": b"%d" % os.getpid()}})

app = BearerTokenMiddleware(application, usage_interval=0.3)
"""


@pytest.fixture(autouse=True)
def _application() -> None:
    Path("app.py").write_text(APPLICATION)


def workers(serve: Serve, token: str, *arguments: str) -> Server:
    """Start a server of four workers, and wait until each of them has answered."""
    server = serve("app:app", "--workers", "4", *arguments)
    request = urllib.request.Request(server.url, headers={"Authorization": f"Bearer {token}"})
    seen: set[bytes] = set()

    def ask() -> bool:
        with urllib.request.urlopen(request, timeout=60) as response:
            seen.add(response.read())
        return len(seen) == 4

    wait_until(ask)
    return server


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_commands_are_in_force_in_every_worker(serve: Serve, keep: Keep, command: Any, lifespan: str) -> None:
    """Once ``revoke`` has returned every worker refuses the token; a new token is accepted at once by every worker."""
    _, first = keep(FileTokenStore("api_tokens.json"), "first")
    server = workers(serve, first, "--lifespan", lifespan)
    for _ in range(5):
        new = command("create", "another").stdout.strip()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda token: server.get(token=token), [new] * 40)) == {200}
            assert command("revoke", new).returncode == 0
            assert set(pool.map(lambda token: server.get(token=token), [new] * 40)) == {401}
    assert server.get(token=first) == 200


def test_usage_is_exact_after_a_graceful_stop(serve: Serve, keep: Keep, command: Any) -> None:
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


def test_usage_beside_a_read_only_token_file(tmp_path: Path, serve: Serve, keep: Keep) -> None:
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


def test_killed_server_loses_one_interval_of_usage(serve: Serve, keep: Keep) -> None:
    """After SIGKILL every use that is older than the interval is counted, and no use is invented."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    server = serve("app:app")
    for _ in range(5):
        server.get(token=secret)
    wait_until(lambda: UsageDatabase(USAGE).read().get(token.id, (0,))[0] == 5)
    for _ in range(5):
        server.get(token=secret)
    server.process.kill()
    server.process.wait()
    assert 5 <= UsageDatabase(USAGE).read()[token.id].use_count <= 10
