"""Tokens in ``api_tokens.json``, in force in every process as soon as they are written.

No task polls and no thread watches. An answer may rest on what is in memory only if the file was looked at less than
20 ms ago, so the look is taken by the requests themselves: a ``stat`` at most every 20 ms, about 2 µs. Writers return
after twice that time: when ``revoke`` has returned, no process of this host accepts the token.

Requests never take the lock and never write.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
import weakref
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec

from ..exceptions import StoreError, StoreUnavailableError, TokenFileError
from . import disk, siblings, tokenfile
from .base import UNRESOLVED, Survey, Unresolved
from .lock import locked
from .memory import count_active

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from ..tokens import Token

FRESHNESS = 0.020
"""Seconds for which a look at the file may be relied on."""

RETRY_INTERVAL = 1.0
"""Seconds after which a file that could not be read is tried again even though it looks the same."""

LOCK_TIMEOUT = 10.0
"""Seconds that a writer waits for another."""

_OTHERS_MAY = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP

_logger = logging.getLogger("freegpt_auth")
_T = TypeVar("_T")


class _Snapshot(NamedTuple):
    """What memory holds of one state of the file; replaced whole, never changed."""

    tokens: dict[bytes, Token]
    signature: disk.Signature | None  # None: not read yet
    problem: str | None = None  # why the file could not be read; the tokens are then those read last
    retry_at: float = float("inf")  # by the monotonic clock


class FileTokenStore:
    """A :class:`~freegpt_auth.stores.base.TokenStore` in a token file. Nothing is read before it is asked.

    Args:
        path: the token file. It need not exist: the first token makes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.path.abspath(path)  # a server may change its directory later
        self._snapshot = _Snapshot({}, signature=None)
        self._looked_at = float("-inf")
        self._configured = False
        self._loading = threading.Lock()
        self._told: str | None = None
        _stores.add(self)

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Answer from the snapshot, if the file is as it was; see :class:`~freegpt_auth.stores.base.Verifier`."""
        if time.monotonic() - self._looked_at >= FRESHNESS and not self._is_unchanged():
            return UNRESOLVED
        token = self._snapshot.tokens.get(digest)
        return self._answer(digest) if token is None else token

    def resolve(self, digest: bytes) -> Token | None:
        """Answer from the file, read again if it changed; several threads wait for one reading."""
        self._refresh()
        return self._answer(digest)

    def survey(self) -> Survey:
        """Read the file if it changed, and tell what it holds."""
        self._refresh()
        return Survey(self._configured, count_active(self._snapshot.tokens), self.path)

    def tokens(self) -> Mapping[bytes, Token]:
        """Return every token by its digest, oldest first. A missing file holds none."""
        return self._read().tokens

    def add(self, digest: bytes, token: Token) -> None:
        """Keep a new token, in a new file if there was none."""

        def append(document: tokenfile.Document) -> None:
            if digest in document.tokens or any(token.id == other.id for other in document.tokens.values()):
                raise StoreError(f"a token with the id {token.id} or with the same secret is there already")
            document.append(digest, token)

        self._change(append)

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Refuse the token from now on, in every process of this host."""

        def enter(document: tokenfile.Document) -> Token:
            token = document.find(token_id)
            if token.revoked_at is None:
                document.revoke(token_id, at)
                token = msgspec.structs.replace(token, revoked_at=at)
            return token

        return self._change(enter)

    def delete(self, token_id: str) -> Token:
        """Remove the token, in every process of this host. The file stays, and keeps authentication on."""

        def remove(document: tokenfile.Document) -> Token:
            token = document.find(token_id)
            document.remove(token_id)
            return token

        return self._change(remove)

    # --- reading: what servers do

    def _answer(self, digest: bytes) -> Token | None:
        snapshot = self._snapshot  # once: another thread may replace it
        token = snapshot.tokens.get(digest)
        if token is None and snapshot.problem is not None:
            raise StoreUnavailableError(snapshot.problem)
        return token

    def _is_unchanged(self) -> bool:
        now = time.monotonic()
        snapshot = self._snapshot
        if now >= snapshot.retry_at or disk.signature_at(self.path) != snapshot.signature:
            return False
        self._looked_at = now
        return True

    def _refresh(self) -> None:
        with self._loading:
            if not self._is_unchanged():
                now = time.monotonic()  # before the file is looked at, so that its age is never taken for less
                self._snapshot = self._load(now)
                self._looked_at = now

    def _load(self, now: float) -> _Snapshot:
        signature = disk.signature_at(self.path)
        try:
            status, content = disk.read_file(self.path)
            signature = disk.signature_of(status)
            contents = tokenfile.read(content)
        except FileNotFoundError as error:
            return self._gone(error, signature)
        except (TokenFileError, ValueError) as error:
            return self._failed(error, signature, now)
        if not contents.blank:
            self._close()
        self._tell_loaded(status, contents)
        return _Snapshot(contents.tokens, signature)

    def _gone(self, error: FileNotFoundError, signature: disk.Signature) -> _Snapshot:
        if signature != disk.MISSING or siblings.remembered(self.path):
            self._close()
        if self._configured:
            what_to_do = "its tokens are refused until it is back. To open this server, restart it without the file"
            self._tell(logging.ERROR, f"{self.path} {error.strerror}: {what_to_do}")
        return _Snapshot({}, signature)

    def _failed(self, error: Exception, signature: disk.Signature, now: float) -> _Snapshot:
        self._close()
        problem = error.problem if isinstance(error, TokenFileError) else str(error)
        kept = f"Tokens read before ({len(self._snapshot.tokens)}) stay in force, all others are refused"
        self._tell(logging.ERROR, f"{self.path} cannot be used: {problem}. {kept}")
        return _Snapshot(self._snapshot.tokens, signature, problem, now + RETRY_INTERVAL)

    def _close(self) -> None:
        """Ask for authentication from now on, here and in every worker that this server starts."""
        if not self._configured:
            self._configured = True
            siblings.remember(self.path)

    def _tell_loaded(self, status: os.stat_result, contents: tokenfile.Contents) -> None:
        if self._snapshot.signature is not None and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s was read again: %d active token(s)", self.path, count_active(contents.tokens))
        if contents.ancestral:
            self._tell(logging.WARNING, f"{self.path} holds plain tokens; the next create, revoke or delete mends it")
        elif status.st_mode & _OTHERS_MAY:
            self._tell(logging.WARNING, f"{self.path} can be read or written by others; chmod 600 it")
        else:
            self._told = None

    def _tell(self, level: int, message: str) -> None:
        """Log once for each cause, not once for each reading."""
        if message != self._told:
            self._told = message
            _logger.log(level, "%s", message)

    # --- writing: what commands do

    def _read(self) -> tokenfile.Document:
        try:
            _, content = disk.read_file(self.path)
        except FileNotFoundError as error:
            if disk.signature_at(self.path) != disk.MISSING:  # never start afresh over a file that was not read
                raise TokenFileError(self.path, f"it {error.strerror}") from None
            return tokenfile.Document(None)
        try:
            return tokenfile.Document(content)
        except ValueError as error:
            raise TokenFileError(self.path, f"{error}; restore a copy, or move it away and create new tokens") from None

    def _change(self, change: Callable[[tokenfile.Document], _T]) -> _T:
        # A symbolic link stays one: what it points to is replaced.
        target = os.path.realpath(self.path)
        with locked(target, LOCK_TIMEOUT):
            document = self._read()
            result = change(document)
            try:
                content = document.encode()
                tokenfile.read(content)  # what could not be read again must not be written
            except (ValueError, RecursionError) as error:
                raise StoreError(
                    f"{self.path}: nothing was changed, since the change cannot be kept: {error}"
                ) from None
            disk.replace_file(target, content)
        # A process that looked at the file just before may rely on that for FRESHNESS.
        time.sleep(2 * FRESHNESS)
        return result


_stores: weakref.WeakSet[FileTokenStore] = weakref.WeakSet()


def _renew_locks() -> None:
    for store in _stores:
        store._loading = threading.Lock()  # noqa: SLF001


# A lock that another thread held at the moment of a fork would be held in the child for ever.
os.register_at_fork(after_in_child=_renew_locks)
