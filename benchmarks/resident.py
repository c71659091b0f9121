"""How much memory a process has.

Resident memory: what ``top`` shows, and no less than what guarding costs. What is private to a process, or its share of
what is not, depends on what else happens to run, so the same server would have other figures beside another one.
"""

from __future__ import annotations

from pathlib import Path


def resident(process: int | str) -> int:
    """Return the resident KiB of a process, page by page; other files of ``/proc`` only estimate it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
