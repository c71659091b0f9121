"""Measurement: contenders take turns in one run; medians and quartiles of many rounds.

The speed of a machine drifts. Contenders that take turns, round by round, meet the same drift: figures of two runs do
not. Differences and ratios are therefore taken round by round too.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

_Figure = TypeVar("_Figure")


def in_turns(contenders: Mapping[str, Callable[[], _Figure]], rounds: int) -> dict[str, list[_Figure]]:
    """Call each contender once a round, after one round that does not count, and return the figures of each."""
    figures: dict[str, list[_Figure]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.freeze()  # to collect 100,000 tokens before each turn would empty the processor's caches
    for number in range(-1, rounds):
        first = number % len(names)  # another contender begins each round
        for name in names[first:] + names[:first]:
            gc.collect()
            figure = contenders[name]()
            if number >= 0:
                figures[name].append(figure)
    gc.unfreeze()
    return figures


async def longest_turn(work: Awaitable[_Figure]) -> tuple[_Figure, float]:
    """Await *work*, and return its result and the longest time in ms for which it held the event loop."""
    done = asyncio.ensure_future(work)
    longest, last = 0.0, time.perf_counter()
    while not done.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return await done, longest * 1e3


def quartiles(figures: Sequence[float]) -> dict[str, float]:
    """Return the quartiles ``q1``, ``median`` and ``q3`` of *figures*, with five significant digits."""
    if len(figures) == 1:
        figures = [*figures, *figures]
    cuts = statistics.quantiles(figures, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), map(significant, cuts), strict=True))


def significant(figure: float) -> float:
    """Return *figure* rounded to five significant digits."""
    return float(f"{figure:.5g}")


def over(figures: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the differences of two contenders, round by round."""
    return [figure - one for figure, one in zip(figures, base, strict=True)]


def ratios(figures: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratios of two contenders, round by round."""
    return [figure / one for figure, one in zip(figures, base, strict=True)]
