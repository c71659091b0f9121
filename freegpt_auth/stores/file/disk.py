"""Reading and replacing one file, safe against crashes and hostile paths. POSIX only; knows no file format."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ...exceptions import FileError
from ...regular_file import UnsuitableFileError, open_regular
from . import timestamps
from .access import kept_access
from .reserve import Reserve

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE_LIMIT = 512 * 1024 * 1024
"""Size of the largest file that is read, in bytes; a larger one is a mistake or an attack."""

_PROBLEMS = {
    errno.EACCES: "permission denied; run this as the user who owns it, or change its permissions",
    errno.EPERM: "permission denied; run this as the user who owns it, or change its permissions",
    errno.EROFS: "the file system is read-only; write where it is writable",
    errno.ENOSPC: "no space is left on the device; nothing was changed",
    errno.EDQUOT: "the disk quota is used up; nothing was changed",
    errno.EBUSY: "it is mounted by itself and cannot be replaced; mount its directory instead",
    errno.ELOOP: "too many levels of symbolic links",
    errno.ENOTDIR: "a part of its path is not a directory",
    errno.EISDIR: "it is a directory, not a file",
    errno.EMFILE: "this process has no file descriptor left; raise its limit (ulimit -n)",
    errno.ENFILE: "the system has no file descriptor left",
    errno.EOVERFLOW: "its modification time is the last that the file system can hold; run touch on it",
}

_PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV)
"""Errors about the path itself. Any other error, such as EMFILE, EACCES or EIO, may hide a change of the file."""

_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP)  # some file systems have no hard links

_ATTEMPTS = 5  # a writer may replace the file during a reading, but not during five in a row

Signature = tuple[int, ...]
"""Identifies one state of a file. Compared for equality only: a restored file can be older."""

_T = TypeVar("_T")

MISSING: Signature = ()
"""The signature of a path without a file."""


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file's state."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def signature_at(path: str) -> Signature:
    """Return the signature of the file at *path*, :data:`MISSING`, or the number of the error of ``stat``."""
    try:
        return signature_of(os.stat(path))  # noqa: PTH116  pathlib takes 1 us more, on the request path
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.lexists(path):
            return MISSING
        return (error.errno or -1,)


_NO_RESERVE = Reserve()


def read_file(path: str, parse: Callable[[BinaryIO], _T], reserve: Reserve = _NO_RESERVE) -> tuple[os.stat_result, _T]:
    """Parse a regular file; return its status and the parsed value, both of one state of the file.

    Args:
        path: of the file.
        parse: reads the open file and returns a value.
        reserve: descriptors for a process that has no other left.

    Raises:
        ValueError: *parse* raised it.
        FileNotFoundError: there is no file and no dangling link at *path*, or the file was deleted behind its mount.
        FileError: the file cannot be read, is not regular, is too large, or changed during the reading.
    """
    for _ in range(_ATTEMPTS - 1):
        before = signature_at(path)
        try:
            return _read_once(path, parse, reserve)
        except (FileNotFoundError, FileError):
            # A file that was replaced meanwhile is neither missing nor broken: try again.
            if signature_at(path) == before:
                break
    return _read_once(path, parse, reserve)


def _read_once(path: str, parse: Callable[[BinaryIO], _T], reserve: Reserve) -> tuple[os.stat_result, _T]:
    try:
        fd, status = open_regular(path, SIZE_LIMIT, reserve.open, reserve.close)
    except UnsuitableFileError as error:
        raise FileError(path, str(error)) from None
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, "is gone", path) from None
        raise _unreadable(path, error) from None
    try:
        _check_readable(path, status)
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            try:
                parsed = parse(file)
            finally:  # also after an error of parse: a mixture of two states need not be well-formed
                if signature_of(os.fstat(fd)) != signature_of(status):
                    raise FileError(path, "it changed while it was read", transient=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except MemoryError:
        raise FileError(path, "there is not enough memory to read it", transient=True) from None
    finally:
        reserve.close(fd)
    return status, parsed


def _unreadable(path: str, error: OSError) -> FileError:
    return FileError(path, explain(error), transient=error.errno not in _PERMANENT)


def _check_readable(path: str, status: os.stat_result) -> None:
    if status.st_nlink == 0:
        # A file mounted by itself keeps its old content after it was replaced on the host.
        raise FileNotFoundError(errno.ENOENT, "was replaced behind its mount (mount its directory instead)", path)


def real_path(path: str) -> str:
    """Return the path of the file that *path* leads to: a write replaces the target of a symbolic link, not the link.

    Raises:
        FileError: a link cannot be followed.
    """
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:  # a new file
        return os.path.realpath(path)
    except OSError as error:
        raise FileError(path, explain(error)) from None


def replace_file(path: str, content: bytes) -> None:
    """Replace the file at *path* by one with *content*, atomically. The caller holds the lock.

    Once this has returned, the new content survives a power failure. A first file is readable and writable by its owner
    only; a replacement keeps owner, group, permissions to read and POSIX ACL. Its modification time is later than that
    of the old file, whether or not the clock has advanced: two files never have the same signature.

    Raises:
        FileError: the file could not be replaced, and the old one is unchanged. (One exception: on a file system
            without hard links whose folder cannot be synced, *content* is in place but may not survive a power
            failure.)
    """
    target = Path(path)
    _remove_leftovers(target)
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        # Opened first: a folder that can be written but not opened is then refused before any change.
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _write_new(temporary, content, target)
            roll_back = _prepare_rollback(target, old)
            temporary.replace(target)
            try:
                _sync_folder(folder)
            except OSError:
                roll_back()
                raise
        finally:
            with contextlib.suppress(OSError):
                os.close(folder)
    except OSError as error:
        raise FileError(path, explain(error)) from None
    finally:
        for leftover in (temporary, old):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _prepare_rollback(target: Path, old: Path) -> Callable[[], object]:
    """Link the file at *target* to the name *old*; return a function that restores it."""
    try:
        os.link(target, old)
    except FileNotFoundError:
        return target.unlink
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return lambda: None
    return lambda: old.replace(target)


def _write_new(path: Path, content: bytes, target: Path) -> None:
    access = kept_access(target)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        access.grant(fd, str(target))
        file.write(content)
        file.flush()
        with contextlib.suppress(FileNotFoundError):
            timestamps.set_later(fd, target.stat().st_mtime_ns)
        os.fsync(fd)


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of killed writers: while the caller holds the lock there is no other writer."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def explain(error: Exception) -> str:
    """Return the meaning of an operating-system error for an operator, in words that follow the path."""
    number = getattr(error, "errno", None)
    return _PROBLEMS.get(number) or os.strerror(number).lower() if number else str(error)
