"""File descriptors held in reserve, to read the token file when the process has no other left.

A flood of idle connections takes every descriptor of a server. Without a reserve it could not read a revocation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref

_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


class Reserve:
    """Two reserved descriptors, the ends of one pipe. Until :meth:`fill` it opens and closes like the system.

    A thread that accepts connections may take the released descriptor before the file is opened: then the second one
    is released. Not safe for several threads at once; a fork duplicates the reserve.
    """

    def __init__(self) -> None:
        self._held: list[int] = []
        self._identity: tuple[int, int] | None = None
        weakref.finalize(self, _close_all, self._held).atexit = False

    def fill(self) -> None:
        """Reserve two descriptors, if none is held and two are free."""
        if not self._held:
            with contextlib.suppress(OSError):  # none is free: the next call tries again
                self._held.extend(os.pipe())
                self._identity = _identity(self._held[0])

    def open(self, path: str, flags: int) -> int:
        """Open a file, with a reserved descriptor if no other is left.

        Raises:
            OSError: it cannot be opened.
        """
        while True:
            try:
                return os.open(path, flags)
            except OSError as error:
                if error.errno not in _EXHAUSTED or not self._release():
                    raise

    def close(self, fd: int) -> None:
        """Close a descriptor of :meth:`open`. If the reserve lacks one, *fd* refills it without becoming free."""
        with contextlib.suppress(OSError):  # closing a file that was only read loses nothing
            if len(self._held) == 1:
                self._held.append(os.dup2(self._held[0], fd, inheritable=False))
            else:
                os.close(fd)

    def _release(self) -> bool:
        """Close one reserved descriptor; return whether there was one."""
        while self._held:
            fd = self._held.pop()
            with contextlib.suppress(OSError):
                # A daemon that closed every descriptor may have reused this number: such a descriptor is not ours.
                if _identity(fd) == self._identity:
                    os.close(fd)
                    return True
        return False


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _close_all(held: list[int]) -> None:
    while held:
        with contextlib.suppress(OSError):
            os.close(held.pop())
