"""The tokens that a server keeps in memory: read, counted and dropped in small steps, so that its event loop goes on.

While a thread works, the event loop waits for the interpreter lock: 5 ms each time it wants it back, and longer where one
step takes longer. A million records dropped in one piece take 100 ms and more, a dict of as many that moves to a larger
place 10-40 ms. So a table is many small dicts, and between two steps the lock is given up.
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

PIECE = 128 * 1024
"""Bytes that are read and decoded at a time, which takes less than a millisecond."""


@dataclass(frozen=True, slots=True)
class Table:
    """Every token, twice; never changed once it is read.

    Attributes:
        shards: by its digest, in the dict of the digest's first byte.
        parts: in the order of the file, in which all of them are counted and dropped 4 times as fast, since they lie in
            memory in that order.
    """

    shards: tuple[dict[bytes, Token], ...]
    parts: tuple[tuple[Token, ...], ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def find(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self.shards[digest[0] if digest else 0].get(digest)

    def count_active(self) -> int:
        """Count the tokens that work now."""
        return sum(count_active(part) for part in in_steps(self.parts))

    def all_parts(self) -> list[object]:
        """Return the table's parts, for :func:`~freegpt_auth.stores.steps.release` to release one by one."""
        return [*self.parts, *self.shards]


EMPTY = Table(({},) * SHARDS)

Contents = decoding.Contents[Table]
"""What a token file says, in a table."""


def read(file: BinaryIO) -> Contents:
    """Return what a token file says.

    Raises:
        ValueError: it is none; the message says what is wrong and where.
    """
    with contextlib.suppress(ValueError):
        return Contents(_read_batches(iter(partial(file.read, PIECE), b"")))
    file.seek(0)
    contents = decoding.read(file.read())
    shards = _new_shards()
    for digest, token in contents.tokens.items():
        shards[digest[0]][digest] = token
    return Contents(Table(shards, (tuple(contents.tokens.values()),)), contents.blank, contents.ancestral)


def _new_shards() -> tuple[dict[bytes, Token], ...]:
    return tuple({} for _ in range(SHARDS))


def _read_batches(pieces: Iterable[bytes]) -> Table:
    """Read a file in this library's own layout.

    Raises:
        ValueError: it is in another, or something is wrong with it.
    """
    shards, parts = _new_shards(), []
    ids: list[set[str]] = [set() for _ in range(SHARDS)]
    for batch in in_steps(decoding.batches(pieces)):
        for token in batch:
            digest = decoding.take_digest(token)
            shards[digest[0]][digest] = token
            token_id = token.id
            ids[hash(token_id) % SHARDS].add(token_id)
        parts.append(batch)
        _let_gc_forget()
    table = Table(shards, tuple(parts))
    if not sum(map(len, ids)) == sum(map(len, shards)) == len(table):
        raise ValueError
    release(ids)
    return table


def _let_gc_forget() -> None:
    """Show what was just made to the garbage collector, which sees that there is nothing to collect in it for ever.

    By itself it would look when hundreds of batches are there, and hold the lock 25 ms at a million tokens.
    """
    if gc.isenabled():
        gc.collect(0)
