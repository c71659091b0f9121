"""Who is calling: the modes, the environment key and the store, and what the application learns of the caller."""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from hashlib import sha256
from hmac import compare_digest
from typing import TYPE_CHECKING, Literal, NamedTuple

from starlette.authentication import AuthCredentials, BaseUser, UnauthenticatedUser

from .exceptions import ConfigurationError, StoreUnavailableError
from .stores.base import UNRESOLVED, Unresolved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .settings import EnvironmentKey
    from .stores.base import Survey, Verifier
    from .tokens import Token

CALLER_LIMIT = 262_144
"""Callers that are kept ready; a store of more used tokens than that makes some of them anew."""

_ENVIRONMENT = "environment"
_NOTHING = b""  # no digest: looks at the store without looking anything up

_logger = logging.getLogger("freegpt_auth")


class AuthMode(StrEnum):
    """What a server accepts, found when it starts."""

    OPEN = "open"
    """Nothing is configured: every request passes."""
    ENVIRONMENT = "environment"
    """Only the environment key."""
    TOKEN_FILE = "token-file"  # noqa: S105
    """The active tokens, and the environment key if one is set."""


class TokenUser(BaseUser):
    """Who calls, for ``request.user``: a token's name and id."""

    __slots__ = ("_identity", "_name")

    def __init__(self, identity: str, name: str) -> None:
        self._identity = identity
        self._name = name

    def __repr__(self) -> str:
        return f"TokenUser(identity={self._identity!r}, display_name={self._name!r})"

    @property
    def is_authenticated(self) -> bool:
        """Always true."""
        return True

    @property
    def display_name(self) -> str:
        """The token's name, or ``environment``."""
        return self._name

    @property
    def identity(self) -> str:
        """The token's id, or ``environment``."""
        return self._identity


class Caller(NamedTuple):
    """All that the application is told of an accepted request, made once for each token.

    Attributes:
        user: for ``scope["user"]``.
        auth: for ``scope["auth"]``.
        token: the token presented; ``None`` for the environment key and in open mode.
        expires: seconds since the epoch at which the token stops working.
    """

    user: BaseUser
    auth: AuthCredentials
    token: Token | None = None
    expires: float = float("inf")


Reason = Literal["missing", "malformed", "unknown", "revoked", "expired", "unavailable"]


class Refusal(NamedTuple):
    """Why a request is refused: for the log, never for the client.

    Attributes:
        reason: one word.
        token_id: the token that was presented, where it is known.
    """

    reason: Reason
    token_id: str | None = None


def _credentials(*scopes: str) -> AuthCredentials:
    """Return credentials that no application can widen for the requests that come after its own."""
    credentials = AuthCredentials()
    credentials.scopes = scopes  # type: ignore[assignment]  # a tuple, since all requests of a caller share it
    return credentials


ANONYMOUS = Caller(UnauthenticatedUser(), _credentials())
"""The caller where no credentials are asked for."""

_UNKNOWN = Refusal("unknown")
_UNAVAILABLE = Refusal("unavailable")


class Authenticator:
    """Decides by the environment key and a store.

    Args:
        verifier: where tokens are looked up.
        key: the environment key, if one is set.
        required: refuse to be open.

    Raises:
        ConfigurationError: *required*, and nothing is configured.
    """

    def __init__(self, verifier: Verifier, key: EnvironmentKey | None, *, required: bool = False) -> None:
        self._verifier = verifier
        self._key_digest = key.digest if key else None
        self._environment = Caller(TokenUser(_ENVIRONMENT, _ENVIRONMENT), _credentials("authenticated"))
        self._callers: dict[bytes, Caller] = {}
        self.mode: AuthMode = AuthMode.OPEN if key is None else AuthMode.ENVIRONMENT
        survey = verifier.survey()
        if survey.configured:
            self.mode = AuthMode.TOKEN_FILE
        if required and self.mode is AuthMode.OPEN:
            raise ConfigurationError(
                f"authentication is required, but no environment key is set and {survey.source} holds no tokens: "
                "set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME"
            )
        _announce(self.mode, survey, key)

    def peek(self, secrets: Sequence[bytes]) -> Caller | Refusal | Literal[Unresolved.UNRESOLVED]:
        """Decide from memory. Never blocks."""
        return self._decide(secrets, self._verifier.peek)

    def resolve(self, secrets: Sequence[bytes]) -> Caller | Refusal:
        """Decide from the store. May block."""
        decision = self._decide(secrets, self._verifier.resolve)
        return _UNAVAILABLE if decision is UNRESOLVED else decision

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
                self.mode = AuthMode.TOKEN_FILE
                _logger.warning("authentication is now on: %d active token(s) from %s", survey.active, survey.source)
        return self.mode is AuthMode.OPEN

    def _decide(
        self, secrets: Sequence[bytes], look_up: Callable[[bytes], Token | Unresolved | None]
    ) -> Caller | Refusal | Literal[Unresolved.UNRESOLVED]:
        decision: Refusal | Literal[Unresolved.UNRESOLVED] = _UNKNOWN
        for secret in secrets:
            if not secret:
                continue
            digest = sha256(secret).digest()
            # In constant time: a key that a person chose could be guessed offline from the start of its digest.
            is_key = self._key_digest is not None and compare_digest(digest, self._key_digest)
            try:
                # For the key too: it may be a token's secret, and a token that was revoked is refused as either.
                token = look_up(digest)
            except StoreUnavailableError:
                if is_key:
                    return self._environment
                decision = _weightier(decision, _UNAVAILABLE)
                continue
            if token is None:
                if is_key:
                    return self._environment
                continue
            if token is UNRESOLVED:
                decision = UNRESOLVED
                continue
            caller = self._callers.get(digest)
            if caller is None or caller.token is not token:
                caller = self._introduce(digest, token)
            if token.revoked_at is None and (is_key or caller.expires > time.time()):
                return self._environment if is_key else caller
            reason: Reason = "expired" if token.revoked_at is None else "revoked"
            decision = _weightier(decision, Refusal(reason, token.id))
        return decision

    def _introduce(self, digest: bytes, token: Token) -> Caller:
        """Make ready what the application is told of a token; good for as long as the store answers this object."""
        caller = Caller(
            TokenUser(token.id, token.name),
            _credentials("authenticated", *token.scopes),
            token,
            token.expires_at.timestamp() if token.expires_at is not None else float("inf"),
        )
        if len(self._callers) >= CALLER_LIMIT:
            self._callers.clear()
        self._callers[digest] = caller
        return caller


def _weightier(
    decision: Refusal | Literal[Unresolved.UNRESOLVED], other: Refusal
) -> Refusal | Literal[Unresolved.UNRESOLVED]:
    """Return what decides about a request that presents several secrets: that one of them cannot be known comes first."""
    return decision if decision is UNRESOLVED or decision is _UNAVAILABLE else other


def _announce(mode: AuthMode, survey: Survey, key: EnvironmentKey | None) -> None:
    """Say once what the operator must know. Never the key."""
    if mode is AuthMode.OPEN:
        _logger.warning(
            "open mode: every request is let through, since no environment key is set and %s holds no tokens. "
            "To turn authentication on, run: python -m freegpt_auth create NAME",
            survey.source,
        )
        return
    origin = f"the environment key from {key.source}" if key else "no environment key"
    _logger.info("%s mode: %d active token(s) from %s, and %s", mode.value, survey.active, survey.source, origin)
