"""Counts uses in memory and writes them to a usage store, without slowing a request.

Recording a use is one append. One daemon thread per recorder writes the uses at each interval; shutdown and exit write
the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import secrets
import threading
import time
import weakref
from collections import Counter, deque
from operator import itemgetter
from typing import TYPE_CHECKING

from ..acting import thread_as_owner_of
from ..exceptions import StoreError, UsageError
from ..forks import Watched
from .base import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from .base import UsageStore

SHUTDOWN_TIMEOUT = 5.0
"""Default limit of a stopping server's wait for its last write, in seconds."""

FORK_TIMEOUT = 1.0
"""Default limit of a fork's wait for a running write, in seconds."""

LONGEST_SLEEP = 2.0
"""Default limit of the writer's sleep, in seconds. The queue has no limit during a sleep, and is counted after it."""

PENDING_LIMIT = 1_000_000
"""Default limit of pending uses, and of tokens with unwritten uses, while the store cannot be written."""

PIECE_SIZE = 10_000
"""Number of uses per call of C code: half the time of a loop; the interpreter lock is held for 1 ms."""

Use = tuple[str, float]
"""Id of a token, and instant of its use in seconds since the epoch."""

_logger = logging.getLogger("freegpt_auth")


class UsageRecorder(Watched):
    """Counts uses in memory and adds them to a store.

    Args:
        store: the usage store.
        interval: seconds between two writes; a killed process loses the uses of one interval.
        shutdown_timeout: seconds that a stopping server waits for its last write.
        fork_timeout: seconds that a fork waits for a running write.
        longest_sleep: seconds after which the writer counts the pending uses, if the interval is longer.
        pending_limit: number of uses, and of tokens with unwritten uses, that are kept while the store cannot be
            written.

    Attributes:
        record: records one use; never blocks, never raises. While the writer sleeps it is the queue's own ``append``,
            which is 70 ns faster than a method; during a write it is a method that limits the queue.

    Raises:
        ConfigurationError: *store* holds foreign data.
    """

    def __init__(
        self,
        store: UsageStore,
        *,
        interval: float,
        shutdown_timeout: float = SHUTDOWN_TIMEOUT,
        fork_timeout: float = FORK_TIMEOUT,
        longest_sleep: float = LONGEST_SLEEP,
        pending_limit: int = PENDING_LIMIT,
    ) -> None:
        # For the last write at exit, when nothing can be imported any more. Not at the import of this module: filelock
        # 3.30 probes the file system then.
        import ctypes  # noqa: F401, PLC0415

        import filelock  # noqa: F401, PLC0415

        with contextlib.suppress(StoreError), thread_as_owner_of(store.source):  # the first write reports it
            store.check()
        self._store = store
        self._interval = interval
        self._shutdown_timeout, self._fork_timeout = shutdown_timeout, fork_timeout
        self._longest_sleep, self._pending_limit = longest_sleep, pending_limit
        self._last_logged: str | None = None
        self._is_held = False
        self.after_fork_in_child()
        self.watch_forks()
        _recorders.add(self)

    def before_fork(self) -> None:
        """Wait for a write, within the timeout: the child would inherit and keep the locks of SQLite."""
        self._is_held = self._writing.acquire(timeout=self._fork_timeout)

    def after_fork_in_parent(self) -> None:
        """Let the writer continue."""
        if self._is_held:
            self._writing.release()

    def after_fork_in_child(self) -> None:
        """Begin with no uses: the parent writes those in memory."""
        self._pending: deque[Use] = deque()
        self._counts: dict[str, tuple[int, float]] = {}
        self._process = secrets.token_hex(8)
        self._batch = Batch(self._process, 0, {})
        self._dropped = 0
        self._writer: threading.Thread | None = None
        self._starting = threading.Lock()
        self._writing = threading.Lock()
        self.record: Callable[[Use], None] = self._record_within_limit

    def _record_within_limit(self, use: Use) -> None:
        if len(self._pending) >= self._pending_limit:
            self._dropped += 1
            return
        self._pending.append(use)
        if self._writer is None:
            self._start()

    def flush(self) -> None:
        """Write all uses recorded so far, within the shutdown timeout. It never raises; faults are logged."""
        deadline = time.monotonic() + self._shutdown_timeout
        if not self._writing.acquire(timeout=self._shutdown_timeout):
            self._log("usage is being written for too long; what came last is lost")
            return
        try:
            self._drain()
            # Retry the failed batch first and unchanged: it may have been committed and only the reply lost.
            while (self._batch.counts or self._counts) and self._write(max(0.0, deadline - time.monotonic())):
                pass
        finally:
            self._writing.release()

    def finish(self) -> None:
        """Write all uses recorded so far, as :meth:`flush` does, and close the store."""
        self.flush()
        self._store.close()

    def _start(self) -> None:
        with self._starting:
            if self._writer is None:
                # Started by the first use: a thread does not survive the fork of a preloading server.
                writer = threading.Thread(target=self._run, name="freegpt_auth-usage", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread available: the next use retries
                    writer.start()
                    self._writer = writer

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while True:
            # Unlimited only during the sleep, which is short. A write may take long: then the queue has a limit.
            self.record = self._pending.append
            time.sleep(min(self._longest_sleep, max(0.0, due - time.monotonic())))
            self.record = self._record_within_limit
            if time.monotonic() >= due:
                self.flush()
                due = time.monotonic() + self._interval
            else:
                with self._writing:
                    self._drain()

    def _drain(self) -> None:
        pending = self._pending
        left = len(pending)  # uses recorded from here on are counted by the next call
        while left:
            uses = [pending.popleft() for _ in range(min(left, PIECE_SIZE))]
            left -= len(uses)
            latest = dict(sorted(uses, key=itemgetter(1)))  # the last use of each token
            for token_id, count in Counter(map(itemgetter(0), uses)).items():
                self._count(token_id, count, latest[token_id])

    def _count(self, token_id: str, uses: int, instant: float) -> None:
        counts, unwritten = self._counts, self._batch.counts
        count, latest = counts.get(token_id, (0, 0.0))
        if not count and token_id not in unwritten and len(counts) + len(unwritten) >= self._pending_limit:
            self._dropped += uses
            return
        counts[token_id] = (count + uses, max(latest, instant))

    def _write(self, timeout: float) -> bool:
        if not self._batch.counts:
            self._batch = Batch(self._process, self._batch.sequence + 1, self._counts)
            self._counts = {}
        try:
            with thread_as_owner_of(self._store.source):
                self._store.write(self._batch, timeout)
        except (StoreError, UsageError) as error:
            self._log(f"usage cannot be written to {self._store.source}: {error}. It is kept in memory until it can")
            return False
        self._batch = self._batch._replace(counts={})
        if self._dropped:
            _logger.warning("usage of %d requests was dropped while it could not be written", self._dropped)
            self._dropped = 0
        if self._last_logged is not None:
            _logger.info("usage is written to %s again", self._store.source)
            self._last_logged = None
        return True

    def _log(self, message: str) -> None:
        if message != self._last_logged:
            self._last_logged = message
            _logger.warning("%s", message)


_recorders: weakref.WeakSet[UsageRecorder] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    for recorder in list(_recorders):
        recorder.flush()
