"""The decision about one request: all credentials that it presents, and the one that a guard outside removed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ..exceptions import MalformedCredentialsError
from .authenticator import Decision, Refusal
from .callers import Caller
from .credentials import presented

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MARK = "freegpt_auth"
"""Key in the scope of the :class:`Caller` that a guard accepted. A guard further in over the same store finds no credential."""

_MISSING, _MALFORMED, _UNKNOWN = Refusal("missing"), Refusal("malformed"), Refusal("unknown")

_Decided = TypeVar("_Decided", bound=Decision)


def judge(
    scope: Any, decide: Callable[[Sequence[bytes]], _Decided], source: object, digest: bytes = b""
) -> _Decided | Refusal:
    """Return the decision about a request.

    Args:
        scope: its scope.
        decide: decides about digests, from memory or from the store.
        source: the store. A secret that a guard outside verified with the same one is judged again, by its digest, after
            the credentials that are still presented: an application may have replaced them in a copy of the scope.
        digest: that of the only credential, where it is known already.
    """
    digests, fault = [digest], None
    if not digest:
        try:
            digests, fault = presented(scope)
        except MalformedCredentialsError:
            return _MALFORMED
    outer = scope.get(MARK)
    if outer is not None and isinstance(outer, Caller) and outer.source is source:
        digests.append(outer.digest)
    if not digests:
        return _MISSING
    decision = decide(digests)
    return Refusal(fault) if fault is not None and decision == _UNKNOWN else decision
