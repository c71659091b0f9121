"""Usage in PostgreSQL, in its own table of the database of the tokens: a write of usage cannot change a token."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psycopg

from ...exceptions import StoreUnavailableError, UsageError
from ...usage.base import Usage
from .address import Address
from .faults import reason_of
from .instants import count_of, instant, instant_of, microseconds
from .pool import Pool

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ...usage.base import Batch
    from .timed_connection import Row

_ADD = "SELECT freegpt_auth.add_usage(%s, %s, %s, %s::bigint[], %s::float8[])"
_READ = f"SELECT token_id, use_count, {microseconds('last_used_at')} FROM freegpt_auth.usage"
_MERGE = f"""
    INSERT INTO freegpt_auth.usage AS known
        SELECT t.id, given.use_count, {instant("given.last_used_at")}
        FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS given (token_id, use_count, last_used_at)
        JOIN freegpt_auth.tokens t ON t.id = given.token_id ORDER BY t.id
        ON CONFLICT (token_id) DO UPDATE SET
            use_count = greatest(known.use_count, excluded.use_count),
            last_used_at = greatest(known.last_used_at, excluded.last_used_at)
"""


class PostgresUsage:
    """A :class:`~freegpt_auth.usage.base.UsageStore` in the database of the tokens, over one connection.

    One transaction writes a batch with its process and number, so a batch that is sent again after a lost reply counts
    once. The instant of a use is sent as its age in seconds: the clocks of servers differ.

    Args:
        url: URL of the database.

    Raises:
        ConfigurationError: *url* cannot be read.
    """

    def __init__(self, url: str) -> None:
        address = Address(url)
        self.source: str = address.shown
        self._pool = Pool(address, 1)

    def write(self, batch: Batch, timeout: float) -> None:  # noqa: ARG002  the pool's limit is shorter
        """Add a batch, unless it was added before. Uses of deleted tokens are dropped."""
        now = time.time()
        ids, counts = list(batch.counts), [count for count, _ in batch.counts.values()]
        ago = [max(0.0, now - latest) for _, latest in batch.counts.values()]
        self._run(_ADD, (batch.process, batch.sequence, ids, counts, ago))

    def read(self) -> Mapping[str, Usage]:
        """Return the usage of each used token by its id."""
        try:
            return {row[0]: Usage(row[1], instant_of(row[2])) for row in self._run(_READ)}
        except OverflowError:
            raise UsageError(
                "a last use is outside the years 1 to 9999; correct freegpt_auth.usage with psql"
            ) from None

    def merge(self, usage: Mapping[str, Usage]) -> None:
        """Raise the counts and last uses of existing tokens to at least these."""
        counts = [one.use_count for one in usage.values()]
        self._run(_MERGE, (list(usage), counts, [count_of(one.last_used_at) for one in usage.values()]))

    def check(self) -> None:
        """Do nothing: the store in the same database checks its schema."""

    def forget(self, token_ids: Collection[str]) -> None:
        """Do nothing: deleting a token deletes its usage, and later uses of it are dropped."""

    def close(self) -> None:
        """Close the connection. Later calls open a new one."""
        self._pool.renew()

    def _run(self, statement: str, values: tuple[object, ...] = ()) -> list[Row]:
        try:
            return self._pool.run(lambda connection: connection.run(statement, values))
        except (psycopg.Error, StoreUnavailableError, ValueError) as error:
            raise UsageError(reason_of(error)) from None
