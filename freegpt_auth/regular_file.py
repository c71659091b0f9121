"""Opening a regular file for reading. A FIFO or a device would hold the caller, or never end."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_DIRECTORY = (
    "it is a directory, as Docker makes one in the place of a missing file that is mounted by itself; remove it, and mount "
    "the directory of the file instead"
)


class UnsuitableFileError(Exception):
    """The file is no regular file, or too large. The message follows its name."""


def open_regular(
    path: str,
    limit: int,
    opener: Callable[[str, int], int] = os.open,
    closer: Callable[[int], object] = os.close,
) -> tuple[int, os.stat_result]:
    """Open the regular file at *path* and return its descriptor, which the caller closes, and its status.

    Args:
        path: of the file. Symbolic links are followed.
        limit: size in bytes of the largest file that is opened.
        opener: opens it; takes the path and the flags.
        closer: closes the descriptor of an unsuitable file.

    Raises:
        UnsuitableFileError: it is not regular, or larger.
        OSError: it cannot be opened.
    """
    # Not blocking: opening a FIFO would otherwise wait for a writer, for ever.
    descriptor = opener(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _check(status, limit)
    except BaseException:
        closer(descriptor)
        raise
    return descriptor, status


def _check(status: os.stat_result, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UnsuitableFileError(_DIRECTORY)
    if not stat.S_ISREG(status.st_mode):
        raise UnsuitableFileError("it is not a regular file")
    if status.st_size > limit:
        raise UnsuitableFileError(f"it is larger than {limit // 2**20} MiB")
