"""The tokens of a server in memory: loaded, counted and released in short steps, to keep its event loop responsive.

Commands call :func:`.decoding.decode` instead, in one step.

While a thread works, the event loop waits for the interpreter lock: 5 ms at each attempt, and longer if one step takes
longer. Releasing a million records at once takes 100 ms and more, and growing a dict of as many 10-40 ms. A table is
therefore many small dicts, and the thread releases the lock between two steps.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from ..rules import count_active
from ..steps import in_steps, release
from . import decoding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...tokens import Token

SHARDS = 256

PIECE_SIZE = 128 * 1024
"""Bytes that are read and decoded in one step, which takes less than a millisecond."""


@dataclass(frozen=True, slots=True)
class Table:
    """Every token, twice; never changed once it is loaded.

    Attributes:
        shards: the tokens by digest; the first byte of a digest is the index of its dict.
        parts: the tokens in the order of the file, which is their order in memory: counting and releasing them in this
            order takes a quarter of the time.
    """

    shards: tuple[dict[bytes, Token], ...]
    parts: tuple[tuple[Token, ...], ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def find(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self.shards[digest[0] if digest else 0].get(digest)

    def count_active(self) -> int:
        """Count the tokens that are in force now."""
        return sum(count_active(part) for part in in_steps(self.parts))

    def all_parts(self) -> list[object]:
        """Return the table's parts, for :func:`~freegpt_auth.stores.steps.release` to release one by one."""
        return [*self.parts, *self.shards]


EMPTY = Table(({},) * SHARDS)

Contents = decoding.Contents[Table]
"""The contents of a token file, its tokens in a table."""


def read(file: BinaryIO) -> Contents:
    """Read a token file in steps, or at once if it is in another layout than this library's.

    Raises:
        ValueError: it is no token file; the message gives the fault and its place.
    """
    with contextlib.suppress(ValueError):
        return Contents(_read_batches(iter(partial(file.read, PIECE_SIZE), b"")))
    file.seek(0)
    contents = decoding.decode(file.read())
    shards = _new_shards()
    for digest, token in contents.tokens.items():
        shards[digest[0]][digest] = token
    return Contents(Table(shards, (tuple(contents.tokens.values()),)), contents.blank, contents.ancestral)


def _new_shards() -> tuple[dict[bytes, Token], ...]:
    return tuple({} for _ in range(SHARDS))


def _read_batches(pieces: Iterable[bytes]) -> Table:
    """Read a file in this library's own layout.

    Raises:
        ValueError: the file is in another layout, or has a fault.
    """
    shards, parts = _new_shards(), []
    ids: list[set[str]] = [set() for _ in range(SHARDS)]
    for batch in in_steps(decoding.decode_batches(pieces)):
        for token in batch:
            digest = decoding.take_digest(token)
            shards[digest[0]][digest] = token
            token_id = token.id
            ids[hash(token_id) % SHARDS].add(token_id)
        parts.append(batch)
        _collect_young_generation()
    table = Table(shards, tuple(parts))
    if not sum(map(len, ids)) == sum(map(len, shards)) == len(table):  # an id or a digest occurs twice
        raise ValueError
    release(ids)
    return table


def _collect_young_generation() -> None:
    """Collect the young generation now, while it is small; the collector then never scans the tokens in one long pass.

    Left alone it would wait for hundreds of batches, and hold the interpreter lock for 25 ms at a million tokens.
    """
    if gc.isenabled():
        gc.collect(0)
