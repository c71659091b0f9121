"""The tokens that a server keeps in memory: read, counted and dropped in small steps, so that its event loop goes on.

While a thread works, the event loop waits for the interpreter lock: 5 ms each time it wants it back, and longer where one
step takes longer. A million records dropped in one piece take 100 ms and more, a dict of as many that moves to a larger
place 10-40 ms. So a table is many small dicts, and between two steps the lock is given up.
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from . import memory, tokenfile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..tokens import Token

SHARDS = 256

STEP = 0.001
"""Seconds for which the interpreter lock is held at a stretch."""

PAUSE = 0.00005
"""Seconds for which it is given up: 0 is not enough for another thread to wake up."""

PIECE = 128 * 1024
"""Bytes that are read and decoded at a time, which takes less than a millisecond."""

_T = TypeVar("_T")


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
        return sum(memory.count_active(part) for part in _in_steps(self.parts))

    def pieces(self) -> list[object]:
        """Return what :func:`drop` takes in the place of the table."""
        return [*self.parts, *self.shards]


EMPTY = Table(({},) * SHARDS)

Contents = tokenfile.Contents[Table]
"""What a token file says, in a table."""


def read(file: BinaryIO) -> Contents:
    """Return what a token file says.

    Raises:
        ValueError: it is none; the message says what is wrong and where.
    """
    with contextlib.suppress(ValueError):
        return Contents(_read_batches(iter(partial(file.read, PIECE), b"")))
    file.seek(0)
    contents = tokenfile.read(file.read())
    shards = _new_shards()
    for digest, token in contents.tokens.items():
        shards[digest[0]][digest] = token
    return Contents(Table(shards, (tuple(contents.tokens.values()),)), contents.blank, contents.ancestral)


def drop(pieces: list[_T]) -> None:
    """Let go of a table piece by piece, after all else that held it has let go.

    No piece is emptied: a request that was given the table before may still be looking into it, and must not miss a
    token.
    """
    time.sleep(PAUSE)  # for that request to be done: else it would be left with all the pieces, and drop them at once
    for _ in _in_steps(range(len(pieces))):
        pieces.pop()


def _new_shards() -> tuple[dict[bytes, Token], ...]:
    return tuple({} for _ in range(SHARDS))


def _read_batches(pieces: Iterable[bytes]) -> Table:
    """Read a file in this library's own layout.

    Raises:
        ValueError: it is in another, or something is wrong with it.
    """
    shards, parts = _new_shards(), []
    ids: list[set[str]] = [set() for _ in range(SHARDS)]
    for batch in _in_steps(tokenfile.batches(pieces)):
        for token in batch:
            digest = tokenfile.take_digest(token)
            shards[digest[0]][digest] = token
            token_id = token.id
            ids[hash(token_id) % SHARDS].add(token_id)
        parts.append(batch)
        _let_gc_forget()
    table = Table(shards, tuple(parts))
    if not sum(map(len, ids)) == sum(map(len, shards)) == len(table):
        raise ValueError
    drop(ids)
    return table


def _let_gc_forget() -> None:
    """Show what was just made to the garbage collector, which sees that there is nothing to collect in it for ever.

    By itself it would look when hundreds of batches are there, and hold the lock 25 ms at a million tokens.
    """
    if gc.isenabled():
        gc.collect(0)


def _in_steps(things: Iterable[_T]) -> Iterator[_T]:
    """Yield each of *things*, and give the interpreter lock up for a moment whenever it was held for a while."""
    began = time.perf_counter()
    for thing in things:
        yield thing
        if time.perf_counter() - began > STEP:
            time.sleep(PAUSE)
            began = time.perf_counter()
