"""The clock of ages and leases: it counts the time that the host sleeps."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

elapsed: Callable[[], float] = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
"""Return the seconds since the host booted, including the time it slept.

``time.monotonic`` stops while a Linux host sleeps (clock_gettime(2)): a lease of 6 s lasted 25 s across a suspend.
Systems without ``CLOCK_BOOTTIME`` fall back to ``CLOCK_MONOTONIC``.
"""
