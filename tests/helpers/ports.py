"""Free loopback ports."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a loopback port that no process listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
