"""Coarse clocks of file systems: how long a state is uncertain, and times that always rise."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003  beside the annotations that pytest may resolve

import pytest

from freegpt_auth.exceptions import FileError
from freegpt_auth.stores.file import disk, timestamps

SECOND = 10**9
FAR = 4_000_000_000 * SECOND  # so far ahead that the file system's clock does not move beyond it


@pytest.mark.parametrize(
    ("changed", "length"), [(100 * SECOND + 1, timestamps.FINE_TICK), (100 * SECOND, timestamps.COARSE_TICK)]
)
def test_whole_second_is_of_a_coarse_clock(changed: int, length: float) -> None:
    """Times with fractions of a second come from a fine clock; whole seconds may be those of a clock of 1 s or 2 s."""
    assert timestamps.tick_length(changed) == length


@pytest.mark.parametrize("granularity", [1, 100, SECOND, 2 * SECOND])
def test_modification_time_rises_with_each_change(
    path: Path, monkeypatch: pytest.MonkeyPatch, granularity: int
) -> None:
    """While the file system's clock stands still no later file has the signature of one before, at any granularity."""
    real = os.utime
    path.touch()
    real(path, ns=(FAR, FAR))
    monkeypatch.setattr(os, "utime", lambda fd, ns: real(fd, ns=(FAR, ns[1] - ns[1] % granularity)))
    times = [FAR]
    for _ in range(3):
        disk.replace_file(str(path), b"content")
        times.append(path.stat().st_mtime_ns)
    assert times == sorted(set(times))


def test_last_possible_time_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot get a later time is not replaced: servers might take the new one for the old."""
    path.write_bytes(b"old")
    real = os.utime
    real(path, ns=(FAR, FAR))
    monkeypatch.setattr(os, "utime", lambda fd, ns: real(fd, ns=(FAR, min(ns[1], FAR))))
    with pytest.raises(FileError, match="the last that the file system can hold; run touch on it"):
        disk.replace_file(str(path), b"new")
    assert path.read_bytes() == b"old"
