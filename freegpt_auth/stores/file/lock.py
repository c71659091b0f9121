"""The lock file beside a file: one writer at a time, over all processes of a host. The lock file is never deleted.

Readers need no lock: a file is replaced whole.
"""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ...exceptions import FileError, StoreBusyError
from .disk import explain

if TYPE_CHECKING:
    from collections.abc import Generator

_POLL_INTERVAL = 0.001
"""Seconds between two attempts of a waiting writer. filelock's default, 50 ms, is longer than most writes."""


@contextlib.contextmanager
def locked(path: str, seconds: float) -> Generator[None]:
    """Hold the lock beside the file at *path*.

    Raises:
        StoreBusyError: another process held it for longer than *seconds*.
        FileError: the lock file cannot be made or locked.
    """
    # Importing filelock takes 48 ms, and commands that only read need no lock.
    from filelock import Timeout, UnixFileLock  # noqa: PLC0415

    _check_folder(path)  # filelock would create it
    # No soft lock where flock is missing: a reused inode breaks it, and two writers lose tokens.
    lock = UnixFileLock(f"{path}.lock", timeout=seconds, mode=0o600, fallback_to_soft=False)
    try:
        lock.acquire(poll_interval=_POLL_INTERVAL)
    except Timeout:
        raise StoreBusyError(f"{path}: another process held its lock for {seconds:g} s; try again") from None
    except (OSError, NotImplementedError) as error:
        raise FileError(path, f"cannot lock {path}.lock: {explain(error)}") from None
    try:
        yield
    finally:
        # The result of the block stands: the lock ends with the process at the latest.
        with contextlib.suppress(OSError):
            lock.release()


def _check_folder(path: str) -> None:
    try:
        status = Path(path).parent.stat()
    except FileNotFoundError:
        raise FileError(path, "its folder does not exist; create the folder first") from None
    except OSError as error:
        raise FileError(path, explain(error)) from None
    if not stat.S_ISDIR(status.st_mode):
        raise FileError(path, "a part of its path is not a directory")
