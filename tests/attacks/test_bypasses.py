"""However a request without a credential is spelled, real servers refuse or drop it.

The requests are bytes on a socket, or HTTP/2 frames without validation: no client corrects them. The application behind
the middleware answers REACHED to every path and method except two public paths, so a bypass is visible in the raw
answer. Over HTTP/2 the table of HTTP/1 is sent again, with further requests that only HTTP/2 can express.

``spellings.txt`` has the tables, one entry a line. It leaves out spellings that are let through by right: those that a
server decodes to a public path (``/%68ealth``), a preflight, and the spellings of a credential that RFC 9110 allows.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from base64 import b64encode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

from freegpt_auth import FileTokenStore
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.watch import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.attacks.conftest import Record
    from tests.helpers.servers import Serve

APPLICATION = """
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from freegpt_auth import BearerTokenMiddleware

class Reached:
    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            await PlainTextResponse("REACHED")(scope, receive, send)
            return
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "REACHED"})

app = FastAPI(redirect_slashes=False)
for path in ("/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/healthsecret", "/health/"):
    app.add_route(path, Reached())
app.mount("/api", Reached())
app.router.default = Reached()
app.add_middleware(BearerTokenMiddleware, public_paths=["/health", "/docs"])

@app.get("/health")
async def health():
    return "PUBLIC"

mounted = Starlette(routes=[Mount("/{tenant}", app)])
"""
TOKEN, VALID = issue("client", now=datetime.now(UTC))
DIGEST = digest_of(VALID)
LEAST = 150
"""Fewest distinct requests that a server must answer in each test."""

PROXIED = "app:app --root-path /prefix --proxy-headers --forwarded-allow-ips *"
UVICORN = {ws: f"app:app --ws {ws}" for ws in ("websockets", "websockets-sansio", "wsproto")}
UVICORN |= {"mounted": "app:mounted", "proxied": PROXIED}
HYPERCORN = {
    "hypercorn": "hypercorn app:app",
    "hypercorn-mounted": "hypercorn app:mounted",
    "hypercorn-root": "hypercorn app:app --root-path /prefix",
}
SERVERS = {
    f"uvicorn-{http}-{kind}": f"uvicorn {arguments} --http {http}"
    for http in ("h11", "httptools")
    for kind, arguments in UVICORN.items()
}
SERVERS |= HYPERCORN
QUICK = {"uvicorn-h11-wsproto", "uvicorn-httptools-websockets-sansio", "hypercorn"}
"""The servers that the quick run attacks: each implementation of HTTP and WebSockets, not mounted."""

WAIT = {"uvicorn": ("--timeout-keep-alive", "1"), "hypercorn": ("--keep-alive", "1", "--graceful-timeout", "1")}


# --- the tables

PREFLIGHT = "Origin: http://x|Access-Control-Request-Method: GET"
BEARER = f"Authorization: Bearer {VALID}"
LOWER_BEARER = f"authorization: Bearer {VALID}"
EXTENDED = ":method: CONNECT|:protocol: websocket|:path: /v1/realtime|sec-websocket-version: 13"
INNER = "GET /v1/models HTTP/1.1|Host: x|Connection: close||"
INNER_BYTES = len(INNER) + INNER.count("|")
CHUNKED = "Transfer-Encoding: chunked"
SUBPROTOCOL = "openai-insecure-api-key."
PARTS = {"CUT": VALID[:-1], "TAIL": VALID[1:], "BARE": VALID[3:], "START": VALID[:9], "END": VALID[9:]}
CASES = {"REVERSED": VALID[::-1], "UPPER": VALID.upper(), "LOWER": VALID.lower(), "ESCAPED": VALID.replace("-", "%2d")}
BASE64 = {"BASE64": VALID, "BASIC": f"client:{VALID}", "BASIC_USER": f"{VALID}:"}
HASHES = {"HEX": VALID.encode().hex(), "DIGEST": DIGEST.hex(), "DIGEST64": b64encode(DIGEST).decode()}
RECORD = {"VALID": VALID, "PREFIX": TOKEN.prefix, "ID": TOKEN.id, "A": "A", "G": "G", "S": " "}
LINES = {"BEARER": BEARER, "LOWER_BEARER": LOWER_BEARER, "PREFLIGHT": PREFLIGHT, "EXTENDED": EXTENDED}
NAMES = {
    **{name: b64encode(text.encode()).decode() for name, text in BASE64.items()},
    **PARTS,
    **CASES,
    **HASHES,
    **RECORD,
    **LINES,
    "SUBPROTOCOL": SUBPROTOCOL,
    "INNER": INNER,
    "INNER_AND_5": INNER_BYTES + 5,
    "TWENTY": "GET /v1/models HTTP/1.1|Host: x||" * 20,
    "MANY_LINES": "X: y|" * 20000,
    "POST": "POST /v1/models HTTP/1.1|Host: x|",
    "CHUNKED": CHUNKED,
    "FIXED": f"{INNER_BYTES:x}|{INNER}|0||",
}
"""The names in ``spellings.txt``."""


def read_spellings() -> dict[str, list[str]]:
    """Return the tables in ``spellings.txt``: escapes as in a Python string, names in braces, a bar for a line end."""
    text = Path(__file__).with_name("spellings.txt").read_text(encoding="ascii")
    tables: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("== "):
            entries = tables[line[3:]] = []
        elif line:
            entries.append(line.encode().decode("unicode_escape").format_map(NAMES))
    return tables


def wire(text: str) -> bytes:
    """Return text as bytes on the wire; a bar ends a line."""
    return text.replace("|", "\r\n").encode("latin-1")


def request(
    target: str = "/v1/models", lines: str = "", *, method: str = "GET", host: str = "x", body: str = ""
) -> bytes:
    """Return a request after which the server closes the connection."""
    length = f"Content-Length: {len(body)}|" if body else ""
    lines = lines and f"{lines}|"
    head = f"{method} {target} HTTP/1.1|Host: {host}|Connection: close|{length}{lines}|"
    return wire(head) + body.encode("latin-1")


def upgrade(target: str = "/v1/realtime", lines: str = "") -> bytes:
    """Return a WebSocket's opening handshake."""
    lines = lines and f"{lines}|"
    return wire(
        f"GET {target} HTTP/1.1|Host: x|Connection: Upgrade|Upgrade: websocket|Sec-WebSocket-Version: 13|"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==|{lines}|"
    )


