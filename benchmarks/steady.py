"""A client that asks at a steady rate, whatever the server makes of it.

When a request is due does not depend on the answers before it, and how long one takes is counted from then: a server that
holds requests up does not get fewer of them. It runs in a process of its own.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

PATIENCE = 20.0
"""Seconds after which an answer does not come any more."""

_LARGEST = 65_536


class Order(NamedTuple):
    """What to ask.

    Attributes:
        rate: requests a second; 0 for as many as are answered.
        seconds: how long.
    """

    rate: float
    seconds: float


class Answers(NamedTuple):
    """What came of it.

    Attributes:
        times: milliseconds from when each request was due until it was answered.
        statuses: how many had each status.
        rate: how many were answered a second.
    """

    times: list[float]
    statuses: Counter[int]
    rate: float


def work(orders: Connection, port: int, requests: Iterator[bytes], connections: int) -> None:
    """Do what is ordered, until ``None`` is, and tell what came of it."""
    sockets = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(connections)]
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while order := orders.recv():
        orders.send(_ask(sockets, requests, order))
    for one in sockets:
        one.close()


def _ask(sockets: list[socket.socket], requests: Iterator[bytes], order: Order) -> Answers:
    """Send each request when it is due, or when a connection is free for it, and wait for the last answer."""
    free, waiting = deque(sockets), dict[socket.socket, tuple[float, bytes]]()
    times: list[float] = []
    statuses: Counter[int] = Counter()
    began = now = time.perf_counter()
    due, end = began, began + order.seconds
    while due < end or waiting:
        while free and due <= now and due < end:
            one = free.popleft()
            one.sendall(next(requests))
            waiting[one] = (due, b"")
            due = due + 1 / order.rate if order.rate else now
        left = due - now if free and due < end else PATIENCE
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, left))
        now = time.perf_counter()
        assert ready or left < PATIENCE, "the server does not answer any more"
        for one in ready:
            since, before = waiting.pop(one)
            received = one.recv(_LARGEST)
            assert received, "the server hung up"
            answer = before + received
            if not _is_complete(answer):
                waiting[one] = (since, answer)
                continue
            times.append((now - since) * 1e3)
            statuses[int(answer[9:12])] += 1
            free.append(one)
        if not order.rate:
            due = max(due, now)
    return Answers(times, statuses, len(times) / (now - began))


def _is_complete(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])
