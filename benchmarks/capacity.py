"""What one database carries, where clients and database share this machine: what the arithmetic for a fleet begins with.

Beside rates there is the time that the database itself took of a core, which does not depend on what else runs here.
"""

from __future__ import annotations

import os
import random
import re
import select
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from database import cluster, make, secret_of
from measure import Result, single, spread

from freegpt_auth.stores.postgres import reads, schema
from freegpt_auth.stores.postgres.usage import PostgresUsage
from freegpt_auth.tokens import digest_of
from freegpt_auth.usage.base import Batch
from tests.helpers.postgresql import BINARIES, PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.postgresql import Cluster

SECTION = "A fleet on PostgreSQL: what one database carries"
SIZE = 1_000_000
CONNECTIONS = (1, 2, 8, 32)
ROUNDS = 3
SECONDS = 3
LISTENERS = (1, 8, 50, 200)
CHANGES = 100
BATCHES = (1, 100, 1_000)
WRITERS = (1, 8)
WRITING = 2.0
"""Seconds for which batches of one size are written."""

_TICKS = os.sysconf("SC_CLK_TCK")

# pgbench writes its own numbers into a statement; each look-up is of another token.
_DIGEST = "sha256(('sk-' || left(encode(sha256(:number::text::bytea), 'hex'), 49))::bytea)"
_LOOK_UP = f"\\set number random(0, {SIZE - 1})\n{reads._LOOK_UP.replace('%s', _DIGEST)};\n"  # noqa: SLF001
_HEARTBEAT = f"{reads._HEAD};\n"  # noqa: SLF001
_CHANGES = " ".join(reads._CHANGES.split()) % {"known": 0, "revision": 0, "digest": "NULL"}  # noqa: SLF001
_FOLLOWING = f"""{_HEARTBEAT}{_CHANGES};
SELECT freegpt_auth.show_process(md5(:client_id::text), 30, 1, false);
"""
"""What each process asks when one token was changed."""

_EXTENDING = "SELECT freegpt_auth.show_process(md5(:client_id::text), 30, 1, true);\n"


class Rate(NamedTuple):
    """What came of asking without a pause.

    Attributes:
        rate: how many a second.
        cost: microseconds of a core that the database took for each.
    """

    rate: float
    cost: float


def measure() -> Iterator[Result]:
    """Measure look-ups, heartbeats, changes, usage and connections."""
    with cluster() as server:
        url = make(server, "carried", SIZE)
        yield from _asked(server)
        for number in LISTENERS:
            yield from _announced(server, url, number)
        server.sql("INSERT INTO freegpt_auth.usage SELECT id, 1, now() FROM freegpt_auth.tokens", "carried")
        server.sql("VACUUM ANALYZE freegpt_auth.usage", "carried")
        for size in BATCHES:
            for writers in WRITERS:
                yield from _written(server, url, size, writers)


# --- what is asked


def _asked(server: Cluster) -> Iterator[Result]:
    cases = [("look-ups by digest", _LOOK_UP, number) for number in CONNECTIONS]
    cases += [("heartbeats", _HEARTBEAT, 8), ("what a process asks after a change", _FOLLOWING, 8)]
    cases += [("rows extended", _EXTENDING, 8)]
    for name, script, connections in cases:
        taken = [_pgbench(server, script, connections) for _ in range(ROUNDS)]
        many = f"{name}, {connections} connection{'s' * (connections > 1)}"
        yield Result(SECTION, many, spread([one.rate for one in taken]), "/s")
        yield Result(SECTION, f"{many}: the database's part", spread([one.cost for one in taken]), "µs of a core")


