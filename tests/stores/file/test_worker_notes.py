"""A worker's note for those that replace it. Whole servers are in test_workers.py and in the attack edges.py."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator  # noqa: TC003  beside the annotations that pytest may resolve
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from freegpt_auth.stores.file import worker_notes

FILE = "api_tokens.json"
STOPPED = 2**22 + 1  # no process has this id: proc_sys_kernel(5), pid_max
ONE, ANOTHER = worker_notes._Server(os.getpid(), b"one"), worker_notes._Server(os.getpid(), b"another")
real_folders, real_servers = worker_notes._folders, worker_notes._servers


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Keep notes in folders of this test's own, and let no test find the server of another."""
    folders = [tmp_path / "memory", tmp_path / "temporary"]
    monkeypatch.setattr(worker_notes, "_folders", lambda: folders)
    real_servers.cache_clear()
    yield folders
    real_servers.cache_clear()


def _serve_by(monkeypatch: pytest.MonkeyPatch, *servers: worker_notes._Server) -> None:
    """Make this process a worker of a server, which may take over from another."""
    monkeypatch.setattr(worker_notes, "_servers", lambda _: servers)


def _within(function: str, call: Callable[[], Any]) -> Any:
    """Call as a function of gunicorn's arbiter does: ``setup`` or ``spawn_worker``."""
    arbiter: dict[str, Any] = {"__name__": "gunicorn.arbiter"}
    exec(f"def {function}(call): return call()", arbiter)
    return arbiter[function](call)


def _leave(function: str = "spawn_worker") -> None:
    _within(function, lambda: worker_notes.leave(FILE))


def _is_found(function: str = "spawn_worker", path: str = FILE) -> Any:
    return _within(function, lambda: worker_notes.found(path))


@pytest.mark.parametrize("is_spawned", [True, False], ids=["uvicorn", "gunicorn"])
def test_worker_knows_what_its_siblings_knew(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, *, is_spawned: bool
) -> None:
    """A note is found again by workers of the same server, for the same token file, and belongs to this user alone."""
    if is_spawned:
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=os.getppid()))
    assert not _is_found()
    _leave()
    assert [_is_found(path=path) for path in (FILE, f"./{FILE}", "other.json")] == [True, True, False]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_server_without_workers_notes_nothing(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that an operator starts by hand opens after a restart, also if its application imports gunicorn."""
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", multiprocessing)
    worker_notes.leave(FILE)
    assert not worker_notes.found(FILE)
    assert not any(folder.exists() for folder in folders)


def test_note_is_for_its_server_and_the_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """After stop, mv and start no note counts; an arbiter that takes over, as at SIGUSR2, knows and adds notes."""
    _serve_by(monkeypatch, ONE)
    worker_notes.leave(FILE)
    for servers, is_found in (((ANOTHER,), False), ((ANOTHER, ONE), True)):
        _serve_by(monkeypatch, *servers)
        assert worker_notes.found(FILE) is is_found
    worker_notes.leave(FILE)
    _serve_by(monkeypatch, ANOTHER)
    assert worker_notes.found(FILE)


def test_preloading_server_knows_its_workers_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under --preload gunicorn loads the application before it forks: its workers' notes hold there."""
    _leave("setup")
    assert _is_found("setup")
    real_servers.cache_clear()
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert _is_found()


def test_orphan_keeps_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that outlives its arbiter leaves no note under its new parent, which starts other servers too."""
    _is_found()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    _leave()
    real_servers.cache_clear()
    assert not _is_found()


def test_processes_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, or where it hides the arbiter, a server is known by a secret that its forked workers inherit."""
    monkeypatch.setattr(os, "getppid", lambda: 0)
    server, _ = _within("spawn_worker", lambda: real_servers(0))
    assert server == (0, str(hash(worker_notes.__name__)).encode())


@pytest.mark.parametrize("lost", [0, 1])
def test_either_folder_suffices(folders: list[Path], monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """A cleared folder, as at a logout, loses no note; the next worker that finds the file gone writes it again."""
    _serve_by(monkeypatch, ONE)
    worker_notes.leave(FILE)
    notes = [next(folder.iterdir()) for folder in folders]
    notes[lost].unlink()
    folders[lost].rmdir()
    assert worker_notes.found(FILE)
    worker_notes.leave(FILE)
    assert all(note.exists() for note in notes)


@pytest.mark.parametrize(("mode", "user"), [(0o777, os.geteuid()), (0o700, os.geteuid() + 1)])
def test_foreign_folder_closes(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: Any, mode: int, user: int
) -> None:
    """Where another user can write, no note counts: without a token file no worker is open, as a log line says."""
    _serve_by(monkeypatch, ONE)
    folders[0].mkdir()
    folders[0].chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert worker_notes.found(FILE)
    worker_notes.leave(FILE)
    assert list(folders[0].iterdir()) == []
    assert f"({folders[0]}: it is not a folder of this user alone" in caplog.text


def test_no_usable_folder_closes(folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Where no note can be kept no worker is open without a token file; one folder that can hold notes is enough."""
    _serve_by(monkeypatch, ONE)
    folders[0].touch()
    assert not worker_notes.found(FILE)
    folders[1].rmdir()
    folders[1].symlink_to("nowhere/below")
    assert worker_notes.found(FILE)
    problem = os.strerror(errno.EEXIST)
    assert f"({folders[0]}: {problem}; {folders[1]}: {problem}), so none of them is open" in caplog.text


def test_notes_of_stopped_servers_are_removed(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts do not fill the memory; other files are left alone."""
    _serve_by(monkeypatch, ONE)
    worker_notes.leave(FILE)
    others = [folders[0] / name for name in (f"{os.getpid()}-running", "no note", f"{STOPPED}-stopped")]
    for each in others:
        each.touch()
    worker_notes.leave("other.json")
    assert [each.exists() for each in others] == [True, True, False]
    assert len(list(folders[0].iterdir())) == 4


def test_folders_of_the_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are in memory and among the temporary files, apart for each namespace of process ids."""
    space = Path("/proc/self/ns/pid").stat().st_ino
    name = f"freegpt_auth-{os.geteuid()}-{space}"
    assert list(real_folders()) == [Path("/dev/shm", name), Path(tempfile.gettempdir(), name)]
    monkeypatch.setattr(tempfile, "gettempdir", Mock(side_effect=FileNotFoundError))
    monkeypatch.setattr(Path, "stat", Mock(side_effect=FileNotFoundError))
    assert list(real_folders()) == [Path(f"/dev/shm/freegpt_auth-{os.geteuid()}-0")]
