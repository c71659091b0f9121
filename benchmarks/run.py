"""Measures everything and writes ``docs/operations/performance.md`` and its chart: ``tox -e bench``.

``tox -e bench -- revocation`` measures only what it names, and writes nothing.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import capacity
import commands
import flood
import following
import memory
import reload
import report
import request_path
import revocation
import servers
import usage_flush

from tests.helpers import fleet

DOCS = Path(__file__).parent.parent / "docs" / "operations"
SUITE = {
    "request_path": request_path,
    "servers": servers,
    "revocation": revocation,
    "reload": reload,
    "usage_flush": usage_flush,
    "commands": commands,
    "memory": memory,
    "fleet": fleet,
    "flood": flood,
    "following": following,
    "capacity": capacity,
}


def main(names: list[str]) -> int:
    """Print each figure when it is there, and write the page at the end. Missed targets are told, and are no failure."""
    if unknown := set(names) - set(SUITE):
        print(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SUITE)}")
        return 2
    logging.disable(logging.WARNING)
    chapters = [measured(name) for name in names or SUITE]
    if not names:
        DOCS.mkdir(exist_ok=True)
        (DOCS / "performance.md").write_text(report.page(chapters))
        report.chart(request_path.charted(chapters[0].results), DOCS / "performance.svg")
    print(report.summary([result for chapter in chapters for result in chapter.results]))
    return 0


def measured(name: str) -> report.Chapter:
    """Run one module, and return what it has to say."""
    module = SUITE[name]
    results = []
    for result in module.measure():
        results.append(result)
        words = (f"{result.section}:", f"{result.name}:", f"{result.figure:.2f}", result.unit, result.bound)
        print(*filter(None, words), "" if result.is_kept else "MISSED", flush=True)
    return report.Chapter(f"{module.__doc__}", results, getattr(module, "left_out", tuple)())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
