"""Ticks of a file system's clock: two states of a file within one tick can have the same times.

Timestamps advance with the kernel's tick (1 to 10 ms) or, on older file systems, each second (ext2 and ext3 with inodes of
128 bytes, HFS+) or every two (FAT). Writers therefore raise the modification time themselves, and readers compare the
content once more after the tick, as git does for "racily clean" entries (git, Documentation/technical/racy-git.adoc).
"""

from __future__ import annotations

import errno
import os

FINE, COARSE = 0.020, 2.0
"""Upper bounds of one tick, in seconds: of a file system whose times have fractions of a second, and of any other."""

_NS = 1_000_000_000
_STEPS = (1, 1_000, 1_000_000, 10_000_000, _NS, 2 * _NS)


def length(changed_ns: int) -> float:
    """Return the upper bound of one tick of a file's clock, in seconds, judged by its ``st_ctime_ns``.

    The host's clock has no part in it: that of a file server, or of the host of a virtual machine, may differ by minutes.
    """
    return FINE if changed_ns % _NS else COARSE


def set_later(fd: int, before: int) -> None:
    """Raise the modification time of a file above *before*, in nanoseconds, if it is not later.

    Times that only rise keep the signatures of successive files apart, even where an inode number is used again. The
    granularity of the file system is found by trial.

    Raises:
        OSError: the file system has no later time.
    """
    for step in _STEPS:
        if os.fstat(fd).st_mtime_ns > before:
            return
        os.utime(fd, ns=(before + step, before + step))
    if os.fstat(fd).st_mtime_ns <= before:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
