"""Hosts of a fleet, an operator who types commands, and clients that ask every host without a pause."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import psycopg

from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.tokens import generate_secret
from tests.helpers.applications import HELLO

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.helpers.postgresql import Cluster
    from tests.helpers.proxy import Proxy

Record = Callable[[str, object], None]
"""How a test tells a figure."""

# The clock of its host is wrong by AHEAD seconds.
_CLOCK = """
import os, time
told = time.time
time.time = lambda: told() + float(os.environ.get("AHEAD", "0"))
"""
APPLICATION = f"""
{_CLOCK}
{HELLO}
import logging
from freegpt_auth import BearerTokenMiddleware

logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(message)s")
logging.getLogger("freegpt_auth").addFilter(lambda record: not record.msg.startswith("refused"))

app = BearerTokenMiddleware(hello, usage_interval=float(os.environ.get("INTERVAL", "0.2")))
"""
_OPERATOR = f"""
{_CLOCK}
import contextlib, io, json, sys
from freegpt_auth import cli

for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(json.loads(line))
        except SystemExit as exit:
            status = exit.code
    ended = time.monotonic()
    print(json.dumps([status, out.getvalue(), err.getvalue(), began, ended]), flush=True)
"""
KEY = "a-key-from-the-environment"
LAW = {
    "key": {200},
    "nothing": {401},
    "wrong": {401, 503},
    "revoked": {401, 503},
    "valid": {200, 503},
    "fading": {200, 401, 503},
}
"""What may be answered at any time, whatever happens. Who is fading is still to be revoked, and looked at by each test."""

USUAL = {"key": 200, "nothing": 401, "wrong": 401, "revoked": 401, "valid": 200}
"""What is answered while nothing happens."""

CLOSED = {"key": 200, "nothing": 401, "wrong": 503, "revoked": 503, "valid": 503}
"""What is answered when the database could not be asked for longer than the lease."""

BOUND = 10.0
"""Seconds in which every request is answered while no more ask than there are threads: one wait for a connection of the
process, one question over a connection that is dead, and one new connection and question take 2 seconds each at most, and
cancelling a question half a second."""

_LINE = re.compile(r"^(\d+) (WARNING|ERROR) (.*)$", re.MULTILINE)
_HEAD = re.compile(rb"HTTP/1.1 (\d+) .*?\r\ncontent-length: (\d+).*?\r\n\r\n", re.DOTALL | re.IGNORECASE)


class Done(NamedTuple):
    """What a command did: its exit status and output, and from when to when it ran."""

    status: int
    out: str
    err: str
    began: float
    ended: float


class Operator:
    """Types commands at a host, one after the other, without waiting for an interpreter to start each time.

    Args:
        store: the URL of the database.
        ahead: seconds by which the clock of the host is wrong.
    """

    def __init__(self, store: str, ahead: float = 0.0) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OPERATOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "FREEGPT_AUTH_STORE": store, "AHEAD": str(ahead)},
        )

    def run(self, *arguments: str) -> Done:
        """Run ``python -m freegpt_auth`` with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
            return Done(*json.loads(self._process.stdout.readline()))

    def create(self, name: str, *options: str) -> tuple[str, str]:
        """Create a token, and return its id and secret."""
        done = self.run("create", name, "--json", *options)
        assert done.status == 0, done
        issued = json.loads(done.out)
        return issued["id"], issued["token"]

    def revoke(self, reference: str) -> Done:
        """Revoke a token, which must succeed."""
        done = self.run("revoke", reference)
        assert done.status == 0, done
        return done

    def close(self) -> None:
        """Let the operator go home."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=30)


@dataclass
class Host:
    """A server, and the link by which it reaches the database."""

    server: Any
    proxy: Proxy | None = None

    def loud(self) -> list[str]:
        """Return the warnings and errors that it logged."""
        return [line for lines in self.told().values() for line in lines]

    def told(self) -> dict[str, list[str]]:
        """Return the warnings and errors that each of its processes logged."""
        told: dict[str, list[str]] = {}
        for process, level, message in _LINE.findall(self.server.log.read_text()):
            told.setdefault(process, []).append(f"{level} {message}")
        return told


class Answer(NamedTuple):
    """From when to when a request went, at which host, what it presented, and its status; 0 if its connection broke."""

    began: float
    ended: float
    host: int
    who: str
    status: int


class Client:
    """Asks one server over one connection, which is opened again when it breaks."""

    def __init__(self, url: str, secret: str | None) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 0)
        header = "" if secret is None else f"Authorization: Bearer {secret}\r\n"
        self._request = f"GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode()
        self._socket: socket.socket | None = None

    def ask(self) -> int:
        """Return the status that is answered; 0 if the connection broke."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, timeout=60)
            self._socket.sendall(self._request)
            return self._receive(self._socket)
        except OSError:
            self.close()
            return 0

    def _receive(self, connection: socket.socket) -> int:
        data = b""
        while (head := _HEAD.match(data)) is None or len(data) < head.end() + int(head[2]):
            if not (more := connection.recv(65536)):
                raise ConnectionResetError
            data += more
        if b"connection: close" in data.lower():
            self.close()
        return int(head[1])

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass
class Watch:
    """Clients that ask every host for everything without a pause: each of them for one thing at one host.

    Attributes:
        hosts: whom they ask.
        secrets: what they present, by a name that ``LAW`` knows.
        may_break: whether a connection to a server may break.
        given: all answers.
    """

    hosts: list[Host]
    secrets: dict[str, str | None]
    may_break: bool = False
    given: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._latest: dict[tuple[int, str], Answer] = {}
        self._wrong: list[Answer] = []
        self._clients: dict[str, tuple[threading.Event, list[threading.Thread]]] = {}
        for name, secret in self.secrets.items():
            self._send(name, secret)

    def add(self, name: str, secret: str) -> None:
        """Ask for one more token from now on."""
        self.secrets[name] = secret
        self._send(name, secret)

    def forget(self, name: str) -> None:
        """Ask for a token no longer, if it was asked for."""
        gone, clients = self._clients.pop(name, (threading.Event(), []))
        gone.set()
        for client in clients:
            client.join()

    def _send(self, name: str, secret: str | None) -> None:
        gone, threads = self._clients[name] = (threading.Event(), [])
        for number, host in enumerate(self.hosts):
            client = Client(host.server.url, secret)
            threads.append(threading.Thread(target=partial(self._ask, client, number, name, gone)))
            threads[-1].start()

    def _ask(self, client: Client, number: int, name: str, gone: threading.Event) -> None:
        allowed = LAW[name] | ({0} if self.may_break else set())
        while not gone.is_set():
            began = time.monotonic()
            status = client.ask()
            answer = Answer(began, time.monotonic(), number, name, status)
            self.given.append(answer)
            self._latest[number, name] = answer
            if status not in allowed:
                self._wrong.append(answer)
            gone.wait(0.001 if status else 0.02)  # leave the servers some of the machine
        client.close()

    def expect(self, expected: Mapping[str, int], at: Iterable[int] | None = None, within: float = 60.0) -> float:
        """Wait until requests that begin after now are answered so, and return how many seconds that took."""
        since = time.monotonic()
        places = [(number, name) for number in (range(len(self.hosts)) if at is None else at) for name in expected]

        def differ() -> list[Any]:
            latest = [(place, self._latest.get(place)) for place in places]
            return [
                (place, answer)
                for place, answer in latest
                if answer is None or answer.began < since or answer.status != expected[place[1]]
            ]

        until(lambda: not differ(), lambda: (expected, differ(), self._state()), within)
        return time.monotonic() - since

    def hold(self, expected: Mapping[str, int], seconds: float, at: Iterable[int] | None = None) -> None:
        """See that for so many seconds every request is answered so."""
        since = time.monotonic()
        numbers = set(range(len(self.hosts)) if at is None else at)
        time.sleep(seconds)
        self.see(expected, since, numbers)

    def see(self, expected: Mapping[str, int], since: float, at: Iterable[int], until: float = float("inf")) -> None:
        """See that every request that began in a time was answered so."""
        numbers = set(at)
        other = [
            answer
            for answer in list(self.given)
            if since <= answer.began < until
            and answer.host in numbers
            and answer.status != expected.get(answer.who, answer.status)
            and answer.status
        ]
        assert not other, (len(other), other[0], other[-1], since, until, self._state())

    def last(self, name: str, number: int) -> float:
        """Return when the last request for a token began that a host has accepted."""
        return max(one.began for one in list(self.given) if (one.who, one.host, one.status) == (name, number, 200))

    def counts(self) -> dict[str, int]:
        """Return how often each status was answered."""
        return {str(status): count for status, count in sorted(Counter(one.status for one in self.given).items())}

    def accepted(self, name: str) -> int:
        """Return how many requests of one token were accepted."""
        return sum(answer.status == 200 and answer.who == name for answer in self.given)

    def slowest(self, since: float = 0.0) -> float:
        """Return how long the slowest request took that began after then."""
        return max((answer.ended - answer.began for answer in self.given if answer.began >= since), default=0.0)

    def delay(self) -> float:
        """Return how long the machine alone made a request wait: the slowest one whose answer needs no database."""
        return max((one.ended - one.began for one in self.given if one.who in {"key", "nothing"}), default=0.0)

    def leave(self) -> None:
        """Stop asking."""
        for gone, _ in self._clients.values():
            gone.set()
        for name in list(self._clients):
            self.forget(name)

    def end(self, bound: float = BOUND) -> None:
        """Stop asking, and see that no answer was against the law or late."""
        self.leave()
        assert not self._wrong, (len(self._wrong), self._wrong[:5], self._state())
        assert self.slowest() <= bound + self.delay(), max(self.given, key=lambda one: one.ended - one.began)

    def _state(self) -> object:
        return self._wrong[:5], [host.server.log.read_text()[-1500:] for host in self.hosts]


