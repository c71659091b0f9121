"""Long work in short steps: pauses between them, and the release of many objects."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from freegpt_auth.stores import steps

if TYPE_CHECKING:
    from collections.abc import Callable


def _use(monkeypatch: pytest.MonkeyPatch, seconds: float, sleep: Callable[[float], object]) -> None:
    """Let each step take so many seconds, and call *sleep* for each pause."""
    clock = partial(next, itertools.count(0.0, seconds))
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=clock, sleep=sleep))


@pytest.mark.parametrize(("seconds", "pauses"), [(0.0, 0), (0.34 * steps.STEP, 3), (1.01 * steps.STEP, 9)])
def test_a_pause_follows_each_step(monkeypatch: pytest.MonkeyPatch, seconds: float, pauses: int) -> None:
    """Other threads get the interpreter lock after each millisecond of work; short work is never interrupted."""
    sleep = Mock()
    _use(monkeypatch, seconds, sleep)
    assert list(steps.in_steps(range(9))) == list(range(9))
    assert [each.args[0] > 0 for each in sleep.mock_calls] == [True] * pauses


def test_parts_are_released_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releasing waits for a present reader, and then takes one step per part."""
    parts, left = [object() for _ in range(9)], list[int]()
    _use(monkeypatch, 1.01 * steps.STEP, lambda _: left.append(len(parts)))
    steps.release(parts)
    assert left == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
