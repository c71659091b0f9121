"""Reading and replacing one file so that neither a crash nor a hostile path can hurt."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable  # noqa: TC003  beside the annotations that pytest may resolve
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock, patch

import pytest

from freegpt_auth.exceptions import FileError
from freegpt_auth.stores.file import disk
from freegpt_auth.stores.file.lock import locked

NOBODY = 65534


def _content(file: BinaryIO) -> bytes:
    """Return the content of a file."""
    return file.read()


def _files(path: Path) -> dict[str, bytes]:
    """Return the contents of all files beside *path*, and its own."""
    return {each.name: each.read_bytes() for each in path.parent.iterdir()}


# --- reading


def test_every_state_of_a_file_has_its_own_signature(path: Path) -> None:
    """A change is noticed even if the file got older, and behind a link, as in a Kubernetes secret."""
    assert disk.signature_at(str(path)) == disk.MISSING
    link, new = path.with_name("link"), path.with_name("new")
    link.symlink_to(path)
    seen = set()
    for content, instant in ((b"one", 9), (b"more", 9), (b"four", 9), (b"four", 8)):
        new.write_bytes(content)
        os.utime(new, (0, instant))
        new.replace(path)
        status, read = disk.read_file(str(link), _content)
        assert read == content
        assert disk.signature_of(status) == disk.signature_at(str(path)) == disk.signature_at(str(link))
        seen.add(disk.signature_of(status))
    os.utime(path, (0, 0))
    assert len(seen | {disk.signature_at(str(path))}) == 5


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "problem", "transient"),
    [
        (Path.mkdir, "it is a directory, as Docker makes one .*; remove it, and mount the directory of the", False),
        (os.mkfifo, "not a regular file", False),
        (_bind, "no such device or address", False),
        (lambda path: path.symlink_to("nowhere"), "no such file or directory", False),
        (lambda path: path.symlink_to(path), "too many levels of symbolic links", False),
        (lambda path: path.symlink_to("/proc/self/mem"), "input/output error", True),
    ],
    ids=["directory", "FIFO", "socket", "dangling link", "link to itself", "unreadable"],
)
def test_other_kinds_of_file_are_refused(
    path: Path, make: Callable[[Path], object], problem: str, *, transient: bool
) -> None:
    """Something unreadable at the path is a fault and no absence, told at once; a disk error may end by itself."""
    make(path)
    assert disk.signature_at(str(path)) != disk.MISSING
    with ThreadPoolExecutor() as pool, pytest.raises(FileError, match=problem) as caught:
        pool.submit(disk.read_file, str(path), _content).result(10)  # a reading that hangs fails
    assert str(caught.value) == f"{path}: {caught.value.problem}"
    assert caught.value.transient is transient


def test_lack_of_memory_may_end_by_itself(path: Path) -> None:
    """A file that could not be read for lack of memory is worth another attempt."""
    path.touch()
    parse = Mock(side_effect=MemoryError)
    with pytest.raises(FileError, match="not enough memory") as caught:
        disk.read_file(str(path), parse)
    assert (caught.value.transient, parse.call_count) == (True, 2)  # at once, for an unchanged file


def test_what_is_hidden_or_impossible_is_not_missing(unprivileged: Path) -> None:
    """A folder that may not be entered, or is none, is told in one sentence, to readers and to writers."""
    folder, file = unprivileged / "folder", unprivileged / "file"
    folder.mkdir(0)
    file.touch()
    for place, problem in ((folder, "permission denied; run this as"), (file, "a part of its path is not a directory")):
        assert disk.signature_at(f"{place}/t.json") != disk.MISSING
        for attempt in (
            partial(disk.read_file, f"{place}/t.json", _content),
            locked(f"{place}/t.json", 0.01).__enter__,
            locked(f"{place}/x/t.json", 0.01).__enter__,
        ):
            with pytest.raises(FileError, match=problem):
                attempt()


@pytest.mark.parametrize("moment", ["opening", "reading"])
def test_file_replaced_meanwhile_is_read(path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A writer that replaces the file in the very moment it is opened makes it neither missing nor broken."""
    new, real = path.with_name("new"), os.open
    path.write_bytes(b"old")
    new.write_bytes(b"new")

    def then_replace(answer: Any) -> Any:
        if new.exists():
            new.replace(path)
        return answer

    if moment == "opening":
        monkeypatch.setattr(os, "open", lambda *arguments: then_replace(real(*arguments)))
    assert disk.read_file(str(path), lambda file: then_replace(file.read()))[1] == b"new"


def test_file_changed_during_reading_is_refused(path: Path) -> None:
    """Half of one state and half of another are never taken for a file, nor for a file with a mistake in it."""
    path.write_bytes(b"one")
    parse = Mock(side_effect=lambda file: path.write_bytes(file.read() + b"more"))
    mistaken = Mock(side_effect=lambda file: path.write_bytes(file.read() + b"more") and int("x"))
    for each in (parse, mistaken):
        with pytest.raises(FileError, match="it changed while it was read"):
            disk.read_file(str(path), each)
        assert each.call_count == 5


