"""Tokens in ``api_tokens.json``, in force in every process as soon as they are written.

No task polls and no thread watches. An answer may rest on what is in memory only if the file was looked at less than
10 ms ago, so the look is taken by the requests themselves: a ``stat`` at most every 10 ms, about 2 µs. Writers return
after twice that time: when ``revoke`` has returned, no process of this host accepts the token. Requests never take the
lock and never write.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from ... import clock as clocks
from ...exceptions import FileError, StoreUnavailableError
from ...forks import Watched
from ...tokens import find
from ..base import LEASE, UNRESOLVED, Merged, Survey, TokenStore, Unresolved
from ..steps import release
from . import disk, editing, snapshot, table, ticks, workers
from .access import exposure
from .document import tokens_in
from .reserve import Reserve
from .snapshot import NEVER, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from ...tokens import Token
    from .document import Document

FRESHNESS = 0.010
"""Seconds for which a look at the file may be relied on. A look takes 2 µs, so they cost 0.02 % of a processor."""

RETRY_INTERVAL = 1.0
"""Seconds after which a file that could not be read is tried again even though it looks the same."""

LOCK_TIMEOUT = 10.0
"""Seconds that a writer waits for another."""

_logger = logging.getLogger("freegpt_auth")
_T = TypeVar("_T")


class FileTokenStore(TokenStore, Watched):
    """A :class:`~freegpt_auth.stores.base.TokenStore` in a token file. Nothing is read before it is asked.

    Args:
        path: the token file. It need not exist: the first token makes it.
        lease: seconds for which known tokens are accepted after the file changed or was lost from sight, and cannot be
            opened or read. They count from the last look that found it unchanged.
        clock: returns seconds that count the time a host sleeps.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, lease: float = LEASE, clock: Callable[[], float] = clocks.elapsed
    ) -> None:
        self.path: str = os.path.abspath(path)  # a server may change its directory later
        self.source: str = self.path
        self._lease = lease
        self._clock = clock
        self._snapshot = Snapshot(table.EMPTY, signature=None)
        self._fresh_until = float("-inf")
        self._confirmed_at = clock()
        self._configured = False
        self._loading = threading.Lock()
        self._reserve = Reserve()
        self._told: str | None = None
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Read the file anew at the first request: a sibling process may have been closed since the parent read it."""
        self._loading = threading.Lock()
        self._snapshot = replace(self._snapshot, signature=None)
        self._fresh_until = float("-inf")

    def state(self) -> object | None:
        """Return an object of the last reading if the file has not changed since."""
        if self._clock() >= self._fresh_until and not self._is_unchanged():
            return None
        return self._snapshot.state

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from the snapshot, if the file is as it was; see :class:`~freegpt_auth.stores.base.TokenSource`."""
        if self._clock() >= self._fresh_until and not self._is_unchanged():
            return UNRESOLVED
        if not digest:  # a thread may have read the first token, and the server not yet have been told
            return UNRESOLVED if self._configured else None
        snapshot = self._snapshot
        token = snapshot.tokens.shards[digest[0]].get(digest)  # find() would cost 50 ns more
        return self._answer(digest) if token is None and snapshot.problem is not None else token

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from the file, read again if it changed; several threads wait for one reading."""
        self._refresh()
        return self._answer(digest)

    def survey(self) -> Survey:
        """Read the file if it changed, and tell what it holds."""
        self._refresh()
        return Survey(self._configured, self._snapshot.tokens.count_active(), self.path)

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first. A missing file holds none."""
        return editing.read(self.path, tokens_in)

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that *reference* may mean; see :func:`freegpt_auth.tokens.find`."""
        return find(reference, self.tokens())

    def add(self, digest: bytes, token: Token) -> None:
        """Keep a new token, in a new file if there was none."""
        self._change(lambda document: document.append(digest, token))

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on, in every process of this host."""
        return self.revoke_all([token_id], at)[0]

    def delete(self, token_id: str) -> Token:
        """Remove the token, in every process of this host. The file stays, and keeps authentication on."""
        return self.delete_all([token_id])[0]

    def revoke_all(self, token_ids: Sequence[str], at: datetime) -> list[Token]:
        """Revoke tokens in one rewrite of the file; see :class:`~freegpt_auth.stores.base.AtOnce`."""
        return self._change(lambda document: [document.revoke(token_id, at) for token_id in token_ids])

    def delete_all(self, token_ids: Sequence[str]) -> list[Token]:
        """Remove tokens in one rewrite of the file; see :class:`~freegpt_auth.stores.base.AtOnce`."""
        return self._change(lambda document: [document.remove(token_id) for token_id in token_ids])

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add the tokens that are not there, and revoke those that are revoked in *tokens*."""
        return self._change(lambda document: document.merge(tokens))

    # --- reading: what servers do

    def _answer(self, digest: bytes) -> Token | None:
        snapshot = self._snapshot  # once: another thread may replace it
        token = snapshot.tokens.find(digest)
        if token is None and snapshot.problem is not None:
            raise StoreUnavailableError(snapshot.problem)
        return token

    def _is_unchanged(self) -> bool:
        now = self._clock()
        snapshot = self._snapshot
        if now >= snapshot.retry_at or disk.signature_at(self.path) != snapshot.signature:
            return False
        self._rely_on(snapshot, now)
        return True

    def _refresh(self) -> None:
        with self._loading:
            if self._is_unchanged():
                return
            self._reserve.fill()
            now = self._clock()  # before the file is looked at, so that its age is never taken for less
            snapshot, old = self._load(now), self._snapshot.tokens.all_parts()
            self._snapshot = snapshot
            self._rely_on(snapshot, now)
        release(old)

    def _rely_on(self, snapshot: Snapshot, now: float) -> None:
        self._fresh_until = now + FRESHNESS
        if snapshot.lease_ends == NEVER:
            self._confirmed_at = now

    def _load(self, now: float) -> Snapshot:
        signature = disk.signature_at(self.path)
        try:
            found = snapshot.read(self.path, self._reserve, self._snapshot, signature)
        except FileNotFoundError as error:
            return self._gone(error, signature, now)
        except (FileError, ValueError) as error:
            return self._failed(error, signature, now)
        if found.contents is None:
            return self._snapshot if now < self._snapshot.retry_at else replace(self._snapshot, retry_at=NEVER)
        if not found.contents.blank or self._was_closed():
            self._close()
        self._tell_loaded(found.status, found.contents)
        signature = disk.signature_of(found.status)
        # From the end of the reading: a change within the same tick may have come at any moment of it.
        compare_at = self._clock() + ticks.length(found.status.st_ctime_ns)
        return Snapshot(found.contents.tokens, signature, retry_at=compare_at, fingerprint=found.fingerprint)

    def _gone(self, error: FileNotFoundError, signature: disk.Signature, now: float) -> Snapshot:
        if self._configured:
            workers.remember(self.path)  # again each second: the note may be gone too
        elif signature != disk.MISSING or self._was_closed():
            self._close()
        if not self._configured:
            return Snapshot(table.EMPTY, signature)
        what_to_do = "its tokens are refused until it is back. To open this server, restart it without the file"
        self._tell(logging.ERROR, f"{self.path} {error.strerror}: {what_to_do}")
        return Snapshot(table.EMPTY, signature, retry_at=now + RETRY_INTERVAL)

    def _failed(self, error: Exception, signature: disk.Signature, now: float) -> Snapshot:
        self._close()
        lease = self._lease, self._confirmed_at + self._lease
        found, effect = snapshot.failed(self._snapshot, signature, error, now=now, lease=lease, retry=RETRY_INTERVAL)
        self._tell(logging.ERROR, f"{self.path} cannot be used: {found.problem}{effect}")
        return found

    def _was_closed(self) -> bool:
        return not self._configured and workers.remembered(self.path)

    def _close(self) -> None:
        """Ask for authentication from now on, here and in every worker that this server starts."""
        if not self._configured:
            self._configured = True
            workers.remember(self.path)

    def _tell_loaded(self, status: os.stat_result, contents: table.Contents) -> None:
        if self._snapshot.signature is not None and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s was read again: %d active token(s)", self.path, contents.tokens.count_active())
        if contents.ancestral:
            self._tell(logging.WARNING, f"{self.path} holds plain tokens; the next create, revoke or delete mends it")
        elif warning := exposure(self.path, status):
            self._tell(logging.WARNING, warning)
        else:
            self._told = None

    def _tell(self, level: int, message: str) -> None:
        """Log once for each cause, not once for each reading."""
        if message != self._told:
            self._told = message
            _logger.log(level, "%s", message)

    # --- writing: what commands do

    def _change(self, edit: Callable[[Document], _T]) -> _T:
        result = editing.change(self.path, edit, LOCK_TIMEOUT)
        # Who looked just before relies on that for FRESHNESS; and who made the change that was found may still be waiting.
        time.sleep(2 * FRESHNESS)
        return result
