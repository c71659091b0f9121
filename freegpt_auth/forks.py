"""Forks of the process: objects that hold a lock, a thread or a connection prepare for one and recover after it."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class Watched:
    """An object with methods that run around each fork, from :meth:`watch_forks` on. By default each does nothing."""

    def watch_forks(self) -> None:
        """Have the methods of this object called, for as long as it lives."""
        _watched.add(self)
        if type(self).before_fork is not Watched.before_fork:
            _hold_forks()

    def before_fork(self) -> None:
        """Prepare for a fork, in the parent."""

    def after_fork_in_parent(self) -> None:
        """Undo :meth:`before_fork`, in the parent."""

    def after_fork_in_child(self) -> None:
        """Replace each lock, thread and connection: they are the parent's."""


class Lock(Watched):
    """A mutual exclusion lock, free in the child after a fork, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        self.watch_forks()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Make a new lock."""
        self._lock = threading.Lock()


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_kept: list[object] = []


def keep(inherited: object) -> None:
    """Keep an object of the parent process alive for ever: its destructor would close a connection of the parent."""
    _kept.append(inherited)


def _before() -> None:
    for each in list(_watched):
        each.before_fork()


def _after_in_parent() -> None:
    for each in list(_watched):
        each.after_fork_in_parent()


def _after_in_child() -> None:
    for each in list(_watched):
        each.after_fork_in_child()


@functools.cache
def _hold_forks() -> None:
    # The hook that is registered last runs first, and ours must run before filelock's. That one blocks the release of
    # file locks in other threads until the fork: run first, it would stop the write that ours awaits.
    import filelock  # noqa: F401, PLC0415  it registers its hook, and may probe the file system

    os.register_at_fork(before=_before)


os.register_at_fork(after_in_parent=_after_in_parent, after_in_child=_after_in_child)
