"""Clients that keep one request under way on each of their connections.

The clock is :func:`time.monotonic`, which all processes of a host share.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import selectors
import socket
import time
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from request_path import HEADERS, LENGTH
from served import BODY, WORKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

PATIENCE = 20.0
"""Longest wait for an answer, in seconds."""

_LARGEST = 65_536
_OK, _UNAUTHORIZED = b"200", b"401"


class Answer(NamedTuple):
    """An answered request.

    Attributes:
        worker: number of the server process that answered.
        began: instant just before the request was sent.
        ended: instant at which the whole answer had been read.
        accepted: the status was 200, not 401.
    """

    worker: int
    began: float
    ended: float
    accepted: bool


class Line:
    """A persistent connection to one worker of a server.

    Attributes:
        worker: number of the process at its other end.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self.worker = 0
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ask(request)
        found = re.search(rb"\r\n%s: (\d+)" % WORKER, self._received)
        assert found, self._received
        self.worker = int(found[1])

    def fileno(self) -> int:
        """Return the file descriptor, for a selector."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection in this process. A forked process keeps its own end."""
        self._socket.close()

    def send(self, request: bytes) -> None:
        """Send a request. The previous one must have been answered."""
        self._received = b""
        self._began = time.monotonic()
        self._socket.sendall(request)

    def receive(self) -> Answer | None:
        """Read available bytes, and return the answer once it is complete."""
        received = self._socket.recv(_LARGEST)
        now = time.monotonic()
        assert received, "the server closed the connection"
        self._received += received
        if not _is_complete(self._received):
            return None
        status = self._received[9:12]
        assert status in (_OK, _UNAUTHORIZED), self._received
        return Answer(self.worker, self._began, now, status == _OK)

    def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer."""
        self.send(request)
        while (answer := self.receive()) is None:
            pass
        return answer


def _is_complete(data: bytes) -> bool:
    if data.endswith(BODY):
        return True
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def request_with(secret: str) -> bytes:
    """Return the bytes of a request of the openai client that presents *secret*."""
    lines = [name + b": " + value for name, value in (*HEADERS, LENGTH)]
    credential = b"authorization: Bearer " + secret.encode()
    head = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", *lines[:12], credential, *lines[12:]])
    return head + b"\r\n\r\n" + b" " * int(LENGTH[1])


def line_to_each(workers: int, port: int, request: bytes) -> list[Line]:
    """Return one connection to each worker: connect until all have one, since the kernel chooses the worker."""
    deadline = time.monotonic() + PATIENCE
    found: dict[int, Line] = {}
    while len(found) < workers:
        assert time.monotonic() < deadline, f"only {len(found)} of {workers} workers answer"
        line = Line(port, request)
        if found.setdefault(line.worker, line) is not line:
            line.close()
    return list(found.values())


def ask_until(is_over: Callable[[], bool], lines: Sequence[Line], requests: Iterator[bytes]) -> list[Answer]:
    """Keep one request under way on each line. On each line, one more request begins after *is_over* returned true."""
    answers: list[Answer] = []
    over = math.inf
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line, selectors.EVENT_READ, line)
            line.send(next(requests))
        waiting = len(lines)
        while waiting:
            ready = selector.select(PATIENCE)
            assert ready, "the server does not answer"
            for key, _ in ready:
                if (answer := key.data.receive()) is None:
                    continue
                answers.append(answer)
                if over == math.inf and is_over():
                    over = time.monotonic()
                if answer.began < over:
                    key.data.send(next(requests))
                else:
                    waiting -= 1
    return answers


@contextmanager
def asking_process(lines: Sequence[Line]) -> Iterator[Connection]:
    """Start a client process, and yield the pipe for its orders: see :func:`_obey`."""
    context = multiprocessing.get_context("fork")  # the process inherits the connections
    ours, theirs = context.Pipe()
    process = context.Process(target=_obey, args=(theirs, lines), daemon=True)
    process.start()
    theirs.close()
    for line in lines:
        line.close()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()
        ours.close()


def answer_of(orders: Connection) -> Any:
    """Return the next message of a client process."""
    assert orders.poll(PATIENCE), "the clients do not answer"
    return orders.recv()


def _obey(orders: Connection, lines: Sequence[Line]) -> None:
    """Ask with each secret that is ordered until the next message, then send the answers.

    The first message for each secret is ``None``: all workers accept it.
    """
    while True:
        request = request_with(orders.recv())
        assert all(line.ask(request).accepted for line in lines)
        orders.send(None)
        answers = ask_until(orders.poll, lines, repeat(request))
        orders.recv()
        orders.send(answers)
