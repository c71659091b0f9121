"""How soon a revocation is in force: four workers of one server are asked without a pause while tokens are revoked."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import askers
from measure import Result, single, spread
from token_file import write_tokens

from freegpt_auth import FileTokenStore, cli
from freegpt_auth.tokens import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from askers import Asked, Line

WORKERS = 4
REVOCATIONS = 1_000
IN_A_PROCESS = 20
"""One revocation in so many is a process of its own. When that replaces the file is not seen."""

OTHERS = 50
"""Tokens that stay valid."""

SECTION = f"Revocation, {WORKERS} workers under load"
REFUSAL = "from the file's replacement to a worker's first refusal"
"""From when the command is about to replace it, until the client has read the last byte."""

LATE = "accepted requests that began after the command had returned"
BEFORE, MEANWHILE = "a request with the token, before the replacement", "a request with another token, meanwhile"
NOISE = "how long a request can wait for the processor alone"


class Revoked(NamedTuple):
    """What was seen of one revocation.

    Attributes:
        replaced: when the command was about to replace the token file; 0 if it could not be seen.
        returned: when the command had returned.
        asked: all requests with the token, from before the command until after it.
    """

    replaced: float
    returned: float
    asked: list[Asked]


class Tally:
    """What is kept of all revocations.

    Attributes:
        asked: how many requests presented a token that was being revoked.
        after: how many of them began after the command had returned.
        late: how many of those were accepted.
        delays: milliseconds from the replacement to the end of the first refusal, of each worker and revocation.
        before: milliseconds of each request that was answered before the replacement.
    """

    def __init__(self) -> None:
        self.asked = self.after = self.late = 0
        self.delays: list[float] = []
        self.before: list[float] = []

    def add(self, revoked: Revoked) -> None:
        """Count one revocation."""
        after = [one for one in revoked.asked if one.began > revoked.returned]
        assert len({one.worker for one in after}) == WORKERS
        self.asked += len(revoked.asked)
        self.after += len(after)
        self.late += sum(one.accepted for one in after)
        if revoked.replaced:
            self.delays += [(end - revoked.replaced) * 1e3 for end in _first_refusals(revoked.asked)]
            self.before += [_milliseconds(one) for one in revoked.asked if one.ended < revoked.replaced]


def measure() -> Iterator[Result]:
    """Revoke a thousand tokens, and measure what each worker made of it."""
    tally, others = take()
    of_all = f"of {tally.after:,} that began then; {tally.asked:,} presented a token that was being revoked"
    yield Result(SECTION, LATE, single(tally.late), "", 0, note=of_all)
    yield Result(SECTION, REFUSAL, spread(tally.delays), "ms", 15, note=_shares(tally.delays))
    yield Result(SECTION, f"{REFUSAL}, longest", single(max(tally.delays)), "ms", 50)
    yield Result(SECTION, BEFORE, spread(tally.before), "ms")
    yield Result(SECTION, f"{BEFORE}, longest", single(max(tally.before)), "ms", note=NOISE)
    yield Result(SECTION, MEANWHILE, spread(others), "ms")
    yield Result(SECTION, f"{MEANWHILE}, longest", single(max(others)), "ms")


def take() -> tuple[Tally, list[float]]:
    """Return what was seen of all revocations, and the milliseconds of the valid requests meanwhile."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = f"{folder}/api_tokens.json"
        secrets = write_tokens(Path(path), REVOCATIONS + OTHERS)
        victims, others = secrets[:REVOCATIONS], secrets[REVOCATIONS:]
        ids = {digest: token.id for digest, token in FileTokenStore(path).tokens().items()}
        port = stack.enter_context(serving(path))
        eager, steady = askers.lines_to_each(WORKERS, 2, port, askers.request_with(others[0]))
        load = stack.enter_context(asking(askers.ask_steadily, steady, others))
        orders = stack.enter_context(asking(askers.ask_without_pause, eager))
        for number, secret in enumerate(victims, start=1):
            command = revoke_in_a_process if number % IN_A_PROCESS == 0 else revoke
            tally.add(watch(orders, secret, lambda: command(path, ids[digest_of(secret)])))  # noqa: B023  called at once
        orders.send(None)
        load.send(None)
        return tally, [_milliseconds(one) for one in told(load)]


def watch(orders: Connection, secret: str, command: Callable[[], tuple[float, float]]) -> Revoked:
    """Have all workers asked with *secret* while *command* revokes it."""
    orders.send(secret)
    told(orders)
    time.sleep(random.uniform(0.002, 0.022))  # noqa: S311  no worker is to have looked at the file at a certain time before
    replaced, returned = command()
    time.sleep(0.01)
    orders.send(None)
    return Revoked(replaced, returned, told(orders))


def revoke(path: str, token_id: str) -> tuple[float, float]:
    """Run the command in this process, and return when it was about to replace the file, and when it had returned."""
    replaced = []
    replace = os.replace

    def note_and_replace(*arguments: Any, **options: Any) -> None:
        replaced.append(time.monotonic())
        replace(*arguments, **options)

    with patch.object(os, "replace", note_and_replace), redirect_stderr(io.StringIO()):
        status = cli.main(["--store", path, "revoke", token_id])
        returned = time.monotonic()
    assert status == 0
    return replaced[0], returned


def revoke_in_a_process(path: str, token_id: str) -> tuple[float, float]:
    """Run the command as an operator does, and return when it had returned."""
    command = [sys.executable, "-m", "freegpt_auth", "--store", path, "revoke", token_id]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # noqa: S603
    return 0.0, time.monotonic()


@contextmanager
def serving(path: str) -> Iterator[int]:
    """Serve the guarded application from several workers, and give the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "guarded_app:app", "--app-dir", str(Path(__file__).parent)]
    options = ["--workers", str(WORKERS), "--port", str(port), "--log-level", "warning"]
    environment = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
    environment["FREEGPT_AUTH_STORE"] = path
    server = subprocess.Popen([*command, *options], env=environment, start_new_session=True)  # noqa: S603
    try:
        _wait_for(port, server)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)
        else:
            return


@contextmanager
def asking(work: Callable[..., None], lines: Sequence[Line], *arguments: Any) -> Iterator[Connection]:
    """Let a process of its own ask on *lines*, and give the pipe for its orders."""
    context = multiprocessing.get_context("fork")  # the lines go with it
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, lines, *arguments), daemon=True)
    process.start()
    theirs.close()
    for line in lines:
        line.close()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()
        ours.close()


def told(orders: Connection) -> Any:
    """Return what a process of :func:`asking` tells next."""
    assert orders.poll(askers.PATIENCE), "the clients do not answer"
    return orders.recv()


def _first_refusals(asked: Sequence[Asked]) -> list[float]:
    first: dict[int, float] = {}
    for one in asked:
        if not one.accepted:
            first[one.worker] = min(one.ended, first.get(one.worker, one.ended))
    return list(first.values())


def _milliseconds(asked: Asked) -> float:
    return (asked.ended - asked.began) * 1e3


def _shares(delays: Sequence[float]) -> str:
    """Tell how many of all were over by when."""
    within = {bound: sum(delay <= bound for delay in delays) / len(delays) for bound in (5, 10, 15, 20, 25, 30, 40, 50)}
    return f"of {len(delays):,} within " + ", ".join(f"{bound} ms: {share:.1%}" for bound, share in within.items())
