"""Errors of the driver and of PostgreSQL as one line for an operator: the fault and its remedy."""

from __future__ import annotations

import psycopg

from ...exceptions import StoreBusyError, StoreError, StoreUnavailableError
from .timed_connection import LockHeldError

_RUN_MIGRATE = "the tables are not as this release made them: run python -m freegpt_auth migrate, or restore a backup"
_SEE_LOG = "look into the log of the database"
_START = "try again once it runs"

# By the first characters of SQLSTATE; five are tried before two (PostgreSQL 18, appendix A).
_ADVICE = {
    "25006": "connect to the primary, or remove default_transaction_read_only",
    "3D000": "create the database, or correct its name in the URL",
    "42501": "use a role of the database that may do this (docs/guide/fleet.md)",
    "42704": _RUN_MIGRATE,
    "42703": _RUN_MIGRATE,
    "42883": _RUN_MIGRATE,
    "42P01": _RUN_MIGRATE,
    "3F000": _RUN_MIGRATE,
    "53100": "make room on the disk of the database",
    "53300": "end idle sessions, or raise max_connections",
    "55P03": "another session holds a lock; end its transaction "
    "(SELECT pid, pg_blocking_pids(pid) FROM pg_stat_activity)",
    "57014": "the time limit was reached, or the statement was cancelled: try again",
    "P0001": "nothing was changed",
    "0A": _RUN_MIGRATE,
    "22": "a value cannot be stored or read: correct that token",
    "23": "a value contradicts the tables: correct that token",
    "25": "try again",
    "28": "correct user and password in the URL",
    "40": "try again",
    "42": _RUN_MIGRATE,
    "53": _SEE_LOG,
    "57": _START,
    "58": _SEE_LOG,
    "XX": _SEE_LOG,
}
_UNREACHED = (
    "check that the database runs and can be written to, and each part of the URL: host, port, name, user, password"
)
_UNSURE = (
    "if something was to be changed, look with list whether it was; a token shown there as revoked may still be "
    "accepted: run revoke again"
)
_UNREADABLE = "a value cannot be stored or read: text must be UTF-8 without the character NUL"


def reason_of(error: Exception) -> str:
    """Return the fault and its remedy in one line."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    lines = (primary or str(error) or type(error).__name__).splitlines()
    # libpq indents its hints with a tab. They suit programs that are started by hand.
    reason = " ".join(line.strip() for line in lines if not line.startswith("\t")).rstrip(".")
    advice = _advice_for(error)
    return f"{reason}; {advice}" if advice else reason


def failure(error: Exception, source: str) -> StoreError:
    """Return the error that a command raises for an error of the driver.

    Args:
        error: ``psycopg.Error``, or ``ValueError`` for a value that the driver cannot convert.
        source: the database, for the operator.
    """
    reason = reason_of(error)
    if isinstance(error, psycopg.errors.UniqueViolation):
        return StoreError(f"{source}: a token with the same id or secret is there already")
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return StoreBusyError(f"{source} is locked: {reason}; {_UNSURE}")
    if isinstance(error, psycopg.OperationalError):
        return StoreUnavailableError(f"{source} does not answer any more: {reason}; {_UNSURE}")
    return StoreError(f"{source}: {reason}")


def _advice_for(error: Exception) -> str:
    if isinstance(error, LockHeldError):
        return ""
    code = (error.sqlstate if isinstance(error, psycopg.Error) else None) or ""
    for length in (5, 2):
        if code[:length] in _ADVICE:
            return _ADVICE[code[:length]]
    if isinstance(error, (psycopg.DataError, UnicodeError)):
        return _UNREADABLE
    if isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError)):
        return _UNREACHED
    return ""
