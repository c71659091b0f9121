"""What a process does to know the tokens of a database: it reads them at its start, and follows every change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from database import cluster, make
from measure import Result, single, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (1_000, 100_000)
ROUNDS = 5
TIME_LIMIT = 300.0
ROUND = Path(__file__).with_name("following_round.py")

_FIGURES = {
    "start": ("from the first request of a process until it knows the tokens", "s"),
    "memory": ("memory for the tokens", "MiB"),
    "quiet": ("the event loop, nothing changes: longest each time", "ms"),
    "held_change": ("the event loop, while one token is changed: longest each time", "ms"),
    "held_reload": ("the event loop, while all tokens are read again: longest each time", "ms"),
    "seen": ("from sending the change of one token until the process knows", "ms"),
    "reloaded": ("from the change of more than 1,000 tokens until all are read again", "s"),
    "idle": ("a process that only follows, of one core", "%"),
}


def measure() -> Iterator[Result]:
    """Measure processes with a thousand tokens, and with a hundred thousand."""
    with cluster() as server:
        for size in SIZES:
            section = f"A fleet on PostgreSQL: a process that follows, {size:,} tokens"
            figures = take(make(server, f"following_{size}", size))
            for name, (title, unit) in _FIGURES.items():
                yield Result(section, title, spread(figures[name]), unit)
                if name.startswith(("quiet", "held")):
                    longest = f"{title.partition(':')[0]}: longest of all"
                    yield Result(section, longest, single(max(figures[name])), unit)


def take(url: str) -> dict[str, list[float]]:
    """Return the figures of all rounds."""
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        output = subprocess.run(  # noqa: S603
            [sys.executable, str(ROUND), url],
            check=True,
            stdout=subprocess.PIPE,
            timeout=TIME_LIMIT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for name, values in json.loads(output).items():
            figures[name] += values
    return figures
