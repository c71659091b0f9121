"""Real servers, each with its own HTTP parser: a client receives the same responses from all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Keep
    from tests.helpers.servers import Serve

    Connect = Callable[[], socket.socket]

APPLICATION = """
from starlette.applications import Starlette
from starlette.middleware import Middleware
from freegpt_auth import BearerTokenMiddleware

app = Starlette(middleware=[Middleware(BearerTokenMiddleware)])
"""
BARE = """
from freegpt_auth import BearerTokenMiddleware

async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})

app = BearerTokenMiddleware(application, usage_interval=60)
"""
SERVERS = {
    "uvicorn-h11": "uvicorn app:app --http h11 --ws wsproto",
    "uvicorn-httptools": "uvicorn app:app --http httptools --ws websockets",
    "hypercorn-asyncio": "hypercorn app:app",
    "hypercorn-trio": "hypercorn app:app --worker-class trio",
    "granian": "granian --interface asgi app:app",
}
UPGRADE = (
    b"GET /talk HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
MEBIBYTE = b"x" * 2**20


UPLOAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 16777216\r\n"
GET = b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def connect(request: pytest.FixtureRequest, tmp_path: Path, serve: Serve, keep: Keep) -> Iterator[Connect]:
    """Return a function that connects to a server of one kind."""
    keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(APPLICATION)
    module, *arguments = SERVERS[request.param].split()
    server = serve(*arguments, module=module)
    with contextlib.ExitStack() as connections:
        yield lambda: connections.enter_context(socket.create_connection(server.address, timeout=60))


def answer(connection: socket.socket, request: bytes, method: str = "GET") -> tuple[int, Any, bytes]:
    """Send a request, byte for byte, and return the status, headers and body of the response."""
    connection.sendall(request)
    with HTTPResponse(connection, method=method) as response:
        response.begin()
        lengths = response.headers.get_all("content-length", [])
        assert len(lengths) <= 1, "clients reject a response with two lengths"
        return response.status, response.headers, response.read() if lengths else b""


@pytest.mark.parametrize("connect", SERVERS, indirect=True)
def test_denials_on_the_wire(connect: Connect) -> None:
    """Every server sends the same denials, leaves out the body of HEAD, and denies a WebSocket before the upgrade."""
    connection = connect()
    status, headers, body = answer(connection, GET)
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="freegpt_auth"')
    assert headers["cache-control"] == "no-store"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    wrong = b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 2\r\n\r\nhi"
    status, headers, body = answer(connection, wrong)
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="freegpt_auth", error="invalid_token"')
    assert b"Invalid API key provided" in body
    connection = connect()
    status, headers, _ = answer(connection, GET.replace(b"GET", b"HEAD"), "HEAD")
    assert (status, headers["content-type"]) == (401, "application/json")
    assert answer(connection, GET)[0] == 401
    assert answer(connect(), UPGRADE + b"\r\n")[0] == 401
    assert answer(connect(), UPLOAD + b"\r\nx")[0] == 401


# granian itself closes a connection whose response has reached its length, although its application still receives
@pytest.mark.parametrize("connect", [name for name in SERVERS if name != "granian"], indirect=True)
def test_upload_is_received_to_its_end(connect: Connect) -> None:
    """A client in the middle of an upload of 16 MiB reads the denial, and is not reset."""
    connection = connect()
    status, _, body = answer(connection, UPLOAD + b"\r\n" + MEBIBYTE)
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    for _ in range(15):
        connection.sendall(MEBIBYTE)


# hypercorn itself sends 100 Continue, before it calls an application
@pytest.mark.parametrize("connect", ["uvicorn-h11", "uvicorn-httptools", "granian"], indirect=True)
def test_expectation_is_denied(connect: Connect) -> None:
    """A client that sends ``Expect: 100-continue`` receives the denial and no "100 Continue"."""
    connection = connect()
    connection.sendall(UPLOAD + b"Expect: 100-continue\r\n\r\n")
    assert connection.recv(12) == b"HTTP/1.1 401"


STARTS = {
    **{name: SERVERS[name] for name in ("uvicorn-h11", "hypercorn-asyncio", "hypercorn-trio", "granian")},
    "uvicorn-workers": "uvicorn app:app --workers 2",
    "granian-workers": "granian --interface asgi app:app --workers 2",
}
STARTING = APPLICATION.replace("Starlette(", "Starlette(lifespan=lambda _: open('started', 'w'), ")


@pytest.mark.parametrize("name", STARTS)
def test_unusable_settings_end_the_server(tmp_path: Path, name: str) -> None:
    """A server with any number of workers ends with the reason, and the application is not started."""
    (tmp_path / "app.py").write_text(STARTING)
    line = f"{STARTS[name]} {'--bind 127.0.0.1:0' if name.startswith('hypercorn') else '--port 0'}"
    process = subprocess.Popen(
        [sys.executable, "-m", *line.split()],
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
    assert ("Traceback" in output) is name.startswith("hypercorn")  # its own, for any failure of a startup


@pytest.mark.parametrize("name", ["uvicorn-h11", "hypercorn-trio"])
def test_shutdown_without_a_lifespan_writes_usage(tmp_path: Path, serve: Serve, keep: Keep, name: str) -> None:
    """No use is lost at SIGTERM, although the wrapped application has no lifespan."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    (tmp_path / "app.py").write_text(BARE)
    module, *arguments = SERVERS[name].split()
    server = serve(*arguments, module=module)
    assert [server.get(token=secret) for _ in range(20)] == [204] * 20
    server.stop()
    assert UsageDatabase("api_tokens.usage.db").read()[token.id].use_count == 20
