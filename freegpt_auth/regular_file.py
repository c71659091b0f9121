"""Opening of a regular file for reading. Reading a FIFO or a device could block or never end."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_DIRECTORY = (
    "it is a directory, as Docker makes one in the place of a missing file that is mounted by itself; remove it, and "
    "mount the directory of the file instead"
)


class UnsuitableFileError(Exception):
    """The file is not a regular one, or is too large. The message is the fault, in words that follow the path."""


def open_regular(
    path: str,
    limit: int,
    opener: Callable[[str, int], int] = os.open,
    closer: Callable[[int], object] = os.close,
) -> tuple[int, os.stat_result]:
    """Open the regular file at *path* and return its descriptor, for the caller to close, and its status.

    Args:
        path: of the file. Symbolic links are followed.
        limit: largest size, in bytes.
        opener: opens the file; takes the path and the flags.
        closer: closes the descriptor of an unsuitable file.

    Raises:
        UnsuitableFileError: the file is not regular, or exceeds *limit*.
        OSError: the file cannot be opened.
    """
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer without a limit.
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