def until(reached: Callable[[], object], state: Callable[[], object] = tuple, within: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within
    while not reached():
        assert time.monotonic() < deadline, state()
        time.sleep(0.01)


def together(act: Callable[[Any], Any], each: Iterable[Any]) -> list[Any]:
    """Do something with each at the same time, and return what comes of it."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(act, each)]


def make_tables(cluster: Cluster) -> str:
    """Make a database with the schema in it, and return its name."""
    name = f"fleet_{time.monotonic_ns()}"
    cluster.sql(f"CREATE DATABASE {name}")
    PostgresTokenStore(cluster.url(name)).migrate()
    return name


def people(operator: Operator, more: int = 0) -> tuple[dict[str, str | None], dict[str, str]]:
    """Make one token of each kind and *more* that nobody uses; return what clients present, and the ids."""
    ids, secrets = {}, {"key": KEY, "nothing": None, "wrong": generate_secret()}
    for name in ("valid", "revoked"):
        ids[name], secrets[name] = operator.create(name)
    for number in range(more):
        operator.create(f"more-{number}")
    operator.revoke(ids["revoked"])
    return secrets, ids


def usage_of(url: str, token_id: str) -> int:
    """Return how many uses of a token the database knows."""
    with psycopg.connect(url, autocommit=True, target_session_attrs="read-write") as connection:
        row = connection.execute("SELECT use_count FROM freegpt_auth.usage WHERE token_id = %s", [token_id]).fetchone()
        return int(row[0]) if row else 0


def middle(values: list[float], part: float) -> float:
    """Return the value that this part of the values does not exceed, in milliseconds."""
    return round(1000 * sorted(values)[math.ceil(part * len(values)) - 1], 1)
