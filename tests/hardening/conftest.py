"""What the attacks share: how long they go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--rounds``: how often what is left to chance is tried."""
    parser.addoption("--rounds", type=int, default=None, help="rounds of what is left to chance; by default few")
