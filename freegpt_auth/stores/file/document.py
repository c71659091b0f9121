"""A token file that a command changes: its records, the changes, and the new bytes. Pure."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import TYPE_CHECKING, Any

import msgspec

from ...exceptions import TokenNotFoundError
from ..base import Merged
from ..rules import duplicate_error, plan_merge
from .decoding import DIGEST_ALGORITHM, FOOT, HEAD, SEPARATOR, Contents, decode
from .faults import explained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ...tokens import Token

_encode = msgspec.json.Encoder().encode
_decode_row = msgspec.json.Decoder(msgspec.Raw).decode
_decode_rows = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Document:
    """A token file that a command changes. Its records keep the fields that this release does not know.

    Args:
        content: the bytes of the file; ``None`` if there is none yet.

    Attributes:
        changed: the file must be written: it was changed since it was read, or it held plain tokens.

    Raises:
        ValueError: *content* is no token file.
    """

    def __init__(self, content: bytes | None) -> None:
        content = content and content.removeprefix(BOM_UTF8)
        contents = _decode_with_unknown_fields(content) if content is not None else Contents({})
        self.changed: bool = contents.ancestral
        self._tokens = contents.tokens
        self._others: dict[str, msgspec.Raw] = {}
        if content is None or contents.ancestral:
            rows = [_row(digest, token) for digest, token in contents.tokens.items()]
        else:
            rows = _rows_in_lines(content) or self._rows_in_any_layout(content)
        self._by_id = {token.id: token for token in contents.tokens.values()}
        self._rows = dict(zip(self._by_id, rows, strict=True))

    def _rows_in_any_layout(self, content: bytes) -> list[bytes]:
        with explained(content):
            self._others = _decode_fields(content)
            self._others.pop("version", None)
            rows = _decode_rows(self._others.pop("tokens", b"[]"))
            return [msgspec.json.format(row, indent=-1) for row in rows]

    def append(self, digest: bytes, token: Token) -> None:
        """Add a record at the end.

        Raises:
            StoreError: a token with this digest or id exists already.
            ValueError: the record cannot be encoded.
        """
        if digest in self._tokens or token.id in self._rows:
            raise duplicate_error(token)
        self._enter(digest, token)

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Set the instant of revocation in a record, unless it has one; return its token.

        Raises:
            TokenNotFoundError: there is no such token.
        """
        token = self._find(token_id)
        if token.revoked_at is None:
            self._rows[token_id] = _encode(_decode_fields(self._rows[token_id]) | {"revoked_at": at})
            self.changed = True
            token = msgspec.structs.replace(token, revoked_at=at)
        return token

    def remove(self, token_id: str) -> Token:
        """Remove a record, and return its token.

        Raises:
            TokenNotFoundError: there is no such token.
        """
        token = self._find(token_id)
        del self._rows[token_id]
        self.changed = True
        return token

    def merge(self, tokens: Mapping[bytes, Token]) -> Merged:
        """Add missing tokens and apply revocations; see :func:`freegpt_auth.stores.rules.plan_merge`.

        Raises:
            StoreError: a new token has the id of another.
        """
        new, revoked = plan_merge(tokens, self._tokens)
        for digest, token in new.items():
            self._enter(digest, token)
        for digest, at in revoked.items():
            self.revoke(self._tokens[digest].id, at)
        return Merged(len(new), len(revoked))

    def encode(self) -> bytes:
        """Return the new bytes of the file.

        Raises:
            ValueError: they could not be decoded again, so they must not be written.
        """
        others = _encode(self._others)[1:-1]
        head = b'{"version": 1, ' + others + b', "tokens": [\n' if others else HEAD
        content = head + SEPARATOR.join(self._rows.values()) + FOOT
        decode(content)
        return content

    def _find(self, token_id: str) -> Token:
        token = self._by_id.get(token_id)
        if token is None:
            raise TokenNotFoundError(f"there is no token with the id {token_id}")
        return token

    def _enter(self, digest: bytes, token: Token) -> None:
        self._rows[token.id] = _row(digest, token)
        self.changed = True


def tokens_in(content: bytes | None) -> dict[bytes, Token]:
    """Return the tokens in *content*, in half the time of a :class:`Document`; none if *content* is ``None``.

    Raises:
        ValueError: *content* is no token file.
    """
    return decode(content).tokens if content is not None else {}


def _decode_with_unknown_fields(content: bytes) -> Contents[dict[bytes, Token]]:
    """Decode a file whose unknown fields are UTF-8 too: they are written back, and a bad one would spoil the file."""
    contents = decode(content)
    with explained(content):
        content.decode()
    return contents


def _rows_in_lines(content: bytes) -> list[bytes]:
    """Return the records of a file with one record per line; an empty list for any other layout."""
    if not content.startswith(HEAD) or not content.endswith(FOOT):
        return []
    lines = content[len(HEAD) : -len(FOOT)].split(SEPARATOR)
    try:
        for line in lines:
            _decode_row(line)
    except msgspec.MsgspecError:  # a record spans two lines, or two share one
        return []
    return lines


def _row(digest: bytes, token: Token) -> bytes:
    row: dict[str, Any] = {
        "id": token.id,
        "name": token.name,
        "prefix": token.prefix,
        "digest": DIGEST_ALGORITHM + digest.hex(),
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "revoked_at": token.revoked_at,
        "scopes": token.scopes,
        "models": token.models,
    }
    if token.last_used_at is not None:
        row["last_used_at"] = token.last_used_at
    try:
        return _encode(row)
    except UnicodeEncodeError:
        raise ValueError("a field of the token holds half of a surrogate pair") from None
