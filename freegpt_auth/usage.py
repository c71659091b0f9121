"""When and how often each token was used, recorded beside the token file without slowing a request.

Recording is one append to memory. One daemon thread a process adds what came together to a SQLite database: every
2 seconds, when the server shuts down, and when the interpreter exits.
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

from .stores import disk
from .usage_database import add_usage

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that a stopping server waits at most for its last write."""

FORK_TIMEOUT = 1.0
"""Seconds that a fork waits at most for a write under way."""

PENDING_LIMIT = 1_000_000
"""Uses, and tokens with unwritten uses, that are kept in memory while they cannot be written."""

_logger = logging.getLogger("freegpt_auth")


class UsageRecorder:
    """Counts uses in memory and adds them to the database at *path*.

    Args:
        path: the database; made when the first use is written.
        interval: seconds between two writes: what a killed process can lose.
    """

    def __init__(self, path: str, *, interval: float) -> None:
        # Now, for a last write at exit that meets a corrupt database: while the interpreter shuts down it cannot be
        # imported, and version 3.30 tries out the file system when it is, which importing this package must not do.
        import filelock  # noqa: F401, PLC0415

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
        try:
            add_usage(self.path, self._counts, timeout)
        except (OSError, sqlite3.Error) as error:
            reason = disk.explain(error) if isinstance(error, OSError) else error
            self._tell(f"usage cannot be written to {self.path}: {reason}. It is kept in memory until it can")
            return
        self._counts.clear()
        if self._dropped:
            _logger.warning("usage of %d requests was dropped while it could not be written", self._dropped)
            self._dropped = 0
        if self._told is not None:
            _logger.info("usage is written to %s again", self.path)
            self._told = None

    def _tell(self, message: str) -> None:
        if message != self._told:
            self._told = message
            _logger.warning("%s", message)


_recorders: weakref.WeakSet[UsageRecorder] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    for recorder in list(_recorders):
        recorder.flush()


_held: list[threading.Lock] = []


def _finish_writing() -> None:
    """Let no fork fall into a write: SQLite's own notes of who holds which lock would cross it and never be undone."""
    locks = [recorder._writing for recorder in list(_recorders)]  # noqa: SLF001
    _held.extend(lock for lock in locks if lock.acquire(timeout=FORK_TIMEOUT))


def _go_on_writing() -> None:
    while _held:
        _held.pop().release()


def _forget_all() -> None:
    for recorder in list(_recorders):
        recorder.forget()


os.register_at_fork(before=_finish_writing, after_in_parent=_go_on_writing, after_in_child=_forget_all)
