"""References to tokens in the arguments of a command. All are resolved before the store is changed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..exceptions import AmbiguousTokenError, TokenNotFoundError
from ..tokens import SECRET_LENGTH, has_valid_checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..stores.base import TokenStore
    from ..tokens import Token

STDIN = "-"
"""Reference that is replaced by the next line of stdin."""

LINE_LIMIT = 4096
"""Longest line of stdin, in characters."""


def resolve(store: TokenStore, references: Sequence[str]) -> list[Token]:
    """Return the tokens of *store* that match *references*: each token once, in the order of the references.

    Args:
        store: the store to search.
        references: see :func:`freegpt_auth.tokens.find`; each ``-`` is replaced by the next line of stdin.

    Raises:
        TokenNotFoundError: a reference matches no token, or a line of stdin cannot be used. The message gives the
            position of the reference and not the reference, which may be a secret.
        AmbiguousTokenError: a reference matches several tokens.
        StoreError: the tokens cannot be read.
    """
    tokens: dict[str, Token] = {}
    for number, reference in enumerate(references, start=1):
        place = f" reference {number} of {len(references)}" if len(references) > 1 else ""
        token = _only(store, _next_line() if reference == STDIN else reference, place)
        tokens[token.id] = token
    return list(tokens.values())


def _only(store: TokenStore, reference: str, place: str) -> Token:
    matches = store.find(reference)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise AmbiguousTokenError(
            f"{len(matches)} tokens match{place} and nothing was done; give the id or prefix of one of these:", matches
        )
    typed = reference.strip()
    mistyped = len(typed) == SECRET_LENGTH and not has_valid_checksum(typed)
    why = "it is mistyped, since its checksum is wrong" if mistyped else "it is none of them"
    raise TokenNotFoundError(
        f"no token of {store.source} matches{place}, so nothing was done: {why}; "
        "give the prefix that list shows, the token id, its exact name or the whole token"
    )


def _next_line() -> str:
    try:
        # A limit: a line without an end, as from /dev/zero, would fill the memory.
        line = sys.stdin.readline(LINE_LIMIT + 1) if sys.stdin else ""
    except UnicodeDecodeError:
        raise TokenNotFoundError("stdin holds no token: it is not text; nothing was done") from None
    except OSError:
        raise TokenNotFoundError("stdin cannot be read; nothing was done") from None
    if len(line) > LINE_LIMIT:
        raise TokenNotFoundError(f"stdin holds no token: its line is over {LINE_LIMIT} characters; nothing was done")
    if not line.strip():
        raise TokenNotFoundError("stdin holds no token: its line is empty; nothing was done")
    return line.rstrip("\r\n")
