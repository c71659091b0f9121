"""The lock beside a file: one writer at a time, and never two."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from freegpt_auth.exceptions import FileError, StoreBusyError
from freegpt_auth.stores.file.lock import locked


def _lock(path: object) -> None:
    with locked(str(path), 0.01):
        pass


def test_lock_of_another_process_times_out(path: Path) -> None:
    """A command that cannot get the lock gives up with one sentence, and gets it once it is free."""
    script = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    program = [sys.executable, "-c", script, f"{path}.lock"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        with pytest.raises(StoreBusyError, match=r"another process held its lock for 0\.01 s; try again"):
            _lock(path)
        holder.communicate(b"\n")
    with pytest.raises(RuntimeError, match="failed"), locked(str(path), 5):
        raise RuntimeError("failed")
    _lock(path)  # an error releases it too


def test_a_writer_looks_often_for_its_turn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several writers none waits much longer than the others write: it looks again each millisecond."""
    waits: list[tuple[int, float]] = []
    sleep, this_thread = time.sleep, threading.get_ident()

    def watched(seconds: float) -> None:
        waits.append((threading.get_ident(), seconds))
        sleep(seconds)

    descriptor = os.open(f"{path}.lock", os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", watched)
    with pytest.raises(StoreBusyError):
        _lock(path)
    os.close(descriptor)
    assert max(seconds for thread, seconds in waits if thread == this_thread) == 0.001  # others may sleep meanwhile too


def test_a_lock_that_cannot_be_made_is_a_fault(path: Path) -> None:
    """Something else in the lock's place is told in one sentence, and a mistyped path makes no folder."""
    Path(f"{path}.lock").mkdir()
    with pytest.raises(FileError, match=r"cannot lock .*t\.json\.lock: it is a directory, not a file"):
        _lock(path)
    with pytest.raises(FileError, match="its folder does not exist; create the folder first"):
        _lock(path.with_name("missing") / "t.json")
    assert [each.name for each in path.parent.iterdir()] == ["t.json.lock"]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSYS, "no flock"), NotImplementedError("no flock")])
def test_there_is_no_lesser_lock(path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    """On a file system without locks nothing is written at all: two writers would lose tokens."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=fault))
    with pytest.raises(FileError, match="cannot lock"):
        _lock(path)
