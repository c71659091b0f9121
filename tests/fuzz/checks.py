"""Checks of one input: bytes in headers and files, text in subprotocols, arguments.

Each ``check_…`` compares the package with an independent model. ``test_properties.py`` calls the checks with inputs of
hypothesis, ``fuzz.py`` with inputs of a fuzzer: :data:`TARGETS` converts bytes into inputs. The fuzzer runs without
pytest, so each ``assert`` has its own message.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import logging.handlers
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

# The format characters of scripts: joiners, the soft hyphen, the Mongolian vowel separator and the visible signs.
JOINERS = {"\u200c", "\u200d", "\u2060", "\xad", "\u180e", "\u06dd", "\u070f", "\u0890", "\u0891", "\u08e2"}
JOINERS |= {chr(code) for start, end in ((0x600, 6), (0x13430, 16), (0x1BCA0, 4)) for code in range(start, start + end)}
JOINERS |= {"\U000110bd", "\U000110cd"}

SECRETS = ["sk-one", "two", "drei-ü", "sk-proj-four-4", "no token's"]
GENERATED, IMPORTED = "sk-" + "0" * 43 + "3P9rQy", "sk-proj-imported-from_elsewhere"
ENDS = {GENERATED: "P9rQy", IMPORTED: "imported-from_elsewhere"}  # their first characters end no escape sequence

Headers = list[tuple[bytes, bytes]]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Log every refusal, skip the wait of writers for servers, and fail if a line of the log is forged."""
    logger, heard = logging.getLogger("freegpt_auth"), logging.handlers.BufferingHandler(sys.maxsize)
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
    forged = [record.getMessage() for record in heard.buffer if not prints(record.getMessage())]
    assert forged == [], forged


def prints(text: str) -> bool:
    """Return whether no character of *text* moves a cursor, starts a line, changes the direction or is invisible."""
    return all(unicodedata.category(c) == "Zs" or unicodedata.category(c)[0] not in "CZ" or c in JOINERS for c in text)


def digest(secret: str) -> bytes:
    """Return the digest of a secret, as in a token file."""
    return sha256(secret.encode()).digest()


# --- requests


@functools.cache
def guard() -> BearerTokenMiddleware:
    """Return a middleware over the live and the dead secrets, with an environment key."""
    store = MemoryTokenStore()
    for number, secret in enumerate(LIVE + DEAD):
        ends: dict[str, Any] = {4: {"revoked_at": PAST}, 5: {"expires_at": PAST}}.get(number, {})
        token = Token(id=f"{number}{FORGING}", name=f"token {number}", prefix="", created_at=PAST, **ends)
        store.add(sha256(secret).digest(), token)
    with mock.patch.dict(os.environ, FREEGPT_API_KEY=KEY.decode()):
        return BearerTokenMiddleware(mock.AsyncMock(), store=store)


NAMES = {**{secret: f"token {number}" for number, secret in enumerate(LIVE)}, KEY: "environment"}


def credentials(kind: str, headers: Headers, subprotocols: list[str]) -> tuple[list[bytes], bool]:
    """Return the secrets that a request presents, and whether it is malformed, by the documented rules."""
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
    """Return the name of the caller, or status and error of the refusal, by the documented rules."""
    values, malformed = credentials(kind, headers, subprotocols)
    callers = [NAMES[value] for value in values if value in NAMES] * (not malformed)
    if not callers and kind == "http" and method == "OPTIONS" and {*PREFLIGHT} <= {name for name, _ in headers}:
        return ""
    error = b'error="invalid_request"' if malformed else b'error="invalid_token"' if values else b""
    return callers[0] if callers else (400 if malformed else 401, error)


def check_request(kind: str, method: str, path: str, headers: Headers, subprotocols: list[str]) -> None:
    """Check that a request reaches the application with its caller and no valid secret, or gets the expected denial."""
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
    """Return the scopes that the application receives, and the messages of a denial."""
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
    """Return status and error of a denial; check that it is a complete response by the ASGI specification."""
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
    """Return a record of a token file."""
    number = digest(secret).hex()
    known = {"id": number[:12], "name": "n", "prefix": "p", "digest": f"sha256${number}"}
    return {**known, "created_at": PAST.isoformat(), **fields}


