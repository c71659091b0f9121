"""Faults, edge by edge: while two workers are asked without a pause, nothing that happens to their files opens them.

Each fault is brought about under a real server, with and without an environment key, with and without lifespan. Every
single answer is looked at. One whose request began before the change may be the old one; one whose request began 20 ms
after it must be the new one, in both workers. So a request that no credential covers is let through at no time.
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
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.disk import SIZE_LIMIT
from freegpt_auth.stores.file.store import FRESHNESS, LOCK_TIMEOUT, RETRY_INTERVAL
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, generate_secret
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import SHUTDOWN_TIMEOUT
from tests.helpers.applications import HELLO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

APPLICATION = (
    HELLO
    + """
import glob, logging, os, time
from freegpt_auth import BearerTokenMiddleware

told = time.time
time.time = lambda: told() + (os.stat("ahead").st_size if os.path.exists("ahead") else 0)

logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(message)s")
logging.getLogger("freegpt_auth").addFilter(lambda record: not record.msg.startswith("refused"))

guarded = {"/": BearerTokenMiddleware(hello, usage_interval=0.1)}
for folder in glob.glob("start-*"):  # servers within the server, each with a token file of its own
    guarded[f"/{folder}"] = BearerTokenMiddleware(hello, store=f"{folder}/api_tokens.json", usage="off")

async def app(scope, receive, send):
    async def signed(message):
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"worker", str(os.getpid()).encode())]
        await send(message)
    await guarded[scope.get("path", "/")](scope, receive, signed)
"""
)
# Root may read every file, so as root the server goes without that right. What it makes, it makes without a umask.
UVICORN = """
import os, sys
fewer = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
command = [*fewer, sys.executable, "-m", "uvicorn", "app:app", "--workers", "2", "--no-access-log", *sys.argv[1:]]
os.umask(0)
os.execvp(command[0], command)
"""
# Where the token file alone is mounted, as docker does with -v ./api_tokens.json:/app/api_tokens.json.
MOUNTED = f"""
import os, sys
if "MOUNTED" not in os.environ:
    os.environ["MOUNTED"] = "yes"
    fresh = ["unshare", "--mount", *["--map-root-user"][:os.geteuid()]]
    os.execvp("unshare", [*fresh, sys.executable, *sys.argv])
import subprocess
subprocess.run(["mount", "--bind", "api_tokens.json", "mounted.json"], check=True)
{UVICORN}
"""
# Where the folders of the workers' notes are the test's own.
NOTING = f"""
import os, sys
if "NOTING" not in os.environ:
    os.environ.update(NOTING="yes", TMPDIR=os.path.abspath("temporary"))
    fresh = ["unshare", "--mount", *["--map-root-user"][:os.geteuid()]]
    os.execvp("unshare", [*fresh, sys.executable, *sys.argv])
import subprocess
subprocess.run(["mount", "--bind", "memory", "/dev/shm"], check=True)
{UVICORN}
"""
NOTES = [
    Path(folder, f"freegpt_auth-0-{Path('/proc/self/ns/pid').stat().st_ino}") for folder in ("memory", "temporary")
]
# A container that shares /dev/shm with another and removes the notes of stopped servers.
NEIGHBOUR = """
from freegpt_auth.stores.file import worker_notes
for folder in worker_notes._folders():
    worker_notes._prepare(folder)
"""
GUNICORN = (
    """
import os, sys
os.environ["HOME"] = os.getcwd()  # gunicorn keeps a socket there
*arguments, _, host, _, port = sys.argv[1:]
sys.argv = ["gunicorn", "app:app", "--workers", "2", *arguments, "--bind", f"{host}:{port}"]
from gunicorn.app.wsgiapp import run
run()
""",
    *("--worker-class", "uvicorn_worker.UvicornWorker", "--max-requests", "20"),
)
KEY = {"FREEGPT_API_KEY": "a-key-from-the-environment"}
TOKENS, USAGE, ASIDE = Path("api_tokens.json"), Path("usage/usage.db"), Path("api_tokens.json.backup")
AHEAD = Path("ahead")
"""As many bytes as the server's clock is seconds ahead."""
ANSWER = re.compile(rb"HTTP/1.1 (\d+) .*\r\nworker: (\d+)\r\n", re.DOTALL)
NO_FILE = {True: (200, 200, 200, 200), False: (401, 401, 401, 401)}  # without a key, and with one
OPENED = ["WARNING open mode: every request is let through"]
CLOSED = ["WARNING authentication is now on: 1 active token"]
LINE = re.compile(r"^(\d+) ((?:INFO|WARNING|ERROR) .*)\n", re.MULTILINE)

