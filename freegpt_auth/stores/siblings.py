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
    process, secret = server
    name = sha256(secret + os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()
    return _folder() / f"{process}-{name}"


def _server() -> tuple[int, bytes] | None:
    """Return the process that starts the workers, and what they share and no other server has; ``None`` if there are none."""
    import multiprocessing  # noqa: PLC0415  commands need it not

    if multiprocessing.parent_process() is not None:  # uvicorn, hypercorn, granian
        return os.getppid(), bytes(multiprocessing.current_process().authkey)
    if "gunicorn.arbiter" in sys.modules:  # its workers are forked
        arbiter = os.getpid() if _is_preloading() else os.getppid()
        with contextlib.suppress(OSError):
            # A process id alone is used again; with the time of its start (field 22 of proc_pid_stat) it is not.
            return arbiter, Path(f"/proc/{arbiter}/stat").read_bytes().rpartition(b")")[2].split()[19]
    return None


def _is_preloading() -> bool:
    """Tell whether this is gunicorn's arbiter, which loads the application itself with ``--preload``.

    Only the call stack tells: its parent may be anything, a shell that starts one server after another too.
    """
    frame = sys._getframe()  # noqa: SLF001
    while frame.f_globals.get("__name__") != "gunicorn.arbiter":
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return frame.f_code.co_name == "setup"


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
