"""The lock beside a file: one writer at a time, and never two."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from freegpt_auth.exceptions import FileError, StoreBusyError
from freegpt_auth.stores.file.lock import locked


def _lock(path: object, seconds: float = 0.01) -> None:
    with locked(str(path), seconds):
        pass


def test_held_lock_times_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer looks for the lock each millisecond, gives up with one sentence, and gets it once it is free."""
    descriptor, sleep = os.open(f"{path}.lock", os.O_CREAT), Mock(wraps=time.sleep)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(StoreBusyError, match=r"another process held its lock for 0\.2 s; try again"):
        _lock(path, 0.2)
    os.close(descriptor)
    assert sleep.mock_calls.count(call(0.001)) > 1
    with pytest.raises(RuntimeError, match="failed"), locked(str(path), 5):
        raise RuntimeError("failed")
    _lock(path)  # an error releases it too


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
