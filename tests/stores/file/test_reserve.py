"""The reserve of file descriptors: a file is opened although the process has none left."""

from __future__ import annotations

import errno
import os
from pathlib import Path  # noqa: TC003  beside the annotations that pytest may resolve
from unittest.mock import Mock

import pytest

from freegpt_auth.stores.file.reserve import Reserve
from tests.helpers.scarcity import no_descriptors
from tests.stores.file.common import open_files


@pytest.fixture
def path(path: Path) -> Path:
    """Return the path of a file."""
    path.write_bytes(b"content")
    return path


@pytest.fixture
def reserve() -> Reserve:
    """Return a full reserve."""
    reserve = Reserve()
    reserve.fill()
    return reserve


def _read(reserve: Reserve, path: Path) -> bytes:
    fd = reserve.open(str(path), os.O_RDONLY)
    content = os.read(fd, 100)
    reserve.close(fd)
    return content


def test_reserve_opens_again_and_again(path: Path, reserve: Reserve) -> None:
    """A full process reads as often as it must: the spare descriptor is back before another thread can have it."""
    empty = Reserve()
    with no_descriptors():
        for _ in range(3):
            assert _read(reserve, path) == b"content"
        empty.fill()
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            _read(empty, path)
    assert _read(empty, path) == b"content"


def test_full_system_is_like_a_full_process(path: Path, reserve: Reserve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor in reserve also opens a file while the whole system has none left."""
    real = os.open
    monkeypatch.setattr(os, "open", Mock(side_effect=[OSError(errno.ENFILE, "full"), real(path, os.O_RDONLY)]))
    assert _read(reserve, path) == b"content"


def test_stolen_descriptor_costs_one_spare(path: Path, reserve: Reserve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is accepted in the moment a spare is free takes that one, and the second opens the file."""
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


def test_foreign_descriptor_is_never_closed(path: Path, reserve: Reserve) -> None:
    """A daemon that closed every descriptor may have given the numbers to its sockets: those stay open."""
    held = list(reserve._held)
    for fd in held:
        os.close(fd)
    others = [os.open(path, os.O_RDONLY) for _ in held]
    assert sorted(others) == sorted(held)
    with no_descriptors(), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        _read(reserve, path)
    for fd in others:
        assert os.read(fd, 100) == b"content"
        os.close(fd)


def test_reserve_ends_with_its_store() -> None:
    """A store that is dropped leaves no descriptor open."""
    before = open_files()
    reserve = Reserve()
    reserve.fill()
    assert open_files() == before + 2
    del reserve
    assert open_files() == before
