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
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.disk import SIZE_LIMIT
from freegpt_auth.stores.file.store import FRESHNESS, LOCK_TIMEOUT, RETRY_INTERVAL
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, generate_secret
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import SHUTDOWN_TIMEOUT
from tests.helpers.applications import HELLO
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Keep
    from tests.helpers.servers import Serve, Server

APPLICATION = (
    HELLO
    + """
import glob, logging, os, time
from freegpt_auth import BearerTokenMiddleware

right = time.time
time.time = lambda: right() + (os.stat("ahead").st_size if os.path.exists("ahead") else 0)

logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(message)s")
logging.getLogger("freegpt_auth").addFilter(lambda record: not record.msg.startswith("refused"))

guarded = {"/": BearerTokenMiddleware(hello, usage_interval=0.1)}
for folder in glob.glob("start-*"):  # applications with token files of their own
    guarded[f"/{folder}"] = BearerTokenMiddleware(hello, store=f"{folder}/api_tokens.json", usage="off")

async def app(scope, receive, send):
    async def signed(message):
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"worker", str(os.getpid()).encode())]
        await send(message)
    await guarded[scope.get("path", "/")](scope, receive, signed)
"""
)
# Under root the server gives up root's right to read every file. It creates files without a umask.
UVICORN = """
import os, sys
fewer = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
command = [*fewer, sys.executable, "-m", "uvicorn", "app:app", "--workers", "2", "--no-access-log", *sys.argv[1:]]
os.umask(0)
os.execvp(command[0], command)
"""
# The token file alone is mounted, as by docker with -v ./api_tokens.json:/app/api_tokens.json.
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
# The folders of the workers' notes belong to the test.
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
# A container that shares /dev/shm and removes the notes of stopped servers.
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
"""Its size in bytes is the number of seconds by which the server's clock is ahead."""
ANSWER = re.compile(rb"HTTP/1.1 (\d+) .*\r\nworker: (\d+)\r\n", re.DOTALL)
NO_FILE = {True: (200, 200, 200, 200), False: (401, 401, 401, 401)}  # without a key, and with one
OPENED = ["WARNING open mode: every request is let through"]
CLOSED = ["WARNING authentication is now on: 1 active token"]
LINE = re.compile(r"^(\d+) ((?:INFO|WARNING|ERROR) .*)\n", re.MULTILINE)

# A worker that ends closes the connections on which no request has begun.
BROKEN_OFF = frozenset({0})

Asked = tuple[str, str]  # a path, and the name of the presented secret


def answers(
    valid: int = 200, wrong: int = 401, revoked: int = 401, nothing: int = 401, at: str = ""
) -> dict[Asked, int]:
    """Return the expected statuses; by default those without a fault. The environment key always works."""
    presented = {"valid": valid, "wrong": wrong, "revoked": revoked, "nothing": nothing, "key": 200}
    return {(f"/{at}", name): status for name, status in presented.items()}


def broken(reason: str, kept: int = 2, at: str = "") -> str:
    """Return the line about a token file that cannot be used."""
    return rf"ERROR \S*{at}/{TOKENS} cannot be used: {reason}\. Tokens read before \({kept}\) stay in force"


def gone(at: str = "") -> str:
    """Return the line about a token file that is gone."""
    return rf"ERROR \S*{at}/{TOKENS} is gone: its tokens are refused until it is back\. To open this server, restart it"


def read_again(active: int = 1, at: str = "") -> str:
    """Return the line about a token file that was read after a change."""
    return rf"INFO \S*{at}/{TOKENS} was read again: {active} active token\(s\)"


class Answer(NamedTuple):
    """The begin of a request, its path and secret, and its status and worker; 0 if the connection broke."""

    began: float
    asked: Asked
    status: int
    worker: int


