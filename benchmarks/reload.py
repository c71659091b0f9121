"""What it costs to read a large token file again: seconds, memory, and how long the event loop is held meanwhile.

Memory that was used before is no measure of memory, so each round is a process of its own: ``reload_round.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from measure import Result, single, spread
from reload_round import secret_of

from freegpt_auth.stores.file.store import decoding, document
from freegpt_auth.tokens import Token, digest_of, prefix_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class Size(NamedTuple):
    """How many tokens, how often they are read, and what is allowed.

    Attributes:
        tokens: in the file.
        rounds: how many processes, one after another.
        reloads: how often each of them reads the file again, of every kind.
        seconds: for reading it once.
        memory: MiB that the tokens may keep.
        gap: ms for which the event loop may be held.
    """

    tokens: int
    rounds: int
    reloads: int
    seconds: float
    memory: float
    gap: float


ROUND = Path(__file__).with_name("reload_round.py")

SIZES = (Size(100_000, 5, 6, 0.25, 60, 8), Size(1_000_000, 3, 4, 2, 550, 25))


def measure() -> Iterator[Result]:
    """Measure with a hundred thousand tokens and with a million."""
    for size in SIZES:
        figures = take(size)
        section = f"Reading the token file again, {size.tokens:,} tokens"
        yield Result(section, "at start", spread(figures["first"]), "s", size.seconds)
        yield Result(section, "while tokens are in memory", spread(figures["later"]), "s", size.seconds)
        yield Result(section, "the same, processor time", spread(figures["processor"]), "s")
        yield Result(section, "memory for the tokens", spread(figures["kept"]), "MiB", size.memory)
        yield Result(section, "the same, after they were read several times", spread(figures["kept_later"]), "MiB")
        yield Result(section, "memory at the peak, at start", spread(figures["peak"]), "MiB")
        yield Result(section, "memory at the peak, while tokens are in memory", spread(figures["peak_later"]), "MiB")
        for load, words in (("idle", "the event loop"), ("busy", "the event loop with requests")):
            for kind in ("quiet", "reload"):
                gaps, target = figures[f"{load}_{kind}"], size.gap if kind == "reload" else None
                name = f"{words}, {'held while reading' if target else 'nothing read'}"
                yield Result(section, f"{name}: longest each time", spread(gaps), "ms", target)
                yield Result(section, f"{name}: longest of all", single(max(gaps)), "ms", target)


def take(size: Size) -> dict[str, list[float]]:
    """Return the figures of all rounds."""
    figures: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), size.tokens)
        for _ in range(size.rounds):
            arguments = [sys.executable, str(ROUND), folder, str(size.reloads)]
            output = subprocess.run(arguments, check=True, capture_output=True, timeout=600).stdout  # noqa: S603
            for name, values in json.loads(output).items():
                figures[name] += values
    return figures


def write_files(folder: Path, size: int) -> None:
    """Write two token files that differ in the name of the last token."""
    lines = [_line(number, f"client {number}") for number in range(size - 1)]
    for name in ("one", "two"):
        content = decoding.SEPARATOR.join([*lines, _line(size - 1, name)])
        path = folder / name
        path.write_bytes(decoding.HEAD + content + decoding.FOOT)
        path.chmod(0o600)
    (folder / "size").write_text(str(size))


def _line(number: int, name: str) -> bytes:
    digest, token_id = digest_of(secret_of(number)), sha256(b"%d" % number).hexdigest()[:12]
    prefix = prefix_of(secret_of(number))
    token = Token(id=token_id, name=name, prefix=prefix, created_at=datetime.now(UTC))
    return document._row(digest, token)  # noqa: SLF001  a Document of a million takes minutes
