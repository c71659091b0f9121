"""Floods of requests without a valid token cost a server neither memory nor log lines, and good clients little time.

Over-long headers, bodies that never end or never come, and a million distinct wrong tokens: behind real servers, and the
whole million in process. Memory is the resident set by ``/proc/PID/statm`` and what ``tracemalloc`` counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import selectors
import socket
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import pytest

from freegpt_auth import BearerTokenMiddleware, FileTokenStore
from freegpt_auth.guard import authenticator, credentials
from freegpt_auth.guard.credentials import VALUE_LIMIT
from freegpt_auth.guard.delivery import BODY_LIMIT, BODY_TIMEOUT
from freegpt_auth.guard.refusal_log import CLIENT_LIMIT, SHOWN, WINDOW
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.applications import HELLO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Each upload's received bytes are logged: a client only knows how many it has sent, and buffers hold some of those.
APPLICATION = f"""
{HELLO}
import logging, os
from freegpt_auth import BearerTokenMiddleware, delivery

logging.basicConfig(level=logging.INFO)
delivery.BODY_TIMEOUT = float(os.environ.get("BODY_TIMEOUT", delivery.BODY_TIMEOUT))
guarded = BearerTokenMiddleware(hello)


async def app(scope, receive, send):
    received = 0

    async def count():
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message

    try:
        await guarded(scope, count, send)
    finally:
        if received:
            logging.info("received %d bytes", received)
"""
PATIENCE = 60.0
"""Seconds in which a busy machine does anything that takes no time."""

KEEP_ALIVE = round(2 * PATIENCE)
"""Seconds for which a server waits for the next request: no client is late for it, and no upload is ended by it."""

SERVERS = {
    **{
        http: ("uvicorn", "--http", http, "--no-access-log", "--timeout-keep-alive", str(KEEP_ALIVE))
        for http in ("h11", "httptools")
    },
    "hypercorn": ("hypercorn", "--keep-alive", str(KEEP_ALIVE)),
}
MILLION, MANY, AT_ONCE = 1_000_000, 20_000, 16
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
GROWTH = 4 * MIB
"""What a resident set may grow by: arenas and buffers, not a million of anything."""

BUFFERS = 16 * MIB
"""Bytes of a server's own buffers, in memory."""

MESSAGE = MIB
"""Longest part of a body that a server passes on in one message, in bytes."""

CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
BODIES = {
    "stalled before the first byte": (b"Content-Length: 1000000", b"", b""),
    "stalled after the first byte": (b"Content-Length: 1000000", b"x", b""),
    "stalled within a chunk": (b"Transfer-Encoding: chunked", b"5\r\nx", b""),
    "endless by length": (b"Content-Length: 999999999999", b"x", b"x" * 0x10000),
    "endless by chunks": (b"Transfer-Encoding: chunked", CHUNK, CHUNK),
}

_logger = logging.getLogger("figures")  # --log-cli-level=INFO shows them


class Target(NamedTuple):
    """A server under attack, and a token that it accepts."""

    server: Any
    secret: str
    kind: str

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        url = urlsplit(self.server.url)
        assert url.hostname
        assert url.port
        return url.hostname, url.port

    def connect(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.create_connection(self.address, timeout=PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def resident(self) -> int:
        """Return how many bytes of memory it holds: hypercorn serves from a process of its own."""
        first = self.server.process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (first, *children)) * PAGE

    def refusals(self) -> list[str]:
        """Return what it logged of refusals."""
        return [line for line in self.server.log.read_text().splitlines() if "refus" in line]

    def received(self, count: int) -> list[int]:
        """Return how many bytes the middleware received of each of *count* bodies, once it has given up on them."""
        until = time.monotonic() + PATIENCE
        while True:
            found = [int(number) for number in re.findall(r"received (\d+) bytes", self.server.log.read_text())]
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.05)


