"""The look-ups in one token source: a few at a time, in threads of their own."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, NamedTuple

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from ..stores.base import UNRESOLVED
from .refusal import UNAVAILABLE, Refusal

if TYPE_CHECKING:
    from ..stores.base import CompleteSource
    from .authenticator import Authenticator
    from .callers import Caller
    from .credentials import Presented
    from .lifespan import Lifespan

LANE_WIDTH = 4
"""Number of simultaneous look-ups per source and event loop."""

_logger = logging.getLogger("freegpt_auth")


class Lane(NamedTuple):
    """The look-ups of one event loop.

    Attributes:
        gate: limits look-ups.
        threads: limits their threads: applications may exhaust anyio's own limiter.
    """

    gate: anyio.Semaphore
    threads: anyio.CapacityLimiter


class LookUps:
    """Queues look-ups in *source*, for each event loop in a lane of its own.

    Args:
        source: the token source. Its ``look_up_limit`` bounds the queue of each event loop.

    Attributes:
        source: the same.
    """

    def __init__(self, source: CompleteSource) -> None:
        self.source = source
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

    async def look_up(self, authenticator: Authenticator, presented: Presented) -> Caller | Refusal:
        """Decide about *presented* from the store, or from memory if an earlier look-up has filled it.

        The decision is *unavailable* if the queue is full, or if the system has no thread left for the look-up.
        """
        lane = self.lane()
        if lane.gate.statistics().tasks_waiting >= self.source.look_up_limit:
            return UNAVAILABLE
        async with lane.gate:
            decision = authenticator.peek(presented)
            if decision is not UNRESOLVED:
                return decision
            return await self._in_thread(authenticator, presented, lane.threads)

    async def _in_thread(
        self, authenticator: Authenticator, presented: Presented, threads: anyio.CapacityLimiter
    ) -> Caller | Refusal:
        is_started = False

        def resolve() -> Caller | Refusal:
            nonlocal is_started
            is_started, self._lacks_threads = True, False
            return authenticator.resolve(presented)

        try:
            return await to_thread.run_sync(resolve, limiter=threads)
        except RuntimeError:
            if is_started:  # an error of the source
                raise
        if not self._lacks_threads:
            self._lacks_threads = True
            _logger.error("a look-up found no free thread: the system allows this process no more. It is answered 503")
        return UNAVAILABLE

    def open(self, lifespan: Lifespan) -> None:
        """Keep the source open for *lifespan*."""
        self._lifespans.add(lifespan)
        self.lane()  # the first use of anyio imports modules for 90 ms, which would delay a request

    async def close(self, lifespan: Lifespan) -> None:
        """Close the source with the last lifespan: another server of this process may still use it."""
        self._lifespans.discard(lifespan)
        if not self._lifespans:
            await to_thread.run_sync(self.source.close)