# A worker that ends, killed or renewed, takes with it the connections on which nothing was asked yet.
BROKEN_OFF = frozenset({0})

Start = "Callable[..., Watch]"
Asked = tuple[str, str]  # a path, and what was presented


def answers(
    valid: int = 200, wrong: int = 401, revoked: int = 401, nothing: int = 401, at: str = ""
) -> dict[Asked, int]:
    """Return what a server answers; by default one that has nothing to complain of. The key works always."""
    presented = {"valid": valid, "wrong": wrong, "revoked": revoked, "nothing": nothing, "key": 200}
    return {(f"/{at}", name): status for name, status in presented.items()}


def broken(reason: str, kept: int = 2, at: str = "") -> str:
    """Return the line about a token file that cannot be used."""
    return rf"ERROR \S*{at}/{TOKENS} cannot be used: {reason}\. Tokens read before \({kept}\) stay in force"


def gone(at: str = "") -> str:
    """Return the line about a token file that is not there any more."""
    return rf"ERROR \S*{at}/{TOKENS} is gone: its tokens are refused until it is back\. To open this server, restart it"


def read_again(active: int = 1, at: str = "") -> str:
    """Return the line about a token file that was read after a change."""
    return rf"INFO \S*{at}/{TOKENS} was read again: {active} active token\(s\)"


class Answer(NamedTuple):
    """When a request began, what it asked, and who answered what; 0 if its connection broke off."""

    began: float
    asked: Asked
    status: int
    worker: int


@dataclass
class Watch:
    """Clients that ask a server without a pause, on a new connection each time."""

    server: Any
    secrets: dict[str, str]
    expected: dict[Asked, int]
    may: frozenset[int] = frozenset()
    given: list[Answer] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        headers = {name: f"Authorization: Bearer {secret}\r\n" for name, secret in self.secrets.items()}
        headers["nothing"] = ""
        self._requests = {
            (path, name): f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers[name]}\r\n".encode()
            for path, name in self.expected
            if name in headers
        }
        self._seen = self._heard = 0
        self._stopping = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(6)]
        for client in self._clients:
            client.start()

    def _ask(self) -> None:
        address = urlsplit(self.server.url)
        while not self._stopping.is_set():
            for asked, request in self._requests.items():
                began, answer = time.monotonic(), b""
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as client,
                ):
                    client.sendall(request)
                    answer = b"".join(iter(partial(client.recv, 65536), b""))
                status, worker = (ANSWER.findall(answer) or [(0, 0)])[0]
                self.given.append(Answer(began, asked, int(status), int(worker)))

    def change(
        self,
        act: Callable[[], object],
        expected: dict[Asked, int],
        *lines: str,
        new: int = 0,
        each: bool = True,
        hold: float = 0.0,
    ) -> None:
        """Do something, and see that the server answers as *expected* from then on and logs *lines*.

        Args:
            act: what to do.
            expected: who gets which status.
            lines: what each worker logs once; it logs nothing else above the level INFO.
            new: how many workers must have answered that never did before.
            each: false if *lines* are logged by one of the workers.
            hold: seconds for which to look on.
        """
        act()
        in_force = time.monotonic() + 2 * FRESHNESS
        until(lambda: self._is_done(in_force + hold, lines, new, each=each), lambda: (lines, self._state()))
        self.workers = self._thorough(in_force + hold)
        fresh = self.given[self._seen :]
        self._seen += len(fresh)
        for answer in fresh:
            old = {self.expected[answer.asked]} if answer.began < in_force else set()
            assert answer.status in {expected[answer.asked]} | old | self.may, (answer, in_force, lines)
        self.expected = expected
        for said in self._said(self.workers, each=each):
            loud = [line for line in said if not line.startswith("INFO")]
            assert len(loud) == sum(not line.startswith("INFO") for line in lines), loud
        self._heard = self.server.log.read_text().rfind("\n") + 1

    def end(self) -> str:
        """Stop asking, and then the server; return what it logged."""
        self.leave()
        assert all(answer.status in {self.expected[answer.asked]} | self.may for answer in self.given[self._seen :])
        log: str = self.server.stop()
        assert "Traceback" not in log
        return log

    def leave(self) -> None:
        """Stop asking."""
        self._stopping.set()
        for client in self._clients:
            client.join()

    def _is_done(self, since: float, lines: tuple[str, ...], new: int, *, each: bool) -> bool:
        workers = self._thorough(since)
        return (
            len(workers) >= 2
            and len(workers - self.workers) >= new
            and all(
                any(re.search(one, line) for line in said) for said in self._said(workers, each=each) for one in lines
            )
        )

    def _thorough(self, since: float) -> set[int]:
        """Return the workers that have answered everything since then."""
        pairs = {(answer.worker, answer.asked) for answer in self.given[self._seen :] if answer.began >= since}
        counts = Counter(worker for worker, _ in pairs)
        return {worker for worker, count in counts.items() if worker and count == len(self._requests)}

    def _said(self, workers: set[int], *, each: bool) -> list[list[str]]:
        """Return what was logged of late: by each of the workers, or by all together."""
        lines = LINE.findall(self.server.log.read_text()[self._heard :])
        groups = [{worker} for worker in workers] if each else [workers]
        return [[line for worker, line in lines if int(worker) in group] for group in groups]

    def _state(self) -> object:
        return self.workers, self.given[-20:], self.server.log.read_text()[-2000:]


