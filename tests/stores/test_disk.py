"""Reading and replacing one file so that neither a crash nor a hostile path can hurt."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator  # noqa: TC003  beside the annotations that pytest may resolve
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest

from freegpt_auth.exceptions import StoreBusyError, TokenFileError
from freegpt_auth.stores import disk

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the file is, or will be."""
    return tmp_path / "t.json"


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Go on as a user who may not do everything, with a folder of that user's own."""
    user = os.geteuid()
    other = NOBODY if user == 0 else user
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, other, -1)
        os.seteuid(other)
        try:
            yield Path(folder)
        finally:
            Path(folder).chmod(0o700)
            os.seteuid(user)


def _read(path: Path) -> bytes:
    """Read in a thread, so that what should not hang cannot hang the tests."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(disk.read_file, str(path)).result(10)[1]


def _fail_with(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- what a path shows


def test_every_state_of_a_file_has_its_own_signature(path: Path) -> None:
    """A changed file is noticed even if its size and its time of change are those of before, or older."""
    path.write_bytes(b"one")
    seen = {disk.signature_at(str(path))}
    path.write_bytes(b"more")
    seen.add(disk.signature_at(str(path)))
    copy = path.with_name("copy")
    copy.write_bytes(b"four")
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    copy.replace(path)
    seen.add(disk.signature_at(str(path)))
    os.utime(path, (0, 0))
    seen.add(disk.signature_at(str(path)))
    path.unlink()
    seen.add(disk.signature_at(str(path)))
    assert len(seen) == 5
    assert disk.signature_at(str(path)) == disk.MISSING


def test_a_path_is_followed_to_the_file(path: Path) -> None:
    """The signature of a link is that of the file behind it, so that a swapped link is noticed."""
    path.write_bytes(b"one")
    link = path.with_name("link")
    link.symlink_to(path)
    assert disk.signature_at(str(link)) == disk.signature_of(path.stat())


def _make(path: Path, kind: str) -> None:
    """Put something at *path* that is no readable file."""
    makers: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "socket": lambda: _bind(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to(path),
        "link into nothing": lambda: path.symlink_to("/nonexistent/folder/file"),
    }
    makers[kind]()


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("directory", "not a regular file"),
        ("fifo", "not a regular file"),
        ("socket", "no such device or address"),
        ("dangling link", "no such file or directory"),
        ("link to itself", "too many levels of symbolic links"),
        ("link into nothing", "no such file or directory"),
    ],
)
def test_what_is_no_file_is_never_missing_and_never_hangs(path: Path, kind: str, problem: str) -> None:
    """Something at the path that cannot be read is a fault and not an absence, and is told without waiting."""
    _make(path, kind)
    assert disk.signature_at(str(path)) != disk.MISSING
    with pytest.raises(TokenFileError, match=problem) as caught:
        _read(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.problem}"


def test_a_part_of_the_path_may_be_a_file(path: Path) -> None:
    """A path through a file is a fault in one sentence."""
    path.write_bytes(b"")
    assert disk.signature_at(str(path / "t.json")) == (errno.ENOTDIR,)
    for attempt in (lambda: _read(path / "t.json"), disk.locked(str(path / "t.json"), 1).__enter__):
        with pytest.raises(TokenFileError, match="a part of its path is not a directory"):
            attempt()
    with pytest.raises(TokenFileError, match="a part of its path is not a directory"):
        disk.locked(str(path / "folder" / "t.json"), 1).__enter__()


def test_nothing_at_the_path_is_missing(path: Path) -> None:
    """Only a path at which nothing is counts as a missing file."""
    with pytest.raises(FileNotFoundError) as caught:
        _read(path)
    assert caught.value.strerror == "is gone"


def test_a_folder_that_may_not_be_entered_is_not_missing(unprivileged: Path) -> None:
    """What the permissions hide is not absent."""
    unprivileged.chmod(0)
    path = unprivileged / "t.json"
    assert disk.signature_at(str(path)) == (errno.EACCES,)
    with pytest.raises(TokenFileError, match="permission denied; run this as the user who owns it"):
        _read(path)
    with pytest.raises(TokenFileError, match=r"cannot lock .*t\.json\.lock: permission denied"):
        disk.locked(str(path), 1).__enter__()
    with pytest.raises(TokenFileError, match="permission denied"):
        disk.locked(str(path / "folder" / "t.json"), 1).__enter__()


# --- reading


def test_the_status_is_of_the_bytes_that_were_read(path: Path) -> None:
    """Bytes and signature belong together."""
    path.write_bytes(b"content")
    status, content = disk.read_file(str(path))
    assert content == b"content"
    assert disk.signature_of(status) == disk.signature_at(str(path))


def test_the_size_limit_is_the_last_size_that_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that nobody can have meant is not read into memory."""
    monkeypatch.setattr(disk, "SIZE_LIMIT", 2**20)
    path.write_bytes(bytes(2**20))
    assert len(_read(path)) == 2**20
    path.write_bytes(bytes(2**20 + 1))
    with pytest.raises(TokenFileError, match="it is larger than 1 MiB"):
        _read(path)


