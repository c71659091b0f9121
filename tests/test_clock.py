"""The clock of ages and leases."""

from __future__ import annotations

import time

import pytest

from freegpt_auth.clock import elapsed


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux has this clock")
def test_time_asleep_is_counted() -> None:
    """A lease ends while the host sleeps: its clock counts the sleep."""
    assert elapsed.args == (time.CLOCK_BOOTTIME,)  # type: ignore[attr-defined]
