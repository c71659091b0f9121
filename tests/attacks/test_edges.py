"""Faults of files, clocks and workers: no fault opens a server of two workers that gets requests without a pause.

Each fault happens under a real server, with and without an environment key, with and without lifespan. The tests check
every answer: a request that began before a change may get the old answer, one that began 20 ms after it must get the
new one, in both workers. So at no time is a request without a credential accepted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.disk import SIZE_LIMIT
from freegpt_auth.stores.file.store import LOCK_TIMEOUT, RETRY_INTERVAL
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, generate_secret
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import SHUTDOWN_TIMEOUT
from tests.attacks.edges import APPLICATION, UVICORN, Asked, Watch, answers, broken, gone, read_again
from tests.helpers.programs import GUNICORN
from tests.helpers.watch import Client, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Keep
    from tests.helpers.servers import Serve

# A container that shares /dev/shm and removes the notes of stopped servers.
NEIGHBOUR = """
from freegpt_auth.stores.file import worker_notes
for folder in worker_notes._folders():
    worker_notes._prepare(folder)
"""
NOTES = [
    Path(folder, f"freegpt_auth-0-{Path('/proc/self/ns/pid').stat().st_ino}") for folder in ("memory", "temporary")
]
RENEWING = (GUNICORN, "--max-requests", "20")
KEY = {"FREEGPT_API_KEY": "a-key-from-the-environment"}
TOKENS, USAGE, ASIDE = Path("api_tokens.json"), Path("usage/usage.db"), Path("api_tokens.json.backup")
NO_FILE = {True: (200, 200, 200, 200), False: (401, 401, 401, 401)}  # without a key, and with one
OPENED = ["WARNING open mode: every request is let through"]
CLOSED = ["WARNING authentication is now on: 1 active token"]
WRITABLE = "WARNING .* can be written by others; run chmod go-w on it"
NO_TOKENS = b'{"version": 1, "tokens": []}'
EMPTY = "it is empty; a new token file is made by create, not by touch"


# --- changes of a file, in one step


def put(path: Path, content: bytes, modified: int | None = None) -> None:
    """Replace a file."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.chmod(0o600)
    os.utime(new, ns=(modified or time.time_ns(),) * 2)
    new.replace(path)


def link(path: Path, target: str) -> None:
    """Replace a file by a symbolic link."""
    new = path.with_name("new")
    new.symlink_to(target)
    new.replace(path)


def link_into_a_locked_folder(path: Path) -> None:
    """Replace a file by a link to a file in a folder without permissions."""
    folder = path.with_name("locked")
    folder.mkdir(exist_ok=True)
    (folder / path.name).touch()
    folder.chmod(0)
    link(path, f"locked/{path.name}")


def pipe(path: Path) -> None:
    """Replace a file by a FIFO."""
    os.mkfifo(path.with_name("new"))
    path.with_name("new").replace(path)


def change_digest(path: Path) -> None:
    """Replace a file by another one of the same size and modification time."""
    content = re.sub(rb"\$[0-9a-f]{64}", b"$" + b"0" * 64, path.read_bytes(), count=1)
    put(path, content, path.stat().st_mtime_ns)


def revoke_all(path: Path) -> None:
    """Replace a file by one in which every token is revoked."""
    put(path, path.read_bytes().replace(b'"revoked_at":null', b'"revoked_at":"2025-11-26T10:30:00Z"'))


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: os.truncate(path, 0), EMPTY),
    (lambda path: os.truncate(path, 300), "it is cut off in line 3: its closing brace is missing"),
    (lambda path: put(path, b'{"version": 1, "tokens": {}}'), r"\$\.tokens must be a list"),
    (lambda path: os.truncate(path, SIZE_LIMIT + 1), "it is larger than 512 MiB"),
    (lambda path: path.chmod(0), "permission denied; .*"),
    (lambda path: link(path, "."), "it is a directory, as Docker makes one .*"),
    (pipe, "it is not a regular file"),
    (lambda path: link(path, "nowhere"), "no such file or directory"),
    (link_into_a_locked_folder, "permission denied; .*"),
    (lambda path: link(path, path.name), "too many levels of symbolic links"),
]
"""Unusable token files, and the reason that is logged. ``test_decoding.py`` has every kind of unreadable content."""

