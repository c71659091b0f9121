"""The output of a command: data on stdout, notes for the operator on stderr."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from ..names import printable


def prepare_streams() -> None:
    """Make the standard streams print every character, and report a disk that is full."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the check mark still shows the list
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # Unbuffered, by -u or PYTHONUNBUFFERED: a partial write to a disk that is nearly full would raise no error.
        raw, encoding, errors = sys.stdout.fileno(), sys.stdout.encoding, sys.stdout.errors
        sys.stdout = os.fdopen(raw, "w", encoding=encoding, errors=errors, closefd=False)


def note(message: str) -> None:
    """Print *message* for the operator, on stderr. A failure to print is ignored: the command goes on."""
    if sys.stderr is None:  # closed: print() would write to stdout instead
        return
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirect *stream* to the null device: the interpreter flushes it at exit, would fail again and exit with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
