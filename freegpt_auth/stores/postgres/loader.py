"""Reads the changes since the revision that memory is at, in steps; or every token, where the log does not reach so far."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ..steps import PAUSE
from . import reads
from .cache import Change

if TYPE_CHECKING:
    from ...tokens import Token
    from .cache import TokenCache
    from .pool import Link

_logger = logging.getLogger("freegpt_auth")


class Loader:
    """Brings the memory of one process to a later state of the database. One thread at a time may use it.

    Args:
        cache: the memory.
        shown: the database, for the log.
    """

    def __init__(self, cache: TokenCache, shown: str) -> None:
        self._cache = cache
        self._shown = shown
        self._mark = ""

    def catch_up(self, link: Link, head: reads.Head) -> None:
        """Bring memory to the state *head*, or a later one.

        Raises:
            psycopg.Error: the database did not answer; memory may hold a part of the later changes.
        """
        if self._cache.revision < 0:
            self._load(link)
        elif (head.revision, head.mark) != (self._cache.revision, self._mark):
            self._read_changes(link)

    def _read_changes(self, link: Link) -> None:
        known, last = (self._cache.revision, self._mark), None
        for noted in reads.changes_since(link, known[0]):
            if not noted or (noted[0].revision, noted[0].mark) != known:
                self._load_what_is_left(link, is_lost=not noted or noted[0].revision == known[0])
                return
            new = noted[1:]
            if any(one.digest is None for one in new):
                last = None
                break
            self._apply(new)
            last = new[-1] if new else last
        if last is None:  # more was changed at once than the log holds, or it does not hold the change
            self._load(link)
        else:
            self._cache.apply((), last.revision)
            self._mark = last.mark

    def _apply(self, new: list[reads.Noted]) -> None:
        """Apply changes without raising the revision: until all are applied, others of it may be missing."""
        changes = (Change(one.revision, one.digest or b"", one.token) for one in new)
        self._cache.apply(changes, self._cache.revision)
        time.sleep(PAUSE)

    def _load_what_is_left(self, link: Link, *, is_lost: bool) -> None:
        """Read every token of a database that does not hold the known revision any more, or whose log begins later."""
        self._load(link, was_known=False)
        if is_lost:
            _logger.error(
                "%s has lost changes that were in force (a failover or a backup?): every token was read again. Tokens "
                "that this process knew as revoked stay so (%d); look through list and revoke what is missing again",
                self._shown,
                self._cache.lasting,
            )

    def _load(self, link: Link, *, was_known: bool = True) -> None:
        tokens: dict[bytes, Token] = {}
        with link.transaction():
            link.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            head = reads.head(link)
            for batch in reads.every_token(link, limit=self._cache.limit + 1):
                tokens.update((digest, self._cache.same(digest, token)) for digest, token in batch)
                time.sleep(PAUSE)
        self._cache.load(tokens, head.revision, was_known=was_known)
        self._mark = head.mark
