"""Run the benchmarks, each as a process of its own, and write the performance page: ``python benchmarks/run.py``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import report
import results

PAGE = Path(__file__).parent.parent / "docs" / "operations" / "performance.md"


def main() -> None:
    """Run the named benchmarks, by default all, and write the page from their results and those of earlier runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default {', '.join(report.BENCHMARKS)}")
    parser.add_argument("--rounds", help="of each benchmark; by default each has its own number")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.names) - set(report.BENCHMARKS):
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}")
    arguments = ["--results", str(options.results), *(["--rounds", options.rounds] if options.rounds else [])]
    for name in options.names or report.BENCHMARKS:
        print(f"{name} …", flush=True)
        script = Path(__file__).with_name(f"{name}.py")
        subprocess.run([sys.executable, str(script), *arguments], check=True)  # noqa: S603
    report.write(options.results, options.page)
    print(options.page)


if __name__ == "__main__":
    main()
