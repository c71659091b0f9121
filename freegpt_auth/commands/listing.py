"""How tokens are shown: to a person, line by line as the user's guide has it, and as JSON. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..names import printable

if TYPE_CHECKING:
    from ..tokens import Token
    from ..usage.base import Usage

_SIGNS = {"active": "✓ Active", "revoked": "✗ Revoked", "expired": "✗ Expired"}

_OFFSET = len("2025-11-26T10:30:00")
# At either end of the calendar there is no other zone to move to.
_NO_SUCH_INSTANT = (OverflowError, ValueError, OSError)


def entry(number: int, token: Token, usage: Usage | None, now: float) -> str:
    """Return the lines of one token, for a person."""
    used = _last_used(token, usage)
    return "\n".join(
        (
            f"{number}. {printable(token.prefix)}...",
            f"   Name: {printable(token.name)}",
            f"   Status: {_SIGNS[token.status(now)]}",
            f"   Created: {local(token.created_at)}",
            *([f"   Expires: {local(token.expires_at)}"] if token.expires_at else []),
            f"   Last used: {local(used) if used else 'Never'}",
        )
    )


def record(token: Token, usage: Usage | None, now: float) -> dict[str, object]:
    """Return one token as it stands in JSON."""
    return {
        "id": token.id,
        "name": token.name,
        "prefix": token.prefix,
        "status": token.status(now),
        "created_at": _iso(token.created_at),
        "expires_at": _iso(token.expires_at),
        "revoked_at": _iso(token.revoked_at),
        "last_used_at": _iso(_last_used(token, usage)),
        "use_count": usage.use_count if usage else 0,
    }


def title(token: Token) -> str:
    """Return a token's prefix and name, for a sentence about it."""
    return f"{printable(token.prefix)}... ({printable(token.name)})"


def local(instant: datetime) -> str:
    """Return an instant as a person at this machine reads it, without the offset; JSON has it."""
    try:
        # In half the time of astimezone, which counts where all of 100,000 tokens are listed.
        here = datetime.fromtimestamp(instant.timestamp())  # noqa: DTZ006
    except _NO_SUCH_INSTANT:
        here = instant
    return here.isoformat(timespec="seconds")[:_OFFSET]


def _iso(instant: datetime | None) -> str | None:
    if instant is None:
        return None
    try:
        moved = instant.astimezone(UTC)
    except _NO_SUCH_INSTANT:
        moved = instant
    return moved.isoformat(timespec="seconds")


def _last_used(token: Token, usage: Usage | None) -> datetime | None:
    if usage is None or token.last_used_at is None:
        return usage.last_used_at if usage else token.last_used_at
    return max(token.last_used_at, usage.last_used_at)