LOADED: list[tuple[Callable[[Path], object], int, tuple[str, ...]]] = [
    (Path.unlink, 401, (gone(),)),
    (lambda path: put(path, b"{}"), 401, (read_again(0),)),
    (lambda path: put(path, NO_TOKENS, 10**18), 401, (read_again(0),)),
    (revoke_all, 401, (read_again(0),)),
    (change_digest, 401, (read_again(),)),
    (lambda path: path.chmod(0o604), 200, (read_again(), "WARNING .* can be read by every user; run chmod o-r on it")),
    (lambda path: path.chmod(0o620), 200, (read_again(), WRITABLE)),
]
"""Other token files, also older ones, the status of a token of the former file, and the logged lines."""


Start = Callable[..., Watch]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def secrets(keep: Keep) -> dict[str, str]:
    """Make a token file with a valid and a revoked token, and return the secrets that clients present."""
    store = FileTokenStore(TOKENS)
    _, valid = keep(store, "valid")
    token, revoked = keep(store, "revoked")
    store.revoke(token.id, token.created_at)
    return {"valid": valid, "revoked": revoked, "wrong": generate_secret()}


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, serve: Serve, secrets: dict[str, str]) -> Iterator[Start]:
    """Return a function that starts a server and its clients; parameters are the lifespan and the environment key."""
    lifespan, key = getattr(request, "param", ("on", {}))
    (tmp_path / "app.py").write_text(APPLICATION)

    def start_one(
        expected: dict[Asked, int],
        *lines: str,
        program: tuple[str, ...] = (UVICORN, "--lifespan", lifespan),
        may_break: bool = False,
        **environment: str,
    ) -> Watch:
        (tmp_path / "launch.py").write_text(program[0])
        server = serve(*program[1:], script=tmp_path / "launch.py", **key, **environment)
        watch = Watch(server, {**secrets, **({"key": KEY["FREEGPT_API_KEY"]} if key else {})}, expected, may_break)
        running.callback(watch.stop)
        watch.change(tuple, expected, *lines, new=2)
        return watch

    with contextlib.ExitStack() as running:
        yield start_one


def variant(lifespan: str, **key: str) -> object:
    """Return the parameter of ``start``; all but the simplest are slow."""
    name = f"{'' if lifespan == 'on' else 'no '}lifespan, {'key' if key else 'no key'}"
    return pytest.param((lifespan, key), id=name, marks=[] if name == "lifespan, no key" else pytest.mark.slow)


in_all_variants = pytest.mark.parametrize(
    "start", [variant("on"), variant("off"), variant("on", **KEY), variant("off", **KEY)], indirect=True
)


@in_all_variants
def test_faulty_token_file_opens_nothing(start: Start, command: Command) -> None:
    """At each fault of the token file and its lock, tokens are accepted or refused as documented, and it is logged."""
    watch, good = start(answers()), TOKENS.read_bytes()
    with TOKENS.with_name(f"{TOKENS}.lock").open("r+") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        late = pool.submit(command, "create", "late")
        for make, valid, lines in LOADED:
            watch.change(partial(make, TOKENS), answers(valid), *lines)
            watch.change(partial(put, TOKENS, good), answers(), read_again())
        watch.change(partial(os.truncate, TOKENS, 0), answers(wrong=503), broken(".*"), hold=2 * RETRY_INTERVAL)
        for make, reason in BROKEN:
            watch.change(partial(put, TOKENS, good), answers(), read_again())
            watch.change(partial(make, TOKENS), answers(wrong=503), broken(reason))
        done = late.result()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"freegpt-auth: \S+: another process held its lock for 10 s; try again\n", done.stderr)
    assert time.monotonic() - began >= LOCK_TIMEOUT
    watch.end()


@in_all_variants
def test_moved_token_file_is_seen(start: Start, command: Command) -> None:
    """A file that moves back, a folder that Kubernetes swaps, and a file that a command writes are read at once."""
    watch, good = start(answers()), TOKENS.read_bytes()
    watch.change(partial(TOKENS.rename, ASIDE), answers(valid=401), gone())
    watch.change(partial(ASIDE.rename, TOKENS), answers(), read_again())
    for folder, content in (("v1", good), ("v2", NO_TOKENS)):
        Path(folder).mkdir()
        put(Path(folder) / TOKENS, content)
    link(Path("..data"), "v1")
    watch.change(partial(link, TOKENS, f"..data/{TOKENS}"), answers(), read_again())
    watch.change(partial(link, Path("..data"), "v2"), answers(valid=401), read_again(0))
    watch.change(partial(link, Path("..data"), "v1"), answers(), read_again())
    watch.change(partial(TOKENS.chmod, 0o622), answers(), read_again(), WRITABLE)
    watch.change(partial(command, "create", "another", umask=0), answers(), read_again(2))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (TOKENS, *Path("v1").iterdir())] == [0o600] * 3
    assert TOKENS.is_symlink()
    watch.end()