def test_a_file_that_was_deleted_elsewhere_is_gone(path: Path) -> None:
    """A file mounted by itself and replaced on the host counts as deleted, and the operator is told what to mount."""
    with path.open("wb") as file:
        path.unlink()
        # What such a mount shows: a path at which a file is that has no name any more.
        with pytest.raises(FileNotFoundError) as caught:
            disk.read_file(f"/proc/self/fd/{file.fileno()}")
    assert caught.value.strerror == "was replaced behind its mount (mount its directory instead)"


def test_a_disk_that_cannot_be_read_is_a_fault() -> None:
    """An error in the middle of reading is told in one sentence."""
    with pytest.raises(TokenFileError, match="input/output error"):
        disk.read_file("/proc/self/mem")


def test_a_file_that_changes_while_it_is_read_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one state and half of another are never taken for a file."""
    path.write_bytes(b"one")
    real = disk._check_readable

    def change(name: str, status: os.stat_result) -> None:
        real(name, status)
        with path.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(disk, "_check_readable", change)
    with pytest.raises(TokenFileError, match="it changed while it was read"):
        disk.read_file(str(path))


@pytest.mark.parametrize("moment", ["before it is looked at", "while it is read"])
def test_a_file_that_is_replaced_while_it_is_opened_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A writer that replaces the file in the very moment it is opened makes it neither missing nor broken."""
    path.write_bytes(b"old")
    new = path.with_name("new")
    new.write_bytes(b"new")
    real_open, real_check = os.open, disk._check_readable

    def replace() -> None:
        with contextlib.suppress(FileNotFoundError):  # only the first time
            new.replace(path)

    def open_and_replace(*arguments: Any, **options: Any) -> int:
        fd = real_open(*arguments, **options)
        replace()
        return fd

    def check_and_replace(name: str, status: os.stat_result) -> None:
        real_check(name, status)
        replace()

    if moment == "while it is read":
        monkeypatch.setattr(disk, "_check_readable", check_and_replace)
    else:
        monkeypatch.setattr(os, "open", open_and_replace)
    assert disk.read_file(str(path))[1] in (b"old", b"new")


# --- replacing


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_every_file_is_born_for_its_owner_only(path: Path, umask: int) -> None:
    """Whatever the umask, the file and its lock can be read and written by their owner and by nobody else."""
    before = os.umask(umask)
    try:
        with disk.locked(str(path), 1):
            disk.replace_file(str(path), b"secret")
    finally:
        os.umask(before)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes == {"t.json": 0o600, "t.json.lock": 0o600}


def test_permissions_are_mended_by_a_write(path: Path) -> None:
    """A file that everybody could read is its owner's alone after the next change."""
    path.write_bytes(b"old")
    path.chmod(0o666)
    disk.replace_file(str(path), b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"new"


def test_root_keeps_the_owner(path: Path) -> None:
    """A change made as root leaves the file to the server's user, who must go on reading it."""
    path.write_bytes(b"old")
    owner = NOBODY if os.geteuid() == 0 else os.geteuid()
    os.chown(path, owner, -1)
    group = path.stat().st_gid
    disk.replace_file(str(path), b"new")
    assert (path.read_bytes(), path.stat().st_uid, path.stat().st_gid) == (b"new", owner, group)


def test_a_user_writes_a_file_of_his_own(unprivileged: Path) -> None:
    """Whoever may write the folder may change the file, and then owns it."""
    path = unprivileged / "t.json"
    for content in (b"first", b"second"):
        with disk.locked(str(path), 1):
            disk.replace_file(str(path), content)
    assert (path.read_bytes(), path.stat().st_uid) == (b"second", os.geteuid())


@pytest.mark.parametrize("name", ["t.json", "tokens[1].json", "*.json"])
def test_the_next_writer_clears_up_after_a_killed_one(tmp_path: Path, name: str) -> None:
    """No half-written file stays for ever, and no file of anybody else is touched, whatever the file is called."""
    leftover = tmp_path / f".{name}.0123456789abcdef.tmp"
    others = [tmp_path / each for each in (".other.json.0123.tmp", ".tokens1.json.0123.tmp", f"{name}.tmp")]
    for each in (leftover, *others):
        each.write_bytes(b"half")
    (tmp_path / f".{name}.folder.tmp").mkdir()
    disk.replace_file(str(tmp_path / name), b"whole")
    assert not leftover.exists()
    assert all(each.exists() for each in others)


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.ENOSPC, "no space is left on the device; nothing was changed"),
        (errno.EDQUOT, "the disk quota is used up; nothing was changed"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EBUSY, "mount its directory instead"),
        (errno.EPERM, "permission denied"),
        (errno.EIO, "input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: str, call: str
) -> None:
    """When a change cannot be written the old file is intact, nothing is left beside it, and one line says why."""
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(
            *{"fsync": (os, "fsync"), "replace": (Path, "replace"), "open": (os, "open")}[call], _fail_with(number)
        )
        with pytest.raises(TokenFileError, match=problem):
            disk.replace_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == ["t.json"]


