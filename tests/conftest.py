"""Fixtures of all tests: a clean environment, both event loops, real servers and a real PostgreSQL."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import BlockBuster

from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.variables import VARIABLES
from tests.helpers import asgi
from tests.helpers.servers import Serve, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from freegpt_auth import Token, TokenStore
    from tests.helpers.postgresql import Cluster

_ATTACKS = Path(__file__).parent / "attacks"
_ON_POSTGRESQL = {"cluster", "durable", "fleet", "mortal"}  # the fixtures that start a PostgreSQL


Keep = Callable[..., "tuple[Token, str]"]


def pytest_configure() -> None:
    """Silence asyncio's warnings about slow callbacks: a loaded machine causes them."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by "-m"
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a real PostgreSQL as ``database``, and every test in tests/attacks as ``attack``."""
    for item in items:
        if not _ON_POSTGRESQL.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("database")
        if _ATTACKS in item.path.parents:
            item.add_marker("attack")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every asynchronous test on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _own_directory_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the tokens, keys and settings of the machine and of other tests."""
    monkeypatch.chdir(tmp_path)
    _clean(monkeypatch)


def _clean(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        environment.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _blocking_is_an_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an asynchronous test in which the library blocks the event loop.

    The library may call ``stat`` on the token file there. Constructing a middleware or a store is no request, and
    neither is a test's own change of a store.
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


@pytest.fixture
def ask() -> asgi.Ask:
    """Return the function that sends one request to an application in this process."""
    return asgi.ask


@pytest.fixture
def keep() -> Keep:
    """Return a function that adds a new token to a store and returns the token and its secret."""

    def add(store: TokenStore, name: str = "a-token", expires_at: datetime | None = None) -> tuple[Token, str]:
        token, secret = issue(name, now=datetime.now(UTC), expires_at=expires_at)
        store.add(digest_of(secret), token)
        return token, secret

    return add


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run one PostgreSQL for all tests that need one: fast, and not durable."""
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415
    from tests.helpers.postgresql import running  # noqa: PLC0415  some environments have no PostgreSQL

    fast = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    with running(tmp_path_factory.mktemp("postgresql") / "data", **fast) as cluster:
        cluster.sql("CREATE DATABASE migrated")
        PostgresTokenStore(cluster.url("migrated")).migrate()
        yield cluster


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    """Return the URL of an empty database for this test, with the schema."""
    yield from _databases(cluster, template="migrated")


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[str]:
    """Return the URL of an empty database for this test, without the schema."""
    yield from _databases(cluster, template="template1")


def _databases(cluster: Cluster, template: str) -> Iterator[str]:
    name = f"test_{time.monotonic_ns()}"
    cluster.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield cluster.url(name)
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python -m freegpt_auth`` in a process of its own."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "freegpt_auth", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Continue as a user without root's rights, and yield a folder of that user."""
    import filelock  # noqa: F401, PLC0415  that user may not read the interpreter's modules

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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts a server on a free loopback port and waits until it answers.

    ``serve("app:app", "--workers", "4")`` runs ``python -m uvicorn app:app --workers 4``;
    ``serve(script=PATH)`` runs a script with ``--port``; ``serve("app:app", module="granian")`` another server.
    """
    yield from serving(tmp_path)


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return the same function for servers that all tests of a module share, in a directory of their own."""
    with pytest.MonkeyPatch.context() as environment:
        _clean(environment)
        yield from serving(tmp_path_factory.mktemp("served"))