# --- replacing


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_every_file_is_its_owners_alone(path: Path, umask: int) -> None:
    """With every umask a new file is for its owner only, and never writable by others; root keeps the owner.

    Readers of the old file can read the new one: otherwise a server would miss a revocation.
    """
    owner = NOBODY if os.geteuid() == 0 else os.geteuid()
    before = os.umask(umask)
    try:
        for mode, changed in ((0o600, 0o660), (0o640, 0o666), (0o644, 0o666), (0o644, 0o600)):
            with locked(str(path), 1):
                disk.replace_file(str(path), b"content")
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
            assert modes == {"t.json": mode, "t.json.lock": 0o600}
            path.chmod(changed)
            os.chown(path, owner, owner)
        disk.replace_file(str(path), b"last")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"last"
    assert (path.stat().st_uid, path.stat().st_gid) == (owner, owner)


def test_a_user_replaces_no_file_of_another(unprivileged: Path) -> None:
    """A user writes a file of his own, but not one of another in his folder: its server could not read the new file."""
    path = unprivileged / "t.json"
    disk.replace_file(str(path), b"old")
    user, other = os.getuid(), os.geteuid()
    assert path.stat().st_uid == other
    os.seteuid(user)
    os.chown(path, user, -1)
    os.seteuid(other)
    with pytest.raises(FileError, match="run this as the user who owns it"):
        disk.replace_file(str(path), b"new")
    assert [each.name for each in unprivileged.iterdir()] == ["t.json"]


@pytest.mark.parametrize("name", ["t.json", "*[1].json"])
def test_the_next_writer_clears_up_after_a_killed_one(path: Path, name: str) -> None:
    """Leftover temporary files are removed, and no other file is touched, for every file name."""
    folder = path.with_name(f".{name}.folder.tmp")
    folder.mkdir()
    for each in (f".{name}.0123456789abcdef.tmp", ".other1.json.0123.tmp", f"{name}.tmp"):
        path.with_name(each).touch()
    disk.replace_file(str(path.with_name(name)), b"whole")
    assert {each.name for each in path.parent.iterdir()} == {".other1.json.0123.tmp", f"{name}.tmp", name, folder.name}


@pytest.mark.parametrize(
    ("call", "number", "problem"),
    [
        ((os, "fsync"), errno.ENOSPC, "no space is left on the device; nothing was changed"),
        ((Path, "replace"), errno.EBUSY, "mount its directory instead"),
        ((os, "open"), errno.EIO, "input/output error"),
        ((os, "link"), errno.ENOSPC, "no space is left on the device; nothing was changed"),
    ],
)
def test_a_failed_write_leaves_the_old_file(path: Path, call: tuple[Any, str], number: int, problem: str) -> None:
    """When a change cannot be written the old file is intact, nothing is left beside it, and one line says why."""
    path.write_bytes(b"old")
    fault = OSError(number, os.strerror(number))
    with patch.object(*call, side_effect=fault), pytest.raises(FileError, match=problem):
        disk.replace_file(str(path), b"new")
    assert _files(path) == {"t.json": b"old"}


def _sync(fd: int, number: int) -> None:
    """Sync files, but no folder."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_change_survives_a_power_failure(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Content, then name, then folder are brought to the disk; only where folders cannot be synced that is no error."""
    steps: list[tuple[int | str, bool]] = []

    def sync(fd: int) -> None:
        status = os.fstat(fd)
        steps.append((status.st_size if stat.S_ISREG(status.st_mode) else "folder", path.exists()))
        _sync(fd, number)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(FileError) if number == errno.EIO else contextlib.nullcontext():
        disk.replace_file(str(path), b"content")
    assert steps == [(len(b"content"), False), ("folder", True)]


@pytest.mark.parametrize(("links", "after"), [(0, b"old"), (errno.EPERM, b"new")])
def test_a_change_that_may_not_survive_is_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, links: int, after: bytes
) -> None:
    """A change that cannot be brought to the disk is undone; that takes a file system that has hard links."""
    monkeypatch.setattr(os, "fsync", partial(_sync, number=errno.EIO))
    with pytest.raises(FileError, match="input/output error"):
        disk.replace_file(str(path), b"new")
    assert not path.exists()
    path.write_bytes(b"old")
    if links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(links, os.strerror(links))))
    inode = path.stat().st_ino
    with pytest.raises(FileError, match="input/output error"):
        disk.replace_file(str(path), b"new")
    assert _files(path) == {"t.json": after}
    assert (path.stat().st_ino == inode) == (after == b"old")
