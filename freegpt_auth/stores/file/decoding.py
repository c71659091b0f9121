"""The format of ``api_tokens.json``: decodes its bytes to tokens. Pure. :mod:`.document` encodes them.

::

    {"version": 1, "tokens": [
    {"id": …, "name": …, "prefix": …, "digest": "sha256$…", "created_at": …, "expires_at": …, …},
    {…}
    ]}

Commands call :func:`decode` with the whole content. Servers call :func:`decode_batches` (in :mod:`.table`), and release
the interpreter lock between two batches of lines: decoding 100,000 tokens at once blocks the event loop for 80 ms.

One token per line also makes differences easy to read. Any other layout of the same JSON is read too, with or without a
byte order mark, and so is the format of this project's ancestor: ``{"<plain token>": {"name", "created_at",
"last_used", "active"}}``.
"""

from __future__ import annotations

import contextlib
from codecs import BOM_UTF8
from datetime import datetime  # noqa: TC003  msgspec reads the annotations when it runs
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec

from ...names import printable
from ...tokens import Token, digest_of, prefix_of
from .faults import explained, record_fault, shape_fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VERSION = 1
"""Version of the format."""

# The layout: the bytes before the first token, after the last, and between two.
HEAD = b'{"version": 1, "tokens": [\n'
FOOT = b"\n]}\n"
SEPARATOR = b",\n"
DIGEST_ALGORITHM = "sha256$"
_DIGEST_SIZE = 32
_DIGEST_START = len(DIGEST_ALGORITHM)
_DIGEST_END = _DIGEST_START + 2 * _DIGEST_SIZE

_Tokens = TypeVar("_Tokens")


class Contents(NamedTuple, Generic[_Tokens]):
    """The contents of a token file.

    Attributes:
        tokens: every token by its digest.
        blank: the file is an empty JSON object, which does not configure authentication.
        ancestral: the file is in the ancestor's format and holds plain tokens.
    """

    tokens: _Tokens
    blank: bool = False
    ancestral: bool = False


class StoredToken(Token, frozen=True, kw_only=True, gc=False):
    """A token's record in a file."""

    digest: str


class _File(msgspec.Struct):
    tokens: list[StoredToken]


class _AncestralToken(msgspec.Struct):
    name: str
    created_at: datetime
    last_used: datetime | None = None
    active: bool = True


_decode_list = msgspec.json.Decoder(Annotated[tuple[StoredToken, ...], msgspec.Meta(min_length=1)]).decode
_decode_file = msgspec.json.Decoder(_File).decode
_decode_any = msgspec.json.Decoder().decode
_set = msgspec.structs.force_setattr


def decode(content: bytes) -> Contents[dict[bytes, Token]]:
    """Decode the bytes of a token file, its tokens oldest first.

    Raises:
        ValueError: the bytes are no token file; the message gives the fault and its place.
    """
    with contextlib.suppress(ValueError):
        return Contents(_index(chain.from_iterable(decode_batches([content]))))
    content = content.removeprefix(BOM_UTF8)
    with explained(content):
        return _decode_any_layout(content)


def decode_batches(pieces: Iterable[bytes]) -> Iterator[tuple[StoredToken, ...]]:
    """Yield the records of a file in this library's own layout, one batch for each of its *pieces*.

    Raises:
        ValueError: the file is in another layout, or has a fault; :func:`decode` finds its place.
    """
    following = iter(pieces)
    first = next(following, b"").removeprefix(BOM_UTF8)
    if not first.startswith(HEAD):
        raise ValueError
    rest = first[len(HEAD) :]
    for piece in following:
        lines, separator, line = rest.rpartition(SEPARATOR)
        if not separator:  # a line longer than a piece: not worth joining pieces
            raise ValueError
        yield _decode_batch(lines)
        rest = line + piece
    if not rest.endswith(FOOT):
        raise ValueError
    yield _decode_batch(rest[: -len(FOOT)])


def _decode_batch(lines: bytes) -> tuple[StoredToken, ...]:
    try:
        return _decode_list(b"[%b]" % lines)
    except (RecursionError, msgspec.MsgspecError):
        raise ValueError from None


def _decode_any_layout(content: bytes) -> Contents[dict[bytes, Token]]:
    document = _decode_any(content)
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004  one kind of error for every bad file
    if not document:
        return Contents({}, blank=True)
    if "version" not in document and all(isinstance(value, dict) for value in document.values()):
        return Contents(_index(_from_ancestor(document)), ancestral=True)
    version = document.get("version")
    if type(version) is not int or version != VERSION:  # true and 1.0 equal 1
        raise ValueError(f"its version is {version!r:.20}; this release reads version {VERSION}")
    try:
        stored = _decode_file(content).tokens
    except msgspec.MsgspecError:
        raise ValueError(shape_fault(content, StoredToken)) from None
    return Contents(_index(stored))


def take_digest(token: StoredToken) -> bytes:
    """Remove the digest from a record and return it: it becomes the key, and a second copy would take 120 bytes.

    Raises:
        ValueError: the field is no digest.
    """
    text = token.digest
    if text[:_DIGEST_START] == DIGEST_ALGORITHM and len(text) == _DIGEST_END:  # startswith takes 70 ns longer
        digest = bytes.fromhex(text[_DIGEST_START:])
        if len(digest) == _DIGEST_SIZE:  # fromhex skips blanks
            _set(token, "digest", "")
            return digest
    raise ValueError


def _index(stored: Iterable[StoredToken]) -> dict[bytes, Token]:
    tokens: dict[bytes, Token] = {}
    ids: set[str] = set()
    for place, token in enumerate(stored):
        try:
            digest = take_digest(token)
        except ValueError:
            problem = f"$.tokens[{place}].digest must be 'sha256$' and 64 hexadecimal digits"
            raise ValueError(problem) from None
        tokens[digest] = token
        ids.add(token.id)
        if len(tokens) != place + 1:
            raise ValueError(f"the digest at $.tokens[{place}] stands there twice")
        if len(ids) != place + 1:
            raise ValueError(f"the id at $.tokens[{place}] stands there twice: {printable(token.id)}")
    return tokens


def _from_ancestor(document: dict[str, Any]) -> Iterable[StoredToken]:
    for number, (secret, value) in enumerate(document.items(), start=1):
        entry = f"entry {number} of a file of plain tokens"  # not its key: that is the plain token
        fault = record_fault(value, _AncestralToken, f"{entry}: ")
        if fault is not None:
            raise ValueError(fault)
        if not secret:
            raise ValueError(f"{entry} is an empty token")
        record = msgspec.convert(value, _AncestralToken)
        digest = digest_of(secret)
        try:
            created_at = record.created_at.astimezone()
            last_used_at = record.last_used and record.last_used.astimezone()
        except OverflowError:
            raise ValueError(f"{entry}: a date is out of range") from None
        yield StoredToken(
            id=digest.hex()[:12],  # the same in every reading
            name=record.name,
            prefix=prefix_of(secret),
            digest=DIGEST_ALGORITHM + digest.hex(),
            created_at=created_at,
            revoked_at=None if record.active else last_used_at or created_at,
            last_used_at=last_used_at,
        )
