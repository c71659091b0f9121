"""File times: two states of a file within one tick of its file system's clock can have the same times.

Timestamps advance with the kernel's tick (1 to 10 ms) or, on older file systems, each second (ext2 and ext3 with inodes
of 128 bytes, HFS+) or every two (FAT). Writers therefore raise the modification time themselves, and readers compare
the content once more after the tick, as git does for "racily clean" entries (git,
Documentation/technical/racy-git.adoc).
"""

from __future__ import annotations

import errno
import os

FINE_TICK, COARSE_TICK = 0.020, 2.0
"""Upper bounds of one tick, in seconds: of a file system whose times have fractions of a second, and of any other."""

_NS = 1_000_000_000
_STEPS = (1, 1_000, 1_000_000, 10_000_000, _NS, 2 * _NS)


def tick_length(changed_ns: int) -> float:
    """Return the upper bound of one tick of a file's clock, in seconds, judged by its ``st_ctime_ns``.

    The host's clock is not consulted: the clock of a file server, or of a virtual machine's host, may differ by
    minutes.
    """
    return FINE_TICK if changed_ns % _NS else COARSE_TICK


def set_later(fd: int, before: int) -> None:
    """Raise the modification time of a file above *before*, in nanoseconds, unless it is later already.

    Rising times keep the signatures of successive files apart, even if an inode number is reused. The granularity of
    the file system is found by trial.

    Raises:
        OSError: the file system has no later time.
    """
    for step in _STEPS:
        if os.fstat(fd).st_mtime_ns > before:
            return
        os.utime(fd, ns=(before + step, before + step))
    if os.fstat(fd).st_mtime_ns <= before:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