def until(reached: Callable[[], object], state: Callable[[], object] = tuple) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, state()
        time.sleep(0.01)


# --- what can happen to a file, in one step


def put(path: Path, content: bytes, modified: int | None = None) -> None:
    """Put a file in the place of what is there."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.chmod(0o600)
    os.utime(new, ns=(modified or time.time_ns(),) * 2)
    new.replace(path)


def link(path: Path, target: str) -> None:
    """Put a symbolic link in the place of what is there."""
    new = path.with_name("new")
    new.symlink_to(target)
    new.replace(path)


def link_into_a_locked_folder(path: Path) -> None:
    """Put a link to a file that nobody may reach in the place of what is there."""
    folder = path.with_name("locked")
    folder.mkdir(exist_ok=True)
    (folder / path.name).touch()
    folder.chmod(0)
    link(path, f"locked/{path.name}")


def pipe(path: Path) -> None:
    """Put a FIFO in the place of what is there."""
    os.mkfifo(path.with_name("new"))
    path.with_name("new").replace(path)


def grow(path: Path) -> None:
    """Put a file of more than 512 MiB in the place of what is there."""
    new = path.with_name("new")
    new.touch()
    os.truncate(new, SIZE_LIMIT + 1)
    new.replace(path)


def edit(pattern: bytes, replacement: bytes) -> Callable[[Path], None]:
    """Return what puts in the place of a file the same with a difference."""
    return lambda path: put(path, re.sub(pattern, replacement, path.read_bytes(), flags=re.DOTALL))


def same_size_and_time(path: Path) -> None:
    """Put another file of the same size, and modified at the same time, in the place of what is there."""
    content = re.sub(rb"\$[0-9a-f]{64}", b"$" + b"0" * 64, path.read_bytes(), count=1)
    put(path, content, path.stat().st_mtime_ns)


EMPTY = "it is empty; a new token file is made by create, not by touch"

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: os.truncate(path, 0), EMPTY),
    "truncated": (lambda path: os.truncate(path, 300), "it is cut off in line 3: its closing brace is missing"),
    "corrupt": (edit(b":", b";"), "it is not JSON: line 1, column 11 cannot be read"),
    "of the wrong shape": (edit(b".+", b'{"version": 1, "tokens": {}}'), r"\$\.tokens must be a list"),
    "NaN": (edit(b'"expires_at":null', b'"expires_at":NaN'), "it holds NaN, which is no number of JSON"),
    "a digest twice": (edit(rb"\$[0-9a-f]{64}", b"$" + b"0" * 64), r"the digest at \$\.tokens\[1\] stands there twice"),
    "an id with an escape twice": (
        edit(rb'"id":"\w+"', rb'"id":"\\u001b[2J"'),
        r"the id at \$\.tokens\[1\] stands there twice: \\x1b\[2J",
    ),
    "of another version": (edit(b'"version": 1', b'"version": 2'), "its version is 2; this release reads version 1"),
    "nested deep": (edit(b".+", b"[" * 100_000), "it is nested too deeply"),
    "a long number": (
        edit(b"^{", b'{"n": ' + b"9" * 5000 + b", "),
        "it holds a number out of range, or half of a surrogate pair",
    ),
    "not UTF-8": (edit(b'"name":"', b'"name":"\xff'), "it is not UTF-8: line 2 holds the byte 0xff"),
    "too large": (grow, "it is larger than 512 MiB"),
    "unreadable": (lambda path: path.chmod(0), "permission denied; .*"),
    "a directory": (lambda path: link(path, "."), "it is a directory, as Docker makes one .*"),
    "a FIFO": (pipe, "it is not a regular file"),
    "a dangling link": (lambda path: link(path, "nowhere"), "no such file or directory"),
    "out of reach": (link_into_a_locked_folder, "permission denied; .*"),
    "a link to itself": (lambda path: link(path, path.name), "too many levels of symbolic links"),
}
"""Token files that cannot be used, and what is logged about them."""

LOADED: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "deleted": (Path.unlink, 401, (gone(),)),
    "moved away": (lambda path: path.rename(ASIDE), 401, (gone(),)),
    "without tokens": (edit(b".+", b'{"version": 1, "tokens": []}'), 401, (read_again(0),)),
    "an empty object": (edit(b".+", b"{}"), 401, (read_again(0),)),
    "all revoked": (edit(b'"revoked_at":null', b'"revoked_at":"2025-11-26T10:30:00Z"'), 401, (read_again(0),)),
    "older": (lambda path: put(path, b'{"version": 1, "tokens": []}', 10**18), 401, (read_again(0),)),
    "of the same size and time": (same_size_and_time, 401, (read_again(),)),
    "readable by others": (
        lambda path: path.chmod(0o644),
        200,
        (read_again(), "WARNING .* can be read by every user; run chmod o-r on it"),
    ),
    "writable by the group": (
        lambda path: path.chmod(0o620),
        200,
        (read_again(), "WARNING .* can be written by others; run chmod go-w on it"),
    ),
}
"""Other token files, what a token of the one before gets, and what is logged."""


@pytest.fixture
def secrets(keep: Callable[..., Any]) -> dict[str, str]:
    """Make a token file of two tokens, one of them revoked, and return what clients present."""
    store = FileTokenStore(TOKENS)
    _, valid = keep(store, "valid")
    token, revoked = keep(store, "revoked")
    store.revoke(token.id, token.created_at)
    return {"valid": valid, "revoked": revoked, "wrong": generate_secret()}


@pytest.fixture(params=["on", "off"], ids=["lifespan", "no lifespan"])
def program(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return what starts a server of two workers, and its options."""
    return UVICORN, "--lifespan", request.param


