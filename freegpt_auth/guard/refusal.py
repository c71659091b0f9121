"""The decision about a request: a caller, a refusal, or unresolved."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..stores.base import UNRESOLVED, Unresolved
from .callers import Caller

Reason = Literal["missing", "malformed", "prefixed", "quoted", "unknown", "revoked", "expired", "unavailable"]


class Refusal(msgspec.Struct, frozen=True):  # made in a third of the time of a named tuple
    """The reason of a refusal: for the log, never for the client.

    Attributes:
        reason: one word.
        token_id: the id of the presented token, if it is known.
    """

    reason: Reason
    token_id: str | None = None


Decision = Caller | Refusal | Literal[Unresolved.UNRESOLVED]
"""A decision from memory, where :data:`~freegpt_auth.stores.base.UNRESOLVED` leaves it to the store."""

UNKNOWN = Refusal("unknown")
UNAVAILABLE = Refusal("unavailable")

_WEIGHTS = {UNRESOLVED: 3, UNAVAILABLE: 2, UNKNOWN: 0}


def worse(
    decision: Refusal | Literal[Unresolved.UNRESOLVED], other: Refusal | Literal[Unresolved.UNRESOLVED]
) -> Refusal | Literal[Unresolved.UNRESOLVED]:
    """Return the one of two that decides about a request: first unresolved, then unavailable, last unknown."""
    return max(decision, other, key=lambda one: _WEIGHTS.get(one, 1))
