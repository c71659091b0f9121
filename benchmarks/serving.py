"""Servers in processes of their own, on loopback: uvicorn with httptools and uvloop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from served import CONTENDER, STORE

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0
"""Longest wait for a server to start or to stop, in seconds."""

_UVICORN = (
    *(sys.executable, "-m", "uvicorn", "--factory", "served:app", "--app-dir", str(Path(__file__).parent)),
    *("--http", "httptools", "--loop", "uvloop", "--interface", "asgi3", "--no-access-log", "--log-level", "error"),
)


class Server(NamedTuple):
    """A server that runs, and its port."""

    port: int
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(contender: str, store: str, workers: int = 1) -> Iterator[Server]:
    """Serve one of the contenders of :mod:`served` until the end of the block. The server answers in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
    environment |= {CONTENDER: contender, STORE: store}
    command = [*_UVICORN, "--port", str(port), "--workers", str(workers)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603
    try:
        _wait_for(port, process)
        yield Server(port, process)
    finally:
        _stop(process)


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep this process to one core, and each process that it starts in the block."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def processor_time(server: Server) -> float:
    """Return the processor time of all threads of a server with one worker, in seconds."""
    threads = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)
        else:
            return


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