SPELLINGS = read_spellings()
BODIES = {
    "application/json": f'{{"api_key": "{VALID}", "authorization": "Bearer {VALID}"}}',
    "application/x-www-form-urlencoded": f"access_token={VALID}&api_key={VALID}",
    "multipart/form-data; boundary=b": f'--b\r\nContent-Disposition: form-data; name="token"\r\n\r\n{VALID}\r\n--b--',
    "message/http": f"{BEARER}\r\n\r\n",
    "text/plain": wire(INNER.replace("|", f"|{BEARER}|", 1)).decode(),
}
REFUSED = [
    *map(request, SPELLINGS["paths"]),
    *(request(method=method) for method in SPELLINGS["methods"]),
    *(request(lines=lines) for lines in SPELLINGS["header lines"]),
    *(request(lines=f"Authorization: {value}") for value in SPELLINGS["authorization values"]),
    *map(wire, SPELLINGS["nearly preflights"]),
    *(request("/v1/chat/completions", f"Content-Type: {kind}", method="POST", body=BODIES[kind]) for kind in BODIES),
    *map(wire, SPELLINGS["pipelined requests"]),
    request("/v1/models/health", "Daphne-Root-Path: /v1/models"),
]
"""The middleware refuses each of these behind every server."""

MALFORMED = [
    *map(request, ["", *SPELLINGS["targets"]]),
    *(request(method=method) for method in ["", *SPELLINGS["no methods"]]),
    *(request(host=host) for host in ["", *SPELLINGS["hosts"]]),
    *(request(lines=lines) for lines in SPELLINGS["malformed header lines"]),
    request("*", method="OPTIONS"),
    request("*", "Origin: http://x", method="OPTIONS"),
    request("x:443", f"Proxy-{BEARER}", method="CONNECT"),
    *map(wire, SPELLINGS["smuggled requests"]),
]
"""A server may refuse these itself, or close the connection."""

