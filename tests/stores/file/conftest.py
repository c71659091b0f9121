"""Fixtures of the tests in this folder."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  beside the annotations that pytest may resolve

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file that does not exist yet."""
    return tmp_path / "t.json"