def written(rows: list[Any]) -> bytes:
    """Return a token file in the layout of this library."""
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(each).encode() for each in rows) + b"\n]}\n"


def active(content: bytes) -> set[bytes]:
    """Return the digests of the active tokens, read by Python's own JSON parser."""
    document = json.loads(content.decode("utf-8", "surrogateescape"), parse_int=str)
    if "version" not in document:
        return {digest(secret) for secret, entry in document.items() if entry.get("active", True)}
    rows = document["tokens"]
    are_unique = all(len({each[name] for each in rows}) == len(rows) for name in ("id", "digest"))
    live = [each for each in rows if each.get("revoked_at") is None and not is_past(each.get("expires_at"))]
    return {bytes.fromhex(each["digest"].removeprefix("sha256$")) for each in live * are_unique}


def is_past(instant: str | None) -> bool:
    """Return whether an instant has passed. RFC 3339 allows the letters of a date in either case, Python in one."""
    return instant is not None and datetime.fromisoformat(instant.upper()) <= datetime.now(UTC)


def is_empty_object(content: bytes) -> bool:
    """Return whether the file is an empty JSON object, which counts as no file."""
    try:
        return bool(json.loads(content.decode()) == {})
    except (ValueError, RecursionError):
        return False


def check_file(content: bytes) -> set[str]:
    """Check that no content of a token file opens a server or accepts more than its active secrets; return those."""
    with watched(), tempfile.TemporaryDirectory() as folder:
        path, nothing = Path(folder, "any.json"), is_empty_object(content)
        path.write_bytes(content)
        store = FileTokenStore(path)
        authenticator = Authenticator(store, None)
        passes = authenticator.resolve(Presented([])) is ANONYMOUS
        opened = [authenticator.mode is AuthMode.OPEN, passes, not store.survey().configured]
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
    """Return whether a request with this secret is accepted, in the steps of the middleware."""
    presented = Presented([digest])
    decision = authenticator.peek(presented)
    caller = authenticator.resolve(presented) if decision is UNRESOLVED else decision
    return isinstance(caller, Caller) and caller is not ANONYMOUS


# --- arguments


def run(arguments: list[str], content: bytes) -> tuple[object, str, str]:
    """Run a command in a folder of its own; return its exit status, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        watched(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(f"{GENERATED}\n")),
    ):
        place = Path(folder, "a", "b")  # two levels, for arguments with ".."
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
    """Check that a command ends with 0, 1 or 2, and on failure prints one line without a secret."""
    tokens = [row(GENERATED, prefix=GENERATED[:14]), row(IMPORTED, prefix=IMPORTED[:10])]
    status, out, err = run(arguments, written(tokens))
    assert status in (0, 1, 2), status
    line, stop, more = err.partition("\n")
    assert not status or (prints(line), stop, more, out) == (True, "\n", "", ""), (out, err)
    for secret, end in ENDS.items():
        # An argument may be only the end of a secret.
        harmless = any(each.count(end) > each.count(secret) for each in arguments)
        assert not status or harmless or end not in err, err


# --- inputs of the fuzzer


def _request(raw: bytes) -> None:
    """Check a request: a line with a method (``WEBSOCKET`` is one) and a path, then lines of headers."""
    start, *lines = raw.split(b"\n")
    method, _, path = start.decode("utf-8", "surrogateescape").partition(" ")
    pairs = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in lines)]
    headers = [pair for pair in pairs if pair[0] != b"sec-websocket-protocol"]
    protocols = [value.decode("latin-1") for name, value in pairs if name == b"sec-websocket-protocol"]
    check_request("websocket" if method == "WEBSOCKET" else "http", method, path, headers, protocols)


def _arguments(raw: bytes) -> None:
    """Check arguments, one per line. Slashes are removed: no command may write outside its folder."""
    check_arguments([os.fsdecode(line) for line in raw.translate(None, b"\0/").split(b"\n")])


TARGETS: dict[str, Callable[[bytes], object]] = {"file": check_file, "request": _request, "arguments": _arguments}
"""The check of each folder of the corpus."""
