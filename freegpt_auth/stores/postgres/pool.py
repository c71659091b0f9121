"""A small pool of connections for the threads of one process."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

import psycopg

from ...exceptions import StoreUnavailableError
from ...forks import Watched, keep
from .address import TIME_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from .address import Address
    from .connection import Connection

_T = TypeVar("_T")
# Errors of a database that answers: over another connection the same statement would wait as long.
_ANSWERED = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)


class Pool(Watched):
    """A few connections shared by several threads, opened on demand.

    Args:
        address: the database.
        size: largest number of connections.
        time_limit: longest wait for a free connection, in seconds.
    """

    def __init__(self, address: Address, size: int, time_limit: float = TIME_LIMIT) -> None:
        self._address = address
        self._size = size
        self._time_limit = time_limit
        self._generation = 0
        self._idle: deque[tuple[int, Connection]] = deque()
        self.after_fork_in_child()
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Forget inherited connections without closing them: they belong to the parent."""
        keep(self._idle)
        self._free = threading.BoundedSemaphore(self._size)
        self._idle = deque()

    def run(self, work: Callable[[Connection], _T]) -> _T:
        """Call *work* with a connection and return its result. It is called again if an idle connection proves dead.

        Raises:
            StoreUnavailableError: every connection is in use for longer than the time limit.
            psycopg.Error: connecting failed, or *work* did.
        """
        if not self._free.acquire(timeout=self._time_limit):
            raise StoreUnavailableError(f"{self._address.shown} is slow: all connections of this process are in use")
        try:
            generation = self._generation  # before connecting: the new connection may be outdated when it is there
            connection = self._take()
            if connection is not None:
                try:
                    return self._run(connection, work, generation)
                except _ANSWERED:
                    raise
                except psycopg.OperationalError:  # the connection died while it was idle
                    pass
            return self._run(self._address.connect(), work, generation)
        finally:
            self._free.release()

    def renew(self) -> None:
        """Use new connections from now on: the present ones may lead to a server that is no longer the primary."""
        self._generation += 1
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[1].close()

    def _run(self, connection: Connection, work: Callable[[Connection], _T], generation: int) -> _T:
        try:
            result = work(connection)
        except BaseException:
            connection.close()  # its protocol state is unknown
            raise
        self._idle.append((generation, connection))
        return result

    def _take(self) -> Connection | None:
        with contextlib.suppress(IndexError):
            while True:
                generation, connection = self._idle.pop()
                if generation == self._generation:
                    return connection
                connection.close()
        return None
