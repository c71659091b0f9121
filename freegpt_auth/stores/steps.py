"""Long work in short steps: the event loop of the process gets the interpreter lock in between."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STEP = 0.001
"""Longest hold of the interpreter lock, in seconds."""

PAUSE = 0.00005
"""Pause between two steps, in seconds: with 0 no other thread wakes up in time to take the interpreter lock."""

_T = TypeVar("_T")


def in_steps(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each of *items*, and sleep :data:`PAUSE` seconds after each :data:`STEP` seconds of work."""
    began = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - began > STEP:
            time.sleep(PAUSE)
            began = time.perf_counter()


def release(parts: list[_T]) -> None:
    """Empty the list *parts* in steps. Its elements stay as they are: a request may still read one of them.

    A million records released at once hold the interpreter lock for 100 ms and more.
    """
    # A request that reads the parts at this moment finishes first; else it would release them, all at once.
    time.sleep(PAUSE)
    for _ in in_steps(range(len(parts))):
        parts.pop()
