"""Counts uses in memory, and writes them without slowing a request.

Recording is one append to memory, and nothing else while the writer sleeps. This is one daemon thread a process, which
writes what came together: every 2 seconds, when the server shuts down, and when the interpreter exits.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from ..acting import thread_as_owner_of
from ..exceptions import StoreError, UsageError
from ..forks import Watched
from .base import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from .base import UsageStore

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that a stopping server waits at most for its last write."""

FORK_TIMEOUT = 1.0
"""Seconds that a fork waits at most for a write under way."""

LONGEST_SLEEP = 2.0
"""Seconds after which the writer looks at what came together, though it may not write it yet: till then that has no bound."""

PENDING_LIMIT = 1_000_000
"""Uses, and tokens with unwritten uses, that are kept in memory while they cannot be written."""

Use = tuple[str, float]
"""A token's id, and when it was used, in seconds since the epoch."""

_logger = logging.getLogger("freegpt_auth")


class UsageRecorder(Watched):
    """Counts uses in memory and adds them to a store.

    Args:
        store: where to.
        interval: seconds between two writes: what a killed process can lose.

    Attributes:
        record: call it to count one use. It never blocks and never fails.

    Raises:
        ConfigurationError: *store* names something that is no place for usage.
    """

    def __init__(self, store: UsageStore, *, interval: float) -> None:
        # Now, for a last write at exit: while the interpreter shuts down it cannot be imported, and version 3.30 tries out
        # the file system when it is, which importing this package must not do.
        import ctypes  # noqa: F401, PLC0415

        import filelock  # noqa: F401, PLC0415

        with contextlib.suppress(StoreError), thread_as_owner_of(store.source):  # the first write reports it
            store.check()
        self._store = store
        self._interval = interval
        self._told: str | None = None
        self._is_held = False
        self.after_fork_in_child()
        self.watch_forks()
        _recorders.add(self)

    def before_fork(self) -> None:
        """Never fork during a write: the child would inherit SQLite's lock table and keep those locks."""
        self._is_held = self._writing.acquire(timeout=FORK_TIMEOUT)

    def after_fork_in_parent(self) -> None:
        """Let the writer go on."""
        if self._is_held:
            self._writing.release()

    def after_fork_in_child(self) -> None:
        """Start with nothing recorded: the uses in memory are the parent's to write."""
        self._pending: deque[Use] = deque()
        self._counts: dict[str, tuple[int, float]] = {}
        self._process = secrets.token_hex(8)
        self._batch = Batch(self._process, 0, {})
        self._dropped = 0
        self._writer: threading.Thread | None = None
        self._starting = threading.Lock()
        self._writing = threading.Lock()
        self.record: Callable[[Use], None] = self._record_within_bounds

    def _record_within_bounds(self, use: Use) -> None:
        if len(self._pending) >= PENDING_LIMIT:
            self._dropped += 1
            return
        self._pending.append(use)
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
            # What could not be written goes first, as it was: it may be there already, and only its answer be lost.
            while (self._batch.counts or self._counts) and self._write(max(0.0, deadline - time.monotonic())):
                pass
        finally:
            self._writing.release()

    def finish(self) -> None:
        """Write what was recorded so far, as :meth:`flush` does, and let go of the store."""
        self.flush()
        self._store.close()

    def _start(self) -> None:
        with self._starting:
            if self._writer is None:
                # Started by the first use and not before: a thread does not survive the fork of a preloading server.
                writer = threading.Thread(target=self._run, name="freegpt_auth-usage", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread to spare: the next use tries again
                    writer.start()
                    self._writer = writer

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while True:
            # A request then does nothing but append, which takes 70 ns off each. A write may take long, so it is bounded.
            self.record = self._pending.append
            time.sleep(min(LONGEST_SLEEP, max(0.0, due - time.monotonic())))
            self.record = self._record_within_bounds
            if time.monotonic() >= due:
                self.flush()
                due = time.monotonic() + self._interval
            else:
                with self._writing:
                    self._drain()

    def _drain(self) -> None:
        counts, pending, unwritten = self._counts, self._pending, self._batch.counts
        for _ in range(len(pending)):
            token_id, instant = pending.popleft()
            count, latest = counts.get(token_id, (0, 0.0))
            if not count and token_id not in unwritten and len(counts) + len(unwritten) >= PENDING_LIMIT:
                self._dropped += 1
                continue
            counts[token_id] = (count + 1, max(latest, instant))

    def _write(self, timeout: float) -> bool:
        if not self._batch.counts:
            self._batch = Batch(self._process, self._batch.sequence + 1, self._counts)
            self._counts = {}
        try:
            with thread_as_owner_of(self._store.source):
                self._store.write(self._batch, timeout)
        except (StoreError, UsageError) as error:
            self._tell(f"usage cannot be written to {self._store.source}: {error}. It is kept in memory until it can")
            return False
        self._batch = self._batch._replace(counts={})
        if self._dropped:
            _logger.warning("usage of %d requests was dropped while it could not be written", self._dropped)
            self._dropped = 0
        if self._told is not None:
            _logger.info("usage is written to %s again", self._store.source)
            self._told = None
        return True

    def _tell(self, message: str) -> None:
        if message != self._told:
            self._told = message
            _logger.warning("%s", message)


_recorders: weakref.WeakSet[UsageRecorder] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    for recorder in list(_recorders):
        recorder.flush()
