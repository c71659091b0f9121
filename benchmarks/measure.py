"""How figures are taken: everything that is compared takes turns in one run, and medians and their spread are told.

Machines are noisy, and their speed drifts. What is measured in one go is compared with what was measured under other
conditions; what takes turns, round by round, is not. So ratios are taken round by round too.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

_Figure = TypeVar("_Figure")

TIMES = "\N{MULTIPLICATION SIGN}"
"""The unit of a ratio."""


class Spread(NamedTuple):
    """The median of many figures, and where the middle half of them lies."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if self.low == self.high:
            return f"{self.median:{spec}}"
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


class Result(NamedTuple):
    """One line of the report.

    Attributes:
        section: the heading it stands under.
        name: what was measured.
        figure: what came out.
        unit: of what.
        target: the bound that it must keep, if there is one, as a number of the same unit.
        at_least: the bound is a lower one.
        note: what a reader should know.
    """

    section: str
    name: str
    figure: Spread
    unit: str
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def bound(self) -> str:
        """The target as people write it."""
        return "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}".rstrip()

    @property
    def is_kept(self) -> bool:
        """Whether the figure keeps the target, or there is none."""
        if self.target is None:
            return True
        return self.figure.median >= self.target if self.at_least else self.figure.median <= self.target


def spread(figures: Sequence[float]) -> Spread:
    """Return the median and the quartiles of *figures*."""
    low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
    return Spread(median, low, high)


def single(figure: float) -> Spread:
    """Return a figure that is no median of many: a count, or a maximum."""
    return Spread(figure, figure, figure)


def in_turns(contenders: Mapping[str, Callable[[], _Figure]], rounds: int) -> dict[str, list[_Figure]]:
    """Let all take one turn in each round, after one round that does not count, and return the figures of each."""
    figures: dict[str, list[_Figure]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
            gc.collect()
            figure = contenders[name]()
            if number >= 0:
                figures[name].append(figure)
    return figures


async def longest_turn(work: Awaitable[_Figure]) -> tuple[_Figure, float]:
    """Return what comes of *work*, and the ms for which a task that always wants its turn had to wait for it meanwhile."""
    done = asyncio.ensure_future(work)
    longest, last = 0.0, time.perf_counter()
    while not done.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return await done, longest * 1e3


def over(figures: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return what is left of each figure when that of the base in the same round is taken away."""
    return [figure - one for figure, one in zip(figures, base, strict=True)]


def ratio(figures: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the ratios of two contenders, round by round."""
    return spread([figure / one for figure, one in zip(figures, base, strict=True)])
