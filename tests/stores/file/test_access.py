"""Access to a replaced file: owner, group, permissions to read, POSIX ACL and labels are kept."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from unittest.mock import Mock

import pytest

from freegpt_auth.exceptions import FileError
from freegpt_auth.stores.file import access, disk

ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
SERVER = 12345
"""The user that a server runs as."""


@pytest.fixture
def path(path: Path) -> Path:
    """Return the path of a file of its owner alone."""
    path.touch(0o600)
    return path


def acl(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    """Return a POSIX ACL as the kernel keeps it, of tags, permissions and ids."""
    packed = (struct.pack("<HHI", *entry, *[0xFFFFFFFF] * (3 - len(entry))) for entry in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def shared(server: int, mask: int, group: int = 0, others: int = 0) -> bytes:
    """Return the ACL of ``setfacl -m u:server:…``."""
    return acl((OWNER, 6), (USER, server, SERVER), (OWNING_GROUP, group), (MASK, mask), (OTHERS, others))


def of_group(owner: int, group: int) -> bytes:
    """Return the ACL of ``setfacl -m g:99:…``."""
    return acl((OWNER, owner), (OWNING_GROUP, 0), (GROUP, group, 99), (MASK, group), (OTHERS, 0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (shared(4, 4), shared(4, 4)),
        (shared(6, 6, group=6, others=6), shared(4, 4, group=4, others=4)),
        (shared(6, 4), shared(4, 4)),
        (of_group(owner=4, group=7), of_group(owner=6, group=4)),
    ],
    ids=["read", "write", "masked write", "group"],
)
def test_acl_is_kept_without_permission_to_write(path: Path, before: bytes, after: bytes) -> None:
    """A server that reads the file by an ACL reads the next one too; nobody but the owner may write that."""
    os.setxattr(path, ACL, before)
    disk.replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.getxattr(path, ACL) == after


def test_default_acl_of_folder_gives_no_access(path: Path) -> None:
    """A new file is for its owner only, and a file without an ACL gets none, in spite of the folder's default ACL."""
    os.setxattr(path.parent, DEFAULT_ACL, shared(7, 7, group=7))
    path.chmod(0o640)
    disk.replace_file(str(path), b"new")
    disk.replace_file(f"{path}.first", b"new")
    for each, mode in ((path, 0o640), (Path(f"{path}.first"), 0o600)):
        assert stat.S_IMODE(each.stat().st_mode) == mode
        assert ACL not in os.listxattr(each)


def test_acl_that_cannot_be_kept_is_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command says so and changes nothing, rather than hide the file from the server."""
    os.setxattr(path, ACL, shared(4, 4))
    monkeypatch.setattr(os, "setxattr", Mock(side_effect=PermissionError(errno.EPERM, "not permitted")))
    problem = r"its access rules \(system.posix_acl_access\) cannot be kept: operation not permitted; nothing was"
    with pytest.raises(FileError, match=problem):
        disk.replace_file(str(path), b"new")
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [(path.name, b"")]


def test_unreadable_acl_is_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ACL that cannot be read cannot be kept: nothing is changed, and no warning rests on a guess."""
    path.chmod(0o660)
    monkeypatch.setattr(os, "getxattr", Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(FileError, match="input/output error"):
        disk.replace_file(str(path), b"new")
    assert path.read_bytes() == b""
    assert access.exposure(str(path), path.stat()) is None


def test_label_in_force_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed SELinux label goes to the next file; labels that new files do not get are of a system turned off."""
    labels = {(path.stat().st_ino, "security.selinux"): b"httpd", (path.stat().st_ino, "system.nfs4_acl"): b"left"}
    given: list[tuple[str, bytes]] = []

    def label_of(place: str | int, name: str) -> bytes:
        inode = os.stat(place).st_ino  # noqa: PTH116  a descriptor has no path
        if (inode, name) not in labels and name != "security.selinux":
            raise OSError(errno.ENODATA, "none")
        return labels.get((inode, name), b"default")

    monkeypatch.setattr(os, "getxattr", label_of)
    monkeypatch.setattr(os, "setxattr", lambda _, name, value: given.append((name, value)))
    disk.replace_file(str(path), b"new")
    assert given == [("security.selinux", b"httpd")]


def test_group_that_grants_nothing_may_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's ``-u 1000`` gives files the group 0, which user 1000 cannot; a group that reads is kept, or it fails."""
    monkeypatch.setattr(os, "fchown", Mock(side_effect=PermissionError(errno.EPERM, "not permitted")))
    real = access.kept_access
    monkeypatch.setattr(disk, "kept_access", lambda target: real(target)._replace(group=54321))
    disk.replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    path.chmod(0o640)
    with pytest.raises(FileError, match=r"cannot keep its owner and group \(\d+:54321\); change them, or add"):
        disk.replace_file(str(path), b"newer")
    assert path.read_bytes() == b"new"


WRITTEN = "can be written by others; run chmod go-w on it"
READ = "can be read by every user; run chmod o-r on it"
BOTH = "can be written by others; run chmod go-w,o-r on it"


@pytest.mark.parametrize(
    ("warning", "rules"),
    [
        (None, [0o640, shared(4, 4), shared(4, 6), shared(6, 4)]),
        (WRITTEN, [0o620, 0o602, shared(6, 6), shared(4, 6, group=6)]),
        (READ, [0o604, shared(4, 4, others=4)]),
        (BOTH, [0o666]),
    ],
)
def test_wide_access_is_a_warning(path: Path, warning: str | None, rules: list[int | bytes]) -> None:
    """Others that may write are named, and every user that may read; the mask of an ACL is not taken for a group."""
    for each in rules:
        path.chmod(each) if isinstance(each, int) else os.setxattr(path, ACL, each)
        assert access.exposure(str(path), path.stat()) == (warning and f"{path} {warning}"), each


def test_unchangeable_file_may_be_read_by_all(unprivileged: Path) -> None:
    """A Kubernetes Secret is readable by all and unchangeable: no warning asks for it, but one names writers."""
    path = unprivileged / "t.json"
    path.touch()
    path.chmod(0o444)
    assert access.exposure(str(path), path.stat()) is not None
    unprivileged.chmod(0o555)
    assert access.exposure(str(path), path.stat()) is None
    path.chmod(0o464)
    assert "can be written by others" in str(access.exposure(str(path), path.stat()))