@dataclass
class Watch:
    """Clients that send requests without a pause, on a new connection each time."""

    server: Server
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
        self._seen = self._read = 0
        self._stopping = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(6)]
        for client in self._clients:
            client.start()

    def _ask(self) -> None:
        while not self._stopping.is_set():
            for asked, request in self._requests.items():
                began, answer = time.monotonic(), b""
                with contextlib.suppress(OSError), socket.create_connection(self.server.address, timeout=60) as client:
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
        """Do something, and check that the server answers as *expected* from then on and logs *lines*.

        Args:
            act: the change.
            expected: the status of each path and secret.
            lines: the lines that each worker logs once; it logs no other warnings or errors.
            new: the number of new workers that must answer.
            each: false if only one worker logs *lines*.
            hold: seconds for which the answers are checked.
        """
        act()
        in_force = time.monotonic() + 2 * FRESHNESS
        wait_until(lambda: self._is_done(in_force + hold, lines, new, each=each), lambda: (lines, self._state()))
        self.workers = self._thorough(in_force + hold)
        fresh = self.given[self._seen :]
        self._seen += len(fresh)
        for answer in fresh:
            old = {self.expected[answer.asked]} if answer.began < in_force else set()
            assert answer.status in {expected[answer.asked]} | old | self.may, (answer, in_force, lines)
        self.expected = expected
        for logged in self._logged(self.workers, each=each):
            warnings = [line for line in logged if not line.startswith("INFO")]
            assert len(warnings) == sum(not line.startswith("INFO") for line in lines), warnings
        self._read = self.server.log.read_text().rfind("\n") + 1

    def end(self) -> str:
        """Stop the clients and the server; return its log."""
        self.stop()
        assert all(answer.status in {self.expected[answer.asked]} | self.may for answer in self.given[self._seen :])
        log = self.server.stop()
        assert "Traceback" not in log
        return log

    def stop(self) -> None:
        """Stop the clients."""
        self._stopping.set()
        for client in self._clients:
            client.join()

    def _is_done(self, since: float, lines: tuple[str, ...], new: int, *, each: bool) -> bool:
        workers = self._thorough(since)
        return (
            len(workers) >= 2
            and len(workers - self.workers) >= new
            and all(
                any(re.search(one, line) for line in logged)
                for logged in self._logged(workers, each=each)
                for one in lines
            )
        )

    def _thorough(self, since: float) -> set[int]:
        """Return the workers that have answered every kind of request since then."""
        pairs = {(answer.worker, answer.asked) for answer in self.given[self._seen :] if answer.began >= since}
        counts = Counter(worker for worker, _ in pairs)
        return {worker for worker, count in counts.items() if worker and count == len(self._requests)}

    def _logged(self, workers: set[int], *, each: bool) -> list[list[str]]:
        """Return the new lines in the log: of each worker, or of all together."""
        lines = LINE.findall(self.server.log.read_text()[self._read :])
        groups = [{worker} for worker in workers] if each else [workers]
        return [[line for worker, line in lines if int(worker) in group] for group in groups]

    def _state(self) -> object:
        return self.workers, self.given[-20:], self.server.log.read_text()[-2000:]


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


def grow(path: Path) -> None:
    """Replace a file by one of more than 512 MiB."""
    new = path.with_name("new")
    new.touch()
    os.truncate(new, SIZE_LIMIT + 1)
    new.replace(path)


def edit(pattern: bytes, replacement: bytes) -> Callable[[Path], None]:
    """Return a function that replaces a pattern in a file."""
    return lambda path: put(path, re.sub(pattern, replacement, path.read_bytes(), flags=re.DOTALL))


def same_size_and_time(path: Path) -> None:
    """Replace a file by another one of the same size and modification time."""
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
"""Unusable token files, and the reason that is logged."""

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
"""Other token files, the status of a token of the former file, and the logged lines."""


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


