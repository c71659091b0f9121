"""Opening of a regular file: its limit, and the descriptor of an unsuitable file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from freegpt_auth.regular_file import UnsuitableFileError, open_regular


def test_unsuitable_file_is_closed() -> None:
    """A file over the limit is rejected, and its descriptor is closed; a file of exactly the limit is opened."""
    Path("file").write_bytes(b"xx")
    descriptor, status = open_regular("file", 2)
    os.close(descriptor)
    assert status.st_size == 2
    closed: list[int] = []
    with pytest.raises(UnsuitableFileError, match="it is larger than 0 MiB"):
        open_regular("file", 1, closer=closed.append)
    os.close(*closed)
