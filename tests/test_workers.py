"""Several worker processes, one token file: what an operator does is in force in all of them at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import read_usage
from tests.helpers.applications import LIFESPAN

if TYPE_CHECKING:
    from collections.abc import Callable

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

app = BearerTokenMiddleware(application)
"""
)


@pytest.fixture
def workers(tmp_path: Path, serve: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that starts a server of four workers and waits until all of them answer."""
    (tmp_path / "app.py").write_text(APPLICATION)

    def start(token: str, *arguments: str) -> Any:
        server = serve("app:app", "--workers", "4", *arguments)
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while len(seen) < 4:
            assert time.monotonic() < deadline, seen
            seen.add(worker_of(server, token))
        return server

    return start


def worker_of(server: Any, token: str) -> int:
    """Return which worker answers, on a connection of its own."""
    request = urllib.request.Request(server.url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return int(json.load(response)["worker"])


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_revoke_and_create_are_in_force_in_every_worker_when_they_return(
    workers: Callable[..., Any], keep: Callable[..., Any], command: Callable[..., Any], lifespan: str
) -> None:
    """No request that begins after revoke returned is accepted, and a new token works at once, whoever answers."""
    store = FileTokenStore("api_tokens.json")
    _, first = keep(store, "first")
    server = workers(first, "--lifespan", lifespan)
    for _ in range(5):
        new = command("create", "another").stdout.strip()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _, token=new: server.get(token=token), range(40))) == {200}
            assert command("revoke", new).returncode == 0
            assert set(pool.map(lambda _, token=new: server.get(token=token), range(40))) == {401}
    assert server.get(token=first) == 200


def test_a_revoked_token_is_refused_while_requests_pour_in(
    workers: Callable[..., Any], keep: Callable[..., Any]
) -> None:
    """Under load too: each request that began after the revocation was done is refused, in every one of the workers."""
    store = FileTokenStore("api_tokens.json")
    token, secret = keep(store)
    server = workers(secret)
    answers: list[tuple[float, int]] = []
    revoked = threading.Event()

    def pour() -> None:
        left = 25
        while left:
            left -= revoked.is_set()
            began = time.monotonic()
            answers.append((began, server.get(token=secret)))

    with ThreadPoolExecutor(8) as pool:
        pouring = [pool.submit(pour) for _ in range(6)]
        while len(answers) < 200:
            time.sleep(0.005)
        try:
            store.revoke(token.id, token.created_at)
        finally:
            done = time.monotonic()
            revoked.set()
        for one in pouring:
            one.result()
    late = [status for began, status in answers if began > done]
    assert len(late) > 100
    assert set(late) == {401}
    assert 200 in {status for began, status in answers if began < done}


def test_a_worker_started_anew_is_as_closed_as_its_siblings(
    tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any]
) -> None:
    """Nothing opens a running server: not the token file moved away, nor a worker killed after that. A restart does."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(APPLICATION)
    server = serve("app:app", "--workers", "2")
    seen = {worker_of(server, secret)}
    Path("api_tokens.json").rename("api_tokens.json.backup")
    os.kill(seen.pop(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    answers = []
    while "Child process" not in server.log.read_text() or server.log.read_text().count("Started server") < 3:
        assert time.monotonic() < deadline, server.log.read_text()
        with contextlib.suppress(OSError):  # the killed worker takes the connections it had with it
            answers.append(server.get())
    answers += [server.get() for _ in range(60)]
    assert set(answers) == {401}
    server.stop()
    assert serve("app:app", "--workers", "2").get() == 200


def test_named_store_is_closed_until_its_first_token(
    tmp_path: Path, serve: Callable[..., Any], command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose token file is mistyped or not mounted refuses everything, says so, and accepts a first token at once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "app.py").write_text(APPLICATION)
    server = serve("app:app", "--workers", "2", FREEGPT_AUTH_STORE="~/tokens.json\r")
    assert {server.get() for _ in range(20)} == {401}
    secret = command("--store", "~/tokens.json", "create", "first").stdout.strip()
    assert {server.get(token=secret) for _ in range(20)} == {200}
    assert f"token-file mode: {tmp_path}/tokens.json is missing or holds no tokens" in server.stop()


def test_usage_is_exact_over_all_workers_after_a_graceful_stop(
    workers: Callable[..., Any], keep: Callable[..., Any], command: Callable[..., Any]
) -> None:
    """What list --json counts is what was requested, to the last request, whichever worker answered it."""
    store = FileTokenStore("api_tokens.json")
    warm, warm_secret = keep(store, "warm")
    token, secret = keep(store, "counted")
    server = workers(warm_secret)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: server.get(token=secret), range(500))) == {200}
    server.stop()
    assert read_usage("api_tokens.usage.db")[token.id].use_count == 500
    records = {record["id"]: record for record in json.loads(command("list", "--json").stdout)}
    assert records[token.id]["use_count"] == 500
    assert records[token.id]["last_used_at"] is not None
    assert records[warm.id]["use_count"] >= 4


def test_usage_is_recorded_beside_a_read_only_token_file(
    tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any]
) -> None:
    """A server that may not write where its tokens are authenticates all the same, and counts where it is told to."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    token, secret = keep(FileTokenStore(folder / "api_tokens.json"))
    (folder / "api_tokens.json").chmod(0o400)
    folder.chmod(0o500)
    (tmp_path / "app.py").write_text(APPLICATION)
    server = serve(
        "app:app",
        FREEGPT_AUTH_STORE=str(folder / "api_tokens.json"),
        FREEGPT_AUTH_USAGE=str(tmp_path / "usage.db"),
    )
    assert [server.get(token=secret) for _ in range(3)] == [200, 200, 200]
    server.stop()
    assert read_usage(str(tmp_path / "usage.db"))[token.id].use_count == 3
    assert sorted(path.name for path in folder.iterdir()) == ["api_tokens.json", "api_tokens.json.lock"]


def test_a_killed_server_loses_one_interval_of_usage_and_invents_none(
    tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any]
) -> None:
    """After kill -9 every use that is older than the interval is counted, and none more than there was."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(APPLICATION.replace("(application)", "(application, usage_interval=0.3)"))
    server = serve("app:app")
    for _ in range(5):
        server.get(token=secret)
    deadline = time.monotonic() + 60
    while read_usage("api_tokens.usage.db").get(token.id, (0,))[0] < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(5):
        server.get(token=secret)
    server.process.kill()
    server.process.wait()
    assert 5 <= read_usage("api_tokens.usage.db")[token.id].use_count <= 10
