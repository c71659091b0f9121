"""Floods of requests without a valid token cost a server no memory and no log lines, and good clients little time.

The floods are over-long headers, bodies that stall or never end, and distinct wrong tokens, from one client and from
many. Memory is the resident set of a server.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.guard.delivery import BODY_LIMIT, BODY_TIMEOUT
from freegpt_auth.guard.refusal_log import CLIENT_LIMIT, SHOWN, WINDOW
from freegpt_auth.tokens import VALUE_LIMIT
from tests.helpers.applications import HELLO
from tests.helpers.watch import in_parallel, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.attacks.conftest import Record
    from tests.conftest import Keep
    from tests.helpers.servers import Serve, Server

# The application logs the received bytes of each upload: some of the bytes that a client sent are in buffers.
APPLICATION = f"""
{HELLO}
import logging, os
from freegpt_auth import BearerTokenMiddleware
from freegpt_auth.guard import delivery

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
"""Seconds within which a loaded machine does any immediate action."""

KEEP_ALIVE = round(2 * PATIENCE)
"""Seconds for which a server waits for the next request: longer than any client here needs."""

SERVERS = {
    **{
        http: ("uvicorn", "--http", http, "--no-access-log", "--timeout-keep-alive", str(KEEP_ALIVE))
        for http in ("h11", "httptools")
    },
    "hypercorn": ("hypercorn", "--keep-alive", str(KEEP_ALIVE)),
}
MANY, AT_ONCE = 50_000, 16
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
GROWTH = 4 * MIB
"""Allowed growth of a resident set: arenas and buffers, far less than 16 bytes for each of a million tokens."""

BUFFERS = 16 * MIB
"""Allowed size of a server's own buffers."""

MESSAGE = MIB
"""Longest part of a body in one message of a server, in bytes."""

CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
BODIES = {
    "stalled before the first byte": (b"Content-Length: 1000000", b"", b""),
    "stalled after the first byte": (b"Content-Length: 1000000", b"x", b""),
    "stalled within a chunk": (b"Transfer-Encoding: chunked", b"5\r\nx", b""),
    "endless by length": (b"Content-Length: 999999999999", b"x", b"x" * 0x10000),
    "endless by chunks": (b"Transfer-Encoding: chunked", CHUNK, CHUNK),
}


