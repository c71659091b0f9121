"""Recognition of our own usage database, before SQLite opens it: any other file is left alone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from typing import TYPE_CHECKING
from urllib.parse import quote

from ...exceptions import StoreBusyError
from ...forks import Watched

if TYPE_CHECKING:
    from collections.abc import Generator

APPLICATION_ID = 0x66677561
"""``PRAGMA application_id`` of a usage database: "fgua" in ASCII."""

_MAGIC = b"SQLite format 3\0"
_ID_AT = slice(68, 72)  # https://www.sqlite.org/fileformat.html#the_database_header
_HEADER_SIZE = 100

# Tables of version 0.1.0, which set no application_id, as SQLite keeps their text; white space apart.
_FIRST_TABLES = {
    "CREATE TABLE usage ( token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL ) WITHOUT ROWID",
    "CREATE TABLE batches ( process TEXT PRIMARY KEY, sequence INTEGER NOT NULL, written_at REAL NOT NULL ) WITHOUT ROWID",
}

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}

_WAY_OUT = "move it away, or name another file in FREEGPT_AUTH_USAGE"


def obstacle(path: str) -> str | None:
    """Return the reason for which usage must not be written to *path*; ``None`` if it may be.

    It may be where nothing is, into an empty file, and into our own database, damaged or not: its header says so. A header
    is read without SQLite, which could change another application's file: it rolls back journals and folds write-ahead
    logs. A file that is replaced by a FIFO between this and SQLite's own ``open`` can hold up the caller, no request.

    Call it within :func:`turn`: closing any descriptor of a file drops the locks that SQLite holds on it for another thread
    of this process (https://www.sqlite.org/howtocorrupt.html, section 2.2).

    Raises:
        OSError: the file cannot be read.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  an open device can do harm, so none is opened
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        return f"it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file; {_WAY_OUT}"
    header = _header_of(path)
    if header and not (_is_marked(header) or _is_of_first_release(path, header)):
        return f"it is no usage database of freegpt_auth, or its header is damaged, so it is left as it is; {_WAY_OUT}"
    return None


def uri_of(path: str, mode: str) -> str:
    """Return SQLite's URI of the database at an absolute *path*, which is opened in *mode*."""
    # Path.as_uri imports urllib when it is called: a fault there would be one of a command that is half done.
    return f"file:{quote(os.fsencode(path))}?mode={mode}"


@contextlib.contextmanager
def turn(path: str, timeout: float) -> Generator[None]:
    """Let one thread of this process at a time have the database at *path* open.

    Raises:
        StoreBusyError: another thread had it open for longer than *timeout* seconds.
    """
    lock = _turns.locks.setdefault(path, threading.Lock())
    if not lock.acquire(timeout=timeout):
        raise StoreBusyError(f"{path}: another thread used it for longer than {timeout:g} s; try again")
    try:
        yield
    finally:
        lock.release()


class _Turns(Watched):
    """One lock for each database that a thread of this process has opened, by path."""

    def __init__(self) -> None:
        self.locks: dict[str, threading.Lock] = {}
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Forget every lock: a thread of the parent may have held it."""
        self.locks.clear()


_turns = _Turns()


def _header_of(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not blocking: it may be a FIFO by now
    try:
        return os.read(fd, _HEADER_SIZE)
    finally:
        os.close(fd)


def _is_marked(header: bytes) -> bool:
    return header.startswith(_MAGIC) and header[_ID_AT] == APPLICATION_ID.to_bytes(4, "big")


def _is_of_first_release(path: str, header: bytes) -> bool:
    if not header.startswith(_MAGIC) or header[_ID_AT] != bytes(4):
        return False
    # Immutable: no lock is taken, no journal rolled back, no file made.
    try:
        with contextlib.closing(sqlite3.connect(uri_of(path, "ro&immutable=1"), uri=True)) as connection:
            tables = connection.execute("SELECT sql FROM sqlite_schema").fetchall()
    except (sqlite3.Error, UnicodeDecodeError):
        return False
    return {" ".join(str(sql).split()) for (sql,) in tables} == _FIRST_TABLES
