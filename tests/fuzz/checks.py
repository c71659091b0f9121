"""What holds for any input at all: bytes in headers and files, text in subprotocols, arguments and names.

Each ``check_…`` says what must hold for one input, and compares with a model that was written apart from the package.
``test_properties.py`` feeds them what hypothesis makes up, ``fuzz.py`` what a fuzzer finds: for it :data:`TARGETS`
makes inputs of any bytes. Nothing here needs pytest, so each ``assert`` says what was found.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import re
import sys
import tempfile
import time
import unicodedata
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio

from freegpt_auth import (
    UNRESOLVED,
    AuthMode,
    BearerTokenMiddleware,
    FileTokenStore,
    MemoryTokenStore,
    StoreError,
    Token,
)
from freegpt_auth.cli import main
from freegpt_auth.guard import refusal_log
from freegpt_auth.guard.authenticator import Authenticator
from freegpt_auth.guard.callers import ANONYMOUS, Caller
from freegpt_auth.guard.credentials import Presented
from freegpt_auth.stores.file import store as file_store
from freegpt_auth.tokens import issue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAST, NOW, FUTURE = (datetime(year, 1, 1, tzinfo=UTC) for year in (2024, 2025, 2999))
PREFIX = "openai-insecure-api-key."
CARRIERS = [b"authorization", b"x-api-key", b"api-key"]
PREFLIGHT = [b"origin", b"access-control-request-method"]
KEY = b"the-environment-key"
LIVE = [b"sk-live", b"another, with blanks", b"\xa0\xfc\x85", b"k" * 4096]
DEAD = [b"sk-revoked", b"sk-expired", b"k" * 4097]
FORGING = "\x1b[2J\nrefused 127.0.0.1 /: unknown"

# The format characters of scripts: joiners, the soft hyphen, the Mongolian vowel separator and the signs that are seen.
JOINERS = {"\u200c", "\u200d", "\u2060", "\xad", "\u180e", "\u06dd", "\u070f", "\u0890", "\u0891", "\u08e2"}
JOINERS |= {chr(code) for start, end in ((0x600, 6), (0x13430, 16), (0x1BCA0, 4)) for code in range(start, start + end)}
JOINERS |= {"\U000110bd", "\U000110cd"}
BLANK = set("\u115f\u1160\u3164\uffa0\u2800\U0001d159\ufffc")

SECRETS = ["sk-one", "two", "drei-ü", "sk-proj-four-4", "no token's"]
GENERATED, IMPORTED = "sk-" + "0" * 43 + "3P9rQy", "sk-proj-imported-from_elsewhere"
ENDS = {GENERATED: "P9rQy", IMPORTED: "imported-from_elsewhere"}  # which begin as no escaped character ends

Headers = list[tuple[bytes, bytes]]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Keep no refusal out of the log, let no writer wait for a server, and find no line of the log forged."""
    logger, heard = logging.getLogger("freegpt_auth"), _Ear()
    level = logger.level
    with (
        mock.patch.object(file_store, "FRESHNESS", 0.0),
        mock.patch.object(refusal_log, "SHOWN", sys.maxsize),
        mock.patch.multiple(logger, handlers=[heard], propagate=False),
    ):
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
    forged = [text for text in heard.texts if not prints(text)]
    assert forged == [], forged


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what was said."""
        self.texts.append(record.getMessage())


def prints(text: str) -> bool:
    """Tell whether nothing in the text moves a cursor, starts a line, turns the reading direction or hides."""
    return all(unicodedata.category(c) == "Zs" or unicodedata.category(c)[0] not in "CZ" or c in JOINERS for c in text)


def digest(secret: str) -> bytes:
    """Return what stands for a secret in a token file."""
    return sha256(secret.encode()).digest()


# --- requests


@functools.cache
def guard() -> BearerTokenMiddleware:
    """Return a middleware with the live and the dead secrets, and an environment key."""
    store = MemoryTokenStore()
    for number, secret in enumerate(LIVE + DEAD):
        ends = {"revoked_at": PAST if number == 4 else None, "expires_at": PAST if number == 5 else None}
        token = Token(id=f"{number}{FORGING}", name=f"token {number}", prefix="", created_at=PAST, **ends)
        store.add(sha256(secret).digest(), token)
    with mock.patch.dict(os.environ, FREEGPT_API_KEY=KEY.decode()):
        return BearerTokenMiddleware(mock.AsyncMock(), store=store)


NAMES = {**{secret: f"token {number}" for number, secret in enumerate(LIVE)}, KEY: "environment"}


def credentials(kind: str, headers: Headers, subprotocols: list[str]) -> tuple[list[bytes], bool]:
    """Return the secrets that a request presents, and whether it is malformed, by the rules of the wire as we tell them."""
    carriers = [(name, value) for name, value in headers if name in CARRIERS]
    forms = {b"authorization": rb"(?is)[ \t]*bearer [ \t]*(.*?)[ \t]*"}
    matches = [re.fullmatch(forms.get(name, rb"(?s)[ \t]*(.*?)[ \t]*"), value) for name, value in carriers]
    offers = [offer.strip(" \t") for value in subprotocols for offer in value.split(",")] * (kind == "websocket")
    keys = [offer.removeprefix(PREFIX) for offer in offers if offer.startswith(PREFIX)]
    values = [match[1] for match in matches if match and match[1]]
    values += [key.encode() if key.isascii() else b"not to be guessed" for key in keys if key]
    joined = [name for name, value in carriers if re.search(rb"(?i),[ \t]*(?:bearer|basic) ", value)]
    malformed = len({name for name, _ in carriers}) < len(carriers) or len(keys) > 1 or b"authorization" in joined
    return values, malformed


def expected(kind: str, method: str, headers: Headers, subprotocols: list[str]) -> object:
    """Return the name of the caller, or how the request is refused, by the rules of the wire as we tell them."""
    values, malformed = credentials(kind, headers, subprotocols)
    callers = [NAMES[value] for value in values if value in NAMES] * (not malformed)
    if not callers and kind == "http" and method == "OPTIONS" and {*PREFLIGHT} <= {name for name, _ in headers}:
        return ""
    error = b'error="invalid_request"' if malformed else b'error="invalid_token"' if values else b""
    return callers[0] if callers else (400 if malformed else 401, error)


def check_request(kind: str, method: str, path: str, headers: Headers, subprotocols: list[str]) -> None:
    """A request reaches the application with the right caller and no valid secret, or gets the right, complete refusal."""
    offer = ", ".join(subprotocols).encode("latin-1", "replace")
    scope: dict[str, Any] = {"type": kind, "path": path, "headers": [*headers, (b"sec-websocket-protocol", offer)]}
    if kind == "http":
        scope["method"] = method
    else:
        scope |= {"subprotocols": [*subprotocols], "extensions": {"websocket.http.response": {}}}
    with watched():
        seen, sent = anyio.run(_answer, scope)
    outcome = [each["user"].display_name for each in seen] or [refusal(kind, method, sent)]
    wanted = [expected(kind, method, headers, subprotocols)]
    assert outcome == wanted, f"{outcome} is not {wanted}"
    for each in seen:
        offers = [value.decode("latin-1") for name, value in each["headers"] if name == b"sec-websocket-protocol"]
        for left in (offers, each.get("subprotocols", [])):
            values, _ = credentials(kind, each["headers"], left)
            assert not {*values} & NAMES.keys() or not each["user"].display_name, values


async def _answer(scope: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the scopes that the application sees, and the messages that are sent in its place."""
    seen: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope)

    async def receive() -> Any:
        return {"type": "http.request" if scope["type"] == "http" else "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = guard()
    guarded.app = app
    await guarded(scope, receive, send)
    return seen, sent


def refusal(kind: str, method: str, sent: list[Any]) -> object:
    """Return status and error of a refusal, which is a whole response as ASGI defines it."""
    start, *bodies = sent
    stem = "http.response" if kind == "http" else "websocket.http.response"
    assert [message["type"] for message in sent] == [f"{stem}.start", *[f"{stem}.body"] * len(bodies)], sent
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False], sent
    headers, body = dict(start["headers"]), b"".join(message["body"] for message in bodies)
    assert len(headers) == len(start["headers"]), sent
    assert body == b"" if method == "HEAD" and kind == "http" else json.loads(body)["error"], sent
    assert headers.get(b"content-length") in (None, b"%d" % len(body)) or method == "HEAD", sent
    scheme, *attributes = headers[b"www-authenticate"].split(b", ")
    assert scheme == b'Bearer realm="freegpt_auth"', sent
    return start["status"], b", ".join(attributes)


