"""Fixtures of the tests in this folder."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.stores.postgres import PostgresTokenStore, reads
from freegpt_auth.stores.postgres.address import Address
from tests.helpers.ports import free_port
from tests.helpers.postgresql import PASSWORD, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster
    from tests.stores.postgres.common import After, Lines


@pytest.fixture
def connection(database: str) -> Iterator[Connection]:
    """Return a connection to an empty database."""
    with contextlib.closing(Address(database).connect()) as connection:
        yield connection


@pytest.fixture
def nowhere() -> str:
    """Return the URL of a port without a server."""
    return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/tokens"


@pytest.fixture(scope="session")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a PostgreSQL server that tests may kill or freeze; its commits wait for no disk."""
    with running(tmp_path_factory.mktemp("mortal") / "data", fsync="off", synchronous_commit="off") as cluster:
        PostgresTokenStore(cluster.url("postgres")).migrate()
        yield cluster


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Return a function that returns the lines in the log, or those of one level."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")
    return lambda level="": [each.getMessage() for each in caplog.records if level in ("", each.levelname)]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> After:
    """Return a function that makes each call of a function of ``reads`` run an action once it has its answer."""

    def run_after(name: str, action: Callable[[], object]) -> None:
        function = getattr(reads, name)

        def with_action(*arguments: Any, **options: Any) -> Any:
            answer = function(*arguments, **options)
            action()
            return answer

        monkeypatch.setattr(reads, name, with_action)

    return run_after
