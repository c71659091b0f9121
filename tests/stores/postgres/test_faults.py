"""Errors of the driver in one line: the fault, and its remedy."""

from __future__ import annotations

import psycopg
import pytest

from freegpt_auth.stores.postgres.faults import reason_of
from freegpt_auth.stores.postgres.timed_connection import LockHeldError

UNREADABLE = "text must be UTF-8 without the character NUL"
REASONS: list[tuple[Exception, str]] = [
    (psycopg.OperationalError("no route\n\tIs the server running?\nsecond."), "no route second; check that"),
    (psycopg.errors.TooManyConnections("sorry"), "sorry; end idle sessions, or raise max_connections"),
    (psycopg.errors.UndefinedFunction("no add_usage"), "no add_usage; the tables are not as this release made them"),
    (psycopg.errors.DeadlockDetected("deadlock"), "deadlock; try again"),
    (psycopg.DataError("NUL"), f"NUL; a value cannot be stored or read: {UNREADABLE}"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UNREADABLE),
    (LockHeldError("process 1 holds a lock"), "process 1 holds a lock"),
    (ValueError("two\nlines"), "two lines"),
    (KeyError(), "KeyError"),
]


@pytest.mark.parametrize(("error", "reason"), REASONS)
def test_reason_is_one_line_with_advice(error: Exception, reason: str) -> None:
    """Each fault is one line without the driver's advice, which suits programs that are started by hand."""
    assert reason in reason_of(error)
    assert "\n" not in reason_of(error)
    assert "running" not in reason_of(error)