# --- token files


def row(secret: str, **fields: object) -> dict[str, Any]:
    """Return a record as it stands in a token file."""
    number = digest(secret).hex()
    known = {
        "id": number[:12],
        "name": "n",
        "prefix": "p",
        "digest": f"sha256${number}",
        "created_at": PAST.isoformat(),
    }
    return known | fields


def written(rows: list[Any]) -> bytes:
    """Return a token file in the layout of this library."""
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(each).encode() for each in rows) + b"\n]}\n"


def active(content: bytes) -> set[bytes]:
    """Return the digests of the tokens that work, as Python's own JSON reader sees the file."""
    document = json.loads(content.decode("utf-8", "surrogateescape"), parse_int=str)
    if "version" not in document:
        return {digest(secret) for secret, entry in document.items() if entry.get("active", True)}
    rows = document["tokens"]
    are_unique = all(len({each[name] for each in rows}) == len(rows) for name in ("id", "digest"))
    return {
        bytes.fromhex(each["digest"].removeprefix("sha256$"))
        for each in rows * are_unique
        if each.get("revoked_at") is None and not is_past(each.get("expires_at"))
    }


def is_past(instant: str | None) -> bool:
    """Tell whether a moment has come. RFC 3339 has the letters in a date in either case, Python in one."""
    return instant is not None and datetime.fromisoformat(instant.upper()) <= datetime.now(UTC)


def says_nothing(content: bytes) -> bool:
    """Tell whether the file is an empty JSON object, which is as good as no file."""
    try:
        return bool(json.loads(content.decode()) == {})
    except (ValueError, RecursionError):
        return False


