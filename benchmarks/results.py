"""The results of a benchmark: a JSON file with the machine, the Python version, the date and the figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import quartiles, significant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = Path(__file__).with_name("results")
"""Where the results of the published run are kept."""

PACKAGES = ("httptools", "starlette", "uvicorn", "uvloop")

Row = dict[str, Any]


def main(name: str, measure: Callable[[int], list[Row]], rounds: int) -> None:
    """Run one benchmark as a program, with the options ``--rounds`` and ``--results``, and save its rows.

    Args:
        name: of the benchmark: its results are saved as ``NAME.json``.
        measure: the benchmark: takes the number of rounds and returns the rows.
        rounds: the number of rounds without the option.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = measure(options.rounds)
    results = {**machine(), "rounds": options.rounds, "seconds": round(time.monotonic() - began), "rows": rows}
    (options.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def row(name: str, unit: str, figures: Sequence[float], **more: float) -> Row:
    """Return a row with the quartiles and the maximum of *figures*."""
    return {"name": name, "unit": unit, **quartiles(figures), "max": significant(max(figures)), **more}


def machine() -> Row:
    """Return the circumstances of a run. They identify a class of machines, but no machine."""
    processor = platform.processor()
    with suppress(OSError, IndexError):  # only Linux has the file
        processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return {
        "python": platform.python_version(),
        "cpu": processor,
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "packages": {name: version(name) for name in PACKAGES},
    }
