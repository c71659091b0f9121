"""Clients that send requests to every host without a pause, and checks of all their answers."""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tests.helpers.fleet import Host

ALLOWED = {
    "key": {200},
    "nothing": {401},
    "wrong": {401, 503},
    "revoked": {401, 503},
    "valid": {200, 503},
    "fading": {200, 401, 503},
}
"""The statuses that are correct during any fault; a number may follow: ``wrong-2``. ``fading`` is revoked in a test."""

USUAL = {"key": 200, "nothing": 401, "wrong": 401, "revoked": 401, "valid": 200}
"""The statuses without a fault."""

CLOSED = {"key": 200, "nothing": 401, "wrong": 503, "revoked": 503, "valid": 503}
"""The statuses once the database was out of reach for longer than the lease."""

BOUND = 10.0
"""Longest time to an answer, in seconds, while there are no more requests than threads.

Waiting for a connection of the pool, a statement on a dead connection, and a new connection with its statement take at
most 2 s each; cancelling a statement takes 0.5 s.
"""

_HEAD = re.compile(rb"HTTP/1.1 (\d+) .*?\r\ncontent-length: (\d+).*?\r\n\r\n", re.DOTALL | re.IGNORECASE)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Answer(NamedTuple):
    """One request: its begin and end, its host and token, and its status; 0 if the connection broke."""

    began: float
    ended: float
    host: int
    token: str
    status: int


class Client:
    """Sends the same request again and again over one connection, which is reopened if it breaks."""

    def __init__(self, url: str, secret: str | None) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 0)
        header = "" if secret is None else f"Authorization: Bearer {secret}\r\n"
        self._request = f"GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode()
        self._socket: socket.socket | None = None

    def ask(self) -> int:
        """Send the request and return the status; 0 if the connection broke."""
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
    """One client for each token at each host.

    Attributes:
        hosts: the servers.
        secrets: the secrets by the names in ``ALLOWED``; None for a request without a credential.
        may_break: whether a connection to a server may break.
        pause: the pause of a client between two requests, in seconds, which leaves the servers some of the machine.
        answers: all answers.
    """

    hosts: list[Host]
    secrets: dict[str, str | None]
    may_break: bool = False
    pause: float = 0.001
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._latest: dict[tuple[int, str], Answer] = {}
        self._wrong: list[Answer] = []
        self._clients: dict[str, tuple[threading.Event, list[threading.Thread]]] = {}
        for name, secret in list(self.secrets.items()):
            self.add(name, secret)

    def add(self, name: str, secret: str | None) -> None:
        """Start clients for one more token."""
        self.secrets[name] = secret
        gone, threads = self._clients[name] = (threading.Event(), [])
        for number, host in enumerate(self.hosts):
            client = Client(host.server.url, secret)
            threads.append(threading.Thread(target=self._ask, args=(client, number, name, gone)))
            threads[-1].start()

    def remove(self, name: str) -> None:
        """Stop the clients of a token, if there are any."""
        gone, threads = self._clients.pop(name, (threading.Event(), []))
        gone.set()
        for thread in threads:
            thread.join()

    def _ask(self, client: Client, number: int, name: str, gone: threading.Event) -> None:
        allowed = ALLOWED[name.partition("-")[0]] | ({0} if self.may_break else set())
        while not gone.is_set():
            began = time.monotonic()
            status = client.ask()
            answer = Answer(began, time.monotonic(), number, name, status)
            self.answers.append(answer)
            self._latest[number, name] = answer
            if status not in allowed:
                self._wrong.append(answer)
            gone.wait(self.pause if status else 0.02)
        client.close()

    def expect(self, expected: Mapping[str, int], at: Iterable[int] | None = None, within: float = 60.0) -> float:
        """Wait until the latest requests are answered as *expected*; return the seconds that this took.

        Only requests that began after this call count.
        """
        since = time.monotonic()
        places = [(number, name) for number in (range(len(self.hosts)) if at is None else at) for name in expected]

        def is_right(place: tuple[int, str]) -> bool:
            answer = self._latest.get(place)
            return answer is not None and answer.began >= since and answer.status == expected[place[1]]

        wait_until(lambda: all(map(is_right, places)), lambda: (expected, self._latest, self._state()), within)
        return time.monotonic() - since

    def hold(self, expected: Mapping[str, int], seconds: float, at: Iterable[int] | None = None) -> None:
        """Check that every request is answered as *expected* during so many seconds."""
        since = time.monotonic()
        time.sleep(seconds)
        self.check(expected, since, range(len(self.hosts)) if at is None else at)

    def check(self, expected: Mapping[str, int], since: float, at: Iterable[int]) -> None:
        """Check that every request that began after *since* at the hosts *at* was answered as *expected*."""
        numbers, given = set(at), list(self.answers)
        later = [one for one in given if one.began >= since and one.host in numbers and one.token in expected]
        other = [one for one in later if one.status not in {0, expected[one.token]}]
        assert not other, (len(other), other[0], other[-1], since, self._state())

    def accepted(self, name: str) -> list[Answer]:
        """Return the accepted requests of a token."""
        return [answer for answer in list(self.answers) if (answer.token, answer.status) == (name, 200)]

    def last(self, name: str, number: int) -> float:
        """Return the begin of the last accepted request of a token at one host."""
        return max(answer.began for answer in self.accepted(name) if answer.host == number)

    def first(self, name: str, status: int, number: int, since: float) -> float:
        """Return the end of the first request of a token after *since* that one host answered with *status*."""
        wanted = (number, name, status)
        return min(one.ended for one in list(self.answers) if one[2:] == wanted and one.began > since)

    def counts(self) -> dict[str, int]:
        """Return the number of answers of each status."""
        return {str(status): count for status, count in sorted(Counter(one.status for one in self.answers).items())}

    def slowest(self) -> float:
        """Return the longest time to an answer, in seconds."""
        return max((answer.ended - answer.began for answer in self.answers), default=0.0)

    def delay(self) -> float:
        """Return the delay that the machine alone causes: the slowest request that needs no database."""
        return max((one.ended - one.began for one in self.answers if one.token in {"key", "nothing"}), default=0.0)

    def stop(self) -> None:
        """Stop all clients."""
        for gone, _ in self._clients.values():
            gone.set()
        for name in list(self._clients):
            self.remove(name)

    def end(self, bound: float = BOUND) -> None:
        """Stop all clients; check that no answer was wrong or took longer than *bound* seconds."""
        self.stop()
        assert not self._wrong, (len(self._wrong), self._wrong[:5], self._state())
        assert self.slowest() <= bound + self.delay(), max(self.answers, key=lambda one: one.ended - one.began)

    def _state(self) -> object:
        return self._wrong[:5], [host.server.log.read_text()[-1500:] for host in self.hosts]


def wait_until(reached: Callable[[], object], state: Callable[[], object] = tuple, within: float = 60.0) -> None:
    """Wait until *reached* returns true; fail with *state* after *within* seconds."""
    deadline = time.monotonic() + within
    while not reached():
        assert time.monotonic() < deadline, state()
        time.sleep(0.01)


def in_parallel(act: Callable[[_In], _Out], arguments: Iterable[_In]) -> list[_Out]:
    """Call *act* with each argument, up to 32 at the same time, and return the results in order."""
    with ThreadPoolExecutor(32) as pool:
        return [*pool.map(act, arguments)]


def percentile(seconds: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed, in milliseconds."""
    return round(1000 * sorted(seconds)[math.ceil(share * len(seconds)) - 1], 1)
