"""What stands in ``api_tokens.json``: the bytes of a token file to tokens, and back. Pure.

::

    {"version": 1, "tokens": [
    {"id": …, "name": …, "prefix": …, "digest": "sha256$…", "created_at": …, "expires_at": …, …},
    {…}
    ]}

One token per line makes a difference easy to read. It also lets a large file be decoded line by line, so that the
interpreter lock is given up in between: at 100,000 tokens the event loop is held 5-8 ms, against 80 ms for the whole
decoded in one piece by a thread. Any other layout of the same JSON is read too.

The format of this project's ancestor is read as well: ``{"<plain token>": {"name", "created_at", "last_used",
"active"}}``.
"""

from __future__ import annotations

import contextlib
from datetime import datetime  # noqa: TC003  msgspec reads the annotations when it runs
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..exceptions import TokenNotFoundError
from ..tokens import Token, digest_of, prefix_of, printable

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

VERSION = 1
_HEAD = b'{"version": 1, "tokens": [\n'
_FOOT = b"\n]}\n"
_SEPARATOR = b",\n"
_DIGEST_ALGORITHM = "sha256$"
_DIGEST_SIZE = 32


class Contents(NamedTuple):
    """What a token file says.

    Attributes:
        tokens: every token by its digest, oldest first.
        blank: the file is an empty JSON object, which says nothing at all.
        ancestral: it is in the ancestor's format and holds plain tokens.
    """

    tokens: dict[bytes, Token]
    blank: bool = False
    ancestral: bool = False


class _StoredToken(Token, frozen=True, kw_only=True, gc=False):
    digest: str


class _File(msgspec.Struct):
    version: int
    tokens: list[_StoredToken]


class _AncestralToken(msgspec.Struct):
    name: str
    created_at: datetime
    last_used: datetime | None = None
    active: bool = True


_decode_line = msgspec.json.Decoder(_StoredToken).decode
_decode_file = msgspec.json.Decoder(_File).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def read(content: bytes) -> Contents:
    """Return what the bytes of a token file say.

    Raises:
        ValueError: they are no token file; the message says what is wrong and where.
    """
    with _plain_errors():
        if content.startswith(_HEAD) and content.endswith(_FOOT):
            # Another layout, or an error whose place only the whole file shows, goes on below.
            with contextlib.suppress(msgspec.MsgspecError):
                return Contents(_index(map(_decode_line, _lines(content))))
        return _read_whole(content)


@contextlib.contextmanager
def _plain_errors() -> Generator[None]:
    """Make one kind of error of all that bad JSON raises."""
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except msgspec.MsgspecError as error:  # a ValueError by itself only from msgspec 0.21 on
        raise ValueError(str(error)) from None


def _lines(content: bytes) -> Iterable[bytes]:
    # One at a time: splitting 100,000 in one call holds the interpreter lock 40 ms.
    start, end = len(_HEAD), len(content) - len(_FOOT)
    if start < end:
        while (stop := content.find(_SEPARATOR, start, end)) >= 0:
            yield content[start:stop]
            start = stop + len(_SEPARATOR)
        yield content[start:end]


def _read_whole(content: bytes) -> Contents:
    document = _decode_any(content)
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004  one kind of error for every bad file
    if not document:
        return Contents({}, blank=True)
    if "version" not in document and all(isinstance(value, dict) for value in document.values()):
        return Contents(_index(_from_ancestor(document)), ancestral=True)
    if document.get("version") != VERSION:
        raise ValueError(f"its version is {document.get('version')!r:.20}; this release reads version {VERSION}")
    return Contents(_index(_decode_file(content).tokens))


def _index(stored: Iterable[_StoredToken]) -> dict[bytes, Token]:
    tokens: dict[bytes, Token] = {}
    ids: set[str] = set()
    for place, token in enumerate(stored):
        digest = _digest(token.digest, place)
        # The digest is the key from here on; a second copy of it in every record would cost 120 bytes each.
        msgspec.structs.force_setattr(token, "digest", "")
        tokens[digest] = token
        ids.add(token.id)
        if len(tokens) != place + 1:
            raise ValueError(f"the digest at $.tokens[{place}] stands there twice")
        if len(ids) != place + 1:
            raise ValueError(f"the id at $.tokens[{place}] stands there twice: {printable(token.id)}")
    return tokens


