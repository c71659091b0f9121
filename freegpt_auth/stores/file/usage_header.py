"""Recognition of our own usage database before SQLite opens it. Any other file is left alone."""

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

# The tables of version 0.1.0, which set no application_id, as SQLite stores them apart from white space.
_FIRST_TABLES = {
    (
        "CREATE TABLE usage ( token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL ) "
        "WITHOUT ROWID"
    ),
    (
        "CREATE TABLE batches ( process TEXT PRIMARY KEY, sequence INTEGER NOT NULL, written_at REAL NOT NULL ) "
        "WITHOUT ROWID"
    ),
}

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}

_ADVICE = "move it away, or name another file in FREEGPT_AUTH_USAGE"


def obstacle(path: str) -> str | None:
    """Return the reason why usage must not be written to *path*; ``None`` if it may be.

    A missing file, an empty file and our own database are allowed; its header identifies it even if damaged. The
    header is read without SQLite, which could change another application's file: it rolls back journals and checkpoints
    write-ahead logs. A FIFO that replaces the file between this check and SQLite's ``open`` can block the caller, but
    no request.

    Call it within :func:`turn`: closing any descriptor of a file drops the locks that SQLite holds on it for another
    thread of this process (https://www.sqlite.org/howtocorrupt.html, section 2.2).

    Raises:
        OSError: the file cannot be read.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  opening a device may have effects
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        return f"it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file; {_ADVICE}"
    header = _header_of(path)
    if header and not (_is_marked(header) or _is_of_first_release(path, header)):
        return f"it is no usage database of freegpt_auth, or its header is damaged, so it is left as it is; {_ADVICE}"
    return None


def uri_of(path: str, mode: str) -> str:
    """Return SQLite's URI for opening the database at an absolute *path* in *mode*."""
    # Not Path.as_uri: it imports urllib at the first call, and a failing import would stop a command half-way.
    return f"file:{quote(os.fsencode(path))}?mode={mode}"


@contextlib.contextmanager
def turn(path: str, timeout: float) -> Generator[None]:
    """Give one thread of this process at a time its turn to open the database at *path*.

    Raises:
        StoreBusyError: another thread had its turn for longer than *timeout* seconds.
    """
    lock = _turns.locks.setdefault(path, threading.Lock())
    if not lock.acquire(timeout=timeout):
        raise StoreBusyError(f"{path}: another thread used it for longer than {timeout:g} s; try again")
    try:
        yield
    finally:
        lock.release()


class _Turns(Watched):
    """One lock per database that a thread of this process has opened, by path."""

    def __init__(self) -> None:
        self.locks: dict[str, threading.Lock] = {}
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Forget every lock: a thread of the parent may hold it."""
        self.locks.clear()


_turns = _Turns()


def _header_of(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would block
    try:
        return os.read(fd, _HEADER_SIZE)
    finally:
        os.close(fd)


def _is_marked(header: bytes) -> bool:
    return header.startswith(_MAGIC) and header[_ID_AT] == APPLICATION_ID.to_bytes(4, "big")


def _is_of_first_release(path: str, header: bytes) -> bool:
    if not header.startswith(_MAGIC) or header[_ID_AT] != bytes(4):
        return False
    # Immutable: SQLite takes no lock, rolls back no journal and makes no file.
    try:
        with contextlib.closing(sqlite3.connect(uri_of(path, "ro&immutable=1"), uri=True)) as connection:
            tables = connection.execute("SELECT sql FROM sqlite_schema").fetchall()
    except (sqlite3.Error, UnicodeDecodeError):
        return False
    return {" ".join(str(sql).split()) for (sql,) in tables} == _FIRST_TABLES
