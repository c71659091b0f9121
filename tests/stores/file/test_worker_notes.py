"""A worker's note for those that replace it. Whole servers are in test_workers.py and in the attack edges.py."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from freegpt_auth.stores.file import worker_notes

FILE = "api_tokens.json"
STOPPED = 2**22 + 1  # no process has this id: proc_sys_kernel(5), pid_max
ONE, ANOTHER = worker_notes._Server(os.getpid(), b"one"), worker_notes._Server(os.getpid(), b"another")

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    """Let no test find the server of another."""
    cached = worker_notes._servers
    cached.cache_clear()
    yield
    cached.cache_clear()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Keep notes in folders of this test's own."""
    folders = [tmp_path / "memory", tmp_path / "temporary"]
    monkeypatch.setattr(worker_notes, "_folders", lambda: folders)
    return folders


def _serve_by(monkeypatch: pytest.MonkeyPatch, *servers: worker_notes._Server) -> None:
    """Make this process a worker of a server, which may take over from another."""
    monkeypatch.setattr(worker_notes, "_servers", lambda _: servers)


@pytest.fixture
def gunicorn() -> dict[str, Any]:
    """Return functions that call another as gunicorn's arbiter does."""
    arbiter: dict[str, Any] = {"__name__": "gunicorn.arbiter"}
    exec("def setup(load): return load()\ndef spawn_worker(load): return load()", arbiter)
    return arbiter


@pytest.fixture(params=["uvicorn", "gunicorn"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gunicorn: dict[str, Any]) -> Run:
    """Return a function that calls another in a worker, of a server that spawns its workers or of one that forks them."""
    if request.param == "gunicorn":
        spawn: Run = gunicorn["spawn_worker"]
        return spawn
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=os.getppid()))
    return lambda function: function()


def test_worker_knows_what_its_siblings_knew(folders: list[Path], run: Run) -> None:
    """A note is found again by workers of the same server, for the same token file, and belongs to this user alone."""
    assert not run(lambda: worker_notes.found(FILE))
    run(lambda: worker_notes.leave(FILE))
    assert run(lambda: worker_notes.found(FILE))
    assert run(lambda: worker_notes.found(f"./{FILE}"))
    assert not run(lambda: worker_notes.found("other.json"))
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_server_without_workers_notes_nothing(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that an operator starts by hand opens after a restart, also if its application imports gunicorn."""
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", multiprocessing)
    worker_notes.leave(FILE)
    assert not worker_notes.found(FILE)
    assert not any(folder.exists() for folder in folders)


@pytest.mark.usefixtures("folders")
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


@pytest.mark.usefixtures("folders")
def test_preloading_server_knows_its_workers_notes(gunicorn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under --preload gunicorn loads the application before it forks: its workers' notes hold there."""
    gunicorn["setup"](lambda: worker_notes.leave(FILE))
    assert gunicorn["setup"](lambda: worker_notes.found(FILE))
    worker_notes._servers.cache_clear()
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert gunicorn["spawn_worker"](lambda: worker_notes.found(FILE))


@pytest.mark.usefixtures("folders")
def test_orphan_keeps_its_server(gunicorn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that outlives its arbiter leaves no note under its new parent, which starts other servers too."""
    gunicorn["spawn_worker"](lambda: worker_notes.found(FILE))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    gunicorn["spawn_worker"](lambda: worker_notes.leave(FILE))
    worker_notes._servers.cache_clear()
    assert not gunicorn["spawn_worker"](lambda: worker_notes.found(FILE))


def test_processes_that_cannot_be_seen(gunicorn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, or where it hides the arbiter, a server is known by a secret that its forked workers inherit."""
    monkeypatch.setattr(os, "getppid", lambda: 0)
    server, _ = gunicorn["spawn_worker"](lambda: worker_notes._servers(0))
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
    """Where another user can write, no note proves anything: no worker is open without a token file, and why is logged."""
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
    assert list(worker_notes._folders()) == [Path("/dev/shm", name), Path(tempfile.gettempdir(), name)]

    monkeypatch.setattr(tempfile, "gettempdir", Mock(side_effect=FileNotFoundError))
    monkeypatch.setattr(Path, "stat", Mock(side_effect=FileNotFoundError))
    assert list(worker_notes._folders()) == [Path(f"/dev/shm/freegpt_auth-{os.geteuid()}-0")]
