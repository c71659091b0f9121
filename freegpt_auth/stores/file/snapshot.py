"""A server's reading of the token file: one state of the file with its tokens, and how long they may be relied on."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, BinaryIO, cast

from ...exceptions import FileError
from . import disk, table

if TYPE_CHECKING:
    import os

    from .reserve import Reserve

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of the file in memory; replaced whole, never changed.

    Attributes:
        tokens: the tokens of the last successful reading.
        signature: of the state that was read; ``None`` before the first reading.
        problem: the reason why that state could not be read.
        retry_at: instant of the next reading even if the signature is the same, by the store's clock.
        lease_ends: instant from which *tokens* are refused, if the file may have changed unseen; else :data:`NEVER`.
        fingerprint: hash of the bytes that were read.
        state: another object for each reading of other bytes.
    """

    tokens: table.Table
    signature: disk.Signature | None
    problem: str | None = None
    retry_at: float = NEVER
    lease_ends: float = NEVER
    fingerprint: bytes = b""
    state: object = field(default_factory=object, compare=False)


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of one reading of the file.

    Attributes:
        status: of the file.
        contents: its tokens; ``None`` if its bytes are those of the last snapshot.
        fingerprint: hash of its bytes.
    """

    status: os.stat_result
    contents: table.Contents | None
    fingerprint: bytes


def read(path: str, reserve: Reserve, last: Snapshot, signature: disk.Signature) -> Reading:
    """Read the file at *path*, whose signature was *signature* just before. The bytes of *last* are not decoded again.

    Raises:
        ValueError, FileNotFoundError, FileError: as :func:`.disk.read_file` and :func:`.table.read` do.
    """
    known = last.fingerprint if signature == last.signature and last.problem is None else None

    def parse(file: BinaryIO) -> tuple[table.Contents | None, bytes]:
        if known:
            fingerprint = _fingerprint(file)
            if fingerprint == known:
                return None, fingerprint
            file.seek(0)
        hashing = _Hashing(file)
        contents = table.read(cast("BinaryIO", hashing))
        return contents, hashing.hash.digest()

    status, (contents, fingerprint) = disk.read_file(path, parse, reserve)
    return Reading(status, contents, fingerprint)


def after_failure(
    last: Snapshot, signature: disk.Signature, error: Exception, *, now: float, lease: tuple[float, float], retry: float
) -> tuple[Snapshot, str]:
    """Return the snapshot after a failed reading that follows *last*, and the effect of the failure for the log.

    The tokens of *last* stay. If *error* may hide a change, they stay until the end of the lease only.

    Args:
        last: the snapshot before.
        signature: of the file that could not be read.
        error: of the reading.
        now: the instant of the reading.
        lease: its length in seconds, and the instant of its end.
        retry: seconds until the next reading.
    """
    length, lease_ends = lease
    problem = str(error)
    ends, bound = NEVER, ""
    if isinstance(error, FileError):
        problem = error.problem
        if error.transient:
            ends, bound = min(last.lease_ends, lease_ends), f" for {length:g} s"
    if now < ends:
        effect = f". Tokens read before ({len(last.tokens)}) stay in force{bound}, all others are refused"
        return Snapshot(last.tokens, signature, problem, min(now + retry, ends), ends), effect
    effect = f". It could not be read for {length:g} s: all tokens are refused until it can be"
    return Snapshot(table.EMPTY, signature, problem, now + retry, ends), effect


def _fingerprint(file: BinaryIO) -> bytes:
    hashing = _Hashing(file)
    while hashing.read(table.PIECE_SIZE):
        pass
    return hashing.hash.digest()


class _Hashing:
    """A file that is hashed during a reading."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = blake2b()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data

    def seek(self, offset: int) -> int:
        self.hash = blake2b()
        return self._file.seek(offset)
