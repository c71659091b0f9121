"""Reads the changes since the revision that memory is at, in steps; or every token, where the log does not reach so far."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from typing import TYPE_CHECKING

from ..table import PAUSE
from . import tables
from .cache import Change

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...tokens import Token
    from .cache import TokenCache
    from .links import Link

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

    def catch_up(self, link: Link, head: tables.Head) -> None:
        """Bring memory to the state *head*, or a later one.

        Raises:
            psycopg.Error: the database did not answer; memory may hold a part of the later changes.
        """
        if self._cache.revision < 0:
            self._load(link)
        elif (head.revision, head.mark) != (self._cache.revision, self._mark):
            self._read_changes(link)

    def _read_changes(self, link: Link) -> None:
        known = (self._cache.revision, self._mark)
        with contextlib.closing(tables.changes_since(link, known[0])) as batches:
            first = next(batches)
            found = [(noted.revision, noted.mark) for noted in first[:1]]
            if found == [known] and self._applied(itertools.chain([first[1:]], batches)):
                return
        # The log does not hold the known revision: it was lost, or the log begins later. Or so much was changed at once.
        self._load(link, was_known=found == [known])
        if not found or (found[0] != known and found[0][0] == known[0]):
            _logger.error(
                "%s has lost changes that were in force (a failover or a backup?): every token was read again. Tokens "
                "that this process knew as revoked stay so (%d); look through list and revoke what is missing again",
                self._shown,
                self._cache.lasting,
            )

    def _applied(self, batches: Iterable[list[tables.Noted]]) -> bool:
        """Apply changes in steps and return True; False if memory must be read afresh."""
        last = None
        for noted in batches:
            if any(one.digest is None for one in noted):
                return False
            # The revision is raised when all are applied: until then other changes of it may be missing.
            self._cache.apply(
                (Change(one.revision, one.digest or b"", one.token) for one in noted), self._cache.revision
            )
            last = noted[-1] if noted else last
            time.sleep(PAUSE)
        if last is None:
            return False
        self._cache.apply((), last.revision)
        self._mark = last.mark
        return True

    def _load(self, link: Link, *, was_known: bool = True) -> None:
        tokens: dict[bytes, Token] = {}
        with link.transaction():
            link.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            head = tables.head(link)
            for batch in tables.every_token(link, limit=self._cache.limit + 1):
                tokens.update((digest, self._cache.same(digest, token)) for digest, token in batch)
                time.sleep(PAUSE)
        self._cache.load(tokens, head.revision, was_known=was_known)
        self._mark = head.mark
