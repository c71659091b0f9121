"""The contract that every place for usage keeps; ``tests/usage`` holds the suite that each must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime


class Usage(NamedTuple):
    """How a token was used.

    Attributes:
        use_count: accepted requests.
        last_used_at: when the last of them came.
    """

    use_count: int
    last_used_at: datetime


class Batch(NamedTuple):
    """What one process writes at once.

    Attributes:
        process: which process, in a word that no other has.
        sequence: the how-manieth of its batches. One whose answer was lost is written again with the same number.
        counts: for each token id how many uses to add, and the last of them in seconds since the epoch.
    """

    process: str
    sequence: int
    counts: Mapping[str, tuple[int, float]]


class UsageStore(Protocol):
    """Where usage is kept. Several processes and threads may use it at the same time.

    Attributes:
        source: where that is, in words for the log. No password is in it.
    """

    source: str

    def write(self, batch: Batch, timeout: float) -> None:
        """Add to each token's count and move its last use forward: all of the batch, or nothing if it was added before.

        Args:
            batch: what to add.
            timeout: seconds to wait at most for other writers.

        Raises:
            UsageError: it may not have been added; the same batch is to be given again.
        """
        ...

    def read(self) -> Mapping[str, Usage]:
        """Return the usage of each used token by its id.

        Raises:
            UsageError: it cannot be read.
        """
        ...

    def merge(self, usage: Mapping[str, Usage]) -> None:
        """Raise each token's count and last use to at least these; so it makes no difference to do it twice.

        Raises:
            UsageError: it cannot be done, and nothing was.
        """
        ...

    def check(self) -> None:
        """Check that usage can be kept here; called once, when a server starts. A fault that may pass is no error.

        Raises:
            ConfigurationError: the place holds something else than usage, which must not be changed.
        """
        ...

    def forget(self, token_ids: Collection[str]) -> None:
        """Remove the usage of deleted tokens, and drop their uses up to this moment that are added later.

        Servers may hold uses that they have not written yet. Where no usage was ever kept, nothing is done.

        Raises:
            UsageError: it cannot be done, and nothing was.
        """
        ...

    def close(self) -> None:
        """Let go of what is held open. What is asked after that opens it again."""
        ...