@pytest.fixture(params=[{}, KEY], ids=["no key", "key"])
def key(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment key."""
    return dict(request.param)


@pytest.fixture
def start(
    tmp_path: Path, serve: Callable[..., Any], secrets: dict[str, str], program: tuple[str, ...], key: dict[str, str]
) -> Iterator[Start]:
    """Return a function that starts a server and the clients that watch it."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(program[0])

    def start_one(
        expected: dict[Asked, int], *lines: str, may: frozenset[int] = frozenset(), **environment: str
    ) -> Watch:
        server = serve(*program[1:], script=tmp_path / "launch.py", **key, **environment)
        watch = Watch(server, {**secrets, "key": key["FREEGPT_API_KEY"]} if key else secrets, expected, may)
        running.callback(watch.leave)
        watch.change(tuple, expected, *lines, new=2)
        return watch

    with contextlib.ExitStack() as running:
        yield start_one


def test_a_fault_of_the_token_file_lets_nobody_in(start: Start, command: Callable[..., Any]) -> None:
    """Whatever becomes of the token file and its lock, tokens work on or are refused as documented, and it is logged."""
    watch, good = start(answers()), TOKENS.read_bytes()
    with TOKENS.with_name(f"{TOKENS}.lock").open("r+") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        late = pool.submit(command, "create", "late")
        for make, valid, lines in LOADED.values():
            watch.change(partial(make, TOKENS), answers(valid), *lines)
            watch.change(partial(put, TOKENS, good), answers(), read_again())
        watch.change(partial(os.truncate, TOKENS, 0), answers(wrong=503), broken(".*"), hold=2 * RETRY_INTERVAL)
        for make, reason in BROKEN.values():
            watch.change(partial(put, TOKENS, good), answers(), read_again())
            watch.change(partial(make, TOKENS), answers(wrong=503), broken(reason))
        done = late.result()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"freegpt-auth: \S+: another process held its lock for 10 s; try again\n", done.stderr)
    assert time.monotonic() - began >= LOCK_TIMEOUT
    watch.end()