def check_file(content: bytes) -> set[str]:
    """No bytes in the place of a token file raise, open a server, or let a secret in that is not listed as active."""
    with watched(), tempfile.TemporaryDirectory() as folder:
        path, nothing = Path(folder, "any.json"), says_nothing(content)
        path.write_bytes(content)
        store = FileTokenStore(path)
        authenticator = Authenticator(store, None)
        opened = [
            authenticator.mode is AuthMode.OPEN,
            authenticator.resolve(Presented([])) is ANONYMOUS,
            not store.survey().configured,
        ]
        assert opened == [nothing] * 3, opened
        accepted = {secret for secret in SECRETS if is_accepted(authenticator, digest(secret))}
        assert not accepted or {digest(secret) for secret in accepted} <= active(content), accepted
        with contextlib.suppress(StoreError):
            tokens = store.tokens()
            live = {key for key, token in tokens.items() if token.status(time.time()) == "active"}
            assert live <= active(content), live
            shown = {secret for secret in SECRETS if digest(secret) in live}
            assert shown == accepted, f"{shown} is not {accepted}"
    return accepted


def is_accepted(authenticator: Authenticator, digest: bytes) -> bool:
    """Tell whether a request with this secret passes, decided step by step as the middleware does."""
    decision = authenticator.peek(Presented([digest]))
    if decision is UNRESOLVED:
        decision = authenticator.resolve(Presented([digest]))
    return isinstance(decision, Caller) and decision is not ANONYMOUS


# --- arguments and names


def run(arguments: list[str], content: bytes) -> tuple[object, str, str]:
    """Run a command in a folder of its own, and return its exit status, its output, and what it said."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        watched(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(f"{GENERATED}\n")),
    ):
        place = Path(folder, "a", "b")  # so deep that ".." reaches nothing else
        place.mkdir(parents=True)
        with contextlib.chdir(place):
            Path("api_tokens.json").write_bytes(content)
            try:
                status: object = main(arguments)
            except SystemExit as exit_:
                status = exit_.code
    for stream in (out, err):
        stream.seek(0)
    return status, out.read(), err.read()


def check_arguments(arguments: list[str]) -> None:
    """A command ends with 0, 1 or 2, and if it fails with one line that shows no secret."""
    tokens = [row(GENERATED, prefix=GENERATED[:14]), row(IMPORTED, prefix=IMPORTED[:10])]
    status, out, err = run(arguments, written(tokens))
    assert status in (0, 1, 2), status
    line, stop, more = err.partition("\n")
    assert not status or (prints(line), stop, more, out) == (True, "\n", "", ""), (out, err)
    for secret, end in ENDS.items():
        harmless = any(each.count(end) > each.count(secret) for each in arguments)  # the end alone is no secret
        assert not status or harmless or end not in err, err


def check_name(name: str) -> None:
    """A name that could drive a terminal is never given to a token, and never shown where a file holds it."""
    try:
        given = issue(name, now=NOW)[0].name
    except ValueError as error:
        given = str(error)
    is_seen = any(unicodedata.category(c)[0] in "LNPS" and c not in BLANK for c in name)
    good = prints(name) and is_seen and len(name) <= 200
    assert given == name if good else given.startswith("a token's name must not"), given
    twins = [
        row(secret, name=name, prefix=name, id=f"{number}{name[:60]}") for number, secret in enumerate(SECRETS[:2])
    ]
    is_text = not any(unicodedata.category(character) == "Cs" for character in name)
    status, *texts = run(["list"], written(twins))
    shape = (status, *(len(text.split("\n")) for text in texts))
    assert shape == ((0, 14, 1) if is_text else (1, 1, 2)), shape
    for reference in (name, f"0{name[:60]}", SECRETS[0]):
        status, out, err = run(["delete", "--", reference], written(twins))
        assert (status in (0, 1, 2), out) == (True, ""), (status, out)
        texts.append(err)
    bare = [line for text in texts for line in text.split("\n") if not prints(line)]
    assert bare == [], bare


# --- what a fuzzer's bytes mean


def _request(raw: bytes) -> None:
    """Read a request's head, as in HTTP: a method (``WEBSOCKET`` is one) and a path, then names and values."""
    start, *lines = raw.split(b"\n")
    method, _, path = start.decode("utf-8", "surrogateescape").partition(" ")
    pairs = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in lines)]
    headers = [pair for pair in pairs if pair[0] != b"sec-websocket-protocol"]
    protocols = [value.decode("latin-1") for name, value in pairs if name == b"sec-websocket-protocol"]
    check_request("websocket" if method == "WEBSOCKET" else "http", method, path, headers, protocols)


def _arguments(raw: bytes) -> None:
    """Read one argument a line; none has a slash, so that no command leaves its folder."""
    check_arguments([os.fsdecode(line) for line in raw.translate(None, b"\0/").split(b"\n")])


TARGETS: dict[str, Callable[[bytes], object]] = {"file": check_file, "request": _request, "arguments": _arguments}
"""What each folder of the corpus is fed to."""
