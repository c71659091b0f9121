"""The sessions that hold a lock for which a command waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import Connection

# From the waiting sessions of this role to the sessions that block them, and so on to those that wait for no lock.
# Without the rights of pg_monitor, the state and start of other roles' sessions are hidden.
_BLOCKERS = """
    WITH RECURSIVE blocking (pid) AS (
        SELECT unnest(pg_blocking_pids(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = session_user AND wait_event_type = 'Lock'
        UNION SELECT unnest(pg_blocking_pids(pid)) FROM blocking
    )
    SELECT pid, usename::text, application_name, state, to_char(xact_start, 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
    FROM blocking LEFT JOIN pg_stat_activity USING (pid) WHERE pg_blocking_pids(pid) = '{}' ORDER BY pid
"""


def describe(connection: Connection) -> str:
    """Return the sessions that block a session of this role, and how to end each; "" if there are none."""
    return " and ".join(_described(*row) for row in connection.run(_BLOCKERS))


def _described(pid: int, role: str | None, program: str | None, state: str | None, since: str | None) -> str:
    if not pid:  # pg_blocking_pids() returns 0 for a prepared transaction
        return "a prepared transaction holds a lock; end it (SELECT gid FROM pg_prepared_xacts; ROLLBACK PREPARED)"
    facts = [f"role {role}", program, f"{state} since {since}" if state else None]
    shown = ", ".join(fact for fact in facts if fact)
    return f"process {pid} ({shown}) holds a lock; end its transaction, or run SELECT pg_terminate_backend({pid})"
