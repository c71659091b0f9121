"""Permissions of a file: the part that its replacement keeps, and warnings about permissions that are too wide.

A server that could read the old file must be able to read the new one, or it would never see a revocation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...exceptions import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACL = "system.posix_acl_access"
_LABELS = ("system.nfs4_acl", "security.selinux")
"""Other extended attributes that govern access to a file."""

# linux/posix_acl_xattr.h: a version of 4 bytes, then entries of tag, permissions and id, little-endian.
_ENTRY = struct.Struct("<HHI")
_HEAD_SIZE = 4
_OWNER, _OWNING_GROUP, _MASK, _OTHERS = 0x01, 0x04, 0x10, 0x20
_READ, _WRITE = 4, 2


class _Entry(NamedTuple):
    tag: int
    permissions: int
    id: int


class Access(NamedTuple):
    """Access to a file: its owner, group, permissions, POSIX ACL and labels."""

    owner: int
    group: int
    mode: int
    acl: bytes | None = None
    labels: tuple[tuple[str, bytes], ...] = ()

    def grant(self, fd: int, path: str) -> None:
        """Give the new file behind *fd* this access; *path* names it in errors.

        Raises:
            FileError: its group, ACL or labels cannot be kept.
            OSError: the file cannot be changed.
        """
        _own(fd, path, self)
        if self.acl is None and _attribute(fd, _ACL) is not None:  # inherited: the folder's default ACL
            os.removexattr(fd, _ACL)
        os.fchmod(fd, self.mode)  # not subject to the umask
        # A label matters only if new files get one too: SELinux leaves its labels behind when it is turned off.
        wanted = [(name, value) for name, value in self.labels if _attribute(fd, name) not in (None, value)]
        if self.acl is not None:
            wanted.append((_ACL, self.acl))
        for name, value in wanted:
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                problem = f"its access rules ({name}) cannot be kept: {os.strerror(error.errno or 0).lower()}"
                raise FileError(path, f"{problem}; nothing was changed") from None


def kept_access(target: Path) -> Access:
    """Return the access for the replacement of *target*: every permission to read, but only the owner's to write.

    The first file is for its owner only: the default ACL of its folder does not count.

    Raises:
        OSError: the access of *target* cannot be read, or another user owns it.
    """
    try:
        status = target.stat()
    except FileNotFoundError:
        return Access(os.geteuid(), os.getegid(), 0o600)
    if os.geteuid() not in (0, status.st_uid):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    acl = _attribute(str(target), _ACL)
    labels = ((name, _attribute(str(target), name)) for name in _LABELS)
    return Access(
        status.st_uid,
        status.st_gid,
        0o600 | status.st_mode & 0o044,
        None if acl is None else _read_only(acl),
        tuple((name, value) for name, value in labels if value is not None),
    )


def written_by_others(place: str, status: os.stat_result, trusted_group: int | None = None) -> bool:
    """Return whether a user other than the owner may write. The group *trusted_group* does not count."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:  # with an ACL these bits are its mask
        return False
    acl = _attribute(place, _ACL)
    entries = [_Entry(_OWNING_GROUP, _WRITE, 0)] if acl is None else _entries(acl)
    return any(
        entry.permissions & _WRITE and (entry.tag != _OWNING_GROUP or status.st_gid != trusted_group)
        for entry in entries
        if entry.tag not in (_OWNER, _MASK, _OTHERS)
    )


def exposure(path: str, status: os.stat_result) -> str | None:
    """Return a warning if others may write the file, or if all may read it and this process can change that."""
    with contextlib.suppress(OSError):
        written = written_by_others(path, status)
        readable = status.st_mode & stat.S_IROTH and _is_changeable(path)
        if written:
            return f"{path} can be written by others; run chmod go-w{',o-r' if readable else ''} on it"
        if readable:
            return f"{path} can be read by every user; run chmod o-r on it"
    return None


def _is_changeable(path: str) -> bool:
    """Return whether this process may change the file. A Kubernetes Secret is readable by all and unchangeable."""
    target = Path(path).resolve()
    return any(os.access(place, os.W_OK, effective_ids=True) for place in (target, target.parent))


def _own(fd: int, path: str, access: Access) -> None:
    status = os.fstat(fd)
    if (status.st_uid, status.st_gid) == (access.owner, access.group):
        return
    try:
        os.fchown(fd, access.owner, access.group)
    except PermissionError:
        # A group without permissions may change: Docker's -u 1000 makes files of group 0, which user 1000 cannot set.
        if status.st_uid != access.owner or access.mode & stat.S_IRWXG or access.acl is not None:
            kept = f"user {status.st_uid} cannot keep its owner and group ({access.owner}:{access.group})"
            raise FileError(path, f"{kept}; change them, or add the user to the group") from None


def _attribute(place: str | int, name: str) -> bytes | None:
    """Return an extended attribute; ``None`` if the file or the system has none."""
    try:
        return os.getxattr(place, name) if hasattr(os, "getxattr") else None
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def _entries(acl: bytes) -> Iterator[_Entry]:
    return (_Entry(*fields) for fields in _ENTRY.iter_unpack(acl[_HEAD_SIZE:]))


def _read_only(acl: bytes) -> bytes:
    """Return the ACL with no permission to write but the owner's."""
    kept = (
        entry._replace(permissions=_READ | _WRITE if entry.tag == _OWNER else entry.permissions & _READ)
        for entry in _entries(acl)
    )
    return acl[:_HEAD_SIZE] + b"".join(_ENTRY.pack(*entry) for entry in kept)