CHANGES = [change.encode().split(b" -> ") for change in SPELLINGS["malformed handshakes"]]
WEBSOCKETS = [
    *map(upgrade, SPELLINGS["websocket targets"]),
    *(upgrade(lines=f"Sec-WebSocket-Protocol: {offer}") for offer in SPELLINGS["subprotocols"]),
    *(upgrade(lines=lines) for lines in SPELLINGS["websocket header lines"]),
    upgrade().replace(b"websocket", b"WebSocket"),
    upgrade().replace(b": Upgrade", b": keep-alive, upgrade"),
]
BROKEN_WEBSOCKETS = [
    *(upgrade().replace(old, new) for old, new in CHANGES),
    *(upgrade(lines=f"Sec-WebSocket-Protocol: {offer}") for offer in SPELLINGS["malformed subprotocols"]),
    upgrade() + b"\x81\x85\0\0\0\0hello",
]
ADMITTED = {
    request(lines=BEARER): b"REACHED",
    request("/v1/chat/completions", f"authorization: bEARER   {VALID}\t", method="POST", body="{}"): b"REACHED",
    request("//health/../v1", f"X-Api-Key: {VALID}"): b"REACHED",
    request("/api/health", f"Api-Key:{VALID}|{BEARER[:-1]}"): b"REACHED",
    request(lines=PREFLIGHT, method="OPTIONS"): b"REACHED",
    upgrade(lines=f"Sec-WebSocket-Protocol: realtime, {SUBPROTOCOL}{VALID}"): b"REACHED",
    upgrade(lines=BEARER): b"REACHED",
    request("/health"): b"PUBLIC",
    request("/%68ealth?x"): b"PUBLIC",
    request("/docs"): b"swagger",
}
CARRIERS = [BEARER, f"X-Api-Key: {VALID}", f"Api-Key: {VALID}"]


# --- the tables of HTTP/2

Fields = tuple[tuple[bytes, bytes], ...]


class Stream(NamedTuple):
    """A request in HTTP/2."""

    headers: Fields
    body: bytes = b""
    trailers: Fields = ()


OF_HTTP1 = {b"host", b"connection", b"upgrade", b"sec-websocket-key", b"transfer-encoding"}
DEFAULTS = ":method: GET|:scheme: http|:authority: x|:path: /v1/models"
ONE_REQUEST = re.compile(rb"[^\r\n]* [^\r\n]* HTTP/1\.[01]\r\n(?!.* HTTP/1\.)", re.DOTALL)


def fields(text: str) -> Fields:
    """Return the header fields in *text*, between bars; a pseudo header's name begins with a colon."""
    pairs = [line.encode("latin-1").partition(b": ") for line in text.split("|") if line]
    return tuple((name, value) for name, _, value in pairs)


def stream(text: str) -> Stream:
    """Return the request "headers||body||trailers", with the default pseudo headers that are not among its headers."""
    head, body, trailers = [*text.split("||"), "", ""][:3]
    own = fields(head)
    default = [pair for pair in fields(DEFAULTS) if pair[0] not in dict(own)]
    return Stream((*default, *own), body.encode("latin-1"), fields(trailers))


