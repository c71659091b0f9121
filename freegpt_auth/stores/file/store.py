"""Tokens in ``api_tokens.json``. Once a command returns, its change is in force in every process of the host.

No task polls and no thread watches the file: requests check it themselves, by one ``stat`` (2 µs) at most every 10 ms.
Commands return after twice that time: then no process of this host accepts a revoked token. Requests never take the
lock.
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
from . import disk, editing, snapshot, table, timestamps, worker_notes
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
"""Default time between two checks of the file, in seconds. A check takes 2 µs: 0.02 % of a processor."""
RETRY_INTERVAL = 1.0
"""Default time until a file that could not be read is read again although its signature is the same, in seconds."""
LOCK_TIMEOUT = 10.0
"""Default limit of a writer's wait for another writer, in seconds."""

_logger = logging.getLogger("freegpt_auth")
_T = TypeVar("_T")


class FileTokenStore(TokenStore, Watched):
    """A :class:`~freegpt_auth.stores.base.TokenStore` in a token file. The constructor reads nothing.

    Args:
        path: of the token file, which need not exist: the first token makes it.
        lease: seconds for which known tokens are accepted while the file may have changed but cannot be opened or read.
            They count from the last check that found it unchanged.
        freshness: seconds between two checks of the file; by default :data:`FRESHNESS`.
        retry_interval: seconds until a file that could not be read is read again.
        lock_timeout: seconds that a writer waits for another.
        clock: returns seconds, including the time a host sleeps.
        sleep: waits for a number of seconds of the same clock.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease: float = LEASE,
        freshness: float | None = None,
        retry_interval: float = RETRY_INTERVAL,
        lock_timeout: float = LOCK_TIMEOUT,
        clock: Callable[[], float] = clocks.elapsed,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.path: str = os.path.abspath(path)  # a server may change its directory later
        self.source: str = self.path
        self._lease = lease
        self._freshness = FRESHNESS if freshness is None else freshness
        self._retry_interval = retry_interval
        self._lock_timeout = lock_timeout
        self._clock = clock
        self._sleep = sleep
        self._snapshot = Snapshot(table.EMPTY, signature=None)
        self._fresh_until = float("-inf")
        self._confirmed_at = clock()
        self._configured = False
        self._loading = threading.Lock()
        self._reserve = Reserve()
        self._last_logged: str | None = None
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        """Read the file again at the first request: another worker may have required authentication since."""
        self._loading = threading.Lock()
        self._snapshot = replace(self._snapshot, signature=None)
        self._fresh_until = float("-inf")

    def state(self) -> object | None:
        """Return an object of the last reading if the file has not changed since."""
        if self._clock() >= self._fresh_until and not self._is_unchanged():
            return None
        return self._snapshot.state

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from the snapshot if the file is unchanged."""
        if self._clock() >= self._fresh_until and not self._is_unchanged():
            return UNRESOLVED
        if not digest:  # a request in open mode: unresolved, if another thread has read the first token since
            return UNRESOLVED if self._configured else None
        snapshot = self._snapshot
        token = snapshot.tokens.shards[digest[0]].get(digest)  # Table.find takes 50 ns more
        return self._find(digest) if token is None and snapshot.problem is not None else token

    def resolve(self, digest: bytes) -> Token | None:
        """Read the file again if it changed, and answer from it; several threads share one reading."""
        self._refresh()
        return self._find(digest)

    def survey(self) -> Survey:
        """Read the file again if it changed, and return its survey."""
        self._refresh()
        return Survey(self._configured, self._snapshot.tokens.count_active(), self.path)

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first; none if the file is missing."""
        return editing.read(self.path, tokens_in)

    def find(self, reference: str) -> list[Token]:
        """Return the tokens that match *reference*; see :func:`freegpt_auth.tokens.find`."""
        return find(reference, self.tokens())

    def add(self, digest: bytes, token: Token) -> None:
        """Add a new token, in a new file if there is none."""
        self._change(lambda document: document.append(digest, token))

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Revoke the token in every process of this host, and return its record."""
        return self.revoke_all([token_id], at)[0]

    def delete(self, token_id: str) -> Token:
        """Remove the token in every process of this host. The file stays, and keeps authentication on."""
        return self.delete_all([token_id])[0]

    def revoke_all(self, token_ids: Sequence[str], at: datetime) -> list[Token]:
        """Revoke tokens in one rewrite of the file; see :class:`~freegpt_auth.stores.base.AtOnce`."""
        return self._change(lambda document: [document.revoke(token_id, at) for token_id in token_ids])

    def delete_all(self, token_ids: Sequence[str]) -> list[Token]:
        """Remove tokens in one rewrite of the file; see :class:`~freegpt_auth.stores.base.AtOnce`."""
        return self._change(lambda document: [document.remove(token_id) for token_id in token_ids])

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add missing tokens and apply revocations, in one rewrite of the file."""
        return self._change(lambda document: document.merge(tokens))

    def _find(self, digest: bytes) -> Token | None:
        snapshot = self._snapshot  # read once: another thread may replace it
        token = snapshot.tokens.find(digest)
        if token is None and snapshot.problem is not None:
            raise StoreUnavailableError(snapshot.problem)
        return token

    def _is_unchanged(self) -> bool:
        now = self._clock()
        snapshot = self._snapshot
        if now >= snapshot.retry_at or disk.signature_at(self.path) != snapshot.signature:
            return False
        self._mark_fresh(snapshot, now)
        return True

    def _refresh(self) -> None:
        with self._loading:
            if self._is_unchanged():
                return
            self._reserve.fill()
            now = self._clock()  # before the check of the file: its age must not be underestimated
            snapshot, old = self._load(now), self._snapshot.tokens.all_parts()
            self._snapshot = snapshot
            self._mark_fresh(snapshot, now)
        release(old)

    def _mark_fresh(self, snapshot: Snapshot, now: float) -> None:
        self._fresh_until = now + self._freshness
        if snapshot.lease_ends == NEVER:
            self._confirmed_at = now

    def _load(self, now: float) -> Snapshot:
        signature = disk.signature_at(self.path)
        try:
            found = snapshot.read(self.path, self._reserve, self._snapshot, signature)
        except FileNotFoundError as error:
            return self._missing(error, signature, now)
        except (FileError, ValueError) as error:
            return self._failed(error, signature, now)
        if found.contents is None:
            return self._snapshot if now < self._snapshot.retry_at else replace(self._snapshot, retry_at=NEVER)
        if not found.contents.blank or self._has_note():
            self._require_authentication()
        self._log_loaded(found.status, found.contents)
        # Counted from the end of the reading: a change within the same tick may have happened at any moment of it.
        compare_at = self._clock() + timestamps.tick_length(found.status.st_ctime_ns)
        signature = disk.signature_of(found.status)
        return Snapshot(found.contents.tokens, signature, retry_at=compare_at, fingerprint=found.fingerprint)

    def _missing(self, error: FileNotFoundError, signature: disk.Signature, now: float) -> Snapshot:
        if self._configured:
            worker_notes.leave(self.path)  # again at each retry: the note may have been deleted
        elif signature != disk.MISSING or self._has_note():
            self._require_authentication()
        if not self._configured:
            return Snapshot(table.EMPTY, signature)
        advice = "its tokens are refused until it is back. To open this server, restart it without the file"
        self._log(logging.ERROR, f"{self.path} {error.strerror}: {advice}")
        return Snapshot(table.EMPTY, signature, retry_at=now + self._retry_interval)

    def _failed(self, error: Exception, signature: disk.Signature, now: float) -> Snapshot:
        self._require_authentication()
        lease, retry = (self._lease, self._confirmed_at + self._lease), self._retry_interval
        found, effect = snapshot.after_failure(self._snapshot, signature, error, now=now, lease=lease, retry=retry)
        self._log(logging.ERROR, f"{self.path} cannot be used: {found.problem}{effect}")
        return found

    def _has_note(self) -> bool:
        """Return whether another worker of this server required authentication, if this one does not yet."""
        return not self._configured and worker_notes.found(self.path)

    def _require_authentication(self) -> None:
        """Require authentication from now on, here and in every worker that this server starts later."""
        if not self._configured:
            self._configured = True
            worker_notes.leave(self.path)

    def _log_loaded(self, status: os.stat_result, contents: table.Contents) -> None:
        if self._snapshot.signature is not None and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s was read again: %d active token(s)", self.path, contents.tokens.count_active())
        if contents.ancestral:
            self._log(logging.WARNING, f"{self.path} holds plain tokens; the next create, revoke or delete mends it")
        elif warning := exposure(self.path, status):
            self._log(logging.WARNING, warning)
        else:
            self._last_logged = None

    def _log(self, level: int, message: str) -> None:
        if message != self._last_logged:  # once per cause, not once per reading
            self._last_logged = message
            _logger.log(level, "%s", message)

    def _change(self, edit: Callable[[Document], _T]) -> _T:
        result = editing.change(self.path, edit, self._lock_timeout)
        # Even if another command made the change a moment ago: a server may still rely on a check from before it.
        self._sleep(2 * self._freshness)
        return result
