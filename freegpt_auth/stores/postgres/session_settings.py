"""Settings of every database session. They override the defaults of the role, the database and a pooler.

The settings below change the meaning of a statement, the text of a value, or the length of a wait. They were selected
from PostgreSQL's chapters "Client Connection Defaults" and "Version and Platform Compatibility" (18). Not overridden:
settings of speed (``plan_cache_mode``), of storage (``default_tablespace``) and of messages (``lc_messages``), and
those by which an operator restricts a role (``role``, ``row_security``, ``default_transaction_read_only``).
"""

from __future__ import annotations

VALUES = {
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    # In a schema that others may write to, a function could match a call better than PostgreSQL's own, and would run
    # with our rights (CVE-2018-1058).
    "search_path": "pg_catalog",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "client_min_messages": "warning",
    "exit_on_error": "off",
    # A host that dies within a transaction holds its locks no longer than this.
    "idle_in_transaction_session_timeout": "60s",
    "idle_session_timeout": "0",
}
"""Settings of every session by name."""

_SINCE_17, _VERSION_17 = {"transaction_timeout": "0"}, 170_000
_LONGEST_LOCK = 60.0

APPLY = """
    SELECT pg_catalog.set_config(name, value, false)
    FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.text[]), pg_catalog.unnest(%s::pg_catalog.text[])) AS setting
    (name, value) WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %s
"""
"""Applies names and values to the session with the given process id. Behind a pooler the id differs: no row is
returned, and no setting is applied.

A pooler in transaction mode would pass the settings on to other clients, and lose them for this one. Every name is
qualified: the role's ``search_path`` is still in force.
"""


def limits(seconds: float) -> dict[str, str]:
    """Return the time limits of the database for a client that waits for *seconds*.

    They are shorter than the client's: a session that waits for a lock would outlive its client. The lock timeout is
    the shortest, so that the error distinguishes a lock from a slow statement.
    """
    lock = min(0.75 * seconds, _LONGEST_LOCK)
    return {"lock_timeout": f"{lock * 1000:.0f}ms", "statement_timeout": f"{0.9 * seconds * 1000:.0f}ms"}


def settings(seconds: float, version: int) -> dict[str, str]:
    """Return the settings of a session by name.

    Args:
        seconds: longest wait of the client for an answer.
        version: version of PostgreSQL as libpq reports it: 180000.
    """
    return {**VALUES, **(_SINCE_17 if version >= _VERSION_17 else {}), **limits(seconds)}


def local(values: dict[str, str]) -> str:
    """Return the statements that apply *values* to the present transaction."""
    # Unlike SELECT set_config(), SET takes no snapshot: the isolation level can still be changed afterwards.
    return "".join(f"SET LOCAL {name} TO '{value}'; " for name, value in values.items())
