"""The code blocks of a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent.parent

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block, with the heading above it."""

    heading: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    """Return every code block of a page."""
    text = (PROJECT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: match.start()]), re.MULTILINE)
        found.append(Block(headings[-1], match[1], match[2]))
    return found
