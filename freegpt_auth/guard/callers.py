"""What the application is told of whoever calls it: the user and the credentials in the scope, in Starlette's terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.authentication import AuthCredentials, BaseUser, UnauthenticatedUser

if TYPE_CHECKING:
    from ..tokens import Token

NEVER = float("inf")
"""When a token expires that does not."""

_ENVIRONMENT = "environment"


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


@dataclass(frozen=True, slots=True)  # whose attributes are read faster than a named tuple's
class Caller:
    """All that the application is told of an accepted request, made once for each token.

    Attributes:
        user: for ``scope["user"]``.
        auth: for ``scope["auth"]``.
        token: the token presented; ``None`` for the environment key and in open mode.
        expires: seconds since the epoch at which the token stops working.
        digest: SHA-256 digest of the secret that was verified.
        source: the store that verified it; a guard over another store must not rely on this caller.
    """

    user: BaseUser
    auth: AuthCredentials
    token: Token | None = None
    expires: float = NEVER
    digest: bytes = field(default=b"", repr=False)
    source: object = field(default=None, repr=False)


def caller_of(token: Token, digest: bytes, source: object) -> Caller:
    """Return what the application is told of a token."""
    expires = token.expires_at.timestamp() if token.expires_at is not None else NEVER
    auth = _credentials("authenticated", *token.scopes)
    return Caller(TokenUser(token.id, token.name), auth, token, expires, digest, source)


def environment_caller(digest: bytes, source: object) -> Caller:
    """Return what the application is told of the environment key."""
    user = TokenUser(_ENVIRONMENT, _ENVIRONMENT)
    return Caller(user, _credentials("authenticated"), digest=digest, source=source)


def _credentials(*scopes: str) -> AuthCredentials:
    """Return credentials that no application can widen for the requests that come after its own."""
    credentials = AuthCredentials()
    credentials.scopes = scopes  # type: ignore[assignment]  # a tuple, since all requests of a caller share it
    return credentials


ANONYMOUS = Caller(UnauthenticatedUser(), _credentials())
"""The caller where no credentials are asked for."""