class Target(NamedTuple):
    """A server under attack, and a token that it accepts."""

    server: Server
    secret: str

    def connect(self, client: str = "127.0.0.1") -> socket.socket:
        """Return a new connection from the address *client*."""
        connection = socket.create_connection(self.server.address, timeout=PATIENCE, source_address=(client, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def resident(self) -> int:
        """Return the resident set of the server and of its child: hypercorn serves from a child process."""
        first = self.server.process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (first, *children)) * PAGE

    def refusals(self) -> list[str]:
        """Return the logged refusals."""
        return [line for line in self.server.log.read_text().splitlines() if "refus" in line]

    def received(self, count: int) -> list[int]:
        """Return the received bytes of each of *count* bodies, once the middleware has dropped them."""
        wait_until(lambda: self.server.log.read_text().count("received ") >= count, within=PATIENCE)
        return [int(number) for number in re.findall(r"received (\d+) bytes", self.server.log.read_text())]


PARAMS = [pytest.param(kind, marks=[] if kind == "httptools" else [pytest.mark.slow]) for kind in SERVERS]


@pytest.fixture(params=PARAMS)
def start(request: pytest.FixtureRequest, serve: Serve, keep: Keep) -> Callable[..., Target]:
    """Return a function that starts one of the servers with one token."""
    _, secret = keep(FileTokenStore("api_tokens.json"))
    Path("app.py").write_text(APPLICATION)
    module, *arguments = SERVERS[request.param]
    return lambda **environment: Target(serve("app:app", *arguments, module=module, **environment), secret)


@pytest.fixture
def target(start: Callable[..., Target]) -> Target:
    """Start each of the servers."""
    return start()


@pytest.fixture
def patient(start: Callable[..., Target]) -> Target:
    """Start each of the servers with a time limit for bodies that no answer on a loaded machine reaches."""
    return start(BODY_TIMEOUT=str(3 * PATIENCE))


def get(token: str) -> bytes:
    """Return a request that presents *token*."""
    return f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def read_answers(connection: socket.socket, count: int = 1) -> list[int]:
    """Return the statuses of *count* answers, or of fewer if the connection ends."""
    received = b""
    while received.count(b'"invalid_api_key"}}') + received.count(b"\r\n\r\nok") < count:
        data = connection.recv(0x10000)
        if not data:
            break
        received += data
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


@contextlib.contextmanager
def good_client(target: Target) -> Iterator[list[float]]:
    """Send requests with the token all the time, and yield the list of the times until the answers."""
    over, waited = threading.Event(), list[float]()

    def ask() -> None:
        while not (over.is_set() and waited):
            with target.connect() as connection:
                for _ in range(100):  # hypercorn closes a connection after 1,000 requests
                    began = time.perf_counter()
                    connection.sendall(get(target.secret))
                    assert read_answers(connection) == [200]
                    waited.append(time.perf_counter() - began)
                    if over.wait(0.005):
                        break

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield waited
        finally:
            over.set()
        asking.result(timeout=2 * PATIENCE)


def waits(target: Target) -> list[float]:
    """Return the times until the answers to a good client, in ascending order."""
    with good_client(target) as waited:
        time.sleep(2)
    return sorted(waited)


def begin_upload(target: Target, body: str) -> socket.socket:
    """Send a bad token and the beginning of a body, and return the connection."""
    framing, first, _ = BODIES[body]
    connection = target.connect()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n"
    connection.sendall(head + framing + b"\r\n\r\n" + first)
    return connection


def upload(target: Target, body: str) -> float:
    """Send a body until the server ends the connection, and return the seconds until then."""
    began, rest = time.monotonic(), BODIES[body][2]
    with begin_upload(target, body) as connection, contextlib.suppress(ConnectionError):
        while rest:
            connection.sendall(rest)
        while connection.recv(0x10000):
            pass
    return time.monotonic() - began


def test_refusal_waits_for_no_body(patient: Target, record: Record) -> None:
    """Two hundred bodies stall at once: each request is refused at once, and good clients wait little longer."""
    crowd = [name for name, (_, _, rest) in BODIES.items() if not rest] * 67
    before, alone, began = patient.resident(), waits(patient), time.monotonic()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(begin_upload(patient, body)) for body in crowd]
        assert {connection.recv(0x10000)[9:12] for connection in connections} == {b"401"}
        took, beside = time.monotonic() - began, waits(patient)
    grown = patient.resident() - before
    # A loaded machine delays some requests, a loaded server all of them: hence the quartile.
    usual, undisturbed = beside[len(beside) // 4], alone[len(alone) // 4]
    record(stalled=len(crowd), all_refused_after=took, quartile=usual, quartile_alone=undisturbed, grown=grown)
    assert took < PATIENCE
    assert usual < 0.05 + 10 * undisturbed
    assert grown < GROWTH + len(crowd) * 0x10000


def test_endless_body_is_cut_off(target: Target, record: Record) -> None:
    """A connection with a bad token is closed after 5 s or 64 MiB of its body, whichever comes first."""
    before = target.resident()
    seconds = dict(zip(BODIES, in_parallel(lambda body: upload(target, body), BODIES), strict=True))
    grown = target.resident() - before
    received = target.received(sum(bool(first) for _, first, _ in BODIES.values()))
    record(received=received, grown=grown)
    assert max(seconds.values()) < BODY_TIMEOUT + PATIENCE
    assert min(seconds[name] for name, (_, _, rest) in BODIES.items() if not rest) > 0.9 * BODY_TIMEOUT
    assert max(received) < BODY_LIMIT + MESSAGE
    assert grown < BUFFERS
    assert target.server.get(token=target.secret) == 200


def test_overlong_headers_leave_nothing(target: Target, rounds: int, record: Record) -> None:
    """A header of any length is refused, by the middleware or by the server, and nothing of it is kept."""
    carriers = ("Authorization: Bearer %s", "X-Api-Key: %s", "Sec-WebSocket-Protocol: openai-insecure-api-key.%s")
    lengths = (VALUE_LIMIT, VALUE_LIMIT + 1, 8000, 15_000, 32_000, 60_000, 200_000, 2_000_000)
    wide = f"Authorization: Bearer {target.secret}{' ' * 9000}{'x' * 5000}"
    lines = [carrier % ("x" * length) for carrier in carriers for length in lengths] + [wide]
    before, found = target.resident(), Counter[bytes]()
    for line in lines * (4 * rounds):
        answer = b""
        with target.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{line}\r\n\r\n".encode())
            answer = connection.recv(0x10000)
        found[answer[9:12] or b"gone"] += 1
    record(answers=dict(found), grown=target.resident() - before)
    assert found[b"401"] >= 4 * rounds
    assert set(found) <= {b"401", b"400", b"413", b"431", b"gone"}
    assert target.resident() - before < 2 * GROWTH
    assert target.server.get(token=target.secret) == 200


def test_flood_of_wrong_tokens_leaves_nothing(target: Target, rounds: int, record: Record) -> None:
    """Distinct wrong tokens over real connections: no memory, few log lines, and good clients are served."""
    flood(target, 2000, "warm-up")
    before, lines, began = target.resident(), len(target.refusals()), time.monotonic()
    with good_client(target) as waited:
        found = flood(target, MANY * rounds, "flood")
    took, grown, logged = time.monotonic() - began, target.resident() - before, len(target.refusals()) - lines
    record(refused=found[401], seconds=took, grown=grown, lines=logged, good_requests=len(waited))
    record(median=median(waited), worst=max(waited))
    assert found == {401: MANY * rounds}
    assert grown < GROWTH
    assert 0 < logged <= (2 + took / WINDOW) * lines_for(MANY * rounds)
    # A good client waits for the turns of the others at most.
    assert median(waited) < 10 * took / (MANY * rounds / AT_ONCE)


def test_flood_from_everywhere_leaves_nothing(target: Target, record: Record) -> None:
    """A batch of wrong tokens from each of many clients leaves no more than a server's buffers, and no file."""
    files, before, began = sorted(Path.cwd().iterdir()), target.resident(), time.monotonic()
    clients = [f"127.{1 + number // 250}.0.{1 + number % 250}" for number in range(4 * CLIENT_LIMIT)]
    for client in clients:
        assert flood(target, AT_ONCE, client, client) == {401: AT_ONCE}
    took, grown, logged = time.monotonic() - began, target.resident() - before, len(target.refusals())
    record(clients=len(clients), seconds=took, grown=grown, lines=logged)
    assert grown < BUFFERS
    assert sorted(Path.cwd().iterdir()) == files
    assert 0 < logged <= (2 + took / WINDOW) * (CLIENT_LIMIT * lines_for(AT_ONCE) + lines_for(len(clients) * AT_ONCE))


def flood(target: Target, count: int, name: str, client: str = "127.0.0.1") -> Counter[int]:
    """Send *count* distinct wrong tokens, some at a time."""
    found = Counter[int]()
    for first in range(0, count, 400):
        with target.connect(client) as connection:
            for begin in range(first, min(first + 400, count), AT_ONCE):
                numbers = range(begin, begin + AT_ONCE)
                connection.sendall(b"".join(get(f"sk-{name}-{number:040d}") for number in numbers))
                found.update(read_answers(connection, AT_ONCE))
    return found


def lines_for(refusals: int) -> int:
    """Return the most lines about one client within a window: the first few refusals, and each power of two."""
    return SHOWN + sum(1 << n <= refusals for n in range(SHOWN.bit_length(), 64))
