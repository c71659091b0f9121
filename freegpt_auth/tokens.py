"""What a token is: its record, its secret's shape, its digest. Pure: no I/O and no clock of its own.

A secret is ``sk-``, 43 random base62 characters (256 bits) and 6 base62 characters of CRC-32 over what precedes them.
The checksum tells a typing error from a foreign key without a look-up, and lets a scanner find leaked secrets exactly.

Why a plain SHA-256 and no slow password hash: slow hashes protect secrets that can be guessed. A secret of 256 random
bits cannot, at any speed; a slow hash would only make every request slow.
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
"""Longest credential that a request may present, in bytes; a longer one is refused without a digest."""

PREFIX_LENGTH = 14
"""Characters of a generated secret that stay visible: ``sk-a1b2c3d4e5f``."""

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_LENGTH = 43  # 62 ** 43 > 2 ** 256
_CHECKSUM_LENGTH = 6  # 62 ** 6 > 2 ** 32

_NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

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

    def status(self, now: float) -> Status:
        """Return the state at *now*, in seconds since the epoch. It is derived from the instants, never stored.

        The only rule about a token that is in force. ``stores.postgres.reads`` has the same rule in SQL. It takes the same
        time for each status: refusals must not differ in time.
        """
        is_expired = (self.expires_at or _NEVER).timestamp() <= now
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if is_expired else "active"


def issue(name: str, *, now: datetime, expires_at: datetime | None = None) -> tuple[Token, str]:
    """Make a new token and its secret. The secret is in the second place of the answer and nowhere else.

    Raises:
        ValueError: *name* is one that no token can have; see :func:`freegpt_auth.names.checked_name`.
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


class Reference(NamedTuple):
    """The readings of a reference to a token, one for each way to name it; ``None`` where it cannot be meant that way.

    Attributes:
        digest: of the whole secret.
        exact: the token id, or the shown prefix.
        name: the token's name.
        start: the shown prefix at the start of a longer part of the secret.
    """

    digest: bytes
    exact: str | None
    name: str | None
    start: str | None

    @classmethod
    def read(cls, text: str) -> Reference:
        """Return the readings of *text*.

        White space round a secret, an id or a prefix is dropped, and so are the dots that ``list`` prints behind a
        prefix. A name counts as it was typed. Text as long as a secret is no part of one, and with ``sk-`` at its start no
        name: a mistyped secret must not reach another token.
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


def find(reference: str, digests: Mapping[bytes, Token]) -> list[Token]:
    """Return the tokens that *reference* may mean.

    A whole secret comes first. The next are a token id, the shown prefix and an exact name, all alike: a name that is
    another token's id or prefix means both. A longer part of a secret is the last.
    """
    wanted = Reference.read(reference)
    owner = digests.get(wanted.digest)
    if owner is not None:
        return [owner]
    tokens = digests.values()
    exact = [token for token in tokens if wanted.exact in (token.id, token.prefix) or token.name == wanted.name]
    return exact or [token for token in tokens if token.prefix == wanted.start]


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode("utf-8", "surrogateescape")), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