@in_all_variants
def test_clock_jump_moves_only_expiry(start: Start, command: Command) -> None:
    """Expiry follows the clock, also while the file is unusable; a revocation is in force at once under any clock."""
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat().encode()
    put(TOKENS, TOKENS.read_bytes().replace(b'"expires_at":null', b'"expires_at":"%b"' % soon))
    watch, good = start(answers()), TOKENS.read_bytes()

    def jump(*, days: int) -> None:
        Path("ahead").touch()
        os.truncate("ahead", 86_400 * days)

    watch.change(partial(jump, days=1), answers(valid=401))
    watch.change(partial(jump, days=0), answers())
    watch.change(partial(os.truncate, TOKENS, 0), answers(wrong=503), broken(EMPTY, 2))
    watch.change(partial(jump, days=1), answers(valid=401, wrong=503), hold=RETRY_INTERVAL)
    watch.change(partial(jump, days=0), answers(wrong=503))
    watch.change(partial(put, TOKENS, good), answers(), read_again())
    watch.change(partial(command, "revoke", watch.secrets["valid"]), answers(valid=401), read_again(0))
    watch.change(partial(jump, days=1), answers(valid=401))
    watch.end()


def test_file_replaced_behind_mount_is_refused(start: Start) -> None:
    """A mounted file that was replaced still shows its old tokens: they are refused, and the log gives the reason."""
    Path("mounted.json").touch()
    watch = start(answers(), FREEGPT_AUTH_STORE="mounted.json", MOUNT=f"{TOKENS} mounted.json")
    reason = r"replaced behind its mount \(mount its directory instead\): its tokens are refused"
    line = rf"ERROR \S*/mounted\.json was {reason}"
    watch.change(partial(put, TOKENS, TOKENS.read_bytes()), answers(valid=401), line)
    watch.end()


@in_all_variants
def test_server_starts_closed_on_broken_file(start: Start, request: pytest.FixtureRequest) -> None:
    """It recovers with the file. Without a file it is open until one appears, and no event opens it after that."""
    _, key = request.node.callspec.params["start"]
    good = TOKENS.read_bytes()
    TOKENS.unlink()
    places = {f"start-{number}": fault for number, fault in enumerate(BROKEN)}
    files = [TOKENS, *(Path(place) / TOKENS for place in places)]
    for (make, _), file in zip(places.values(), files[1:], strict=True):
        file.parent.mkdir()
        put(file, good)
        make(file)
    expected = answers(*NO_FILE[not key])
    for place in places:
        expected |= answers(503, 503, 503, at=place)
    lines = [broken(reason, 0, place) for place, (_, reason) in places.items()]
    watch = start(expected, *lines, *OPENED[len(key) :])
    for change, valid, line in ((partial(put, content=good), 200, read_again), (Path.unlink, 401, gone)):
        expected = {(path, presented): answers(valid)["/", presented] for path, presented in expected}
        lines = [line(at=place) for place in ("", *places)] + (CLOSED[len(key) :] if valid == 200 else [])
        watch.change(lambda change=change: [*map(change, files)], expected, *lines)  # type: ignore[misc]
    watch.end()


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def test_revocation_needs_no_free_descriptor(
    tmp_path: Path, serve: Serve, command: Command, secrets: dict[str, str], loop: str
) -> None:
    """While idle connections take every descriptor of the server, a token is refused once ``revoke`` has returned."""
    (tmp_path / "app.py").write_text(APPLICATION)
    few = "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    (tmp_path / "launch.py").write_text(f"{few}; runpy.run_module('uvicorn', run_name='__main__')")
    # A longer backlog makes asyncio log as many tracebacks.
    patient = ("--backlog", "64", "--timeout-keep-alive", "120")
    server = serve("app:app", "--loop", loop, *patient, "--no-access-log", script=tmp_path / "launch.py")
    client = Client(server.url, secrets["valid"])  # keeps its connection
    assert client.ask() == 200
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        with contextlib.suppress(TimeoutError):  # no descriptor is left, and the backlog is full
            for _ in range(400):
                stack.enter_context(socket.create_connection(server.address, timeout=5))
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        wait_until(lambda: len(list(descriptors.iterdir())) == 256 and client.ask())
        assert [client.ask() for _ in range(10)] == [200] * 10
        assert command("revoke", secrets["valid"]).returncode == 0
        assert {client.ask() for _ in range(100)} == {401}


