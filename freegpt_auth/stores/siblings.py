"""What the workers of one server leave each other to know: that authentication was on.

A worker that is started in the place of another must not open a server whose token file has been moved away since. A
server that an operator stops and starts again must. So the note is bound to the process that starts the workers, and
means nothing to any other: it is an empty file in memory, named by what only those workers share.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

_logger = logging.getLogger("freegpt_auth")


def remember(path: str) -> None:
    """Note for workers to come that the token file at *path* asked for authentication. Nothing is noted where none can come."""
    note = _note(path)
    if note is None:
        return
    try:
        note.parent.mkdir(mode=0o700, exist_ok=True)
        if not _is_private(note.parent):
            raise PermissionError(errno.EPERM, "it is not a folder of this user alone")
        _forget_the_stopped(note.parent)
        note.touch(mode=0o600)
    except OSError as error:
        _logger.warning(
            "%s cannot be used: %s. A worker that is started after the token file was moved away will be open",
            note.parent,
            error.strerror,
        )


def remembered(path: str) -> bool:
    """Tell whether a worker of this server noted so."""
    note = _note(path)
    return note is not None and _is_private(note.parent) and note.exists()


def _note(path: str) -> Path | None:
    server = _server()
    if server is None:
        return None
    name = sha256(server + os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()
    return _folder() / f"{os.getppid()}-{name}"


def _server() -> bytes | None:
    """Return what the workers of this server share and no other server has; ``None`` if this is no worker."""
    import multiprocessing  # noqa: PLC0415  commands need it not

    if multiprocessing.parent_process() is not None:  # uvicorn, hypercorn, granian
        return bytes(multiprocessing.current_process().authkey)
    if "gunicorn.arbiter" in sys.modules:  # its workers are forked
        with contextlib.suppress(OSError):
            # A process id alone is used again; with the time of its start (field 22 of proc_pid_stat) it is not.
            return Path(f"/proc/{os.getppid()}/stat").read_bytes().rpartition(b")")[2].split()[19]
    return None


def _folder() -> Path:
    # Memory that is gone after a reboot, and that nothing clears out by age before.
    memory = Path("/dev/shm")  # noqa: S108  the folder in it is this user's, and is looked at before it is believed
    base = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return base / f"freegpt_auth-{os.geteuid()}"


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _forget_the_stopped(folder: Path) -> None:
    for note in folder.iterdir():
        try:
            os.kill(int(note.name.partition("-")[0]), 0)
        except ProcessLookupError:
            note.unlink(missing_ok=True)
        except (OSError, ValueError):  # it runs as another user, or this is no note
            continue
