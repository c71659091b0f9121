"""What a worker leaves for those that are started after it. Whole servers are in test_workers.py."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth.stores import siblings

FILE = "api_tokens.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep notes in a folder of this test's own."""
    folder = tmp_path / "notes"
    monkeypatch.setattr(siblings, "_folder", lambda: folder)
    return folder


@pytest.fixture(params=["uvicorn", "gunicorn"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a worker of a server that spawns its workers, or of one that forks them."""
    if request.param == "uvicorn":
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a supervisor")
    else:
        monkeypatch.setitem(sys.modules, "gunicorn.arbiter", multiprocessing)


@pytest.mark.usefixtures("worker")
def test_a_worker_knows_what_its_siblings_knew(folder: Path) -> None:
    """A note is found again by workers of the same server, for the same token file, and by nobody else's eyes."""
    assert not siblings.remembered(FILE)
    siblings.remember(FILE)
    assert siblings.remembered(FILE)
    assert siblings.remembered(f"./{FILE}")
    assert not siblings.remembered("other.json")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_server_without_workers_notes_nothing(folder: Path) -> None:
    """A server that an operator starts by hand opens after a restart, as documented."""
    siblings.remember(FILE)
    assert not siblings.remembered(FILE)
    assert not folder.exists()


def test_another_server_is_not_meant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After stop, mv and start the workers are another server's."""
    monkeypatch.setattr(siblings, "_server", lambda: (os.getpid(), b"one"))
    siblings.remember(FILE)
    monkeypatch.setattr(siblings, "_server", lambda: (os.getpid(), b"another"))
    assert folder.exists()
    assert not siblings.remembered(FILE)


@pytest.mark.usefixtures("folder")
def test_a_preloading_server_knows_what_its_workers_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under --preload gunicorn loads the application before it forks: what its workers noted holds there, and for it alone."""
    gunicorn: dict[str, Any] = {"__name__": "gunicorn.arbiter"}
    exec("def setup(load): return load()\ndef spawn_worker(load): return load()", gunicorn)
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", multiprocessing)
    gunicorn["setup"](lambda: siblings.remember(FILE))
    assert gunicorn["setup"](lambda: siblings.remembered(FILE))
    assert not siblings.remembered(FILE)  # by its parent, which may be the shell that starts the next server
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert gunicorn["spawn_worker"](lambda: siblings.remembered(FILE))


def test_a_folder_that_others_made_is_not_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever else can write into the folder cannot tell a server what to do, and the operator is told."""
    monkeypatch.setattr(siblings, "_server", lambda: (os.getpid(), b"one"))
    siblings.remember(FILE)
    folder.chmod(0o777)
    assert not siblings.remembered(FILE)
    siblings.remember(FILE)
    assert "it is not a folder of this user alone" in caplog.text


def test_notes_of_stopped_servers_are_cleared_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarting does not fill the memory; what is not a note of this library is left alone."""
    monkeypatch.setattr(siblings, "_server", lambda: (os.getpid(), b"one"))
    siblings.remember(FILE)
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    os.waitpid(process, 0)
    (folder / f"{process}-stopped").touch()
    (folder / f"{os.getpid()}-running").touch()
    (folder / "no note").touch()
    siblings.remember("other.json")
    names = {note.name for note in folder.iterdir()}
    assert {f"{os.getpid()}-running", "no note"} < names
    assert len(names) == 4


def test_the_folder_is_in_memory_where_there_is_such_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note is gone after a reboot; without /dev/shm it is where temporary files are."""
    assert siblings._folder().name == f"freegpt_auth-{os.geteuid()}"
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    assert not siblings._folder().is_relative_to("/dev/shm")