def limit(workers: set[int], size: int) -> None:
    """Limit the size of the files that processes write, as a full disk does."""
    for worker in workers:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def ruin(token_id: str) -> int:
    """Damage the usage database behind its header between two writes, and return its count for a token."""
    with contextlib.closing(sqlite3.connect(USAGE, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        ((count,),) = database.execute("SELECT use_count FROM usage WHERE token_id = ?", [token_id])
        with USAGE.open("r+b") as file:
            file.seek(100)
            file.write(b"no database" * 1000)
    return int(count)


@in_all_variants
def test_faulty_usage_database_fails_no_request(start: Start, secrets: dict[str, str]) -> None:
    """Usage stays in memory until it can be written; then every request is counted once."""
    token_id = FileTokenStore(TOKENS).tokens()[digest_of(secrets["valid"])].id
    (Path("blocked") / USAGE.name).mkdir(parents=True)
    Path("disk").mkdir()
    link(USAGE.parent, "disk")
    UsageDatabase(str(USAGE)).write(Batch("p", 1, {f"!{number:063}": (1, 0.0) for number in range(20_000)}), 5.0)
    watch = start(answers(), FREEGPT_AUTH_USAGE=str(USAGE))
    faults: list[tuple[Callable[[Any], object], Any, Any, str]] = [
        (partial(link, USAGE.parent), "nowhere", "disk", "its folder does not exist; create the folder first"),
        (partial(link, USAGE.parent), "blocked", "disk", "it is a directory, not a file; move it away, or .*"),
        (USAGE.chmod, 0o400, 0o600, "it or its folder is read-only; .*"),
        (partial(limit, watch.workers), 2**20, -1, "the disk failed to read or write it; look for .*"),
    ]
    for act, fault, healthy, reason in faults:
        line = f"WARNING usage cannot be written to .*: {reason}. It is kept in memory until it can"
        watch.change(partial(act, fault), answers(), line)
        watch.change(partial(act, healthy), answers(), "INFO usage is written to .* again")
    lost: list[int] = []
    corrupt = r"WARNING .* was corrupt and is now .*\.corrupt-\d+; usage is counted afresh"
    watch.change(lambda: lost.append(ruin(token_id)), answers(), corrupt, each=False)
    watch.stop()
    accepted = sum(answer.status == 200 and answer.asked == ("/", "valid") for answer in watch.given)
    wait_until(lambda: lost[0] + UsageDatabase(str(USAGE)).read()[token_id].use_count == accepted)
    assert stat.S_IMODE(USAGE.stat().st_mode) == 0o600
    watch.end()


def test_locked_usage_database_delays_no_stop(start: Start) -> None:
    """The server answers meanwhile, waits 5 seconds for the lock at its end, logs that and stops."""
    watch = start(answers(), FREEGPT_AUTH_USAGE="usage.db")
    wait_until(Path("usage.db").exists)
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        watch.change(tuple, answers(), hold=0.5)
        began = time.monotonic()
        assert "usage cannot be written" in watch.end()
        assert time.monotonic() - began < SHUTDOWN_TIMEOUT + 30


# --- workers


def move_and_kill(watch: Watch) -> None:
    """Move the token file away, and kill a worker."""
    watch.may_break = True
    TOKENS.rename(ASIDE)
    os.kill(min(watch.workers), signal.SIGKILL)


@in_all_variants
def test_successor_of_killed_worker_is_closed(start: Start, request: pytest.FixtureRequest) -> None:
    """After the token file was moved away, a new worker is closed; a new server is open, as documented."""
    _, key = request.node.callspec.params["start"]
    watch = start(answers())
    watch.change(partial(move_and_kill, watch), answers(401), gone(), new=1)
    watch.may_break = False
    watch.change(partial(ASIDE.rename, TOKENS), answers(), read_again())
    watch.end()
    TOKENS.rename(ASIDE)
    start(answers(*NO_FILE[not key]), *OPENED[len(key) :]).end()


@pytest.mark.parametrize(
    ("program", "opened"),
    [((*RENEWING, "--preload"), []), pytest.param(RENEWING, OPENED, marks=pytest.mark.slow)],
    ids=["preload", "no preload"],
)
def test_renewed_gunicorn_workers_stay_closed(start: Start, program: tuple[str, ...], opened: list[str]) -> None:
    """A renewed worker of gunicorn is closed; a server that starts without a token file is open."""
    watch = start(answers(), program=program, may_break=True)
    watch.change(partial(TOKENS.rename, ASIDE), answers(401), gone(), new=4)
    watch.end()
    start(answers(*NO_FILE[True]), *opened, program=program, may_break=True).end()


def test_worker_forked_from_open_process_is_closed(start: Start, command: Command) -> None:
    """A worker that is forked from an open process is closed if authentication was on in an earlier worker."""
    TOKENS.unlink()
    watch = start(answers(*NO_FILE[True]), program=(*RENEWING, "--preload"), may_break=True)
    watch.change(partial(command, "create", "first"), answers(401), *CLOSED)
    booted = watch.server.log.read_text().count("Booting worker")
    TOKENS.unlink()
    wait_until(lambda: watch.server.log.read_text().count("Booting worker") >= booted + 6)
    watch.end()


def test_gunicorn_ends_on_unusable_settings(tmp_path: Path) -> None:
    """Gunicorn shows the reason and ends."""
    (tmp_path / "app.py").write_text(
        "from fastapi import FastAPI\nfrom freegpt_auth import BearerTokenMiddleware\n"
        "app = FastAPI()\napp.add_middleware(BearerTokenMiddleware, required=True)\n"
    )
    # Of two workers that fail at once, the second may interrupt the end of gunicorn.
    command = [sys.executable, "-c", GUNICORN, "--workers", "1", "--host", "127.0.0.1", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 3
    assert "authentication is required, but no environment key is set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_cleared_notes_open_no_worker(start: Start) -> None:
    """Neither a cleaned /dev/shm, as at a logout, nor a container that shares it, nor lost notes open a worker."""
    for folder in NOTES:
        folder.parent.mkdir()
    temporary = str(Path("temporary").absolute())
    watch = start(answers(), MOUNT="memory /dev/shm", TMPDIR=temporary)
    notes = {note for folder in NOTES for note in folder.iterdir()}
    neighbour = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", *["--map-root-user"][: os.geteuid()]]
    environment = {**os.environ, "TMPDIR": temporary}
    subprocess.run([*neighbour, sys.executable, "-c", NEIGHBOUR], env=environment, check=True, timeout=30)
    assert all(note.exists() for note in notes)
    shutil.rmtree(NOTES[0])

    def clear_and_kill() -> None:
        for folder in NOTES:
            shutil.rmtree(folder)
        wait_until(lambda: all(note.exists() for note in notes))
        os.kill(min(watch.workers), signal.SIGKILL)

    watch.change(partial(move_and_kill, watch), answers(401), gone(), new=1)
    watch.change(clear_and_kill, answers(401), gone(), new=1, each=False)
    watch.end()


@pytest.mark.usefixtures("secrets")
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--preload"]], ids=["no preload", "preload"])
def test_gunicorn_upgrade_opens_no_worker(tmp_path: Path, serve: Serve, arguments: list[str]) -> None:
    """After SIGUSR2 the workers of the new arbiter and their successors are closed."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(GUNICORN)
    arguments = ["--pid", "pid", "--graceful-timeout", "1", *arguments]
    server = serve(*arguments, script=tmp_path / "launch.py")

    def booted() -> list[int]:
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", server.log.read_text())]

    def assert_closed(workers: int) -> None:
        wait_until(lambda: len(booted()) >= workers and server.log.read_text().count("startup complete") >= workers)
        for _ in range(30):
            with contextlib.suppress(OSError):  # a worker that ends closes connections on which no request has begun
                assert server.get("/") == 401

    assert_closed(2)
    TOKENS.rename(ASIDE)
    os.kill(server.process.pid, signal.SIGUSR2)
    try:
        assert_closed(4)
        server.process.send_signal(signal.SIGQUIT)
        server.process.wait(20)
        for worker in booted()[2:]:
            os.kill(worker, signal.SIGKILL)
        assert_closed(6)
    finally:
        for arbiter in tmp_path.glob("pid*"):
            os.kill(int(arbiter.read_text()), signal.SIGTERM)
        wait_until(lambda: not list(tmp_path.glob("pid*")))
