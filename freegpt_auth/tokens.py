"""Tokens: the stored record, the shape of a secret, the digest, the readings of a reference. Pure: no I/O, no clock.

A secret is ``sk-``, 43 random base62 characters (256 bits) and 6 base62 characters of CRC-32 over all that precedes.
The checksum reveals a typing error without a look-up, and lets a scanner recognise leaked secrets.

The digest is a plain SHA-256, not a slow password hash. Slow hashes protect secrets that can be guessed; 256 random
bits cannot be guessed at any speed, and a slow hash would delay every request.
"""

from __future__ import annotations

import secrets
import zlib
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from .names import checked_name

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET_LENGTH = 52
"""Characters of a secret made by :func:`generate_secret`."""

VALUE_LIMIT = 4096
"""Longest credential of a request, in bytes. A longer one is refused before it is digested."""

PREFIX_LENGTH = 14
"""Visible characters of a generated secret: ``sk-a1b2c3d4e5f``."""

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_LENGTH = 43  # 62 ** 43 > 2 ** 256
_CHECKSUM_LENGTH = 6  # 62 ** 6 > 2 ** 32

_NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""An instant with its offset from UTC."""

Status = Literal["active", "revoked", "expired"]


class Token(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The stored record of a token. The secret cannot be derived from it or checked with it.

    Attributes:
        id: short random public id, for logs, usage rows and ``request.user.identity``.
        name: the operator's name for it.
        prefix: the visible start of the secret, which ``list`` shows and ``revoke`` takes.
        created_at: instant of issue.
        expires_at: instant from which the token is refused; ``None`` for never.
        revoked_at: instant of revocation; ``None`` if not revoked. A revocation cannot be undone.
        scopes: rights of the token (RFC 6749, section 3.3), which the application reads in ``request.auth.scopes``.
        models: models for the token; ``None`` for all. For the application: this library does not enforce them.
        last_used_at: last use before the token was imported. Later uses are in the usage database.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    name: str
    prefix: str
    created_at: Instant
    expires_at: Instant | None = None
    revoked_at: Instant | None = None
    scopes: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    last_used_at: Instant | None = None

    def status(self, now: float) -> Status:
        """Return the state at *now*, in seconds since the epoch. It is derived from the instants, never stored.

        The rule is repeated in SQL in ``stores.postgres.reads`` and, for expiry, in ``Authenticator.recognise``.
        Each status takes the same time: refusals must not differ in time.
        """
        is_expired = (self.expires_at or _NEVER).timestamp() <= now
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if is_expired else "active"


def issue(name: str, *, now: datetime, expires_at: datetime | None = None) -> tuple[Token, str]:
    """Return a new token and its secret, which no other object holds.

    Raises:
        ValueError: *name* is refused by :func:`freegpt_auth.names.checked_name`.
    """
    secret = generate_secret()
    token = Token(
        id=secrets.token_hex(6),
        name=checked_name(name),
        prefix=prefix_of(secret),
        created_at=now,
        expires_at=expires_at,
    )
    return token, secret


def generate_secret() -> str:
    """Return a new random secret."""
    body = "sk-" + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))
    return body + _checksum(body)


def has_valid_checksum(secret: str) -> bool:
    """Return whether *secret* has the shape of a generated one and no typing error. Its token need not exist."""
    return len(secret) == SECRET_LENGTH and secret[-_CHECKSUM_LENGTH:] == _checksum(secret[:-_CHECKSUM_LENGTH])


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 digest of *secret*, the key of its token in a store."""
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()


def prefix_of(secret: str) -> str:
    """Return the visible start of *secret*: at most :data:`PREFIX_LENGTH` characters, and at most a third of it.

    An imported secret may be short, and must not be shown whole.
    """
    return secret[: min(PREFIX_LENGTH, len(secret) // 3)]


class Reference(NamedTuple):
    """A reference to a token, in each of its possible readings; ``None`` for a reading that is excluded.

    Attributes:
        digest: digest, if the text is a whole secret.
        exact: token id or shown prefix.
        name: name of the token.
        start: shown prefix, if the text is a longer part of a secret.
    """

    digest: bytes
    exact: str | None
    name: str | None
    start: str | None

    @classmethod
    def read(cls, text: str) -> Reference:
        """Return the readings of *text*.

        White space around a secret, an id or a prefix is dropped, as are the dots that ``list`` prints after a prefix.
        A name is matched as typed. A mistyped secret must not match another token: text of a secret's length is no part
        of a secret, and is no name if it starts with ``sk-``.
        """
        typed = text.strip()
        part = typed.rstrip(".…")
        is_short = len(part) < SECRET_LENGTH
        return cls(
            digest=digest_of(typed),
            exact=part if part and is_short else None,
            name=text if typed and (len(typed) < SECRET_LENGTH or not typed.startswith("sk-")) else None,
            start=part[:PREFIX_LENGTH] if len(part) >= PREFIX_LENGTH and is_short else None,
        )


def find(reference: str, tokens: Mapping[bytes, Token]) -> list[Token]:
    """Return the tokens that *reference* may mean.

    A whole secret comes first. A token id, the shown prefix and an exact name are next and rank equally: a name that is
    another token's id or prefix means both tokens. A longer part of a secret is last.

    Args:
        reference: text of a command's argument.
        tokens: every token of the store, by digest.
    """
    wanted = Reference.read(reference)
    owner = tokens.get(wanted.digest)
    if owner is not None:
        return [owner]
    exact = [
        token for token in tokens.values() if wanted.exact in (token.id, token.prefix) or token.name == wanted.name
    ]
    return exact or [token for token in tokens.values() if token.prefix == wanted.start]


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode("utf-8", "surrogateescape")), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
