"""Servers in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.helpers.asking import is_up, status
from tests.helpers.ports import free_port
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Server:
    """A server that accepts connections at *url* and logs to *log*."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the server."""
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def get(self, path: str = "/v1/models", token: str | None = None) -> int:
        """Send a GET and return the status code."""
        return status(self.url + path, token)

    def stop(self) -> str:
        """Stop the server with SIGTERM and return its log."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        return self.log.read_text()


Serve = Callable[..., Server]
"""The type of the fixtures ``serve`` and ``serve_once``."""


def serving(folder: Path) -> Iterator[Serve]:
    """Yield a function that starts servers in *folder*; stop them all afterwards."""
    servers: list[Server] = []

    def serve(*arguments: str, module: str = "uvicorn", script: Path | None = None, **environment: str) -> Server:
        program = [str(script)] if script else ["-m", module]
        servers.append(_start(folder, [*program, *arguments], module, environment))
        return servers[-1]

    yield serve
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def _start(folder: Path, arguments: list[str], module: str, environment: dict[str, str]) -> Server:
    """Start a server on a free loopback port and wait until it answers."""
    port = free_port()
    bind = f"--bind 127.0.0.1:{port}" if module == "hypercorn" else f"--host 127.0.0.1 --port {port}"
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, *bind.split()],
            stdout=output,
            stderr=subprocess.STDOUT,
            # By default uvicorn kills a worker that does not respond for 5 seconds: a loaded machine causes that.
            env={**os.environ, "UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "120", **environment},
            cwd=folder,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return is_up(server.url)

    wait_until(answers, log.read_text, 120)
    return server
