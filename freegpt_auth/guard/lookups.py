"""The look-ups of one token source: a few at a time, in threads of their own."""

from __future__ import annotations

import logging
import math
import weakref
from typing import TYPE_CHECKING, NamedTuple

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from ..stores.base import UNRESOLVED
from .authenticator import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

    from ..stores.base import TokenSource
    from .authenticator import Decision
    from .callers import Caller
    from .lifespan import Lifespan

LANE_WIDTH = 4
"""Look-ups of one source and one event loop at the same time."""

_UNAVAILABLE = Refusal("unavailable")

_logger = logging.getLogger("freegpt_auth")


class Lane(NamedTuple):
    """The look-ups of one event loop.

    Attributes:
        gate: admits them.
        threads: theirs alone. An application may occupy all of anyio's default threads.
    """

    gate: anyio.Semaphore
    threads: anyio.CapacityLimiter


class LookUps:
    """Queues look-ups in *verifier*, for each event loop in a lane of its own.

    Args:
        verifier: the token source. Its ``look_up_limit`` bounds the queue of each event loop.

    Attributes:
        verifier: the same.
    """

    def __init__(self, verifier: TokenSource) -> None:
        self.verifier = verifier
        self._limit: float = getattr(verifier, "look_up_limit", math.inf)
        self._lanes: RunVar[Lane] = RunVar("freegpt_auth")
        self._lacks_threads = False
        self._lifespans: weakref.WeakSet[Lifespan] = weakref.WeakSet()

    def lane(self) -> Lane:
        """Return the lane of the running event loop."""
        lane = self._lanes.get(None)
        if lane is None:
            lane = Lane(anyio.Semaphore(LANE_WIDTH), anyio.CapacityLimiter(LANE_WIDTH))
            self._lanes.set(lane)
        return lane

    async def settle(
        self, peek: Callable[[Scope], Decision], resolve: Callable[[Scope], Caller | Refusal], scope: Scope
    ) -> Caller | Refusal:
        """Decide about a request from the store, or from memory if an earlier look-up has filled it.

        The decision is *unavailable* if the queue is full, or if the system has no thread left for the look-up.
        """
        lane = self.lane()
        if lane.gate.statistics().tasks_waiting >= self._limit:
            return _UNAVAILABLE
        async with lane.gate:
            decision = peek(scope)
            if decision is not UNRESOLVED:
                return decision
            return await self._in_thread(resolve, scope, lane.threads)

    async def _in_thread(
        self, resolve: Callable[[Scope], Caller | Refusal], scope: Scope, threads: anyio.CapacityLimiter
    ) -> Caller | Refusal:
        started = False

        def run() -> Caller | Refusal:
            nonlocal started
            started, self._lacks_threads = True, False
            return resolve(scope)

        try:
            return await to_thread.run_sync(run, limiter=threads)
        except RuntimeError:
            if started:  # an error of the source
                raise
        if not self._lacks_threads:
            self._lacks_threads = True
            _logger.error("a look-up found no free thread: the system allows this process no more. It is answered 503")
        return _UNAVAILABLE

    def open(self, lifespan: Lifespan) -> None:
        """Keep the source open for *lifespan*."""
        self._lifespans.add(lifespan)
        self.lane()  # the first use of anyio imports for 90 ms: no request waits for that

    async def close(self, lifespan: Lifespan) -> None:
        """Close the source with the last lifespan: another server of this process may still use it."""
        self._lifespans.discard(lifespan)
        close: Callable[[], None] | None = getattr(self.verifier, "close", None)
        if close is not None and not self._lifespans:
            await to_thread.run_sync(close)
