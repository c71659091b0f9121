"""The reserve of file descriptors: a file is opened although the process has none left."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest

from freegpt_auth.stores.file.reserve import Reserve
from tests.helpers.scarcity import no_descriptors


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return the path of a file."""
    (tmp_path / "file").write_bytes(b"content")
    return str(tmp_path / "file")


def _read(reserve: Reserve, path: str) -> bytes:
    fd = reserve.open(path, os.O_RDONLY)
    content = os.read(fd, 100)
    reserve.close(fd)
    return content


def test_reserve_opens_again_and_again(path: str) -> None:
    """A full process reads as often as it must: the spare descriptor is taken back before another thread can have it."""
    reserve, empty = Reserve(), Reserve()
    reserve.fill()
    with no_descriptors():
        for _ in range(3):
            assert _read(reserve, path) == b"content"
        empty.fill()
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            empty.open(path, os.O_RDONLY)
    assert _read(empty, path) == b"content"


def test_stolen_descriptor_costs_one_spare(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is accepted in the moment a spare is free takes that one, and the second opens the file."""
    reserve = Reserve()
    reserve.fill()
    close, stolen = os.close, list[int]()

    def close_and_steal(fd: int) -> None:
        close(fd)
        monkeypatch.setattr(os, "close", close)
        stolen.append(os.open(os.devnull, os.O_RDONLY))

    with no_descriptors():
        monkeypatch.setattr(os, "close", close_and_steal)
        for _ in range(2):
            assert _read(reserve, path) == b"content"
        close(*stolen)


def test_foreign_descriptor_is_never_closed(path: str) -> None:
    """A daemon that closed every descriptor may have given the numbers to its sockets: those stay open."""
    reserve = Reserve()
    reserve.fill()
    held = list(reserve._held)
    for fd in held:
        os.close(fd)
    others = [os.open(path, os.O_RDONLY) for _ in held]
    assert sorted(others) == sorted(held)
    with no_descriptors(), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        reserve.open(path, os.O_RDONLY)
    for fd in others:
        assert os.read(fd, 100) == b"content"
        os.close(fd)


def test_reserve_ends_with_its_store() -> None:
    """A store that is dropped leaves no descriptor open."""
    folder = Path("/proc/self/fd")
    gc.collect()  # releases the descriptors of earlier tests
    before = len(list(folder.iterdir()))
    reserve = Reserve()
    reserve.fill()
    assert len(list(folder.iterdir())) == before + 2
    del reserve
    gc.collect()
    assert len(list(folder.iterdir())) == before
