"""Helpers of the tests in this folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0
"""Seconds after which a wait fails its test."""


@dataclass
class Clock:
    """A local clock that the test advances."""

    instant: float = 1_000.0

    def __call__(self) -> float:
        """Return the instant."""
        return self.instant


def until(is_reached: Callable[[], object], explanation: Callable[[], object] = lambda: "") -> None:
    """Wait until *is_reached* returns a true value; *explanation* is called after a timeout."""
    deadline = time.monotonic() + PATIENCE
    while not is_reached():
        assert time.monotonic() < deadline, explanation()
        time.sleep(0.005)


def name_of(url: str) -> str:
    """Return the name of the database in *url*."""
    return url.rpartition("/")[2]


def execute(url: str, *statements: str) -> None:
    """Run statements in one transaction, as an operator with psql does."""
    with psycopg.connect(url) as connection:
        for statement in statements:
            connection.execute(statement.encode())
