"""Loads the token cache of one process: the changes since the cached revision, or the whole table."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ..steps import PAUSE
from . import reads

if TYPE_CHECKING:
    from ...tokens import Token
    from .cache import TokenCache
    from .connection import Connection

_logger = logging.getLogger("freegpt_auth")


class Loader:
    """Brings a cache to a later state of the database, with a pause after each batch of rows. Not thread-safe.

    Args:
        cache: the cache to load.
        shown: the database, for the log.
    """

    def __init__(self, cache: TokenCache, shown: str) -> None:
        self._cache = cache
        self._shown = shown
        self._mark = ""

    def catch_up(self, connection: Connection, head: reads.Head) -> None:
        """Bring the cache to the state *head* or a later one.

        Raises:
            psycopg.Error: the database did not answer. The cache may hold a part of the later changes.
        """
        if self._cache.revision < 0:
            self._load(connection)
        elif (head.revision, head.mark) != (self._cache.revision, self._mark):
            self._read_changes(connection)

    def _read_changes(self, connection: Connection) -> None:
        known, last = (self._cache.revision, self._mark), None
        for batch in reads.changes_since(connection, known[0]):
            if not batch or (batch[0].revision, batch[0].mark) != known:
                self._reload(connection, has_lost=not batch or batch[0].revision == known[0])
                return
            new = batch[1:]
            if not all(change.digest for change in new):
                last = None
                break
            # The revision is raised after the last batch: a revision may have changes in several batches.
            self._cache.apply(new, self._cache.revision)
            time.sleep(PAUSE)
            last = new[-1] if new else last
        if last is None:  # too many tokens changed at once, or the change is not in the log
            self._load(connection)
        else:
            self._cache.apply((), last.revision)
            self._mark = last.mark

    def _reload(self, connection: Connection, *, has_lost: bool) -> None:
        """Read every token of a database whose log lacks the cached revision, and keep cached revocations.

        Args:
            connection: to that database.
            has_lost: the database has lost that revision; else its log was trimmed and begins later.
        """
        self._load(connection, pin_revocations=True)
        if has_lost:
            _logger.error(
                "%s has lost changes that were in force (a failover or a backup?): every token was read again. Tokens "
                "that this process knew as revoked stay so (%d); look through list and revoke what is missing again",
                self._shown,
                self._cache.pinned,
            )

    def _load(self, connection: Connection, *, pin_revocations: bool = False) -> None:
        tokens: dict[bytes, Token] = {}
        with connection.transaction():
            connection.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            head = reads.head(connection)
            for batch in reads.every_token(connection, limit=self._cache.limit + 1):
                tokens.update((digest, self._cache.interned(digest, token)) for digest, token in batch)
                time.sleep(PAUSE)
        self._cache.load(tokens, head.revision, pin_revocations=pin_revocations)
        self._mark = head.mark
