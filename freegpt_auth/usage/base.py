"""The contract of a usage store; ``tests/usage/test_contract.py`` is the test suite of every implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime


class Usage(NamedTuple):
    """The usage of one token.

    Attributes:
        use_count: number of accepted requests.
        last_used_at: instant of the last one.
    """

    use_count: int
    last_used_at: datetime


class Batch(NamedTuple):
    """Uses that one process writes at once.

    Attributes:
        process: random id of the writing process.
        sequence: number of the batch within that process, from 1. A retry has the same number.
        counts: number of uses to add, and instant of the last one in seconds since the epoch, by token id.
    """

    process: str
    sequence: int
    counts: Mapping[str, tuple[int, float]]


class UsageStore(Protocol):
    """A store of usage, safe to use from several processes and threads at once.

    Attributes:
        source: name of the store for the log, without a password.
    """

    source: str

    def write(self, batch: Batch, timeout: float) -> None:
        """Add the counts of a batch and advance the last uses, atomically. A batch added before changes nothing.

        Args:
            batch: the batch.
            timeout: longest wait for other writers, in seconds.

        Raises:
            UsageError: the result is unknown; retry with the same batch.
        """
        ...

    def read(self) -> Mapping[str, Usage]:
        """Return the usage of each used token by its id.

        Raises:
            UsageError: the usage cannot be read.
        """
        ...

    def merge(self, usage: Mapping[str, Usage]) -> None:
        """Raise each token's count and last use to at least the given ones, atomically. Idempotent.

        Raises:
            UsageError: nothing was changed.
        """
        ...

    def check(self) -> None:
        """Check at the start of a server that usage can be written. A fault that may be temporary is no error.

        Raises:
            ConfigurationError: the location holds foreign data, which must not be changed.
        """
        ...

    def forget(self, token_ids: Collection[str]) -> None:
        """Remove the usage of deleted tokens, including earlier uses that servers have not written yet.

        Does nothing if no usage was ever written.

        Raises:
            UsageError: nothing was changed.
        """
        ...

    def close(self) -> None:
        """Release open resources. Later calls reopen them."""
        ...
