"""The sessions that hold the locks which a command waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import Link

# The waiting sessions of this role, the sessions that block them, and so on; of these the ones that wait for no lock. A
# session without the rights of pg_monitor sees process, role and program of others, and neither state nor time.
_HOLDERS = """
    WITH RECURSIVE blocking (pid) AS (
        SELECT unnest(pg_blocking_pids(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = session_user AND wait_event_type = 'Lock'
        UNION SELECT unnest(pg_blocking_pids(pid)) FROM blocking
    )
    SELECT pid, usename::text, application_name, state, to_char(xact_start, 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
    FROM blocking LEFT JOIN pg_stat_activity USING (pid) WHERE pg_blocking_pids(pid) = '{}' ORDER BY pid
"""


def holders(link: Link) -> str:
    """Return which sessions hold a lock that a session of this role waits for, and how to end them; "" if none does."""
    named = [_named(*row) for row in link.run(_HOLDERS)]
    return " and ".join(named)


def _named(pid: int, role: str | None, program: str | None, state: str | None, since: str | None) -> str:
    if not pid:  # pg_blocking_pids(): 0 is a prepared transaction
        return "a prepared transaction holds a lock; end it (SELECT gid FROM pg_prepared_xacts; ROLLBACK PREPARED)"
    facts = [f"role {role}", program, f"{state} since {since}" if state else None]
    shown = ", ".join(fact for fact in facts if fact)
    return f"process {pid} ({shown}) holds a lock; end its transaction, or run SELECT pg_terminate_backend({pid})"