def test_a_token_file_moves_in_its_ways(start: Start, command: Callable[..., Any]) -> None:
    """A file moved back, a folder swapped as Kubernetes does it, and a file that a command writes are seen at once."""
    watch, good = start(answers()), TOKENS.read_bytes()
    watch.change(partial(TOKENS.rename, ASIDE), answers(valid=401), gone())
    watch.change(partial(ASIDE.rename, TOKENS), answers(), read_again())
    for folder, content in (("v1", good), ("v2", b'{"version": 1, "tokens": []}')):
        Path(folder).mkdir()
        put(Path(folder) / TOKENS, content)
    link(Path("..data"), "v1")
    watch.change(partial(link, TOKENS, f"..data/{TOKENS}"), answers(), read_again())
    watch.change(partial(link, Path("..data"), "v2"), answers(valid=401), read_again(0))
    watch.change(partial(link, Path("..data"), "v1"), answers(), read_again())
    watch.change(
        partial(TOKENS.chmod, 0o622),
        answers(),
        read_again(),
        "WARNING .* can be written by others; run chmod go-w on it",
    )
    watch.change(partial(command, "create", "another", umask=0), answers(), read_again(2))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (TOKENS, *Path("v1").iterdir())] == [0o600] * 3
    assert TOKENS.is_symlink()
    watch.end()


def test_a_clock_that_jumps_moves_expiry_and_nothing_else(start: Start, command: Callable[..., Any]) -> None:
    """Expiry follows the clock, whatever the file is like by then; a revocation is in force at once under any clock."""
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    edit(b'"expires_at":null', f'"expires_at":"{soon}"'.encode())(TOKENS)
    watch, good = start(answers()), TOKENS.read_bytes()
    day = 86_400

    def jump(seconds: int) -> None:
        AHEAD.touch()
        os.truncate(AHEAD, seconds)

    watch.change(partial(jump, day), answers(valid=401))
    watch.change(partial(jump, 0), answers())
    watch.change(partial(os.truncate, TOKENS, 0), answers(wrong=503), broken(EMPTY, 2))
    watch.change(partial(jump, day), answers(valid=401, wrong=503), hold=RETRY_INTERVAL)
    watch.change(partial(jump, 0), answers(wrong=503))
    watch.change(partial(put, TOKENS, good), answers(), read_again())
    watch.change(partial(command, "revoke", watch.secrets["valid"]), answers(valid=401), read_again(0))
    watch.change(partial(jump, day), answers(valid=401))
    watch.end()


@pytest.mark.parametrize("program", [(MOUNTED, "--lifespan", "on")], ids=[""])
def test_a_file_replaced_behind_its_mount_is_refused(start: Start) -> None:
    """A file that is mounted by itself goes on showing its old tokens when it was replaced: they are refused, and why is said."""
    Path("mounted.json").touch()
    watch = start(answers(), FREEGPT_AUTH_STORE="mounted.json")
    reason = (
        r"ERROR \S*/mounted\.json was replaced behind its mount \(mount its directory instead\): its tokens are refused"
    )
    watch.change(partial(put, TOKENS, TOKENS.read_bytes()), answers(valid=401), reason)
    watch.end()


