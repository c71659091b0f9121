"""Real servers, each with its own reading of HTTP: what a client sees on the wire is the same behind all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import read_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

APPLICATION = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from freegpt_auth import BearerTokenMiddleware

async def echo(request):
    return PlainTextResponse(str(len(await request.body())))

async def talk(websocket):
    await websocket.accept()
    await websocket.close()

app = Starlette(routes=[Route("/echo", echo, methods=["GET", "POST"]), WebSocketRoute("/talk", talk)])
app.add_middleware(BearerTokenMiddleware)
"""
BARE = """
from freegpt_auth import BearerTokenMiddleware

async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})

app = BearerTokenMiddleware(application, usage_interval=60)
"""
SERVERS = {
    "uvicorn-h11": ("uvicorn", "app:app", "--http", "h11", "--ws", "wsproto"),
    "uvicorn-httptools": ("uvicorn", "app:app", "--http", "httptools", "--ws", "websockets"),
    "hypercorn-asyncio": ("hypercorn", "app:app"),
    "hypercorn-trio": ("hypercorn", "app:app", "--worker-class", "trio"),
    "granian": ("granian", "--interface", "asgi", "app:app"),
}
UPGRADE = (
    b"GET /talk HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
MEBIBYTE = b"x" * 2**20


class Connection:
    """A client that writes and reads bytes, so that nothing is mended on the way."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self.socket = socket.create_connection((address.hostname or "", address.port or 0), timeout=60)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def answer(self, *, bodiless: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Read one response: its status, headers and body."""
        status = int(self.file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().lower().partition(":")
            assert name != "content-length" or name not in headers, "clients refuse a response with two lengths"
            headers[name] = value.strip()
        body = b"" if bodiless else self.file.read(int(headers.get("content-length", "0")))
        return status, headers, body

    def close(self) -> None:
        """Leave."""
        self.file.close()
        self.socket.close()


@pytest.fixture
def connect(
    request: pytest.FixtureRequest, tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any]
) -> Iterator[Callable[[], Connection]]:
    """Return a function that connects to a server of one kind."""
    keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(APPLICATION)
    module, *arguments = SERVERS[request.param]
    server = serve(*arguments, module=module)
    connections: list[Connection] = []

    def new() -> Connection:
        connections.append(Connection(server.url))
        return connections[-1]

    yield new
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("connect", SERVERS, indirect=True)
def test_a_refusal_on_the_wire(connect: Callable[[], Connection]) -> None:
    """Refusals, kept-alive connections, HEAD and uploads look alike behind every server."""
    refused_connection_stays_usable(connect())
    head_is_answered_without_a_body(connect())
    upload_gets_its_answer(connect(), b"x")


# granian by itself ends a connection whose response has reached its length, whatever its application goes on to receive
@pytest.mark.parametrize("connect", [name for name in SERVERS if name != "granian"], indirect=True)
def test_an_upload_is_received_to_its_end(connect: Callable[[], Connection]) -> None:
    """A client that uploads 16 MiB before it reads anything gets the refusal, not a reset connection."""
    connection = connect()
    upload_gets_its_answer(connection, MEBIBYTE)
    for _ in range(15):
        connection.send(MEBIBYTE)


# hypercorn says "go on" by itself, before any application is asked
@pytest.mark.parametrize("connect", ["uvicorn-h11", "uvicorn-httptools", "granian"], indirect=True)
def test_a_client_that_asks_first_is_not_told_to_go_on(connect: Callable[[], Connection]) -> None:
    """A client that asks first whether to upload is told no, and never "100 Continue"."""
    connection = connect()
    connection.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 16777216\r\n\r\n")
    assert connection.answer()[0] == 401


@pytest.mark.parametrize("connect", SERVERS, indirect=True)
def test_a_websocket_is_refused_before_the_upgrade(connect: Callable[[], Connection]) -> None:
    """A WebSocket without a token gets a real 401 in place of the upgrade."""
    connection = connect()
    connection.send(UPGRADE + b"\r\n")
    assert connection.answer()[0] == 401


def refused_connection_stays_usable(connection: Connection) -> None:
    """Two refusals on one connection, the second after a small body."""
    connection.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    status, headers, body = connection.answer()
    assert status == 401
    assert headers["www-authenticate"] == 'bearer realm="freegpt_auth"'
    assert headers["cache-control"] == "no-store"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    connection.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 2\r\n\r\nhi")
    status, headers, body = connection.answer()
    assert status == 401
    assert headers["www-authenticate"] == 'bearer realm="freegpt_auth", error="invalid_token"'
    assert b"Invalid API key provided" in body


def head_is_answered_without_a_body(connection: Connection) -> None:
    """HEAD gets the headers, and the next response is not mistaken for a body."""
    connection.send(b"HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    status, headers, _ = connection.answer(bodiless=True)
    assert status == 401
    assert headers["content-type"] == "application/json"
    connection.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.answer()[0] == 401


def upload_gets_its_answer(connection: Connection, begin: bytes) -> None:
    """A client that has begun to upload 16 MiB with a bad token reads the refusal."""
    connection.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 16777216\r\n\r\n")
    connection.send(begin)
    status, _, body = connection.answer()
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


STARTS = {
    **{name: SERVERS[name] for name in ("uvicorn-h11", "hypercorn-asyncio", "hypercorn-trio", "granian")},
    "uvicorn-workers": ("uvicorn", "app:app", "--workers", "2"),
    "granian-workers": ("granian", "--interface", "asgi", "app:app", "--workers", "2"),
}
STARTING = APPLICATION.replace("Starlette(", "Starlette(lifespan=lambda _: open('started', 'w'), ")


@pytest.mark.parametrize("name", STARTS)
def test_unusable_settings_end_the_server(tmp_path: Path, name: str) -> None:
    """A server of any number of workers ends and shows the reason, and the application's own startup never runs."""
    (tmp_path / "app.py").write_text(STARTING)
    module, *arguments = STARTS[name]
    address = ["--bind", "127.0.0.1:0"] if module == "hypercorn" else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments, *address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "FREEGPT_AUTH_REQUIRED": "1"},
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=180)[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "authentication is required, but no environment key is set" in output
    assert not (tmp_path / "started").exists()
    assert ("Traceback" in output) is (module == "hypercorn")  # its own, whatever fails a startup


@pytest.mark.parametrize("name", ["uvicorn-h11", "hypercorn-trio"])
def test_shutdown_without_a_lifespan_writes_usage(
    tmp_path: Path, serve: Callable[..., Any], keep: Callable[..., Any], name: str
) -> None:
    """No use is lost at SIGTERM though the wrapped application, the README's, implements no lifespan."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(BARE)
    module, *arguments = STARTS[name]
    server = serve(*arguments, module=module)
    assert [server.get(token=secret) for _ in range(20)] == [204] * 20
    server.stop()
    assert read_usage("api_tokens.usage.db")[token.id].use_count == 20
