"""Settings of every database session: the defaults of a role, a database, the environment or a pooler change nothing.

Each setting of PostgreSQL's chapters "Client Connection Defaults" and "Version and Platform Compatibility" (18) was judged: those
below change the meaning of a statement or the text of a value, or hold a session up. Left alone are settings of speed
(``plan_cache_mode``), of places on disk (``default_tablespace``), of messages (``lc_messages``), and those that an operator
restricts a role by: ``role``, ``row_security``, ``default_transaction_read_only``.
"""

from __future__ import annotations

VALUES = {
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    # A schema in which others may create functions could hold one that matches a call better than PostgreSQL's own, and
    # would run with our rights (CVE-2018-1058).
    "search_path": "pg_catalog",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "client_min_messages": "warning",
    "exit_on_error": "off",
    # Longest pause between two statements of one transaction: a host that dies in the middle keeps no lock for longer.
    "idle_in_transaction_session_timeout": "60s",
    "idle_session_timeout": "0",
}
"""Settings of every session, by name."""

_SINCE_17, _VERSION_17 = {"transaction_timeout": "0"}, 170_000
_LONGEST_LOCK = 60.0

APPLY = """
    SELECT pg_catalog.set_config(name, value, false)
    FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.text[]), pg_catalog.unnest(%s::pg_catalog.text[])) AS setting (name, value)
    WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %s
"""
"""Apply names and values to a session whose process has a number. A pooler reports another number: no row, nothing applied.

A pooler in transaction mode would lend the settings to other clients, and lose them for this one. Every name is qualified: the
role's ``search_path`` is not replaced yet.
"""


def limits(seconds: float) -> dict[str, str]:
    """Return the time limits that the database enforces where a client waits for *seconds*.

    The database gives up first: a session that waits for a lock would outlive the connection of its client. The limit for locks
    is the shortest, so that the error tells a lock from a slow statement.
    """
    lock = min(0.75 * seconds, _LONGEST_LOCK)
    return {"lock_timeout": f"{lock * 1000:.0f}ms", "statement_timeout": f"{0.9 * seconds * 1000:.0f}ms"}


def settings(seconds: float, version: int) -> dict[str, str]:
    """Return the settings of a session by name.

    Args:
        seconds: how long the client waits for each answer.
        version: PostgreSQL's, as libpq reports it: 180000.
    """
    return {**VALUES, **(_SINCE_17 if version >= _VERSION_17 else {}), **limits(seconds)}


def local(values: dict[str, str]) -> str:
    """Return the statements that apply *values* until the end of a transaction."""
    # SET takes no snapshot, unlike SELECT set_config(): the isolation level may still be changed after it.
    return "".join(f"SET LOCAL {name} TO '{value}'; " for name, value in values.items())
