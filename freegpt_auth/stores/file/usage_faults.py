"""SQLite's errors in words for an operator; they follow the path of the database."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from ...exceptions import FileError, StoreBusyError, UsageError
from .disk import explain

if TYPE_CHECKING:
    from collections.abc import Generator

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""Codes of a damaged database. SQLITE_ERROR is one: the statements are correct, so the tables must be wrong."""

_WORDS = {
    **dict.fromkeys(DAMAGED, "it is damaged; the next write of a server moves it aside"),
    sqlite3.SQLITE_BUSY: "another program holds its lock; end that program, or let it close the database",
    sqlite3.SQLITE_CANTOPEN: (
        "it or its journal cannot be opened; check the permissions of its folder and the limit of open files"
    ),
    sqlite3.SQLITE_FULL: "no space is left on the device; nothing was changed",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write it; look for the reason in the system's log",
    sqlite3.SQLITE_NOMEM: "there is too little memory to open it",
    sqlite3.SQLITE_READONLY: (
        "it or its folder is read-only; run this as the user who owns them, or change their permissions"
    ),
}


@contextlib.contextmanager
def explained() -> Generator[None]:
    """Turn each error of the file, its lock and SQLite into a :class:`UsageError` without SQLite's own message.

    Raises:
        UsageError: the block raised such an error.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(explain(error)) from None
    except sqlite3.Error as error:
        code = code_of(error)
        unknown = f"SQLite cannot use it (result code {code} of https://www.sqlite.org/rescode.html)"
        raise UsageError(_WORDS.get(code, unknown)) from None
    except FileError as error:
        raise UsageError(error.problem) from None
    except StoreBusyError:
        raise UsageError("other processes write to it for too long") from None


def code_of(error: sqlite3.Error) -> int:
    """Return the primary result code of *error*; 0 if the error is not SQLite's own."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF  # an extended code has more bits


def damage() -> sqlite3.DatabaseError:
    """Return the error of a damaged database, for damage that the sqlite3 module found and SQLite did not."""
    error = sqlite3.DatabaseError()
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
