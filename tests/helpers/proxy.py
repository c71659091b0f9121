"""A link between one host and its database, that can be cut, hung, slowed and robbed, as networks do it.

The proxy lives on an event loop in a thread of its own. The two ends must not speak TLS: what passes is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.helpers.postgresql import free_port

if TYPE_CHECKING:
    from collections.abc import Coroutine

PLAIN = "?sslmode=disable&gssencmode=disable"
"""What a URL that leads through a proxy ends with."""

_ANNOUNCEMENT = ord("A")  # NotificationResponse


@dataclass(eq=False)
class _Link:
    """One connection of a client.

    Attributes:
        client: to whom the answers go.
        server: to whom the questions go.
        is_lost: nothing that is sent arrives any more, not even the end.
        is_held: what is sent arrives when it is over.
        is_robbed: the next answer is not delivered.
        rest: the beginning of a message of which the end has not come yet.
    """

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_lost: bool = False
    is_held: bool = False
    is_robbed: bool = False
    rest: bytes = field(default=b"", repr=False)

    def abort(self) -> None:
        """Reset the connection at both ends."""
        self.is_lost = True
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """Listens at a loopback port and passes on to a server at another.

    Args:
        target: the port of the server.

    Attributes:
        port: where it listens.
        delay: seconds that each direction takes.
        is_deaf: notifications are not delivered.
        robbed: a client that sends these bytes does not get the answer, and its connection is then cut.
        robberies: how many answers were not delivered because of that.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.delay = 0.0
        self.is_deaf = False
        self.robbed: bytes | None = None
        self.robberies = 0
        self._is_lost = self._is_held = False
        self._links: dict[_Link, None] = {}  # in the order of their beginning
        self._loop = asyncio.new_event_loop()
        self._moved = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.accept()

    def refuse(self) -> None:
        """Take no new connections, and cut those that there are."""
        self._do(self._close_server())
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._do(self._open_server())

    def cut(self) -> None:
        """Reset every connection."""
        self._do(self._abort())

    def lose(self) -> None:
        """Let whatever is sent vanish without a word: in these connections for good, in new ones until :meth:`mend`."""
        self._do(self._mark(lost=True))

    def hold(self, keep: int = 0) -> None:
        """Take whatever is sent and deliver nothing, until :meth:`mend`; except in the *keep* oldest connections."""
        self._do(self._mark(held=True, keep=keep))

    def mend(self) -> None:
        """Let everything pass again; what was lost is lost."""
        self.delay, self.is_deaf, self.robbed = 0.0, False, None
        self._do(self._mark())

    def links(self) -> int:
        """Return how many connections there are."""
        return len(self._links)

    def close(self) -> None:
        """End it."""
        self.refuse()
        self._do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, act: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(act, self._loop).result(10)

    async def _open_server(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _abort(self) -> None:
        for link in list(self._links):
            link.abort()

    async def _mark(self, *, lost: bool = False, held: bool = False, keep: int = 0) -> None:
        self._is_lost, self._is_held = lost, held
        for number, link in enumerate(self._links):
            link.is_lost |= lost
            link.is_held = held and number >= keep
        self._moved.set()
        self._moved = asyncio.Event()

    async def _finish(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, asked: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            answered, server = await asyncio.open_connection("127.0.0.1", self.target)
        except (OSError, asyncio.CancelledError):  # refused, or this proxy is being closed
            client.transport.abort()
            return
        link = _Link(client, server, is_lost=self._is_lost, is_held=self._is_held)
        self._links[link] = None
        try:
            await asyncio.gather(
                self._pass(link, asked, server, self._question),
                self._pass(link, answered, client, self._answer),
                return_exceptions=True,
            )
        finally:
            self._links.pop(link)
            link.abort()

    async def _pass(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, edit: Any) -> None:
        under_way: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        delivery = self._loop.create_task(self._deliver(link, under_way, sink))
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
                await self._moved.wait()
            if link.is_lost and not sink.transport.is_closing():
                if data is None:  # one end has gone, and the other never learns of it
                    await asyncio.sleep(3600)
                continue
            if data is None:
                sink.close()
                return
            sink.write(data)

    def _question(self, link: _Link, data: bytes) -> bytes:
        if self.robbed is not None and self.robbed in data:
            link.is_robbed = True
        return data

    def _answer(self, link: _Link, data: bytes) -> bytes:
        if link.is_robbed:
            self.robberies += 1
            link.abort()
            return b""
        messages, link.rest = _split(link.rest + data)
        return b"".join(message for message in messages if not (self.is_deaf and message[0] == _ANNOUNCEMENT))


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole messages of a server, and the beginning of one more."""
    messages, start = [], 0
    while len(data) >= start + 5:
        (size,) = struct.unpack_from("!I", data, start + 1)
        if len(data) < start + 1 + size:
            break
        messages.append(data[start : start + 1 + size])
        start += 1 + size
    return messages, data[start:]
