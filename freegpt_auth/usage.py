"""When and how often each token was used, recorded beside the token file without slowing a request.

Recording is one append to memory. One daemon thread a process adds what came together to a SQLite database: every
2 seconds, when the server shuts down, and when the interpreter exits. Counts are added as differences and the last use
only moves forward, so any number of processes write side by side and none can undo what another wrote.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .exceptions import StoreError
from .stores import disk

if TYPE_CHECKING:
    from collections.abc import Generator

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that a stopping server waits at most for its last write."""

PENDING_LIMIT = 1_000_000
"""Uses, and tokens with unwritten uses, that are kept in memory while they cannot be written."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS usage (
        token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL
    ) WITHOUT ROWID
"""
_ADD = """
    INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT (token_id) DO UPDATE SET
        use_count = use_count + excluded.use_count, last_used_at = max(last_used_at, excluded.last_used_at)
"""
_NOT_A_DATABASE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_logger = logging.getLogger("freegpt_auth")


class Usage(NamedTuple):
    """How a token was used.

    Attributes:
        use_count: accepted requests.
        last_used_at: when the last of them came.
    """

    use_count: int
    last_used_at: datetime


class UsageRecorder:
    """Counts uses in memory and adds them to the database at *path*.

    Args:
        path: the database; made when the first use is written.
        interval: seconds between two writes: what a killed process can lose.
    """

    def __init__(self, path: str, *, interval: float) -> None:
        self.path: str = os.path.abspath(path)
        self._interval = interval
        self._told: str | None = None
        self.forget()
        _recorders.add(self)

    def forget(self) -> None:
        """Drop what is in memory: after a fork it is the parent's to write."""
        self._pending: deque[tuple[str, float]] = deque()
        self._counts: dict[str, tuple[int, float]] = {}
        self._dropped = 0
        self._writer: threading.Thread | None = None
        self._starting = threading.Lock()
        self._writing = threading.Lock()

    def record(self, token_id: str, instant: float) -> None:
        """Count one use of a token at *instant*, in seconds since the epoch. It never blocks and never fails."""
        if len(self._pending) >= PENDING_LIMIT:
            self._dropped += 1
            return
        self._pending.append((token_id, instant))
        if self._writer is None:
            self._start()

    def flush(self) -> None:
        """Write what was recorded so far. It blocks for at most 5 seconds and never raises; trouble is logged."""
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        if not self._writing.acquire(timeout=SHUTDOWN_TIMEOUT):
            self._tell("usage is being written for too long; what came last is lost")
            return
        try:
            self._drain()
            if self._counts:
                self._write(max(0.0, deadline - time.monotonic()))
        finally:
            self._writing.release()

    def _start(self) -> None:
        with self._starting:
            if self._writer is None:
                # Started by the first use and not before: a thread does not survive the fork of a preloading server.
                writer = threading.Thread(target=self._run, name="freegpt_auth-usage", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread to spare: the next use tries again
                    writer.start()
                    self._writer = writer

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            self.flush()

    def _drain(self) -> None:
        counts, pending = self._counts, self._pending
        for _ in range(len(pending)):
            token_id, instant = pending.popleft()
            count, latest = counts.get(token_id, (0, 0.0))
            if not count and len(counts) >= PENDING_LIMIT:
                self._dropped += 1
                continue
            counts[token_id] = (count + 1, max(latest, instant))

    def _write(self, timeout: float) -> None:
        error = self._try_to_add(timeout)
        if getattr(error, "sqlite_errorcode", None) in _NOT_A_DATABASE and self._move_aside(timeout):
            error = self._try_to_add(timeout)
        if error is not None:
            self._tell(f"usage cannot be written to {self.path}: {_explain(error)}. It is kept in memory until it can")
            return
        self._counts.clear()
        if self._dropped:
            _logger.warning("usage of %d requests was dropped while it could not be written", self._dropped)
            self._dropped = 0
        if self._told is not None:
            _logger.info("usage is written to %s again", self.path)
            self._told = None

    def _try_to_add(self, timeout: float) -> Exception | None:
        try:
            self._add(timeout)
        except (OSError, sqlite3.Error) as error:
            return error
        return None

    def _add(self, timeout: float) -> None:
        # Born readable by its owner only; SQLite gives its journal the same permissions.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with _connected(f"{Path(self.path).as_uri()}?mode=rw", timeout) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_SCHEMA)
            connection.executemany(_ADD, ((key, *value) for key, value in self._counts.items()))
            connection.execute("COMMIT")

    def _move_aside(self, timeout: float) -> bool:
        """Put a corrupt database out of the way and tell whether a new one can be started; the counts are still here."""
        try:
            with disk.locked(self.path, timeout):
                if _is_corrupt(self.path):  # else another process was faster
                    aside = f"{self.path}.corrupt-{int(time.time())}"
                    Path(self.path).replace(aside)
                    # The old journal must not be played back into the new database.
                    Path(f"{self.path}-journal").unlink(missing_ok=True)
                    _logger.warning("%s was corrupt and is now %s; usage is counted afresh", self.path, aside)
        except (OSError, StoreError):
            return False
        return True

    def _tell(self, message: str) -> None:
        if message != self._told:
            self._told = message
            _logger.warning("%s", message)


def read_usage(path: str) -> dict[str, Usage]:
    """Return the usage of each used token by its id; of none if nothing was recorded yet.

    Raises:
        sqlite3.Error: the database cannot be read, or is no usage database.
    """
    if not Path(path).exists():
        return {}
    with _connected(f"{Path(path).absolute().as_uri()}?mode=ro", SHUTDOWN_TIMEOUT) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'usage'").fetchone():
            return {}
        try:
            return {
                token_id: Usage(use_count, datetime.fromtimestamp(last_used_at, UTC))
                for token_id, use_count, last_used_at in connection.execute("SELECT * FROM usage")
            }
        except (TypeError, ValueError, OverflowError) as error:
            raise sqlite3.DataError(f"it holds no usage: {error}") from None


def _is_corrupt(path: str) -> bool:
    try:
        with _connected(f"{Path(path).as_uri()}?mode=rw", 0.0) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() != ("ok",))
    except sqlite3.DatabaseError as error:
        return error.sqlite_errorcode in _NOT_A_DATABASE


def _explain(error: Exception) -> str:
    return disk.explain(error) if isinstance(error, OSError) else str(error)


@contextlib.contextmanager
def _connected(uri: str, timeout: float) -> Generator[sqlite3.Connection]:
    # One connection a write: nothing is open while nothing happens, and nothing crosses a fork.
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


_recorders: weakref.WeakSet[UsageRecorder] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    for recorder in list(_recorders):
        recorder.flush()


_held: list[threading.Lock] = []


def _finish_writing() -> None:
    """Let no fork fall into a write: SQLite's own notes of who holds which lock would cross it and never be undone."""
    locks = [recorder._writing for recorder in list(_recorders)]  # noqa: SLF001
    _held.extend(lock for lock in locks if lock.acquire(timeout=SHUTDOWN_TIMEOUT))


def _go_on_writing() -> None:
    while _held:
        _held.pop().release()


def _forget_all() -> None:
    for recorder in list(_recorders):
        recorder.forget()


os.register_at_fork(before=_finish_writing, after_in_parent=_go_on_writing, after_in_child=_forget_all)
