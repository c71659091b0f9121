"""Clients that ask the workers of one server, each on connections that are known to be that worker's.

They run in processes of their own, so that nothing else that is measured holds them up, and tell what they saw over a
pipe. Clocks are :func:`time.monotonic`, which all processes of a host share.
"""

from __future__ import annotations

import math
import re
import selectors
import socket
import time
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

PATIENCE = 10.0
"""Seconds after which an answer does not come any more."""

PAUSE = 0.001
"""Seconds between the requests of :func:`ask_steadily`."""

_ACCEPTED, _REFUSED = b"200", b"401"


class Asked(NamedTuple):
    """A request that was answered.

    Attributes:
        worker: which worker answered.
        began: when it was about to be sent.
        ended: when the whole answer had been read.
        accepted: it was let through.
    """

    worker: int
    began: float
    ended: float
    accepted: bool


class Line:
    """A kept-alive connection.

    Attributes:
        worker: the process at its other end.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.worker = 0
        self._began = 0.0
        self._answer = b""
        self.ask(request)
        found = re.search(rb"\r\nworker: (\d+)", self._answer)
        assert found, self._answer
        self.worker = int(found[1])

    def fileno(self) -> int:
        """Return what a selector waits for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up, here; a process that was forked meanwhile keeps its own end."""
        self._socket.close()

    def send(self, request: bytes) -> None:
        """Send a request. The one before has been answered."""
        self._answer = b""
        self._began = time.monotonic()
        self._socket.sendall(request)

    def receive(self) -> Asked | None:
        """Read what has come, and return the request if its whole answer has."""
        received = self._socket.recv(4096)
        now = time.monotonic()
        assert received, "the server hung up"
        self._answer += received
        head, end, body = self._answer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if not end or length is None or len(body) < int(length[1]):
            return None
        status = head[9:12]
        assert status in (_ACCEPTED, _REFUSED), head
        return Asked(self.worker, self._began, now, status == _ACCEPTED)

    def ask(self, request: bytes) -> Asked:
        """Send a request and wait for its answer."""
        self.send(request)
        while (asked := self.receive()) is None:
            pass
        return asked


def request_with(secret: str) -> bytes:
    """Return what is sent to present *secret*."""
    lines = ["GET /v1/models HTTP/1.1", "Host: localhost", f"Authorization: Bearer {secret}"]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def lines_to_each(workers: int, lines: int, port: int, request: bytes) -> list[list[Line]]:
    """Return *lines* sets of connections, one to every worker in each. Which worker gets a connection is up to chance."""
    deadline = time.monotonic() + 60
    found: dict[int, list[Line]] = {}
    while len(found) < workers or min(map(len, found.values())) < lines:
        assert time.monotonic() < deadline, f"not all of the workers answer: {found}"
        line = Line(port, request)
        mine = found.setdefault(line.worker, [])
        mine.append(line)
        if len(mine) > lines:
            mine.pop().close()
    return [list(row) for row in zip(*found.values(), strict=True)]


def ask_without_pause(orders: Connection, lines: Sequence[Line]) -> None:
    """For each secret that is ordered, ask with it on all lines until the next order, and then tell what was asked.

    That all workers accept it is told first. No secret ends the work.
    """
    while secret := orders.recv():
        request = request_with(secret)
        assert all(line.ask(request).accepted for line in lines)
        orders.send(None)
        asked = _ask_until_ordered(orders, lines, request)
        orders.recv()
        orders.send(asked)


def _ask_until_ordered(orders: Connection, lines: Sequence[Line], request: bytes) -> list[Asked]:
    asked: list[Asked] = []
    ordered = math.inf
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        for line in lines:
            selector.register(line, selectors.EVENT_READ, line)
            line.send(request)
        waiting = len(lines)
        while waiting:
            for key, _ in selector.select():
                if key.data is None:
                    selector.unregister(orders)
                    ordered = time.monotonic()
                elif one := key.data.receive():
                    asked.append(one)
                    if one.began < ordered:  # so each worker is asked once more after the order
                        key.data.send(request)
                    else:
                        waiting -= 1
    return asked


def ask_steadily(orders: Connection, lines: Sequence[Line], secrets: Sequence[str]) -> None:
    """Ask on one line after the other, with one secret after the other, until ordered to tell what was asked."""
    asked: list[Asked] = []
    requests = cycle(map(request_with, secrets))
    for line in cycle(lines):
        if orders.poll(PAUSE):
            break
        asked.append(line.ask(next(requests)))
    orders.send(asked)