def _pgbench(server: Cluster, script: str, connections: int) -> Rate:
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        before = _reaped(server)
        output = subprocess.run(  # noqa: S603
            [
                *(BINARIES / "pgbench", "-n", "-M", "extended", "-f", file.name, "-T", str(SECONDS)),
                *("-c", str(connections), "-h", "127.0.0.1", "-p", str(server.port), "-U", "postgres", "carried"),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PGPASSWORD": PASSWORD},
        ).stdout
    [rate] = re.findall(r"tps = ([\d.]+)", output)
    [done] = re.findall(r"actually processed: (\d+)", output)
    time.sleep(0.1)  # until the last backend is gone
    return Rate(float(rate), (_reaped(server) - before) / int(done) * 1e6)


def _reaped(server: Cluster) -> float:
    """Return the seconds of a core that connections took which are closed."""
    assert server.process
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / _TICKS


# --- what is announced


def _announced(server: Cluster, url: str, number: int) -> Iterator[Result]:
    """Change tokens while so many connections listen."""
    heard: list[float] = []
    sent: list[float] = []
    with ExitStack() as stack:
        admin = stack.enter_context(closing(psycopg.connect(url, autocommit=True)))
        listeners = [stack.enter_context(closing(psycopg.connect(url, autocommit=True))) for _ in range(number)]
        for listener in listeners:
            listener.execute(f"LISTEN {schema.CHANNEL}")
            listener.execute(reads._HEAD.encode())  # noqa: SLF001
        done = threading.Event()
        before = _worked(server)
        hearing = threading.Thread(target=_hear, args=(listeners, sent, heard, done))
        hearing.start()
        commits = [_change(admin, place, sent) for place in range(CHANGES)]
        done.set()
        hearing.join()
        cost = (_worked(server) - before) / CHANGES * 1e6
        memory = [_private(listener.info.backend_pid) for listener in listeners]
    to = f"a change, {number} process{'es' * (number > 1)} listening"
    assert len(heard) == number * CHANGES, f"{len(heard)} of {number * CHANGES} notifications came"
    yield Result(SECTION, f"{to}: its commit", spread(commits), "ms")
    yield Result(SECTION, f"{to}: from sending it to hearing of it", spread(heard), "ms")
    p99 = sorted(heard)[int(len(heard) * 0.99)]
    yield Result(SECTION, f"{to}: 99 of 100 have heard of it within", single(p99), "ms")
    yield Result(SECTION, f"{to}: the database's part", single(cost / 1e3), "ms of a core")
    if number > 1:
        yield Result(SECTION, f"memory of a connection, of {number}", spread(memory), "MiB")


def _change(admin: psycopg.Connection[tuple[object, ...]], place: int, sent: list[float]) -> float:
    sent.append(time.perf_counter())
    admin.execute("UPDATE freegpt_auth.tokens SET name = 'renamed' WHERE digest = %s", (digest_of(secret_of(place)),))
    taken = (time.perf_counter() - sent[-1]) * 1e3
    time.sleep(0.02)  # one change after the other: each is heard by all before the next is sent
    return taken


def _hear(
    listeners: list[psycopg.Connection[tuple[object, ...]]],
    sent: list[float],
    heard: list[float],
    done: threading.Event,
) -> None:
    """Note how long after it was sent each notification came; libpq by itself, which is quick."""
    poll = select.epoll()
    by_number = {listener.fileno(): listener.pgconn for listener in listeners}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    while (ready := poll.poll(0.1)) or not done.is_set():
        now = time.perf_counter()
        for number, _ in ready:
            connection = by_number[number]
            connection.consume_input()
            while connection.notifies():
                heard.append((now - sent[-1]) * 1e3)
    poll.close()


def _worked(server: Cluster) -> float:
    """Return the seconds of a core that the database's processes took which are there."""
    return sum(int(Path(f"/proc/{one}/schedstat").read_text().split()[0]) for one in server._processes()) / 1e9  # noqa: SLF001


def _private(process: int) -> float:
    """Return the MiB that a process holds and shares with none."""
    kib = re.findall(r"Private_(?:Clean|Dirty): +(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text())
    return sum(map(int, kib)) / 1024


# --- what is written


def _written(server: Cluster, url: str, size: int, writers: int) -> Iterator[Result]:
    """Write usage as servers do."""
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(PostgresUsage(url))) for _ in range(writers)]
        for number, store in enumerate(stores):
            store.add(_batch(f"{size}-{writers}-{number}", 0, size), 5.0)
        taken: list[list[float]] = [[] for _ in stores]
        threads = [
            threading.Thread(target=_write, args=(store, f"{size}-{writers}-{number}", size, taken[number]))
            for number, store in enumerate(stores)
        ]
        before, began = _worked(server), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds, worked = time.perf_counter() - began, _worked(server) - before
    times = [one for each in taken for one in each]
    name = f"usage of {size:,} token{'s' * (size > 1)} at once, {writers} connection{'s' * (writers > 1)}"
    yield Result(SECTION, f"{name}: batches", single(len(times) / seconds), "/s")
    yield Result(SECTION, f"{name}: one batch", spread(times), "ms")
    yield Result(SECTION, f"{name}: the database's part of one", single(worked / len(times) * 1e3), "ms of a core")


def _write(store: PostgresUsage, process: str, size: int, taken: list[float]) -> None:
    until = time.perf_counter() + WRITING
    sequence = 0
    while time.perf_counter() < until:
        sequence += 1
        batch = _batch(process, sequence, size)
        began = time.perf_counter()
        store.add(batch, 5.0)
        taken.append((time.perf_counter() - began) * 1e3)


def _batch(process: str, sequence: int, size: int) -> Batch:
    now = time.time()
    ids = (digest_of(secret_of(number)).hex()[:16] for number in random.sample(range(SIZE), size))
    return Batch(process, sequence, dict.fromkeys(ids, (1, now)))
