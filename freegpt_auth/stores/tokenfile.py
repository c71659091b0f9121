"""What stands in ``api_tokens.json``: from its bytes to tokens. Pure. The way back is in :mod:`.document`.

::

    {"version": 1, "tokens": [
    {"id": …, "name": …, "prefix": …, "digest": "sha256$…", "created_at": …, "expires_at": …, …},
    {…}
    ]}

One token per line makes a difference easy to read. It also lets a large file be decoded some lines at a time, so that
the interpreter lock is given up in between; the whole decoded in one piece by a thread holds the event loop 80 ms at
100,000 tokens. Any other layout of the same JSON is read too.

The format of this project's ancestor is read as well: ``{"<plain token>": {"name", "created_at", "last_used",
"active"}}``.
"""

from __future__ import annotations

import contextlib
from datetime import datetime  # noqa: TC003  msgspec reads the annotations when it runs
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec

from ..names import printable
from ..tokens import Token, digest_of, prefix_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

VERSION = 1
"""Of the format."""

# The layout: what stands before the first token, after the last, and between two.
HEAD = b'{"version": 1, "tokens": [\n'
FOOT = b"\n]}\n"
SEPARATOR = b",\n"
DIGEST_ALGORITHM = "sha256$"
_DIGEST_SIZE = 32
_DIGEST_START = len(DIGEST_ALGORITHM)
_DIGEST_END = _DIGEST_START + 2 * _DIGEST_SIZE

_Tokens = TypeVar("_Tokens")


class Contents(NamedTuple, Generic[_Tokens]):
    """What a token file says.

    Attributes:
        tokens: every token by its digest.
        blank: the file is an empty JSON object, which says nothing at all.
        ancestral: it is in the ancestor's format and holds plain tokens.
    """

    tokens: _Tokens
    blank: bool = False
    ancestral: bool = False


class StoredToken(Token, frozen=True, kw_only=True, gc=False):
    """A token's record as it stands in a file."""

    digest: str


class _File(msgspec.Struct):
    version: int
    tokens: list[StoredToken]


class _AncestralToken(msgspec.Struct):
    name: str
    created_at: datetime
    last_used: datetime | None = None
    active: bool = True


_decode_batch = msgspec.json.Decoder(Annotated[tuple[StoredToken, ...], msgspec.Meta(min_length=1)]).decode
_decode_file = msgspec.json.Decoder(_File).decode
_decode_any = msgspec.json.Decoder().decode
_set = msgspec.structs.force_setattr


def read(content: bytes) -> Contents[dict[bytes, Token]]:
    """Return what the bytes of a token file say: its tokens oldest first.

    Raises:
        ValueError: they are no token file; the message says what is wrong and where.
    """
    with contextlib.suppress(ValueError):
        return Contents(_index(chain.from_iterable(batches([content]))))
    with plain_errors():
        return _read_whole(content)


@contextlib.contextmanager
def plain_errors() -> Generator[None]:
    """Make one kind of error of all that bad JSON raises."""
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except msgspec.MsgspecError as error:  # a ValueError by itself only from msgspec 0.21 on
        raise ValueError(str(error)) from None


def batches(pieces: Iterable[bytes]) -> Iterator[tuple[StoredToken, ...]]:
    """Yield the records of a file in this library's own layout, those of one piece of it at a time.

    Raises:
        ValueError: it is in another layout, or there is an error whose place only the whole file shows.
    """
    following = iter(pieces)
    first = next(following, b"")
    if not first.startswith(HEAD):
        raise ValueError
    rest = first[len(HEAD) :]
    with plain_errors():
        for piece in following:
            lines, separator, line = rest.rpartition(SEPARATOR)
            if not separator:  # such long lines are not worth the copies that joining piece to piece would take
                raise ValueError
            yield _decode_batch(b"[%b]" % lines)
            rest = line + piece
        if not rest.endswith(FOOT):
            raise ValueError
        yield _decode_batch(b"[%b]" % rest[: -len(FOOT)])


def _read_whole(content: bytes) -> Contents[dict[bytes, Token]]:
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


def take_digest(token: StoredToken) -> bytes:
    """Take the digest out of a record. It is the key from here on; a second copy of it would cost 120 bytes.

    Raises:
        ValueError: it is none.
    """
    text = token.digest
    if text[:_DIGEST_START] == DIGEST_ALGORITHM and len(text) == _DIGEST_END:  # startswith takes 70 ns more
        digest = bytes.fromhex(text[_DIGEST_START:])
        if len(digest) == _DIGEST_SIZE:  # blanks are no digits, and are skipped
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
            problem = f"expected 'sha256$' and 64 hexadecimal digits - at $.tokens[{place}].digest"
            raise ValueError(problem) from None
        tokens[digest] = token
        ids.add(token.id)
        if len(tokens) != place + 1:
            raise ValueError(f"the digest at $.tokens[{place}] stands there twice")
        if len(ids) != place + 1:
            raise ValueError(f"the id at $.tokens[{place}] stands there twice: {printable(token.id)}")
    return tokens


def _from_ancestor(document: dict[str, Any]) -> Iterable[StoredToken]:
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
        yield StoredToken(
            id=digest.hex()[:12],  # the same at every reading
            name=record.name,
            prefix=prefix_of(secret),
            digest=DIGEST_ALGORITHM + digest.hex(),
            created_at=created_at,
            revoked_at=None if record.active else last_used_at or created_at,
            last_used_at=last_used_at,
        )
