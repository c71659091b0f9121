"""What all tests share: a clean environment, both event loops, and real servers in processes of their own."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.variables import VARIABLES
from tests.helpers.asking import status

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


_ATTACKS = Path(__file__).parent / "attacks"
_ON_POSTGRESQL = {"cluster", "durable"}  # the fixtures that start one


def pytest_configure() -> None:
    """Keep asyncio's warnings about slow steps out of the log: a loaded machine causes them."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by "-m"
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a real PostgreSQL as ``database``, and everything in tests/attacks as ``attack``."""
    for item in items:
        if not _ON_POSTGRESQL.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("database")
        if _ATTACKS in item.path.parents:
            item.add_marker("attack")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every asynchronous test runs on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _own_directory_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the tokens, keys or settings of the machine, or of another test."""
    monkeypatch.chdir(tmp_path)
    _clean(monkeypatch)


def _clean(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        environment.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _blocking_is_an_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test fails if the library blocks the event loop. All it may do there is look at the token file.

    Making a middleware or a store, and putting tokens into one from a test, is no request.
    """
    if request.node.get_closest_marker("anyio") is None:
        yield
        return
    blockbuster = BlockBuster("freegpt_auth")
    blockbuster.functions["os.stat"].can_block_in("freegpt_auth/stores/file/disk.py", "signature_at")
    for function in blockbuster.functions.values():
        function.can_block_in("freegpt_auth/middleware.py", "__init__")
        function.can_block_in("freegpt_auth/stores/file/store.py", {"__init__", "add", "revoke", "delete"})
        function.can_block_in("freegpt_auth/stores/postgres/store.py", {"add", "revoke", "delete"})
    blockbuster.activate()
    yield
    blockbuster.deactivate()


@dataclass
class Answer:
    """What an ASGI application sent, and what it was given."""

    messages: list[Any] = field(default_factory=list)
    scope: Scope | None = None

    @property
    def status(self) -> int:
        """The status code of the response."""
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The whole body of the response."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> Any:
        """The error object in the body."""
        return json.loads(self.body)["error"]


@pytest.fixture
def ask() -> Callable[..., Awaitable[Answer]]:
    """Return a function that sends an ASGI application one request and returns its :class:`Answer`.

    ``await ask(app, path="/v1/models", headers=[(b"authorization", b"Bearer …")], method="GET", type="http",
    incoming=[…])``; *incoming* are the messages to receive, and any other keyword goes into the scope.
    """

    async def send_one(
        app: App,
        *,
        path: str = "/v1/models",
        headers: list[tuple[bytes, bytes]] | None = None,
        incoming: list[Any] | None = None,
        **scope_items: Any,
    ) -> Answer:
        kind = scope_items.setdefault("type", "http")
        scope: Scope = {"path": path, "headers": headers or [], "client": ("127.0.0.1", 50000), **scope_items}
        if kind == "http":
            scope.setdefault("method", "GET")
        first = {"type": "http.request", "body": b"", "more_body": False}
        messages = list(incoming or [first if kind == "http" else {"type": f"{kind}.connect"}])
        answer = Answer(scope=scope)

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            answer.messages.append(message)

        await app(scope, receive, send)
        return answer

    return send_one


@pytest.fixture
def hello() -> App:
    """Return an application that answers 200 and its caller: ``{"user": …, "identity": …, "scopes": […]}``."""

    async def app(scope: Scope, _receive: Any, send: Any) -> None:
        content = {
            "user": scope["user"].display_name,
            "identity": scope["user"].identity,
            "scopes": scope["auth"].scopes,
        }
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    return app


@pytest.fixture
def keep() -> Callable[..., Any]:
    """Return a function that puts a new token into a store and returns the token and its secret."""

    def add(store: Any, name: str = "a-token", expires_at: datetime | None = None) -> Any:
        token, secret = issue(name, now=datetime.now(UTC), expires_at=expires_at)
        store.add(digest_of(secret), token)
        return token, secret

    return add


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one PostgreSQL for all tests that need one: as fast as it can be, and safe from nothing."""
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415
    from tests.helpers.postgresql import running  # noqa: PLC0415  most tests need none, and some environments have none

    fast = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    with running(tmp_path_factory.mktemp("postgresql") / "data", **fast) as cluster:
        cluster.sql("CREATE DATABASE migrated")
        PostgresTokenStore(cluster.url("migrated")).migrate()
        yield cluster


@pytest.fixture
def database(cluster: Any) -> Iterator[str]:
    """Return the URL of an empty database of this test's own, with the schema in it."""
    yield from _databases(cluster, template="migrated")


@pytest.fixture
def empty(cluster: Any) -> Iterator[str]:
    """Return the URL of a database of this test's own, without the schema."""
    yield from _databases(cluster, template="template1")


def _databases(cluster: Any, template: str) -> Iterator[str]:
    name = f"test_{time.monotonic_ns()}"
    cluster.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield cluster.url(name)
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python -m freegpt_auth`` in a process of its own."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "freegpt_auth", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Go on as a user who may not do everything, with a folder of that user's own."""
    import filelock  # noqa: F401, PLC0415  that user may not reach the interpreter's modules

    user = os.geteuid()
    other = 65534 if user == 0 else user
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, other, -1)
        os.seteuid(other)
        try:
            yield Path(folder)
        finally:
            Path(folder).chmod(0o700)
            os.seteuid(user)


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str = "/v1/models", token: str | None = None) -> int:
        """Return the status code that a GET answers."""
        return status(self.url + path, token)

    def stop(self) -> str:
        """Stop the server as an operator does, and return what it logged."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        return self.log.read_text()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server on a free loopback port and waits until it answers.

    ``serve("app:app", "--workers", "4")`` runs ``python -m uvicorn app:app --workers 4``;
    ``serve(script=PATH)`` runs a script with ``--port``; ``serve("app:app", module="granian")`` another server.
    """
    yield from _servers(tmp_path)


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return the same function, for servers that all tests of a module share, in a directory of their own."""
    with pytest.MonkeyPatch.context() as environment:
        _clean(environment)
        yield from _servers(tmp_path_factory.mktemp("served"))


def _servers(folder: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: str, module: str = "uvicorn", script: Path | None = None, **environment: str) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program = [str(script)] if script else ["-m", module]
        address = (
            ["--bind", f"127.0.0.1:{port}"] if module == "hypercorn" else ["--host", "127.0.0.1", "--port", str(port)]
        )
        log = folder / f"server-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program, *arguments, *address],
                stdout=output,
                stderr=subprocess.STDOUT,
                # By default uvicorn kills a worker that a busy machine keeps from answering it for 5 seconds.
                env={**os.environ, "UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "120", **environment},
                cwd=folder,
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        servers.append(server)
        deadline = time.monotonic() + 120
        while True:
            try:
                server.get("/")
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            else:
                return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()
