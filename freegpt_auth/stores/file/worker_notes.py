"""A note to restarted workers of the same server: authentication was on.

A worker that replaces another must require authentication even if the token file was moved away meanwhile. A server
that an operator restarts without the file must not. A note therefore belongs to the process that starts the workers. It
is an empty file, named after that process and the path of the token file.

Each note is kept in two folders, because either may be cleared: systemd removes a user's files from ``/dev/shm`` at the
last logout (logind.conf(5), RemoveIPC), and old files from the folder for temporary files. Each namespace of process
ids has folders of its own: a container that shares ``/dev/shm`` would take the servers of another container for stopped
ones.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import stat
import sys
import tempfile
import threading
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_logger = logging.getLogger("freegpt_auth")


class _UnsafeFolderError(PermissionError):
    """The folder belongs to another user, or others have access to it."""


class _Server(NamedTuple):
    """The process that starts the workers, and a secret that its workers share and no other server has."""

    process: int
    secret: bytes


def leave(path: str) -> None:
    """Leave a note that the token file at *path* required authentication. A server without workers leaves none."""
    for server in _servers(os.getpid())[:1]:
        for folder in _folders():
            with contextlib.suppress(OSError):  # without notes, new workers require authentication
                _prepare(folder)
                _note(folder, server, path).touch(mode=0o600)


def found(path: str) -> bool:
    """Return whether a worker of this server left a note for *path*, or whether notes cannot be relied on.

    The second case is logged: no folder can hold notes, or another user has access to one and may have deleted notes.
    """
    servers = _servers(os.getpid())
    if not servers:
        return False
    problems: list[OSError] = []
    folders = list(_folders())
    for folder in folders:
        try:
            _prepare(folder)
            if any(_note(folder, server, path).exists() for server in servers):
                return True
            _check_writable(folder)
        except OSError as error:
            problems.append(error)
    is_unknown = len(problems) == len(folders) or any(isinstance(error, _UnsafeFolderError) for error in problems)
    if is_unknown:
        _logger.warning(
            "the workers of this server cannot leave notes for those that replace them (%s), so none of them is open. "
            "Make these folders usable for this user alone, or run the server without workers",
            "; ".join(f"{error.filename}: {error.strerror}" for error in problems),
        )
    return is_unknown


def _note(folder: Path, server: _Server, path: str) -> Path:
    name = sha256(server.secret + os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"{server.process}-{name}"


@functools.cache
def _servers(_process: int) -> tuple[_Server, ...]:
    """Return the server of this process, then that server's predecessor; none if this process is no worker.

    Cached per process: a process whose parent has ended gets another parent.
    """
    import multiprocessing  # noqa: PLC0415  commands do not need it

    supervisor = multiprocessing.parent_process()
    if supervisor is not None:  # uvicorn, hypercorn, granian
        return (_Server(supervisor.pid or 0, bytes(multiprocessing.current_process().authkey)),)
    arbiter = _arbiter()
    if arbiter is None:
        return ()
    start, parent = _start_and_parent(arbiter)
    # After SIGUSR2 the old arbiter is the new one's parent until the old one quits.
    return _Server(arbiter, start), _Server(parent, _start_and_parent(parent)[0])


def _start_and_parent(process: int) -> tuple[bytes, int]:
    """Return the start of a process, which no later process with its id shares, and its parent."""
    try:
        # proc_pid_stat(5), from field 3 on; field 22 counts from the boot.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[19] + Path("/proc/sys/kernel/random/boot_id").read_bytes(), int(fields[1])
    except OSError:  # no /proc, or it hides the processes of other users: proc(5), hidepid
        return str(hash(__name__)).encode(), 0  # the seed of str hashes is random, and forked workers inherit it


def _arbiter() -> int | None:
    """Return the process id of gunicorn's arbiter if this process is its worker, or is itself a preloading arbiter.

    Only the call stack shows that: a server of another kind may import gunicorn, and the parent process may be
    anything, such as a shell that starts one server after another.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001
    called = set()
    while frame is not None:
        if frame.f_globals.get("__name__") == "gunicorn.arbiter":
            called.add(frame.f_code.co_name)
        frame = frame.f_back
    if "spawn_worker" in called:
        return os.getppid()
    return os.getpid() if called else None


def _folders() -> Iterator[Path]:
    """Yield the folders of the notes, which may not exist yet."""
    bases = ["/dev/shm"]  # noqa: S108  the folder in it must be this user's alone
    with contextlib.suppress(OSError):  # there is no usable folder for temporary files
        bases.append(tempfile.gettempdir())
    for base in dict.fromkeys(bases):
        yield Path(base, f"freegpt_auth-{os.geteuid()}-{_namespace()}")


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _prepare(folder: Path) -> None:
    """Make the folder, and remove the notes of stopped servers from it.

    Raises:
        OSError: the folder cannot be made, or is not this user's alone.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise _UnsafeFolderError(errno.EPERM, "it is not a folder of this user alone", str(folder))
    for note in folder.iterdir():
        try:
            os.kill(int(note.name.partition("-")[0]), 0)
        except ProcessLookupError:
            note.unlink(missing_ok=True)
        except (OSError, ValueError):  # the process runs as another user, or the file is no note
            continue


def _check_writable(folder: Path) -> None:
    probe = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
    probe.touch(mode=0o600)
    probe.unlink()