def _digest(text: str, place: int) -> bytes:
    if text.startswith(_DIGEST_ALGORITHM) and len(text) == len(_DIGEST_ALGORITHM) + 2 * _DIGEST_SIZE:
        try:
            digest = bytes.fromhex(text[len(_DIGEST_ALGORITHM) :])
        except ValueError:
            digest = b""
        if len(digest) == _DIGEST_SIZE:
            return digest
    raise ValueError(f"expected 'sha256$' and 64 hexadecimal digits - at $.tokens[{place}].digest")


def _from_ancestor(document: dict[str, Any]) -> Iterable[_StoredToken]:
    for place, (secret, value) in enumerate(document.items()):
        try:
            record = msgspec.convert(value, _AncestralToken)
        except msgspec.ValidationError as error:
            # Not the key it stands under: that is the plain token.
            raise ValueError(f"{error}, in entry {place + 1} of a file of plain tokens") from None
        if not secret:
            raise ValueError(f"entry {place + 1} of a file of plain tokens is an empty token")
        digest = digest_of(secret)
        try:
            created_at = record.created_at.astimezone()
            last_used_at = record.last_used and record.last_used.astimezone()
        except OverflowError:
            raise ValueError(f"a date is out of range, in entry {place + 1} of a file of plain tokens") from None
        yield _StoredToken(
            id=digest.hex()[:12],  # the same at every reading
            name=record.name,
            prefix=prefix_of(secret),
            digest=_DIGEST_ALGORITHM + digest.hex(),
            created_at=created_at,
            revoked_at=None if record.active else last_used_at or created_at,
            last_used_at=last_used_at,
        )


class Document:
    """A token file that is being changed: the records as they stand, with every field that this release does not know.

    Raises:
        ValueError: the bytes are no token file.
    """

    def __init__(self, content: bytes | None) -> None:
        contents = read(content) if content is not None else Contents({})
        self._tokens = contents.tokens
        self._envelope: dict[str, Any] = {"version": VERSION, "tokens": []}
        if contents.ancestral:
            self._envelope["tokens"] = [_row(digest, token) for digest, token in contents.tokens.items()]
        elif content is not None:
            with _plain_errors():
                self._envelope.update(_decode_any(content))  # this also reads the fields that read() skips

    @property
    def tokens(self) -> dict[bytes, Token]:
        """Every token by its digest, as the file said when it was read."""
        return self._tokens

    def find(self, token_id: str) -> Token:
        """Return the token with this id.

        Raises:
            TokenNotFoundError: there is none.
        """
        for token in self._tokens.values():
            if token.id == token_id:
                return token
        raise TokenNotFoundError(f"there is no token with the id {token_id}")

    def append(self, digest: bytes, token: Token) -> None:
        """Add a record at the end."""
        self._envelope["tokens"].append(_row(digest, token))

    def revoke(self, token_id: str, at: datetime) -> None:
        """Enter in a record when its token was revoked."""
        next(row for row in self._envelope["tokens"] if row["id"] == token_id)["revoked_at"] = at

    def remove(self, token_id: str) -> None:
        """Remove a record."""
        self._envelope["tokens"] = [row for row in self._envelope["tokens"] if row["id"] != token_id]

    def encode(self) -> bytes:
        """Return the bytes of the file as it is now."""
        lines = _SEPARATOR.join(map(_encode, self._envelope["tokens"]))
        others = {name: value for name, value in self._envelope.items() if name not in ("version", "tokens")}
        if not others:
            return _HEAD + lines + _FOOT
        head = b'{"version": 1, ' + _encode(others)[1:-1] + b', "tokens": [\n'
        return head + lines + _FOOT


def _row(digest: bytes, token: Token) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": token.id,
        "name": token.name,
        "prefix": token.prefix,
        "digest": _DIGEST_ALGORITHM + digest.hex(),
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "revoked_at": token.revoked_at,
        "scopes": token.scopes,
        "models": token.models,
    }
    if token.last_used_at is not None:
        row["last_used_at"] = token.last_used_at
    return row
