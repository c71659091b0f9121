"""The decision about the credentials of a request: by the mode, the environment key and the token source."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Literal

from ..exceptions import ConfigurationError, StoreUnavailableError
from ..forks import Lock
from ..stores.base import UNRESOLVED, Unresolved
from ..tokens import Token
from .callers import ANONYMOUS, NEVER, Caller, caller_of, environment_caller
from .credentials import NOT_PLAIN, plain
from .modes import AuthMode, announce
from .refusal import UNAVAILABLE, UNKNOWN, Decision, Refusal, worse

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..environment_key import EnvironmentKey
    from ..stores.base import CompleteSource
    from .credentials import Presented

    _LookUp = Callable[[bytes], Token | Literal[Unresolved.UNRESOLVED] | None]

CALLER_LIMIT = 262_144
"""Largest number of cached callers. The next evicts all: each is made again at its next request."""

_OPEN = AuthMode.OPEN  # a member of an enumeration is read 80 ns slower from its class
_NO_DIGEST = b""  # asks a source for news without a look-up
_LONG_AGO = datetime(2025, 1, 1, tzinfo=UTC)
_UNKNOWN_TOKEN = Token(id="", name="", prefix="", created_at=_LONG_AGO, revoked_at=_LONG_AGO)
_MISSING, _MALFORMED = Refusal("missing"), Refusal("malformed")

_logger = logging.getLogger("freegpt_auth")


class Authenticator:
    """Decides about credentials. The guards of a process over one source, with one key, share it.

    Args:
        source: the token source.
        key: the environment key, if one is set.
        required: refuse to be open.
        named: the operator named the store: never be open.
        caller_limit: number of callers kept ready.

    Attributes:
        mode: the mode; an open server may change it once, to a closed one.

    Raises:
        ConfigurationError: *required*, and nothing is configured.
    """

    def __init__(
        self,
        source: CompleteSource,
        key: EnvironmentKey | None,
        *,
        required: bool = False,
        named: bool = False,
        caller_limit: int = CALLER_LIMIT,
    ) -> None:
        self._source = source
        self._state, self._now = source.state, source.now
        self._key = key
        self._key_digest = key.digest if key else None
        self._key_refusal: Refusal | None = None
        self._environment = environment_caller(self._key_digest or _NO_DIGEST, source)
        self._callers: dict[bytes, Caller] = {}
        self._caller_limit = min(caller_limit, source.cache_limit)  # each caller keeps its token in memory
        self._lock = Lock()
        self.mode: AuthMode = AuthMode.OPEN if key is None else AuthMode.ENVIRONMENT
        survey = source.survey()
        if survey.configured or named:
            self.mode = AuthMode(survey.kind)
        self._watch_key()
        self.restrict(required=required, named=named)
        announce(self.mode, survey, key)

    def restrict(self, *, required: bool, named: bool) -> None:
        """Apply the settings of one more guard: *named* ends open mode for every guard. May block.

        Raises:
            ConfigurationError: *required*, and nothing is configured.
        """
        if named and self.mode in (AuthMode.OPEN, AuthMode.ENVIRONMENT):
            survey = self._source.survey()
            self.mode = AuthMode(survey.kind)
            announce(self.mode, survey, self._key)
        if required and self._resolve_open():
            raise ConfigurationError(
                f"authentication is required, but no environment key is set and {self._source.survey().source} holds "
                "no tokens: set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME"
            )

    def recognise(self, scope: Any) -> tuple[Caller | None, bytes, int]:
        """Return the caller of a secret that was accepted before, its digest and its place among the headers.

        This is the whole decision about nearly every request. ``None`` leaves it to ``peek``. An open server reads
        nothing.
        """
        digest, place = NOT_PLAIN if self.mode is _OPEN else plain(scope)
        caller = self._callers.get(digest)
        if caller is None:
            return None, digest, place
        try:
            state = self._state()  # before peek: a change in between costs one more peek, and accepts nothing
            if caller.state is not state:
                if self._source.peek(digest) is not caller.token:
                    return None, digest, place
                if state is not None:
                    caller.state = state
            # Token.status by the precomputed expiry: a revoked token is another object.
            if caller.expires is NEVER or caller.expires > self._now():
                return caller, digest, place
        except StoreUnavailableError:
            pass  # peek decides about it
        return None, digest, place

    def peek(self, presented: Presented) -> Decision:
        """Decide from memory. Never blocks."""
        return self._peek_open() if self.mode is _OPEN else self._decide(presented, self._source.peek)

    def resolve(self, presented: Presented) -> Caller | Refusal:
        """Decide from the store. May block."""
        if self._resolve_open():
            return ANONYMOUS
        decision = self._decide(presented, self._source.resolve)
        self._watch_key()
        return UNAVAILABLE if decision is UNRESOLVED else decision

    def _peek_open(self) -> Caller | Literal[Unresolved.UNRESOLVED]:
        try:
            return UNRESOLVED if self._source.peek(_NO_DIGEST) is UNRESOLVED else ANONYMOUS
        except StoreUnavailableError:  # a fault since the last survey: only a survey may let a request through
            return UNRESOLVED

    def _resolve_open(self) -> bool:
        """Return whether every request passes, by the store. A server that was closed once stays closed."""
        if self.mode is not AuthMode.OPEN:
            return False
        try:
            survey = self._source.survey()
        except StoreUnavailableError:  # a fault must not let a request through
            return False
        if survey.configured:
            with self._lock:  # several requests may survey at once: one of them logs it
                is_first, self.mode = self.mode is AuthMode.OPEN, AuthMode(survey.kind)
            if is_first:
                _logger.warning("authentication is now on: %d active token(s) from %s", survey.active, survey.source)
        return self.mode is AuthMode.OPEN

    def _decide(self, presented: Presented, look_up: _LookUp) -> Decision:
        if presented.fault == "malformed":
            return _MALFORMED
        decision: Refusal | Literal[Unresolved.UNRESOLVED] = UNKNOWN if presented.digests else _MISSING
        for digest in presented.digests:
            if not digest:
                continue
            verdict = self._verdict(digest, look_up)
            if isinstance(verdict, Caller):
                return verdict
            decision = verdict if decision is UNKNOWN else worse(decision, verdict)
        return Refusal(presented.fault) if presented.fault is not None and decision == UNKNOWN else decision

    def _verdict(self, digest: bytes, look_up: _LookUp) -> Decision:
        # In constant time: the start of its digest would help to guess a key that a person chose.
        is_key = self._key_digest is not None and compare_digest(digest, self._key_digest)
        if is_key and self._key_refusal is not None:  # no caller may be made of a restored token
            return self._key_refusal
        token: Token | None = None
        verdict: Caller | Refusal = UNAVAILABLE
        try:
            answer = look_up(digest)
            if answer is UNRESOLVED:
                return UNRESOLVED
            token = answer
            verdict = self._token_verdict(digest, token)
        except StoreUnavailableError:
            pass  # the environment key works through every fault of the store
        return self._key_verdict(digest, token, verdict) if is_key else verdict

    def _token_verdict(self, digest: bytes, token: Token | None) -> Caller | Refusal:
        # Each refusal takes the same time: a stop-watch must not show which tokens were once in force.
        known = _UNKNOWN_TOKEN if token is None else token
        status = known.status(self._now())
        if status == "active":
            return self._caller_for(digest, known)
        self._callers.pop(digest, None)
        return Refusal("unknown" if known is _UNKNOWN_TOKEN else status, known.id or None)

    def _key_verdict(self, digest: bytes, token: Token | None, verdict: Caller | Refusal) -> Caller | Refusal:
        """Return the verdict about the environment key. Once its *token* is revoked, the key is refused for good.

        If the key is an active token's secret, its uses are counted.
        """
        with self._lock:  # no other thread may cache a caller after the refusal
            if token is not None and token.revoked_at is not None:
                self._key_refusal = Refusal("revoked", token.id)
            if self._key_refusal is not None:
                self._callers.pop(digest, None)
                return self._key_refusal
            if isinstance(verdict, Refusal):
                verdict = self._callers[digest] = self._environment
            return verdict

    def _watch_key(self) -> None:
        """Notice a revocation of the environment key in memory, also while no request presents the key."""
        if self._key_digest is not None and self._key_refusal is None:
            self._verdict(self._key_digest, self._source.peek)

    def _caller_for(self, digest: bytes, token: Token) -> Caller:
        """Return the caller of a token, made once for each object that the source answers."""
        caller = self._callers.get(digest)
        if caller is None or caller.token is not token:
            caller = caller_of(token, digest, self._source)
            if len(self._callers) >= self._caller_limit:
                self._callers.clear()
            self._callers[digest] = caller
        return caller
