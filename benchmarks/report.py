"""The figures as people read them: a Markdown page, which begins with what was promised and what is kept, and a chart."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from measure import Result, Spread

INTRODUCTION = """# How fast it is

Written by `tox -e bench`. All that is compared took turns in one run. A figure is the median, behind it the range in
which the middle half lies; a count and a maximum stand alone. Ratios were taken round by round. *The floor* is the
least code that does the same work, written by hand: [benchmarks/floor.py](../../benchmarks/floor.py)."""

PACKAGES = ("anyio", "fastapi", "freegpt-auth", "msgspec", "psycopg", "starlette", "uvicorn")
"""Whose versions are told."""

CHART = "![What each guard adds to a request](performance.svg)"
OURS, OTHER = "#0b62a4", "#8a8a8a"
WORTH_A_COLOUR = "freegpt_auth"


class Chapter(NamedTuple):
    """What one module of the suite has to say.

    Attributes:
        introduction: what it measures.
        results: its figures.
        left_out: what was not measured, and why.
    """

    introduction: str
    results: Sequence[Result]
    left_out: Sequence[str] = ()


def page(chapters: Sequence[Chapter]) -> str:
    """Return the whole page."""
    results = [result for chapter in chapters for result in chapter.results]
    parts = [INTRODUCTION, summary(results), CHART, *map(_told, chapters), machine()]
    return "\n\n".join(parts) + "\n"


def summary(results: Sequence[Result]) -> str:
    """Return what was promised, and what is kept."""
    promised = [result for result in results if result.target is not None]
    missed = sum(not result.is_kept for result in promised)
    lines = ["| | | target | measured | |", "|---|---|---:|---:|---|"]
    for section, rows in groupby(promised, key=lambda result: result.section):
        heading = section
        for result in rows:
            lines.append(f"| {heading} | {result.name} | {result.bound} | {_median(result)} | {_outcome(result)} |")
            heading = ""
    return f"## In short\n\n{len(promised) - missed} of {len(promised)} targets are kept.\n\n" + "\n".join(lines)


def machine() -> str:
    """Return what the figures depend on."""
    processor = platform.processor()
    with suppress(OSError, IndexError):  # Linux keeps it there, and nowhere else
        processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    packages = "\n".join(f"- {name} {version(name)}" for name in PACKAGES)
    return f"## Measured on\n\n- {processor}, {os.cpu_count()} cores, {platform.system()}\n- {python}\n{packages}"


def _told(chapter: Chapter) -> str:
    parts: list[str] = []
    for section, rows in groupby(chapter.results, key=lambda result: result.section):
        parts += [f"## {section}", *([chapter.introduction] if not parts else []), _table(list(rows))]
    if chapter.left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {reason}" for reason in chapter.left_out))
    return "\n\n".join(parts)


def _table(results: Sequence[Result]) -> str:
    lines = ["| | measured | target | |", "|---|---:|---:|---|"]
    for result in results:
        figure = f"{result.figure:{_digits(result)}} {result.unit}".rstrip()
        lines.append(f"| {result.name} | {figure} | {result.bound} | {_outcome(result)} |")
    notes = [f"- {result.name}: {result.note}" for result in results if result.note]
    return "\n".join(lines + ([""] if notes else []) + notes)


def _digits(result: Result) -> str:
    return ".2f" if result.unit and result.figure.median < 100 else ",.0f"  # noqa: PLR2004


def _median(result: Result) -> str:
    return f"{result.figure.median:{_digits(result)}} {result.unit}".rstrip()


def _outcome(result: Result) -> str:
    if result.target is None:
        return ""
    if result.is_kept:
        return "kept"
    excess = abs(result.figure.median - result.target)
    return f"**missed** by {excess / result.target:.1%}" if result.target else f"**missed** by {excess:g}"


def chart(figures: Mapping[str, Mapping[str, Spread]], path: Path) -> None:
    """Draw what each guard adds to a request.

    Args:
        figures: for each guard, the microseconds by what they depend on: 1 token, 1,000 tokens …
        path: where the drawing goes.
    """
    mpl.rcParams["svg.hashsalt"] = "freegpt_auth"  # the same figures make the same file
    names = sorted(figures, key=lambda name: next(iter(figures[name].values())).median)
    drawing, axes = plt.subplots(figsize=(9, 0.45 * len(names) + 1.5), layout="constrained")
    for size, case in enumerate(figures[names[0]]):
        places = [place for place, name in enumerate(names) if case in figures[name]]
        medians = [figures[names[place]][case].median for place in places]
        colours = [OURS if names[place] == WORTH_A_COLOUR else OTHER for place in places]
        axes.scatter(medians, places, 40 * (size + 1) ** 2, "none", edgecolors=colours, linewidths=1.5, label=case)
    for place, name in enumerate(names):
        _write_medians(axes, [figure.median for figure in figures[name].values()], place)
    _finish(axes, names)
    drawing.legend(loc="outside upper right", ncols=len(figures[names[0]]), frameon=False)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def _write_medians(axes: Axes, medians: Sequence[float], place: int) -> None:
    text = "   ".join(f"{median:,.1f}" if median < 10 else f"{median:,.0f}" for median in medians)  # noqa: PLR2004
    axes.annotate(text, (max(medians), place), (14, 0), textcoords="offset points", va="center", fontsize=9)


def _finish(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[names.index(WORTH_A_COLOUR)].set_color(OURS)
    axes.get_yticklabels()[names.index(WORTH_A_COLOUR)].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.margins(x=0.14, y=0.08)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("µs added to each request, on a logarithmic scale")
