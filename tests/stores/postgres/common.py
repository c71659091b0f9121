"""Helpers of the tests in this folder."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from freegpt_auth.stores.postgres import reads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from freegpt_auth.stores.postgres.connection import Connection
    from tests.helpers.postgresql import Cluster

Lines = Callable[..., list[str]]
After = Callable[[str, Callable[[], object]], None]

PATIENCE = 30.0  # seconds after which a wait fails its test


@dataclass
class Clock:
    """A local clock that the test advances."""

    instant: float = 1_000.0

    def __call__(self) -> float:
        """Return the instant."""
        return self.instant

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.instant += seconds


def name_of(url: str) -> str:
    """Return the name of the database in *url*."""
    return url.rpartition("/")[2]


def execute(url: str, *statements: str) -> None:
    """Run statements in one transaction, as an operator with psql does."""
    with psycopg.connect(url) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def behind(connection: Connection, revision: int) -> int:
    """Return the number of processes that commands wait for."""
    return int(reads.processes_behind(connection, revision)[0])


@contextlib.contextmanager
def cut_off(cluster: Cluster, url: str) -> Iterator[None]:
    """End every connection to a database, and let it accept none during the block."""
    name = name_of(url)
    cluster.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    cluster.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    yield
    cluster.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@contextlib.contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    """Stop every process of a server during the block."""
    cluster.freeze()
    try:
        yield
    finally:
        cluster.freeze(signal.SIGCONT)