def translated(row: bytes) -> Stream:
    """Return an HTTP/1.1 request in HTTP/2; a WebSocket's handshake is an extended CONNECT (RFC 8441)."""
    head, _, body = row.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, _, target = first.rpartition(b" ")[0].partition(b" ")
    pairs = [line.partition(b":") for line in lines]
    own = [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
    websocket = b"sec-websocket-key" in dict(own)
    pseudo = [(b":method", b"CONNECT" if websocket else method), (b":scheme", b"http"), (b":path", target)]
    pseudo += [(b":authority", dict(own).get(b"host", b"")), *([(b":protocol", b"websocket")] if websocket else [])]
    return Stream((*pseudo, *(pair for pair in own if pair[0] not in OF_HTTP1)), body)


def all_translated(rows: Iterable[bytes]) -> list[Stream]:
    """Return the rows that are one request each in HTTP/2, without duplicates."""
    return [*dict.fromkeys(translated(row) for row in rows if ONE_REQUEST.match(row))]


REFUSED_STREAMS = [*map(stream, SPELLINGS["http2 headers"])]
MALFORMED_STREAMS = [
    *map(stream, SPELLINGS["malformed http2 headers"]),
    *map(Stream, map(fields, SPELLINGS["incomplete http2 headers"])),
]
SETTINGS = b"AAMAAABkAAQAAP__"
BROKEN_SETTINGS = [b"", b"!", b"A", SETTINGS + b"\r\nHTTP2-Settings: " + SETTINGS, b"\xff", b"A" * 9000]


def to_http2(row: bytes, settings: bytes = SETTINGS) -> bytes:
    """Return the request with an upgrade to HTTP/2 (RFC 7540, section 3.2)."""
    wanted = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: " + settings
    return row.replace(b"Connection: close", wanted)


def all_to_http2(rows: Iterable[bytes]) -> list[bytes]:
    """Return the rows that a server can upgrade, with an upgrade to HTTP/2.

    Requests with a body or another upgrade are left out. So are HEAD, after which the client expects a body, and
    CONNECT, after which hypercorn hangs.
    """
    unfit = re.compile(rb"(?:HEAD|CONNECT) |.*\r\n(?:Content-Length|Upgrade): ", re.DOTALL)
    fit = (row for row in rows if ONE_REQUEST.match(row) and not unfit.match(row))
    return [to_http2(row) for row in fit if b"Connection: close" in row]


# --- clients and verdicts

# hypercorn announces "connection: close" and does not always close.
ENDED = re.compile(rb"REACHED|content-length: 0\r\n(?:[^\r\n]+\r\n)*connection: close\r\n", re.IGNORECASE)
ORIGIN_FORM = re.compile(rb"^([A-Z-]+ )(?=/)", re.MULTILINE)
SWITCHED = re.compile(rb"HTTP/1\.1 101 .*?\r\n\r\n", re.DOTALL)
NEVER = re.compile(rb"(?!)")
STATUS = re.compile(rb"HTTP/(?:1\.[01]|2) (?!100)(\d+)")  # hypercorn sends 100 before the answer
CHALLENGE = b'www-authenticate: bearer realm="freegpt_auth"'
OWN_REFUSALS = {b"400", b"401", b"405", b"426", b"431", b"501"}
# uvicorn's answer to a handshake that is not ASCII
NOT_ASCII = re.compile(rb"HTTP/1\.1 500 .*\r\n\r\nFailed to open a WebSocket connection\.", re.DOTALL)
STREAMS = 100  # the most that hypercorn allows on one connection


@dataclass
class Target:
    """A server, and the path below which the application is mounted."""

    address: tuple[str, int]
    prefix: bytes

    def below(self, rows: Iterable[bytes]) -> list[bytes]:
        """Return the rows that can be sent below the mount point, with their paths below it."""
        if not self.prefix:
            return [*rows]
        return [
            ORIGIN_FORM.sub(rb"\1" + self.prefix, row)
            for row in rows
            # A path with a line break belongs to no mount point of Starlette's.
            if ORIGIN_FORM.match(row) and len(ORIGIN_FORM.findall(row)) == 1 and b"%0d%0a" not in row
        ]

    def exchange(self, row: bytes, ended: re.Pattern[bytes] = ENDED) -> bytes:
        """Send *row* on a new connection; return the answer until the server closes, or *ended* matches."""
        with self.connect() as connection:
            return exchange(connection, row, ended)

    def converse(self, requests: Iterable[Stream]) -> list[bytes]:
        """Send all *requests* as streams of one HTTP/2 connection; return the answers in order."""
        client = Http2()
        client.connection.initiate_connection()
        with self.connect() as connection:
            return client.converse(connection, requests)

    def go_on(self, opening: bytes, requests: Iterable[Stream] = ()) -> list[bytes]:
        """Send *opening* in HTTP/1.1 and *requests* in HTTP/2 after the upgrade; return the answers in that order."""
        client = Http2()
        client.connection.initiate_upgrade_connection()
        with self.connect() as connection:
            received = exchange(connection, opening, SWITCHED)
            switched = SWITCHED.match(received)
            if not switched:
                return [received]
            client.answers[1] = b""
            client.waiting.add(1)
            return client.converse(connection, requests, received[switched.end() :])

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(self.address, timeout=30)


class Http2:
    """A client that validates and corrects nothing. A dropped request has an empty answer."""

    def __init__(self) -> None:
        self.connection = H2Connection(
            H2Configuration(
                validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
            )
        )
        self.answers: dict[int, bytes] = {}
        self.waiting: set[int] = set()

    def converse(self, connection: socket.socket, requests: Iterable[Stream], received: bytes = b"") -> list[bytes]:
        """Send all *requests* and return the answers in the form of HTTP/1.1."""
        for request in requests:
            self._request(request)
        self._take(received)
        with contextlib.suppress(ConnectionError):
            connection.sendall(self.connection.data_to_send())
            while self.waiting and (block := connection.recv(65536)):
                self._take(block)
                connection.sendall(self.connection.data_to_send())
        return [*self.answers.values()]

    def _request(self, request: Stream) -> None:
        number = self.connection.get_next_available_stream_id()
        self.answers[number] = b""
        self.waiting.add(number)
        more = bool(request.body or request.trailers)
        is_open = (b":protocol", b"websocket") in request.headers
        self.connection.send_headers(number, request.headers, end_stream=not more and not is_open)
        if more:
            self.connection.send_data(number, request.body, end_stream=not request.trailers)
        if request.trailers:
            self.connection.send_headers(number, request.trailers, end_stream=True)

    def _take(self, block: bytes) -> None:
        for event in self.connection.receive_data(block):
            match event:
                case ResponseReceived(stream_id=int(number), headers=[(_, status), *headers]):
                    lines = [b"HTTP/2 " + status, *(name + b": " + value for name, value in headers), b"\r\n"]
                    self.answers[number] += b"\r\n".join(lines)
                case DataReceived(stream_id=int(number), data=bytes(data), flow_controlled_length=length):
                    self.connection.acknowledge_received_data(length or 0, number)
                    self.answers[number] += data
                    if b"REACHED" in self.answers[number]:
                        self.waiting.discard(number)
                case StreamEnded(stream_id=int(number)) | StreamReset(stream_id=int(number)):
                    self.waiting.discard(number)


def exchange(connection: socket.socket, row: bytes, ended: re.Pattern[bytes]) -> bytes:
    """Send *row*; return the answer until the server closes, or *ended* matches."""
    received = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(row)
    with contextlib.suppress(ConnectionError):
        while not ended.search(received) and (block := connection.recv(65536)):
            received += block
    return received


def is_refused(received: bytes) -> bool:
    """Return whether every answer is a refusal by the middleware."""
    statuses = STATUS.findall(received)
    challenges = received.lower().count(CHALLENGE)
    silent = b"REACHED" not in received and VALID.encode() not in received
    return silent and {*statuses} <= {b"400", b"401"} and len(statuses) == challenges > 0


def is_dropped(received: bytes) -> bool:
    """Return whether every answer is a refusal, by the middleware or the server, or there is no answer."""
    statuses = {*STATUS.findall(received)} - ({b"500"} if NOT_ASCII.match(received) else set())
    understood = bool(STATUS.search(received)) == bool(received)
    return understood and b"REACHED" not in received and statuses <= OWN_REFUSALS


@dataclass
class Attack:
    """The distinct requests that were sent to one server, and the answered ones among them."""

    record: Record
    sent: set[object] = field(default_factory=set)
    answered: set[object] = field(default_factory=set)

    def judge(self, rows: Sequence[object], received: Sequence[bytes], verdict: Callable[[bytes], bool]) -> None:
        """Check every single answer."""
        assert [pair for pair in zip(rows, received, strict=True) if not verdict(pair[1])] == []
        self.sent |= {*rows}
        self.answered |= {row for row, answer in zip(rows, received, strict=True) if answer}

    def end(self) -> None:
        """Record the counts. An attack with few answers proves little: it fails."""
        self.record(answered=len(self.answered), dropped=len(self.sent - self.answered))
        assert len(self.answered) >= LEAST


def marked(kinds: Iterable[str]) -> list[object]:
    """Return the kinds of servers, with the mark ``slow`` on all but the quick ones."""
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.fixture(scope="module", params=marked(SERVERS))
def target(request: pytest.FixtureRequest, serve_once: Serve, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Return a running server of each kind."""
    folder = tmp_path_factory.mktemp("application")
    (folder / "app.py").write_text(APPLICATION)
    store = folder / "api_tokens.json"
    FileTokenStore(store).add(DIGEST, TOKEN)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    module, app, *arguments = SERVERS[request.param].split()
    arguments += WAIT[module]
    server = serve_once(app, *arguments, module=module, FREEGPT_AUTH_STORE=str(store), PYTHONPATH=path)
    return Target(server.address, b"/health" if app == "app:mounted" else b"")


def test_no_bypass_over_http1(target: Target, record: Record) -> None:
    """No spelling of an HTTP/1 request or a WebSocket without a credential reaches the application."""
    attack = Attack(record)
    for rows, verdict in ((REFUSED + WEBSOCKETS, is_refused), (MALFORMED + BROKEN_WEBSOCKETS, is_dropped)):
        sent = target.below(rows)
        attack.judge(sent, in_parallel(target.exchange, sent), verdict)
    attack.end()


@pytest.mark.parametrize("target", marked(HYPERCORN), indirect=True, scope="module")
def test_no_bypass_over_http2(target: Target, record: Record) -> None:
    """The same holds for a hundred streams at once on an HTTP/2 connection, and for spellings of HTTP/2 itself."""
    attack = Attack(record)
    sent = all_translated(target.below(REFUSED + WEBSOCKETS)) + ([] if target.prefix else REFUSED_STREAMS)
    for begin in range(0, len(sent), STREAMS):
        some = sent[begin : begin + STREAMS]
        attack.judge(some, target.converse(some), is_refused)
    sent = all_translated(target.below(MALFORMED + BROKEN_WEBSOCKETS)) + ([] if target.prefix else MALFORMED_STREAMS)
    attack.judge(sent, in_parallel(lambda row: target.converse([row])[0], sent), is_dropped)
    attack.end()


@pytest.mark.parametrize("target", marked(HYPERCORN), indirect=True, scope="module")
def test_no_bypass_during_upgrade_to_http2(target: Target, record: Record) -> None:
    """A connection that changes from HTTP/1.1 to HTTP/2 is refused before and after."""
    attack = Attack(record)
    later = all_translated(target.below([request()]))
    sent = all_to_http2(target.below(REFUSED))
    answers = in_parallel(lambda row: target.go_on(row, later), sent)
    assert {len(answer) for answer in answers} == {1 + len(later)}
    for answer in zip(*answers, strict=True):
        attack.judge(sent, answer, is_refused)
    sent = all_to_http2(target.below(MALFORMED))
    sent += target.below(to_http2(request(), settings) for settings in BROKEN_SETTINGS)
    attack.judge(sent, in_parallel(lambda row: b"".join(target.go_on(row, later)), sent), is_dropped)
    attack.end()


def test_credential_counts_for_one_request(target: Target) -> None:
    """A request without a credential is refused, also after one with a credential on the same connection."""
    plain, *carriers = target.below(request(lines=line) for line in ["", *CARRIERS])
    for carrier in carriers:
        received = target.exchange(carrier.replace(b"Connection: close\r\n", b"") + plain, NEVER)
        assert STATUS.findall(received) == [b"200", b"401"]
        assert received.count(b"REACHED") == received.lower().count(CHALLENGE) == 1


@pytest.mark.parametrize("target", marked(HYPERCORN), indirect=True, scope="module")
def test_credential_counts_for_one_stream(target: Target) -> None:
    """Streams with and without a credential share a connection, and only those with one reach the application."""
    plain, *carriers = target.below(request(lines=line) for line in ["", *CARRIERS])
    rounds = STREAMS // 2 // len(carriers)
    turns = [translated(row) for carrier in carriers for row in (carrier, plain)] * rounds
    for answers in (target.converse(turns), target.go_on(to_http2(plain), turns)[1:]):
        assert [b"REACHED" in answer for answer in answers] == [True, False] * (len(turns) // 2)
        assert all(map(is_refused, answers[1::2]))
    admitted, *later = target.go_on(to_http2(carriers[0]), [translated(plain)])
    assert b"REACHED" in admitted
    assert [*map(is_refused, later)] == [True]


def test_valid_credential_is_accepted(target: Target) -> None:
    """A request with a credential reaches the application, also after these attacks."""
    received = [target.exchange(row) for row in target.below(ADMITTED)]
    assert [pair for pair in zip(ADMITTED.values(), received, strict=True) if pair[0] not in pair[1]] == []


@pytest.mark.parametrize("target", marked(HYPERCORN), indirect=True, scope="module")
def test_valid_credential_is_accepted_over_http2(target: Target) -> None:
    """The same holds over HTTP/2."""
    received = target.converse(all_translated(target.below(ADMITTED)))
    assert [pair for pair in zip(ADMITTED.values(), received, strict=True) if pair[0] not in pair[1]] == []