@pytest.fixture(params=SERVERS)
def target(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> Target:
    """Return each of the servers, started afresh with one token."""
    return start(request.param, serve)


@pytest.fixture(params=SERVERS)
def patient(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> Target:
    """Return each of the servers, with a time for bodies that no busy machine takes for an answer."""
    return start(request.param, serve, BODY_TIMEOUT=str(3 * PATIENCE))


def start(kind: str, serve: Callable[..., Any], **environment: str) -> Target:
    """Start a server with one token."""
    token, secret = issue("good", now=datetime.now(UTC))
    FileTokenStore("api_tokens.json").add(digest_of(secret), token)
    Path("app.py").write_text(APPLICATION)
    module, *arguments = SERVERS[kind]
    return Target(serve("app:app", *arguments, module=module, **environment), secret, kind)


def get(token: str, lines: str = "") -> bytes:
    """Return a request that presents *token*."""
    return f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{lines}\r\n".encode()


def read_answers(connection: socket.socket, count: int = 1) -> list[int]:
    """Return the status of each of *count* answers; less than that if the connection ends."""
    received = b""
    while received.count(b'"invalid_api_key"}}') + received.count(b"\r\n\r\nok") < count:
        data = connection.recv(0x10000)
        if not data:
            break
        received += data
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


class Clients:
    """Good clients, who ask all the time; how long each of them waited."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._going = True
        self.waited: list[float] = []

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor()
        self._asking = self._pool.submit(self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._asking.result(timeout=2 * PATIENCE)
        self._pool.shutdown()

    def _ask(self) -> None:
        while self._going or not self.waited:
            with self._target.connect() as connection:
                for _ in range(100):  # hypercorn closes a connection after 1,000 requests
                    began = time.perf_counter()
                    connection.sendall(get(self._target.secret))
                    assert read_answers(connection) == [200]
                    self.waited.append(time.perf_counter() - began)
                    if not self._going:
                        break
                    time.sleep(0.005)


@dataclass
class Upload:
    """A connection with a bad token and a body that does not end: what became of it."""

    connection: socket.socket
    rest: bytes
    began: float = field(default_factory=time.monotonic)
    answered: float | None = None
    ended: float | None = None
    received: bytes = b""
    sent: int = 0

    def go_on(self, events: int) -> None:
        """Read what is there to read, and send what can be sent."""
        try:
            if events & selectors.EVENT_READ:
                data = self.connection.recv(0x10000)
                self.received += data
                if data:
                    self.answered = self.answered or time.monotonic() - self.began
                else:
                    self.ended = time.monotonic() - self.began
            if events & selectors.EVENT_WRITE:
                self.sent += self.connection.send(self.rest)
        except BlockingIOError:
            pass
        except ConnectionError:
            self.ended = time.monotonic() - self.began


def upload(
    target: Target, bodies: list[str], seconds: float, what: str, then: Callable[[], object] = tuple
) -> list[Upload]:
    """Begin one upload after another, and go on until each was *answered*, or has *ended*, or *seconds* are over.

    *then* is called before the connections are closed.
    """
    uploads = []
    with selectors.DefaultSelector() as selector:
        for body in bodies:
            framing, first, rest = BODIES[body]
            connection = target.connect()
            one = Upload(connection, rest)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n"
            connection.sendall(head + framing + b"\r\n\r\n" + first)
            connection.settimeout(0)
            selector.register(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if rest else 0), one)
            uploads.append(one)
        until = time.monotonic() + seconds
        while any(getattr(one, what) is None for one in uploads) and time.monotonic() < until:
            for key, events in selector.select(0.1):
                key.data.go_on(events)
                if key.data.ended is not None:
                    selector.unregister(key.fileobj)
    then()
    for one in uploads:
        one.connection.close()
    return uploads


def waits(target: Target) -> list[float]:
    """Return how long each request of a good client waited, in ascending order."""
    with Clients(target) as clients:
        time.sleep(2)
    return sorted(clients.waited)


def test_a_refusal_never_waits_for_a_body(patient: Target) -> None:
    """Two hundred bodies stall at once: each refusal comes all the same, and good clients hardly notice."""
    crowd = [name for name, (_, _, rest) in BODIES.items() if not rest] * 67
    before = patient.resident()
    alone, beside = waits(patient), list[float]()
    uploads = upload(patient, crowd, PATIENCE, "answered", lambda: beside.extend(waits(patient)))
    slowest = max(one.answered or 999 for one in uploads)
    grown = patient.resident() - before
    # A busy machine makes some requests wait, and a busy server all of them.
    usual, undisturbed = beside[len(beside) // 4], alone[len(alone) // 4]
    _logger.info(
        "%s: %d stalled, slowest refusal %.4f s, good requests %d, quartile %.4f s, alone %.4f s, grown %d bytes",
        *(patient.kind, len(crowd), slowest, len(beside), usual, undisturbed, grown),
    )
    assert {one.received[9:12] for one in uploads} == {b"401"}, "it waited for the body"
    assert usual < 0.05 + 10 * undisturbed
    assert grown < GROWTH + len(crowd) * 0x10000


def test_a_body_that_does_not_end_is_given_up(target: Target) -> None:
    """A connection with a bad token is closed after 5 s or 64 MiB of its body, whichever is first."""
    before = target.resident()
    uploads = dict(zip(BODIES, upload(target, [*BODIES], BODY_TIMEOUT + PATIENCE, "ended"), strict=True))
    grown = target.resident() - before
    for name, one in uploads.items():
        _logger.info("%s: %s: ended %s s, sent %.1f MiB", target.kind, name, one.ended, one.sent / MIB)
    received = target.received(sum(bool(first) for _, first, _ in BODIES.values()))
    _logger.info("%s: received %s", target.kind, received)
    assert [name for name, one in uploads.items() if one.ended is None] == []
    assert max(received) < BODY_LIMIT + MESSAGE
    assert min(one.ended or 0 for one in uploads.values() if not one.rest) > 0.9 * BODY_TIMEOUT, (
        "the slow have their time"
    )
    assert grown < BUFFERS, "a body was kept"
    assert target.server.get(token=target.secret) == 200


def test_overlong_headers_are_refused_or_dropped(target: Target, rounds: int) -> None:
    """A value of any length, up to what a server takes and beyond, is refused by us or by the server, and leaves nothing."""
    carriers = ("Authorization: Bearer %s", "X-Api-Key: %s", "Sec-WebSocket-Protocol: openai-insecure-api-key.%s")
    lengths = (VALUE_LIMIT, VALUE_LIMIT + 1, 8000, 15_000, 32_000, 60_000, 200_000, 2_000_000)
    wide = f"Authorization: Bearer {target.secret}{' ' * 9000}{'x' * 5000}"
    lines = [carrier % ("x" * length) for carrier in carriers for length in lengths] + [wide]
    before, found = target.resident(), Counter[bytes]()
    for line in lines * (4 * rounds):
        with target.connect() as connection, contextlib.suppress(ConnectionError):
            found[b"gone"] += 1
            connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{line}\r\n\r\n".encode())
            answer = connection.recv(0x10000)
            found[answer[9:12] or b"gone"] += 1
            found[b"gone"] -= bool(answer)
    _logger.info("%s: %s, grown %d bytes", target.kind, dict(found), target.resident() - before)
    assert found[b"401"] >= 4 * rounds
    assert set(found) <= {b"401", b"400", b"413", b"431", b"gone"}
    assert target.resident() - before < 2 * GROWTH
    assert target.server.get(token=target.secret) == 200


def test_overlong_values_are_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value over the limit costs no digest: it is refused unhashed, whichever way it is presented."""
    hashed: list[int] = []

    def noted(secret: bytes) -> Any:
        hashed.append(len(secret))
        return sha256(secret)

    monkeypatch.setattr(credentials, "sha256", noted)
    app = BearerTokenMiddleware(None, store=FileTokenStore("api_tokens.json"))
    app._authenticator.mode = authenticator.AuthMode.TOKEN_FILE
    for length in (1, VALUE_LIMIT, VALUE_LIMIT + 1, 10**6, 10**8):
        assert refuse(app, [b"x" * length]) == {401: 1}
    assert set(hashed) - {0} == {1, VALUE_LIMIT}


def test_tens_of_thousands_of_wrong_tokens_leave_nothing(target: Target, rounds: int) -> None:
    """Distinct wrong tokens over real connections: no memory, a handful of lines, and good clients are served meanwhile."""
    _flood(target, 2000, "warm-up")
    before, lines = target.resident(), len(target.refusals())
    began = time.monotonic()
    with Clients(target) as clients:
        found = _flood(target, MANY * rounds, "flood")
    took, grown, logged = time.monotonic() - began, target.resident() - before, len(target.refusals()) - lines
    _logger.info(
        "%s: %d refused in %.1f s, grown %d bytes, %d lines; good requests %d, median %.4f s, worst %.4f s",
        *(target.kind, found[401], took, grown, logged),
        *(len(clients.waited), median(clients.waited), max(clients.waited)),
    )
    assert found == {401: MANY * rounds}
    assert grown < GROWTH
    assert 0 < logged <= (2 + took / WINDOW) * lines_for(MANY * rounds)
    assert median(clients.waited) < 10 * took / (MANY * rounds / AT_ONCE), (
        "a good client waits for more than the others' turns"
    )


def _flood(target: Target, count: int, name: str) -> Counter[int]:
    """Send *count* distinct wrong tokens, some at a time."""
    found = Counter[int]()
    for first in range(0, count, 400):
        with target.connect() as connection:
            for begin in range(first, first + 400, AT_ONCE):
                numbers = range(begin, begin + AT_ONCE)
                connection.sendall(b"".join(get(f"sk-{name}-{number:040d}") for number in numbers))
                found.update(read_answers(connection, AT_ONCE))
    return found


def lines_for(refusals: int) -> int:
    """Return how many of one client's refusals are logged within a window: the first few, and each power of two."""
    return SHOWN + sum(2**n <= refusals for n in range(SHOWN.bit_length(), 64))


class Lines:
    """Counts records, and keeps them from pytest, which would keep them all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _: logging.LogRecord) -> bool:
        """Count one."""
        self.count += 1
        return False


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    """Count what the library logs."""
    counted, logger = Lines(), logging.getLogger("freegpt_auth")
    caplog.set_level(logging.DEBUG, "freegpt_auth")
    logger.addFilter(counted)
    yield counted
    logger.removeFilter(counted)


def refuse(app: Any, secrets: Iterable[bytes], client: str = "192.0.2.7") -> Counter[int]:
    """Present each of *secrets* in process, and count the answers. A ``%d`` makes of each sender another one."""
    return asyncio.run(_refuse(app, secrets, client))


async def _refuse(app: Any, secrets: Iterable[bytes], client: str) -> Counter[int]:
    found = Counter[int]()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found[message["status"]] += 1

    common = {"type": "http", "method": "GET", "path": "/v1/models"}
    for number, secret in enumerate(secrets):
        headers = [(b"authorization", b"Bearer " + secret)]
        await app({**common, "headers": headers, "client": (client.replace("%d", str(number)), 50000)}, receive, send)
    return found


def wrong(start: int, stop: int) -> Iterator[bytes]:
    """Make distinct secrets of the right length."""
    return (b"sk-%049d" % number for number in range(start, stop))


def own_memory() -> int:
    """Return the resident set of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_a_million_wrong_tokens_leave_nothing(lines: Lines, rounds: int, keep: Callable[..., Any]) -> None:
    """One client tries a million distinct tokens: no memory, no file, and a line for each power of two."""
    keep(FileTokenStore("api_tokens.json"))
    app = BearerTokenMiddleware(None)
    refuse(app, wrong(0, 20_000))
    files, before, logged, began = sorted(Path.cwd().iterdir()), own_memory(), lines.count, time.monotonic()
    assert refuse(app, wrong(20_000, MILLION * rounds)) == {401: MILLION * rounds - 20_000}
    took, grown, logged = time.monotonic() - began, own_memory() - before, lines.count - logged
    _logger.info("a million: %.1f s, grown %d bytes, %d lines", took, grown, logged)
    assert grown < 4 * GROWTH, "16 bytes for each token; its digest alone has 65"
    assert sorted(Path.cwd().iterdir()) == files
    assert 0 < logged <= (1 + took / WINDOW) * lines_for(MILLION * rounds)


def test_nothing_that_is_counted_grows(lines: Lines, keep: Callable[..., Any]) -> None:
    """As tracemalloc sees it too nothing is kept of a wrong token, nor of its client, be each of them another one."""
    keep(FileTokenStore("api_tokens.json"))
    app = BearerTokenMiddleware(None)
    tracemalloc.start()
    try:
        refuse(app, wrong(0, 5000))
        gc.collect()
        before, logged = tracemalloc.get_traced_memory()[0], lines.count
        refuse(app, wrong(5000, 55_000), "2001:db8::%d")
        gc.collect()
        grown, logged = tracemalloc.get_traced_memory()[0] - before, lines.count - logged
    finally:
        tracemalloc.stop()
    _logger.info("counted: grown %d bytes, %d lines", grown, logged)
    assert grown < 0x10000
    assert 0 < logged <= 2 * (CLIENT_LIMIT + lines_for(50_000))
