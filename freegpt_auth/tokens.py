"""What a token is: its record, its secret's shape, its digest. Pure: no I/O and no clock of its own.

A secret is ``sk-``, 43 random base62 characters (256 bits) and 6 base62 characters of CRC-32 over what precedes them.
The checksum tells a typing error from a foreign key without a look-up, and lets a scanner find leaked secrets exactly.

Why a plain SHA-256 and no slow password hash: slow hashes protect secrets that can be guessed. A secret of 256 random
bits cannot, at any speed; a slow hash would only make every request slow.
"""

from __future__ import annotations

import secrets
import zlib
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET_LENGTH = 52
"""Characters of a secret made by :func:`generate_secret`."""

PREFIX_LENGTH = 14
"""Characters of a generated secret that stay visible: ``sk-a1b2c3d4e5f``."""

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_LENGTH = 43  # 62 ** 43 > 2 ** 256
_CHECKSUM_LENGTH = 6  # 62 ** 6 > 2 ** 32
_NAME_LENGTH = 200

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""A moment with its offset from UTC."""

Status = Literal["active", "revoked", "expired"]


class Token(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The stored record of a token. It holds nothing from which the secret could be found or checked.

    Attributes:
        id: short random public id, for logs, usage rows and ``request.user.identity``.
        name: what the operator calls it.
        prefix: the visible start of the secret, which ``list`` shows and ``revoke`` takes.
        created_at: when it was issued.
        expires_at: when it stops working; ``None`` for never.
        revoked_at: when it was revoked; ``None`` while it was not. Revoking cannot be undone.
        scopes: what it may do (RFC 6749, section 3.3); found again in ``request.auth.scopes``.
        models: the models it is meant for; ``None`` for all. Kept for the application, not enforced here.
        last_used_at: when it was last used before it was imported; later use is in the usage database.
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

    def status(self, now: datetime) -> Status:
        """Tell whether the token works at *now*. Derived from the instants, never stored beside them."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"


def issue(name: str, *, now: datetime, expires_at: datetime | None = None) -> tuple[Token, str]:
    """Make a new token and its secret. The secret is in the second place of the answer and nowhere else.

    Raises:
        ValueError: *name* is empty, too long, or holds control characters.
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
    """Tell whether *secret* has the shape of one made here and no typing error. It need not be a live token's."""
    return len(secret) == SECRET_LENGTH and secret[-_CHECKSUM_LENGTH:] == _checksum(secret[:-_CHECKSUM_LENGTH])


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 digest under which a secret's token is stored."""
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()


def prefix_of(secret: str) -> str:
    """Return the visible start of *secret*: at most 14 characters, and never more than a third of it.

    A secret made here is long enough to show 14. An imported one may be short, and must not be shown whole.
    """
    return secret[: min(PREFIX_LENGTH, len(secret) // 3)]


def checked_name(name: str) -> str:
    """Return *name* if it can be shown on a terminal as it is.

    Raises:
        ValueError: it is empty, longer than 200 characters, or holds characters that do not print.
    """
    if not name.strip():
        raise ValueError("a token's name must not be empty")
    if len(name) > _NAME_LENGTH:
        raise ValueError(f"a token's name must not be longer than {_NAME_LENGTH} characters")
    if not name.isprintable():
        raise ValueError(f"a token's name must not contain control characters: {printable(name)}")
    return name


def printable(text: str) -> str:
    """Return *text* with every character that could drive a terminal or forge a log line escaped."""
    if text.isprintable():  # nearly always: list has 200,000 of them to print at 100,000 tokens
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def find(reference: str, digests: Mapping[bytes, Token]) -> list[Token]:
    """Return the tokens that *reference* may mean: a whole secret, a token id, the shown prefix, or more of the secret.

    Trailing dots are ignored, since ``list`` prints the prefix with three of them. A reference as long as a secret that
    is not one of these tokens' secrets means none, so that a mistyped secret never reaches a token beside it.
    """
    owner = digests.get(digest_of(reference))
    if owner is not None:
        return [owner]
    reference = reference.rstrip(".…")
    if not reference or len(reference) >= SECRET_LENGTH:
        return []
    tokens = digests.values()
    exact = [token for token in tokens if reference in (token.id, token.prefix)]
    return exact or [
        token for token in tokens if len(token.prefix) == PREFIX_LENGTH and reference.startswith(token.prefix)
    ]


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode("utf-8", "surrogateescape")), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
