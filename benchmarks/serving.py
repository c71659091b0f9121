"""Servers in processes of their own, on loopback, on another core than the load."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import served
from load import wait_until_ready
from request_path import HEADERS, LENGTH
from token_file import write_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PATH = "/v1/chat/completions"
STOPPING = 10.0
"""Seconds after which a server that does not stop is killed."""

UVICORN = ("uvicorn", "--factory", "served:app", "--interface", "asgi3", "--no-access-log", "--log-level", "error")
SERVERS = {
    "uvicorn with h11 and asyncio": (*UVICORN, "--http", "h11", "--loop", "asyncio"),
    "uvicorn with httptools and uvloop": (*UVICORN, "--http", "httptools", "--loop", "uvloop"),
    "granian with uvloop": (
        *("granian", "--factory", "served:app", "--interface", "asgi", "--loop", "uvloop"),
        *("--no-access-log", "--log-level", "error"),
    ),
}
"""The command line of each, but for the port. The first is what ``freegpt-auth[server]`` installs."""


class Tokens(NamedTuple):
    """A folder with a token file, and the secrets in it."""

    folder: Path
    secrets: list[str]


class Server(NamedTuple):
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]


def make_tokens(folder: str, number: int) -> Tokens:
    """Make so many tokens in *folder*."""
    secrets = write_tokens(Path(folder, served.TOKENS), number)
    Path(folder, served.SECRETS).write_text("\n".join(secrets))
    return Tokens(Path(folder), secrets)


def requests(secrets: Sequence[str], path: str = PATH) -> list[bytes]:
    """Return a request with each of *secrets*, with the headers of a real client."""
    content = b"{" + b" " * 118 + b"}"
    lines = [name + b": " + value for name, value in (*HEADERS, LENGTH)]
    head = b"\r\n".join([f"POST {path} HTTP/1.1".encode(), *lines[:12], b"authorization: Bearer %s", *lines[12:]])
    return [head % secret.encode() + b"\r\n\r\n" + content for secret in secrets]


@contextlib.contextmanager
def serve(command: Sequence[str], contender: str, tokens: Tokens) -> Iterator[Server]:
    """Run a server until the block ends; in it the server answers."""
    port = _free_port()
    environment: Mapping[str, str] = {
        **os.environ,
        served.CONTENDER: contender,
        served.FOLDER: str(tokens.folder),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with on_core(0):
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", *command, "--port", str(port)], env=environment, cwd=tokens.folder
        )
    try:
        wait_until_ready(port, requests(tokens.secrets[:1])[0], served.BODY)
        yield Server(port, process)
    finally:
        _stop(process)


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep to one core, as does every process that is started meanwhile, if there is more than one."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def processes(server: Server) -> list[int]:
    """Return the server's process, and those that it started: granian's worker is one of them."""
    first = server.process.pid
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return [first, *map(int, children)]


def processor_time(server: Server) -> float:
    """Return the seconds for which the server had a core so far."""
    statistics = [
        path.read_text() for one in processes(server) for path in Path(f"/proc/{one}/task").glob("*/schedstat")
    ]
    return sum(int(line.split()[0]) for line in statistics) / 1e9


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOPPING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
