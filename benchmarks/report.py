"""The performance page and its chart, from the results: the text is ``page.md`` with a place for each figure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import chart
from served import BARE, FLOOR, GUARDED

if TYPE_CHECKING:
    from collections.abc import Iterable

BENCHMARKS = ("request_path", "throughput", "revocation", "reload", "fleet")
TEMPLATE = Path(__file__).with_name("page.md")
SIZES = (1, 1_000, 100_000)
TITLES = {"valid": "freegpt_auth", "floor": "the floor", "starlette": "Starlette"}


class Figure(SimpleNamespace):
    """A row of results, or a median with its quartiles. In the page, ``{figure:.1f}`` becomes "2.5 (2.4-2.7)"."""

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.q1:{spec}}-{self.q3:{spec}})"


def write(results: Path, page: Path) -> None:
    """Write the page, and its chart beside it, from the JSON files in the folder *results*.

    Raises:
        FileNotFoundError: one of :data:`BENCHMARKS` has no results.
    """
    read = {name: json.loads((results / f"{name}.json").read_text(), object_hook=_figure) for name in BENCHMARKS}
    added = _added(read["request_path"]["rows"])
    bars = {_tokens(size): [_bar(name, added[name][size]) for name in TITLES] for size in SIZES}
    rows = {name: {row.name: row for row in read[name]["rows"]} for name in BENCHMARKS[1:]}
    text = TEMPLATE.read_text().format(
        valid=added["valid"],
        wrong=added["wrong"][1_000].added.median,
        logged=added["wrong, logged"][1_000].added.median,
        open=added["open"][1_000].added.median,
        alternative=_in_words(bars),
        added_rows="\n".join(_added_row(size, added["valid"][size]) for size in SIZES),
        **{contender: _of(contender, rows["throughput"]) for contender in (BARE, FLOOR)},
        guarded=_of(GUARDED, rows["throughput"]),
        file=rows["revocation"],
        reload=rows["reload"],
        fleet=rows["fleet"],
        machines="\n".join(sorted({_machine(one) for one in read.values()})),
        minutes=round(sum(one["seconds"] for one in read.values()) / 60),
    )
    page.write_text(text)
    page.with_suffix(".svg").write_text(chart.svg("Microseconds added to each request; lines: quartiles", bars))


def _figure(values: dict[str, Any]) -> Any:
    return Figure(**values) if "name" in values or "median" in values else values


def _added(rows: Iterable[Figure]) -> dict[str, dict[int, Figure]]:
    """Return the rows by name and number of tokens, each with ``added`` in microseconds."""
    found: dict[str, dict[int, Figure]] = {}
    for row in rows:
        row.added = Figure(**{name: value / 1e3 for name, value in vars(row.added_ns).items()})
        found.setdefault(row.name, {})[row.tokens] = row
    return found


def _of(contender: str, rows: dict[str, Figure]) -> dict[str, Figure]:
    """Return the rows of one contender, by their names without it."""
    return {name.removeprefix(f"{contender}: "): row for name, row in rows.items() if name.startswith(contender)}


def _added_row(size: int, row: Figure) -> str:
    compared = [f"{row.ratios[name].median:.2f} × {TITLES[name]}" for name in ("floor", "starlette")]  # noqa: RUF001
    return f"| Added to a request, {_tokens(size)} | {row.added:.2f} µs | {', '.join(compared)} |"


def _in_words(bars: dict[str, list[chart.Bar]]) -> str:
    groups = (f"{name}: {', '.join(f'{bar.label} {bar.median:.2f}' for bar in group)}." for name, group in bars.items())
    return " ".join(groups)


def _tokens(size: int) -> str:
    return f"{size:,} token{'s' * (size > 1)}"


def _bar(name: str, row: Figure) -> chart.Bar:
    return chart.Bar(TITLES[name], row.added.q1, row.added.median, row.added.q3, is_ours=name == "valid")


def _machine(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    processor = f"{results['cpu']}, {results['cores']} cores"
    return f"Measured on {results['date']} on Linux: {processor}, CPython {results['python']}, {versions}."