@pytest.fixture(params=["on", pytest.param("off", marks=pytest.mark.slow)], ids=["lifespan", "no lifespan"])
def program(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the script that starts a server of two workers, and its options."""
    return UVICORN, "--lifespan", request.param


@pytest.fixture(params=[{}, pytest.param(KEY, marks=pytest.mark.slow)], ids=["no key", "key"])
def key(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the variable of the environment key, if there is one."""
    return dict(request.param)


@pytest.fixture
def start(
    tmp_path: Path, serve: Serve, secrets: dict[str, str], program: tuple[str, ...], key: dict[str, str]
) -> Iterator[Start]:
    """Return a function that starts a server and its clients."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(program[0])

    def start_one(
        expected: dict[Asked, int], *lines: str, may: frozenset[int] = frozenset(), **environment: str
    ) -> Watch:
        server = serve(*program[1:], script=tmp_path / "launch.py", **key, **environment)
        watch = Watch(server, {**secrets, "key": key["FREEGPT_API_KEY"]} if key else secrets, expected, may)
        running.callback(watch.stop)
        watch.change(tuple, expected, *lines, new=2)
        return watch

    with contextlib.ExitStack() as running:
        yield start_one


def test_faulty_token_file_opens_nothing(start: Start, command: Command) -> None:
    """After each fault of the token file and its lock, tokens are accepted or refused as documented, and a line is logged."""
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


def test_moved_token_file_is_seen(start: Start, command: Command) -> None:
    """A file that moves back, a folder that Kubernetes swaps, and a file that a command writes are read at once."""
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


def test_clock_jump_moves_only_expiry(start: Start, command: Command) -> None:
    """Expiry follows the clock, also while the file is unusable; a revocation is in force at once under any clock."""
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
def test_file_replaced_behind_mount_is_refused(start: Start) -> None:
    """A mounted file that was replaced still shows its old tokens: they are refused, and the log gives the reason."""
    Path("mounted.json").touch()
    watch = start(answers(), FREEGPT_AUTH_STORE="mounted.json")
    reason = (
        r"ERROR \S*/mounted\.json was replaced behind its mount \(mount its directory instead\): its tokens are refused"
    )
    watch.change(partial(put, TOKENS, TOKENS.read_bytes()), answers(valid=401), reason)
    watch.end()


def test_server_starts_closed_on_broken_file(start: Start, key: dict[str, str]) -> None:
    """It recovers with the file. Without a file it is open until one appears, and no event opens it after that."""
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
    headers = {"Authorization": f"Bearer {secrets['valid']}"}

    def ask(client: HTTPConnection) -> int:
        client.request("GET", "/", headers=headers)
        answer = client.getresponse()
        answer.read()
        return answer.status

    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(HTTPConnection(*server.address, timeout=30)))
        assert ask(client) == 200
        with contextlib.suppress(TimeoutError):  # no descriptor is left, and the backlog is full
            for _ in range(400):
                stack.enter_context(socket.create_connection(server.address, timeout=5))
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        wait_until(lambda: len(list(descriptors.iterdir())) == 256 and ask(client))
        for _ in range(10):
            assert ask(client) == 200
        assert command("revoke", secrets["valid"]).returncode == 0
        assert {ask(client) for _ in range(100)} == {401}


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


def test_faulty_usage_database_fails_no_request(start: Start, secrets: dict[str, str]) -> None:
    """Usage stays in memory until it can be written; then every request is counted once."""
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
    watch.stop()
    accepted = sum(answer.status == 200 and answer.asked == ("/", "valid") for answer in watch.given)
    wait_until(lambda: lost[0] + UsageDatabase(str(USAGE)).read()[token_id].use_count == accepted)
    assert stat.S_IMODE(USAGE.stat().st_mode) == 0o600
    watch.end()


@pytest.mark.parametrize(("program", "key"), [((UVICORN, "--lifespan", "on"), {})], ids=[""])
def test_locked_usage_database_delays_no_stop(start: Start) -> None:
    """The server answers meanwhile, waits 5 seconds for the lock at its end, logs that and stops."""
    watch = start(answers(), FREEGPT_AUTH_USAGE="usage.db")
    wait_until(Path("usage.db").exists)
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        watch.change(tuple, answers(), hold=0.5)
        watch.stop()
        began = time.monotonic()
        assert "usage cannot be written" in watch.end()
        assert time.monotonic() - began < SHUTDOWN_TIMEOUT + 30


def test_successor_of_killed_worker_is_closed(start: Start, key: dict[str, str]) -> None:
    """After the token file was moved away, a new worker is closed; a new server is open, as documented."""
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
    ("program", "opened"),
    [((*GUNICORN, "--preload"), []), pytest.param(GUNICORN, OPENED, marks=pytest.mark.slow)],
    ids=["preload", "no preload"],
)
def test_renewed_gunicorn_workers_stay_closed(start: Start, opened: list[str]) -> None:
    """A renewed worker of gunicorn is closed; a server that starts without a token file is open."""
    watch = start(answers(), may=BROKEN_OFF)
    watch.change(partial(TOKENS.rename, ASIDE), answers(401), gone(), new=4)
    watch.end()
    start(answers(*NO_FILE[True]), *opened, may=BROKEN_OFF).end()


def test_gunicorn_ends_on_unusable_settings(tmp_path: Path) -> None:
    """Gunicorn shows the reason and ends with all its workers."""
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


def test_worker_forked_from_open_process_is_closed(tmp_path: Path, serve: Serve, command: Command) -> None:
    """A worker that is forked from an open process is closed if authentication was on in an earlier worker."""
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

    wait_until(is_renewed_and_closed)


def clear(folders: list[Path]) -> None:
    """Remove the notes of all servers, as systemd does at a logout."""
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "key"), [((NOTING, "--lifespan", "on"), {})], ids=[""])
def test_cleared_notes_open_no_worker(start: Start) -> None:
    """Neither a cleaned /dev/shm, nor a container that shares it, nor the loss of all notes opens a worker."""
    for folder in NOTES:
        folder.parent.mkdir()
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
        wait_until(lambda: all(note.exists() for note in notes))
        os.kill(min(watch.workers), signal.SIGKILL)

    watch.may = BROKEN_OFF
    watch.change(move_and_kill, answers(401), gone(), new=1)
    watch.change(clear_and_kill, answers(401), gone(), new=1, each=False)
    watch.end()


UPGRADABLE = """
import os, sys
*arguments, _, host, _, port = sys.argv[1:]
command = [sys.executable, "-m", "gunicorn", "app:app", "--workers", "2", "--pid", "pid", "--graceful-timeout", "1", *arguments]
command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--bind", f"{host}:{port}"]
os.environ["HOME"] = os.getcwd()
os.execv(sys.executable, command)
"""


@pytest.mark.usefixtures("secrets")
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--preload"]], ids=["no preload", "preload"])
def test_gunicorn_upgrade_opens_no_worker(tmp_path: Path, serve: Serve, arguments: list[str]) -> None:
    """After SIGUSR2 the workers of the new arbiter and their successors are closed."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "launch.py").write_text(UPGRADABLE)
    server = serve(*arguments, script=tmp_path / "launch.py")

    def booted() -> list[int]:
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", server.log.read_text())]

    def assert_closed(workers: int) -> None:
        wait_until(lambda: len(booted()) >= workers and server.log.read_text().count("startup complete") >= workers)
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
        wait_until(lambda: not list(tmp_path.glob("pid*")))
