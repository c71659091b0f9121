"""Who is calling: the modes, the environment key and the store."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from datetime import UTC, datetime
from hmac import compare_digest
from typing import TYPE_CHECKING, Literal

import msgspec

from ..exceptions import ConfigurationError, StoreUnavailableError
from ..forks import Lock
from ..stores.base import UNRESOLVED, Unresolved
from ..tokens import Token
from .callers import NEVER, Caller, caller_of, environment_caller
from .modes import AuthMode, announce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..environment_key import EnvironmentKey
    from ..stores.base import TokenSource

CALLER_LIMIT = 262_144
"""Callers that are kept ready; a store of more used tokens than that makes some of them anew."""

_NOTHING = b""  # no digest: looks at the store without looking anything up

_logger = logging.getLogger("freegpt_auth")


Reason = Literal["missing", "malformed", "prefixed", "quoted", "unknown", "revoked", "expired", "unavailable"]


class Refusal(msgspec.Struct, frozen=True):  # which is made in a third of the time of a named tuple
    """Why a request is refused: for the log, never for the client.

    Attributes:
        reason: one word.
        token_id: the token that was presented, where it is known.
    """

    reason: Reason
    token_id: str | None = None


Decision = Caller | Refusal | Literal[Unresolved.UNRESOLVED]


_ONCE = datetime(2025, 1, 1, tzinfo=UTC)
_STRANGER = Token(id="", name="", prefix="", created_at=_ONCE, revoked_at=_ONCE)  # stands for a token that is unknown

_UNKNOWN = Refusal("unknown")
_UNAVAILABLE = Refusal("unavailable")
_WEIGHTS = {UNRESOLVED: 3, _UNAVAILABLE: 2, _UNKNOWN: 0}


class Authenticator:
    """Decides by the environment key and a store. The guards of a process that have both in common share it.

    Args:
        verifier: where tokens are looked up.
        key: the environment key, if one is set.
        required: refuse to be open.
        named: the operator named the store: never be open, whatever it holds.

    Raises:
        ConfigurationError: *required*, and nothing is configured.
    """

    def __init__(
        self, verifier: TokenSource, key: EnvironmentKey | None, *, required: bool = False, named: bool = False
    ) -> None:
        self._verifier = verifier
        self._now: Callable[[], float] = getattr(verifier, "now", time.time)
        self._key = key
        self._key_digest = key.digest if key else None
        self._environment = environment_caller(self._key_digest or _NOTHING, verifier)
        self._callers: dict[bytes, Caller] = {}
        self._caller_limit: float = getattr(verifier, "cache_limit", math.inf)
        self._key_refusal: Refusal | None = None
        self._lock = Lock()
        self.mode: AuthMode = AuthMode.OPEN if key is None else AuthMode.ENVIRONMENT
        survey = verifier.survey()
        if survey.configured or named:
            self.mode = AuthMode.TOKEN_FILE
        self._watch_key()
        self.restrict(required=required, named=named)
        announce(self.mode, survey, key)

    def restrict(self, *, required: bool, named: bool) -> None:
        """Apply the settings of one more guard, which close an open server for every guard. May block.

        Raises:
            ConfigurationError: *required*, and nothing is configured.
        """
        if named and self.mode is not AuthMode.TOKEN_FILE:
            self.mode = AuthMode.TOKEN_FILE
            announce(self.mode, self._verifier.survey(), self._key)
        if required and self.resolve_open():
            raise ConfigurationError(
                f"authentication is required, but no environment key is set and {self._verifier.survey().source} holds no "
                "tokens: set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME"
            )

    def recognise(self, digest: bytes) -> Caller | None:
        """Return who is calling, if that is known from an earlier request and still so: for nearly every request."""
        caller = self._callers.get(digest)
        if caller is None:
            return None
        try:
            # The caller stays the same for as long as the store answers the same object.
            if self._verifier.peek(digest) is caller.token and (
                caller.expires is NEVER or caller.expires > self._now()
            ):
                return caller
        except StoreUnavailableError:
            pass  # what that means is for peek to decide
        return None

    def peek(self, digests: Sequence[bytes]) -> Decision:
        """Decide from memory. Never blocks."""
        return self._decide(digests, self._verifier.peek)

    def resolve(self, digests: Sequence[bytes]) -> Caller | Refusal:
        """Decide from the store. May block."""
        decision = self._decide(digests, self._verifier.resolve)
        self._watch_key()
        return _UNAVAILABLE if decision is UNRESOLVED else decision

    def accepts(self, digest: bytes) -> bool:
        """Return whether memory alone shows that a secret is valid. Never blocks."""
        return isinstance(self.peek([digest]), Caller)

    def peek_open(self) -> bool | Literal[Unresolved.UNRESOLVED]:
        """Tell whether every request passes, from memory."""
        if self.mode is not AuthMode.OPEN:
            return False
        try:
            return UNRESOLVED if self._verifier.peek(_NOTHING) is UNRESOLVED else True
        except StoreUnavailableError:  # it went wrong since, so it is not for memory to say that all may pass
            return UNRESOLVED

    def resolve_open(self) -> bool:
        """Tell whether every request passes, from the store. A server that was closed once stays closed."""
        if self.mode is AuthMode.OPEN:
            try:
                survey = self._verifier.survey()
            except StoreUnavailableError:  # what cannot be known must not let a request through
                return False
            if survey.configured:
                with self._lock:  # several requests may find out at once, and only one is to say so
                    is_first, self.mode = self.mode is AuthMode.OPEN, AuthMode.TOKEN_FILE
                if is_first:
                    _logger.warning(
                        "authentication is now on: %d active token(s) from %s", survey.active, survey.source
                    )
        return self.mode is AuthMode.OPEN

    def _decide(
        self, digests: Sequence[bytes], look_up: Callable[[bytes], Token | Literal[Unresolved.UNRESOLVED] | None]
    ) -> Decision:
        decision: Refusal | Literal[Unresolved.UNRESOLVED] = _UNKNOWN
        for digest in digests:
            if not digest:
                continue
            # In constant time: a key that a person chose could be guessed offline from the start of its digest.
            is_key = self._key_digest is not None and compare_digest(digest, self._key_digest)
            try:
                # For the key too: it may be a token's secret, and a token that was revoked is refused as either.
                token = look_up(digest)
                verdict = self._judge_key(digest, token) if is_key else self._judge(digest, token)
            except StoreUnavailableError:
                verdict = self._judge_key(digest, None) if is_key else _UNAVAILABLE
            if isinstance(verdict, Caller):
                return verdict
            decision = verdict if decision is _UNKNOWN else _weightier(decision, verdict)
        return decision

    def _judge(self, digest: bytes, token: Token | Literal[Unresolved.UNRESOLVED] | None) -> Decision:
        if token is UNRESOLVED:
            return UNRESOLVED
        # Nobody must learn by a stop-watch which tokens once were good: all that follows is done for each refusal alike.
        known = _STRANGER if token is None else token
        revoked, ended = known.revoked_at is not None, (known.expires_at or _ONCE).timestamp() <= self._now()
        expired = ended and known.expires_at is not None
        if not (revoked or expired):
            return self._introduce(digest, known)
        self._callers.pop(digest, None)
        reason: Reason = "unknown" if known is _STRANGER else "revoked" if revoked else "expired"
        return Refusal(reason, known.id or None)

    def _judge_key(self, digest: bytes, token: Token | Literal[Unresolved.UNRESOLVED] | None) -> Decision:
        """Return the caller of the environment key, or refuse the key for good once *token* is its revoked token."""
        if token is UNRESOLVED:
            return UNRESOLVED
        with self._lock:  # no other thread may cache the caller after the refusal
            if token is not None and token.revoked_at is not None:
                self._key_refusal = Refusal("revoked", token.id)
            if self._key_refusal is not None:
                self._callers.pop(digest, None)
                return self._key_refusal
            self._callers[digest] = self._environment
            return self._environment

    def _watch_key(self) -> None:
        """Notice a revocation of the environment key in the state just read, also while no request presents the key."""
        if self._key_digest is None or self._key_refusal is not None:
            return
        with contextlib.suppress(StoreUnavailableError):
            self._judge_key(self._key_digest, self._verifier.peek(self._key_digest))

    def _introduce(self, digest: bytes, token: Token) -> Caller:
        """Return what the application is told of a token, made once for as long as the store answers this object."""
        caller = self._callers.get(digest)
        if caller is None or caller.token is not token:
            caller = caller_of(token, digest, self._verifier)
            # Each holds its token: of more than the store keeps in memory, memory would not be bounded by the store.
            if len(self._callers) >= min(CALLER_LIMIT, self._caller_limit):
                self._callers.clear()
            self._callers[digest] = caller
        return caller


def _weightier(
    decision: Refusal | Literal[Unresolved.UNRESOLVED], other: Refusal | Literal[Unresolved.UNRESOLVED]
) -> Refusal | Literal[Unresolved.UNRESOLVED]:
    """Return what decides about a request that presents several secrets: that one of them cannot be known comes first."""
    return max(decision, other, key=lambda one: _WEIGHTS.get(one, 1))
