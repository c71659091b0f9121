"""A proxy between a host and its database that cuts, stalls, delays and drops traffic as networks do.

The proxy runs on an event loop in a thread of its own. It reads the protocol, so both ends must not use TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from anyio.from_thread import start_blocking_portal

from tests.helpers.ports import free_port

PLAIN = "?sslmode=disable&gssencmode=disable"
"""The end of a URL that leads through a proxy."""

_NOTIFICATION = ord("A")  # the message type NotificationResponse


@dataclass(eq=False)
class _Link:
    """One connection of a client.

    Attributes:
        client: the end that receives replies.
        server: the end that receives queries.
        is_lost: everything sent is dropped, the end of the connection too.
        is_held: everything sent is delivered later.
        loses_reply: the next reply is not delivered.
        rest: the beginning of an incomplete message.
    """

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_lost: bool = False
    is_held: bool = False
    loses_reply: bool = False
    rest: bytes = field(default=b"", repr=False)

    def abort(self) -> None:
        """Reset the connection at both ends."""
        self.is_lost = True
        self.client.transport.abort()
        self.server.transport.abort()


_Edit = Callable[[_Link, bytes], bytes]


class Proxy:
    """Forwards connections from one loopback port to another.

    Args:
        target: the port of the server.

    Attributes:
        port: the port that it listens at.
        delay: the delay of each direction, in seconds.
        drops_notifications: notifications are not delivered.
        lose_reply_to: the reply to a query with these bytes is not delivered, and its connection is cut.
        lost_replies: the number of replies that were lost in that way.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.delay = 0.0
        self.drops_notifications = False
        self.lose_reply_to: bytes | None = None
        self.lost_replies = 0
        self._is_lost = self._is_held = False
        self._links: dict[_Link, None] = {}  # oldest first
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._thread = contextlib.ExitStack()
        self._do = self._thread.enter_context(start_blocking_portal("asyncio")).call
        self.accept()

    def refuse(self) -> None:
        """Refuse new connections, and cut the existing ones."""
        self._do(self._close_server)
        self.cut()

    def accept(self) -> None:
        """Accept connections again."""
        self._do(self._open_server)

    def cut(self) -> None:
        """Reset every connection."""
        self._do(self._abort)

    def lose(self) -> None:
        """Drop everything sent: in existing connections for good, in new ones until :meth:`mend`."""
        self._do(partial(self._mark, lost=True))

    def hold(self, keep: int = 0) -> None:
        """Deliver nothing until :meth:`mend`, except in the *keep* oldest connections."""
        self._do(partial(self._mark, held=True, keep=keep))

    def mend(self) -> None:
        """Deliver everything again; dropped traffic stays lost."""
        self.delay, self.drops_notifications, self.lose_reply_to = 0.0, False, None
        self._do(self._mark)

    def close(self) -> None:
        """Cut all connections and end the event loop."""
        self.refuse()
        self._do(asyncio.sleep, 0.05)  # connections just accepted, or cut, end by themselves
        self._thread.close()

    async def _open_server(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _abort(self) -> None:
        for link in list(self._links):
            link.abort()

    def _mark(self, *, lost: bool = False, held: bool = False, keep: int = 0) -> None:
        self._is_lost, self._is_held = lost, held
        for number, link in enumerate(self._links):
            link.is_lost |= lost
            link.is_held = held and number >= keep
        self._released.set()
        self._released = asyncio.Event()

    async def _serve(self, queries: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            replies, server = await asyncio.open_connection("127.0.0.1", self.target)
        except (OSError, asyncio.CancelledError):  # refused, or this proxy is being closed
            client.transport.abort()
            return
        link = _Link(client, server, is_lost=self._is_lost, is_held=self._is_held)
        self._links[link] = None
        try:
            await asyncio.gather(
                self._pass(link, queries, server, self._query),
                self._pass(link, replies, client, self._reply),
                return_exceptions=True,
            )
        finally:
            self._links.pop(link)
            link.abort()

    async def _pass(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, edit: _Edit) -> None:
        under_way: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        delivery = asyncio.create_task(self._deliver(link, under_way, sink))
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                under_way.put_nowait((time.monotonic() + self.delay, edit(link, data)))
        under_way.put_nowait((time.monotonic() + self.delay, None))
        await delivery

    async def _deliver(
        self, link: _Link, under_way: asyncio.Queue[tuple[float, bytes | None]], sink: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while link.is_held:
                await self._released.wait()
            if link.is_lost and not sink.transport.is_closing():
                if data is None:  # one end closed; the other never receives the end
                    await asyncio.sleep(3600)
                continue
            if data is None:
                sink.close()
                return
            sink.write(data)

    def _query(self, link: _Link, data: bytes) -> bytes:
        if self.lose_reply_to is not None and self.lose_reply_to in data:
            link.loses_reply = True
        return data

    def _reply(self, link: _Link, data: bytes) -> bytes:
        if link.loses_reply:
            self.lost_replies += 1
            link.abort()
            return b""
        messages, link.rest = _split(link.rest + data)
        return b"".join(
            message for message in messages if not (self.drops_notifications and message[0] == _NOTIFICATION)
        )


FAULTS = {
    "refused": (Proxy.refuse, Proxy.accept),
    "vanishing": (Proxy.lose, Proxy.mend),
    "held": (Proxy.hold, Proxy.mend),
}
"""Faults of a link, by their begin and end."""


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete messages of a server, and the incomplete rest."""
    messages, start = [], 0
    while len(data) >= start + 5:
        (size,) = struct.unpack_from("!I", data, start + 1)
        if len(data) < start + 1 + size:
            break
        messages.append(data[start : start + 1 + size])
        start += 1 + size
    return messages, data[start:]