def test_a_file_too_large_for_the_user_leaves_the_old_one(path: Path) -> None:
    """A real limit met in the middle of writing changes nothing."""
    path.write_bytes(b"old")
    script = (
        "import resource, sys\n"
        "from freegpt_auth.stores import disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    disk.replace_file(sys.argv[1], bytes(100_000))\n"
        "finally:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=30, check=False)
    assert "TokenFileError" in done.stderr
    assert "file too large" in done.stderr
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [("t.json", b"old")]


def test_a_failure_is_only_reported_for_what_was_not_done(unprivileged: Path) -> None:
    """Where the folder may be written but not listed, a change is made, or it is refused and nothing has changed."""
    path = unprivileged / "t.json"
    path.write_bytes(b"old")
    unprivileged.chmod(0o300)
    expected = b"new"
    try:
        disk.replace_file(str(path), b"new")
    except TokenFileError:
        expected = b"old"
    assert path.read_bytes() == expected


def test_the_new_file_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure leaves the old file or the new one: content, then name, then folder are brought to the disk."""
    steps: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size}")
        real_sync(fd)

    def replace(self: Path, target: Path) -> Path:
        steps.append("name")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    disk.replace_file(str(path), b"content")
    assert steps == ["file of 7", "name", "folder"]


# --- the lock


def test_a_lock_held_by_another_process_is_waited_for_only_so_long(path: Path) -> None:
    """A command that cannot get the lock gives up with one sentence, and gets it once it is free."""
    script = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, f"{path}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        with pytest.raises(StoreBusyError, match=r"another process held its lock for 0\.01 s; try again"):
            disk.locked(str(path), 0.01).__enter__()
        holder.communicate(b"\n")
    with disk.locked(str(path), 5):
        pass


def test_the_lock_is_released_by_an_error(path: Path) -> None:
    """A change that failed does not keep the next one waiting."""
    with pytest.raises(RuntimeError, match="failed"), disk.locked(str(path), 1):
        raise RuntimeError("failed")
    with disk.locked(str(path), 0):
        pass


def test_threads_exclude_each_other(path: Path) -> None:
    """Two threads of one process never hold the lock at the same time."""

    def attempt() -> str:
        with pytest.raises(StoreBusyError) as caught:
            disk.locked(str(path), 0).__enter__()
        return str(caught.value)

    with disk.locked(str(path), 1), ThreadPoolExecutor() as pool:
        assert "try again" in pool.submit(attempt).result()


def test_a_lock_that_cannot_be_made_is_a_fault(path: Path) -> None:
    """Something else in the lock's place is told in one sentence."""
    Path(f"{path}.lock").mkdir()
    with pytest.raises(TokenFileError, match=r"cannot lock .*t\.json\.lock: it is a directory, not a file"):
        disk.locked(str(path), 1).__enter__()


def test_there_is_no_lesser_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks nothing is written at all: two writers would lose tokens."""

    def acquire(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.UnixFileLock, "acquire", acquire)
    with pytest.raises(TokenFileError, match="does not appear to support flock"):
        disk.locked(str(path), 1).__enter__()


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    """A mistyped path makes no folder: the command says that it is missing."""
    with pytest.raises(TokenFileError, match="its folder does not exist; create the folder first"):
        disk.locked(str(tmp_path / "missing" / "t.json"), 1).__enter__()
    assert list(tmp_path.iterdir()) == []
