"""The benchmarks: they run, and the performance page is made from their results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_page_is_made_from_results(tmp_path: Path) -> None:
    """One round of a benchmark saves its results, and the page and its chart are written from all results."""
    results, page = tmp_path / "results", tmp_path / "performance.md"
    shutil.copytree(BENCHMARKS / "results", results)
    arguments = ["request_path", "--rounds", "1", "--results", str(results), "--page", str(page)]
    environment = {**os.environ, "PYTHONSAFEPATH": ""}  # the benchmarks import each other from their folder
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *arguments], capture_output=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr.decode()
    assert json.loads((results / "request_path.json").read_text())["rounds"] == 1
    assert "100,000 tokens" in page.read_text()
    assert page.with_suffix(".svg").read_text().startswith("<svg")
