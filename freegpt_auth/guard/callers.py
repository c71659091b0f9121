"""The caller of a request, as the application finds it in the scope, in Starlette's terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.authentication import AuthCredentials, BaseUser, UnauthenticatedUser

if TYPE_CHECKING:
    from ..tokens import Token

MARK = "freegpt_auth"
"""Key in the scope of the :class:`Caller` that a guard accepted: a guard further in finds its credential removed."""

NEVER = float("inf")
"""Expiry of a token that does not expire."""

_ENVIRONMENT = "environment"


class TokenUser(BaseUser):
    """The caller for ``request.user``: a token's name and id."""

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


@dataclass(slots=True, eq=False)  # attributes of slots are read faster than those of a named tuple
class Caller:
    """The caller of an accepted request, made once per token. Only ``state`` changes.

    Attributes:
        user: for ``scope["user"]``.
        auth: for ``scope["auth"]``.
        token: the token presented; ``None`` for the environment key and in open mode.
        token_id: its id, read without the token: one cache line less.
        expires: its expiry in seconds since the epoch.
        digest: SHA-256 digest of the verified secret.
        source: the token source that verified it; a guard over another source must verify it again.
        state: the source's state when its ``peek`` last answered this token.
    """

    user: BaseUser
    auth: AuthCredentials
    token: Token | None = None
    token_id: str | None = None
    expires: float = NEVER
    digest: bytes = field(default=b"", repr=False)
    source: object = field(default=None, repr=False)
    state: object = field(default_factory=object, repr=False)


def caller_of(token: Token, digest: bytes, source: object) -> Caller:
    """Return the caller of a token."""
    expires = NEVER if token.expires_at is None else token.expiry()
    auth = _credentials("authenticated", *token.scopes)
    return Caller(TokenUser(token.id, token.name), auth, token, token.id, expires, digest, source)


def environment_caller(digest: bytes, source: object) -> Caller:
    """Return the caller of the environment key."""
    user = TokenUser(_ENVIRONMENT, _ENVIRONMENT)
    return Caller(user, _credentials("authenticated"), digest=digest, source=source)


def _credentials(*scopes: str) -> AuthCredentials:
    """Return credentials that an application cannot change for later requests."""
    credentials = AuthCredentials()
    credentials.scopes = scopes  # type: ignore[assignment]  # a tuple: all requests of a caller share it
    return credentials


ANONYMOUS = Caller(UnauthenticatedUser(), _credentials())
"""The caller where no credentials are required."""