def test_a_server_starts_closed_on_a_broken_file(start: Start, key: dict[str, str]) -> None:
    """It recovers with the file. Where there was none it is open until there is one, and nothing opens it after that."""
    good = TOKENS.read_bytes()
    TOKENS.unlink()
    files = {f"start-{number}": Path(f"start-{number}") / TOKENS for number, _ in enumerate(BROKEN)}
    for (make, _), file in zip(BROKEN.values(), files.values(), strict=True):
        file.parent.mkdir()
        put(file, good)
        make(file)
    expected = answers(*NO_FILE[not key])
    for place in files:
        expected |= answers(503, 503, 503, at=place)
    lines = [broken(reason, 0, place) for (_, reason), place in zip(BROKEN.values(), files, strict=True)]
    watch = start(expected, *lines, *OPENED[len(key) :])

    def mend() -> None:
        for file in (TOKENS, *files.values()):
            put(file, good)

    expected = {(path, presented): answers()["/", presented] for path, presented in expected}
    lines = [read_again(at=place) for place in ("", *files)]
    watch.change(mend, expected, *lines, *CLOSED[len(key) :])

    def remove() -> None:
        for file in (TOKENS, *files.values()):
            file.unlink()

    expected = {(path, presented): answers(401)["/", presented] for path, presented in expected}
    watch.change(remove, expected, *(gone(place) for place in ("", *files)))
    watch.end()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_no_descriptor_left_hides_no_revocation(
    tmp_path: Path, serve: Callable[..., Any], command: Callable[..., Any], secrets: dict[str, str], loop: str
) -> None:
    """Idle connections take every descriptor of the server, and a revoked token is refused once revoke has returned."""
    (tmp_path / "app.py").write_text(APPLICATION)
    few = "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    (tmp_path / "launch.py").write_text(f"{few}; runpy.run_module('uvicorn', run_name='__main__')")
    # With its default of 2048 asyncio logs as many tracebacks in a row.
    patient = ("--backlog", "64", "--timeout-keep-alive", "120")
    server = serve("app:app", "--loop", loop, *patient, "--no-access-log", script=tmp_path / "launch.py")
    address = urlsplit(server.url)
    headers = {"Authorization": f"Bearer {secrets['valid']}"}

    def ask(client: HTTPConnection) -> int:
        client.request("GET", "/", headers=headers)
        answer = client.getresponse()
        answer.read()
        return answer.status

    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(HTTPConnection(address.netloc, timeout=30)))
        assert ask(client) == 200
        with contextlib.suppress(TimeoutError):  # no descriptor is left, and the backlog is full
            for _ in range(400):
                stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=5))
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        until(lambda: len(list(descriptors.iterdir())) == 256 and ask(client))
        for _ in range(10):
            assert ask(client) == 200
        assert command("revoke", secrets["valid"]).returncode == 0
        assert {ask(client) for _ in range(100)} == {401}


def limit(workers: set[int], size: int) -> None:
    """Let processes write nothing beyond this size of a file, as on a full disk."""
    for worker in workers:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def ruin(token_id: str) -> int:
    """Damage the usage database behind its header between two writes, and return what it counted."""
    with contextlib.closing(sqlite3.connect(USAGE, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        ((count,),) = database.execute("SELECT use_count FROM usage WHERE token_id = ?", [token_id])
        with USAGE.open("r+b") as file:
            file.seek(100)
            file.write(b"no database" * 1000)
    return int(count)


def test_a_fault_of_the_usage_database_fails_no_request(start: Start, secrets: dict[str, str]) -> None:
    """Usage that cannot be written waits in memory, and when it can be, no request was lost and none invented."""
    token_id = FileTokenStore(TOKENS).tokens()[digest_of(secrets["valid"])].id
    (Path("blocked") / USAGE.name).mkdir(parents=True)
    Path("disk").mkdir()
    link(USAGE.parent, "disk")
    UsageDatabase(str(USAGE)).write(Batch("p", 1, {f"!{number:063}": (1, 0.0) for number in range(20_000)}), 5.0)
    watch = start(answers(), FREEGPT_AUTH_USAGE=str(USAGE))
    to_disk = partial(link, USAGE.parent, "disk")
    for make, mend, reason in (
        (partial(link, USAGE.parent, "nowhere"), to_disk, "its folder does not exist; create the folder first"),
        (
            partial(link, USAGE.parent, "blocked"),
            to_disk,
            "it is a directory, not a file; move it away, or name another file in FREEGPT_AUTH_USAGE",
        ),
        (
            partial(USAGE.chmod, 0o400),
            partial(USAGE.chmod, 0o600),
            "it or its folder is read-only; run this as the user who owns them, or change their permissions",
        ),
        (
            partial(limit, watch.workers, 2**20),
            partial(limit, watch.workers, -1),
            "the disk failed to read or write it; look for .*",
        ),
    ):
        watch.change(
            make, answers(), f"WARNING usage cannot be written to .*: {reason}. It is kept in memory until it can"
        )
        watch.change(mend, answers(), "INFO usage is written to .* again")
    lost: list[int] = []
    corrupt = r"WARNING .* was corrupt and is now .*\.corrupt-\d+; usage is counted afresh"
    watch.change(lambda: lost.append(ruin(token_id)), answers(), corrupt, each=False)
    watch.leave()
    accepted = sum(answer.status == 200 and answer.asked == ("/", "valid") for answer in watch.given)
    until(lambda: lost[0] + UsageDatabase(str(USAGE)).read()[token_id].use_count == accepted)
    assert stat.S_IMODE(USAGE.stat().st_mode) == 0o600
    watch.end()


@pytest.mark.parametrize(("program", "key"), [((UVICORN, "--lifespan", "on"), {})], ids=[""])
def test_a_server_stops_though_its_usage_database_is_locked_for_ever(start: Start) -> None:
    """It waits 5 seconds for whoever holds the lock, serving all the while, and then it stops and says so."""
    watch = start(answers(), FREEGPT_AUTH_USAGE="usage.db")
    until(Path("usage.db").exists)
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        watch.change(tuple, answers(), hold=0.5)
        watch.leave()
        began = time.monotonic()
        assert "usage cannot be written" in watch.end()
        assert time.monotonic() - began < SHUTDOWN_TIMEOUT + 30


def test_a_killed_worker_is_succeeded_by_one_as_closed(start: Start, key: dict[str, str]) -> None:
    """A worker that is started after the token file was moved away is closed; a server that is, as documented, is open."""
    watch = start(answers())

    def move_and_kill() -> None:
        TOKENS.rename(ASIDE)
        os.kill(min(watch.workers), signal.SIGKILL)

    watch.may = BROKEN_OFF
    watch.change(move_and_kill, answers(401), gone(), new=1)
    watch.may = frozenset()
    watch.change(partial(ASIDE.rename, TOKENS), answers(), read_again())
    watch.end()
    TOKENS.rename(ASIDE)
    start(answers(*NO_FILE[not key]), *OPENED[len(key) :]).end()


@pytest.mark.parametrize("key", [{}], ids=[""])
@pytest.mark.parametrize(
    ("program", "opened"), [((*GUNICORN, "--preload"), []), (GUNICORN, OPENED)], ids=["preload", "no preload"]
)
def test_gunicorn_renews_its_workers_and_stays_closed(start: Start, opened: list[str]) -> None:
    """Under gunicorn too no worker that is renewed is open, and a server that is started without a token file is."""
    watch = start(answers(), may=BROKEN_OFF)
    watch.change(partial(TOKENS.rename, ASIDE), answers(401), gone(), new=4)
    watch.end()
    start(answers(*NO_FILE[True]), *opened, may=BROKEN_OFF).end()


def test_gunicorn_ends_on_unusable_settings(tmp_path: Path) -> None:
    """It shows the reason and ends with all its workers."""
    (tmp_path / "app.py").write_text(
        "from fastapi import FastAPI\n"
        "from freegpt_auth import BearerTokenMiddleware\n"
        "app = FastAPI()\n"
        "app.add_middleware(BearerTokenMiddleware, required=True)\n"
    )
    program, *arguments = GUNICORN
    command = [sys.executable, "-c", program, *arguments, "--host", "127.0.0.1", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 3
    assert "authentication is required, but no environment key is set" in done.stderr
    assert "Traceback" not in done.stderr


def test_gunicorn_that_was_open_when_it_forked_stays_closed(
    tmp_path: Path, serve: Callable[..., Any], command: Callable[..., Any]
) -> None:
    """A worker that is forked from an open process is closed, if authentication was turned on in a worker before it."""
    program, *arguments = GUNICORN
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(program)
    server = serve(*arguments, "--preload", script=tmp_path / "launch.py")

    def ask(times: int) -> Counter[int]:
        given: Counter[int] = Counter()
        while given.total() < times:
            with contextlib.suppress(OSError):  # see BROKEN_OFF
                given[server.get("/")] += 1
        return given

    assert ask(30) == {200: 30}
    command("create", "first")
    assert ask(30) == {401: 30}
    TOKENS.unlink()

    def is_renewed_and_closed() -> bool:
        assert ask(20) == {401: 20}
        return server.log.read_text().count("Booting worker") >= 8

    until(is_renewed_and_closed)


@pytest.fixture
def _folders_of_notes() -> None:
    """Make the folders in which a server finds /dev/shm and its temporary files."""
    for folder in NOTES:
        folder.parent.mkdir()


def clear(folders: list[Path]) -> None:
    """Remove the notes of all servers, as systemd does at a logout."""
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.usefixtures("_folders_of_notes")
@pytest.mark.parametrize(("program", "key"), [((NOTING, "--lifespan", "on"), {})], ids=[""])
def test_cleared_notes_open_no_worker(start: Start) -> None:
    """Neither a cleaned /dev/shm, nor a container that shares it, nor the loss of all notes opens a worker."""
    watch = start(answers())
    notes = {note for folder in NOTES for note in folder.iterdir()}
    neighbour = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", *["--map-root-user"][: os.geteuid()]]
    temporary = {**os.environ, "TMPDIR": str(Path("temporary").absolute())}
    subprocess.run([*neighbour, sys.executable, "-c", NEIGHBOUR], env=temporary, check=True, timeout=30)
    assert all(note.exists() for note in notes)
    clear(NOTES[:1])

    def move_and_kill() -> None:
        TOKENS.rename(ASIDE)
        os.kill(min(watch.workers), signal.SIGKILL)

    def clear_and_kill() -> None:
        clear(NOTES)
        until(lambda: all(note.exists() for note in notes))
        os.kill(min(watch.workers), signal.SIGKILL)

    watch.may = BROKEN_OFF
    watch.change(move_and_kill, answers(401), gone(), new=1)
    watch.change(clear_and_kill, answers(401), gone(), new=1, each=False)
    watch.end()


@pytest.mark.usefixtures("_folders_of_notes")
def test_foreign_folder_of_notes_opens_no_worker(
    tmp_path: Path, serve: Callable[..., Any], command: Callable[..., Any]
) -> None:
    """Where another user made the folder first, no worker without a token file is open, and the log says why."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(NOTING)
    NOTES[0].mkdir()
    NOTES[0].chmod(0o777)
    server = serve(script=tmp_path / "launch.py")
    assert {server.get("/") for _ in range(30)} == {401}
    assert server.get("/", token=command("create", "first").stdout.strip()) == 200
    assert (
        f"(/dev/shm/{NOTES[0].name}: it is not a folder of this user alone), so none of them is open" in server.stop()
    )


def test_import_of_gunicorn_keeps_no_server_closed(tmp_path: Path, serve: Callable[..., Any], secrets: Any) -> None:
    """A uvicorn whose application imports gunicorn opens after stop, mv and start, as documented."""
    (tmp_path / "app.py").write_text(f"import gunicorn.arbiter\n{APPLICATION}")
    server = serve("app:app")
    assert server.get("/", token=secrets["valid"]) == 200
    TOKENS.rename(ASIDE)
    assert server.get("/") == 401
    server.stop()
    assert serve("app:app").get("/") == 200


UPGRADABLE = """
import os, sys
*arguments, _, host, _, port = sys.argv[1:]
command = [sys.executable, "-m", "gunicorn", "app:app", "--workers", "2", "--pid", "pid", "--graceful-timeout", "1", *arguments]
command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--bind", f"{host}:{port}"]
os.environ["HOME"] = os.getcwd()
os.execv(sys.executable, command)
"""


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("arguments", [[], ["--preload"]], ids=["no preload", "preload"])
def test_gunicorn_upgrade_opens_no_worker(tmp_path: Path, serve: Callable[..., Any], arguments: list[str]) -> None:
    """After SIGUSR2 the workers of the new arbiter are as closed as those of the old one, and so are their successors."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(UPGRADABLE)
    server = serve(*arguments, script=tmp_path / "launch.py")

    def booted() -> list[int]:
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", server.log.read_text())]

    def assert_closed(workers: int) -> None:
        until(lambda: len(booted()) >= workers and server.log.read_text().count("startup complete") >= workers)
        for _ in range(30):
            with contextlib.suppress(OSError):  # see BROKEN_OFF
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
        until(lambda: not list(tmp_path.glob("pid*")))


def test_names_show_no_escapes(command: Callable[..., Any], secrets: dict[str, str]) -> None:
    """A name that would steer a terminal is not taken, and one that somebody wrote into the file is shown harmless."""
    done = command("create", "\x1b[2J")
    assert (done.returncode, done.stdout) == (2, "")
    edit(b'"name":"valid"', rb'"name":"\\u001b[2J\\u202e"')(TOKENS)
    listed, revoked = command("list").stdout, command("revoke", secrets["valid"]).stderr
    for shown, output in (("U+001B", done.stderr), ("\\x1b[2J", listed), ("\\x1b[2J", revoked)):
        assert shown in output
        assert output.replace("\n", "").isprintable()


@pytest.mark.parametrize("arguments", [("create", "more"), ("delete", "valid")], ids=["create", "delete"])
def test_a_full_disk_leaves_the_old_file(
    command: Callable[..., Any], secrets: dict[str, str], arguments: tuple[str, str]
) -> None:
    """A command that cannot write says so in one line and has changed nothing."""
    before = {path: path.read_bytes() for path in Path().iterdir()}
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    done = command(arguments[0], secrets.get(arguments[1], arguments[1]), preexec_fn=full)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"freegpt-auth: \S+/{TOKENS}: file too large\n", done.stderr)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
