"""Every call to the file system that a command makes fails once, in every way that it can: nothing is half done.

``strace`` makes the n-th call of a kind fail while a command runs. A command that was traced in peace tells which calls
there are; then each of them fails in a run of its own, on a copy of the same files. To trace the command and not the
interpreter that starts, commands run in forks of a launcher that has everything imported.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file import store as file_store
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.usage.base import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STRACE = shutil.which("strace")
AT_ONCE = 4
CREATED = datetime(2025, 11, 26, 22, 30, tzinfo=UTC)

# For each line on stdin: fork, send the output to files, stop until a tracer has come, run the command.
LAUNCHER = """
import ctypes, json, locale, os, shutil, signal, sqlite3, sys
import filelock
from freegpt_auth import cli
from freegpt_auth.stores.file import usage as sqlite
from freegpt_auth.stores.file import store as file

file.FRESHNESS = 0.0  # no server runs beside the commands, so none is waited for
PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
for line in sys.stdin:
    home, arguments = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.chdir(home)
        for number, name in (1, "../out"), (2, "../err"):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY)  # some systems let only a parent trace
        os.kill(os.getpid(), signal.SIGSTOP)
        raise SystemExit(cli.main(arguments))
    os.waitpid(child, os.WUNTRACED)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# What each call is made to fail with; retval=0 is a file that ends too early, and a disk that takes nothing this time.
_STAT = "EIO EACCES ELOOP EINTR"
_CHANGE = "EIO EACCES EPERM EROFS ENOSPC EDQUOT EINTR"
FAULTS = {
    call: [fault if "=" in fault else f"error={fault}" for fault in faults.split()]
    for calls, faults in {
        "open openat": "ENOSPC EIO EACCES EROFS EMFILE EINTR",
        "read pread64": "EIO EINTR retval=0",
        "write pwrite64": "ENOSPC EIO EDQUOT EFBIG EINTR retval=0",
        "fsync fdatasync": "EIO ENOSPC EDQUOT EROFS EINTR",
        "rename renameat renameat2": f"{_CHANGE} EBUSY",
        "link linkat": f"{_CHANGE} EMLINK",
        "unlink unlinkat": f"{_CHANGE} EBUSY",
        "mkdir mkdirat": _CHANGE,
        "chmod fchmod fchmodat chown fchown lchown fchownat": "EIO EPERM EROFS EINTR",
        "flock fcntl": "EIO ENOLCK EAGAIN EINTR",
        "close": "EIO ENOSPC EDQUOT EINTR",
        "stat lstat fstat newfstatat statx access faccessat faccessat2": _STAT,
        "readlink readlinkat": _STAT,
        "getcwd": "ENOENT EACCES",
        "getdents64": "EIO EACCES retval=0",
        "lseek": "EIO EINVAL",
        "getxattr fgetxattr": "EIO EACCES",
        "setxattr fsetxattr fremovexattr": _CHANGE,
        "utimensat": "EIO EPERM EROFS EINTR",
        "ioctl": "",  # asks the terminal for its width
        "mmap": "",  # the allocator's: memory is no disk
    }.items()
    for call in calls.split()
}


@dataclass(frozen=True)
class Run:
    """One run of a command, what it said, and what became of the token file."""

    trace: str
    status: int
    out: str
    err: str
    before: bytes | None
    after: bytes | None
    known: set[bytes]  # digests before
    tokens: dict[bytes, Any]  # after
    left: dict[str, int]  # after one more write: every file, and its type and mode

    @property
    def hit(self) -> str:
        """The call that failed."""
        return " ".join(line for line in self.trace.splitlines() if "(INJECTED)" in line)


class Launcher:
    """Runs commands one after the other, each under its own ``strace``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._stdin, self._stdout = process.stdin, process.stdout

    def run(self, home: Path, arguments: list[str], *tracing: str) -> int:
        """Run one command in *home* and return its exit status; its output and its trace come beside *home*."""
        assert self._stdin is not None
        assert self._stdout is not None
        self._stdin.write(json.dumps([str(home), arguments]) + "\n")
        self._stdin.flush()
        child = int(self._stdout.readline())
        with subprocess.Popen(
            ["strace", "-o", home.parent / "trace", *tracing, "-p", str(child)], stderr=subprocess.PIPE, text=True
        ) as strace:
            assert strace.stderr is not None
            attached = strace.stderr.readline()
            os.kill(child, signal.SIGCONT)
            strace.wait(timeout=90)
        assert "attached" in attached
        return int(self._stdout.readline())


@contextmanager
def launchers(*options: str) -> Iterator[queue.SimpleQueue[Launcher]]:
    """Start as many launchers as runs go on at once."""
    assert STRACE, "these tests need strace: install it (on Debian and Ubuntu: apt install strace)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ready: queue.SimpleQueue[Launcher] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(AT_ONCE):
            process = subprocess.Popen(
                [sys.executable, *options, "-c", LAUNCHER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            ready.put(Launcher(stack.enter_context(process)))
        yield ready


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "FRESHNESS", 0.0)


SECRET = issue("doomed", now=CREATED)[1]


def no_file(home: Path) -> None:
    """Prepare nothing: the command makes the first token."""


def a_file(home: Path) -> None:
    """Prepare a token file with two tokens, one of them in use."""
    store = FileTokenStore(home / "api_tokens.json")
    for name, secret in ("kept", issue("kept", now=CREATED)[1]), ("doomed", SECRET):
        token, _ = issue(name, now=CREATED)
        store.add(digest_of(secret), token)
    UsageDatabase(str(home / "api_tokens.usage.db")).write(Batch("p", 1, {token.id: (7, CREATED.timestamp())}), 1.0)


def a_link(home: Path) -> None:
    """Prepare a token file in another folder, and a symbolic link to it."""
    a_file(home)
    (home / "elsewhere").mkdir()
    (home / "api_tokens.json").rename(home / "elsewhere" / "tokens.json")
    (home / "api_tokens.json.lock").unlink()
    (home / "api_tokens.json").symlink_to("elsewhere/tokens.json")


def an_ancestor(home: Path) -> None:
    """Prepare a file of plain tokens, which the first change converts."""
    rows = {
        secret: {"name": name, "created_at": CREATED.isoformat(), "last_used": None, "active": True}
        for name, secret in (("kept", issue("kept", now=CREATED)[1]), ("doomed", SECRET))
    }
    (home / "api_tokens.json").write_text(json.dumps(rows))
    (home / "api_tokens.json").chmod(0o600)


def run_once(launcher: Launcher, folder: Path, template: Path, arguments: list[str], *tracing: str) -> Run:
    """Run a command on a copy of *template*, and look at what it left."""
    home = folder / "home"
    shutil.copytree(template, home, symlinks=True)
    path = home / "api_tokens.json"
    before = path.read_bytes() if path.exists() else None
    known = set(FileTokenStore(path).tokens())
    status = launcher.run(home, arguments, *tracing)
    after = path.read_bytes() if path.exists() else None
    tokens = dict(FileTokenStore(path).tokens())
    another, secret = issue("another", now=CREATED)
    FileTokenStore(path).add(digest_of(secret), another)
    usage = home / "api_tokens.usage.db"
    if usage.exists():
        UsageDatabase(str(usage)).forget([])
    left = {str(one.relative_to(home)): one.lstat().st_mode for one in home.rglob("*")}
    texts = [(folder / name).read_text().replace(str(home), "HOME") for name in ("trace", "out", "err")]
    return Run(texts[0], status, *texts[1:], before, after, known, tokens, left)


def broken(run: Run, healthy: Run, without_usage: str) -> list[str]:
    """Return which promises a run did not keep."""
    failed = run.status == 1
    muted = "write(2" in run.hit  # what cannot be said need not be
    one_line = re.fullmatch(r"freegpt-auth: [^\n]+\n", run.err) is not None
    printed = [digest_of(secret) for secret in re.findall(r"sk-\w{49}", run.out)]
    new = [digest for digest in run.tokens if digest not in run.known]
    # A first token that cannot be shown is taken back, and leaves a file without tokens: that keeps a server closed.
    intact = run.after == run.before or ("write(1" in run.hit and run.before is None and not run.tokens)
    done = {token.name: token.revoked_at is not None for token in run.tokens.values()}
    wanted = {token.name: token.revoked_at is not None for token in healthy.tokens.values()}
    # A token is deleted whether or not its usage can be removed.
    without = (
        re.fullmatch(re.escape(plain(healthy.err)) + r"freegpt-auth: the usage [^\n]+\n", plain(run.err)) is not None
    )
    usual_out, usual_err = plain(run.out) == plain(healthy.out), plain(run.err) == plain(healthy.err)
    promises = {
        "it succeeds or fails": run.status in (0, 1),
        "one line says why it failed": not failed or one_line or muted,
        "what failed left the file as it was": not failed or intact,
        "what failed printed nothing": not failed or not run.out,
        "what succeeded is done": failed or done == wanted,
        "what succeeded said so": failed or usual_err or without or muted or (one_line and "usage" in run.err),
        "what succeeded printed all": failed or usual_out or (one_line and run.out == without_usage),
        "the secrets printed are those of the new tokens": printed == new,
        "no secret is in the messages": re.search(r"sk-\w{12}", run.err) is None,
        "after the next write all is in order": run.left == healthy.left,
    }
    return [promise for promise, kept in promises.items() if not kept]


def plain(text: str) -> str:
    """Return *text* without what is different in each run."""
    return re.sub(r"sk-\w+|\b[0-9a-f]{12}\b|\d{4}-\d\d-\d\dT[\d:]+", "…", text)


@pytest.mark.parametrize(
    ("prepare", "arguments", "options"),
    [
        pytest.param(no_file, ["create", "new"], [], id="create-the-first"),
        pytest.param(a_file, ["create", "new"], [], id="create"),
        pytest.param(a_file, ["create", "new"], ["-u"], id="create-unbuffered"),
        pytest.param(a_file, ["create", "new", "--json"], [], id="create-json"),
        pytest.param(a_link, ["create", "new"], [], id="create-through-a-link"),
        pytest.param(a_file, ["list"], [], id="list"),
        pytest.param(a_file, ["list", "--json"], [], id="list-json"),
        pytest.param(a_file, ["revoke", SECRET], [], id="revoke"),
        pytest.param(an_ancestor, ["revoke", SECRET], [], id="revoke-and-convert"),
        pytest.param(a_file, ["delete", SECRET], [], id="delete"),
    ],
)
def test_whatever_fails_the_command_is_done_or_was_not_begun(
    tmp_path: Path,
    prepare: Callable[[Path], None],
    arguments: list[str],
    options: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    """A command whose disk fails says so in one line with status 1, and leaves the token file as it was, byte for byte.

    No secret is printed of a token that is not kept, no traceback, and the next command finds nothing in its way.
    """
    template = tmp_path / "template"
    template.mkdir()
    prepare(template)
    with launchers(*options) as ready, ThreadPoolExecutor(AT_ONCE) as pool:

        def run(number: int, *tracing: str, source: Path = template) -> Run:
            folder = tmp_path / str(number)
            folder.mkdir()
            launcher = ready.get()
            try:
                return run_once(launcher, folder, source, arguments, *tracing)
            finally:
                ready.put(launcher)

        healthy = run(0, "-e", "trace=%file,%desc")
        assert healthy.status == 0
        bare = tmp_path / "bare"
        shutil.copytree(template, bare, symlinks=True)
        (bare / "api_tokens.usage.db").unlink(missing_ok=True)
        without_usage = run(1, "-e", "trace=%file", source=bare).out
        calls = Counter(re.findall(r"^(\w+)\(", healthy.trace, re.MULTILINE))
        faults = [(call, n, fault) for call in calls for n in range(1, calls[call] + 1) for fault in FAULTS[call]]
        inject = [("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={n}") for call, n, fault in faults]
        runs = list(pool.map(lambda one: run(one[0], *one[1]), enumerate(inject, start=2)))
    record_property("faults", len(runs))
    assert len(runs) > 100
    assert [fault for fault, run in zip(faults, runs, strict=True) if not run.hit] == []
    wrong = [
        f"{run.hit}: exit {run.status}, {run.err!r}, but NOT {', NOT '.join(promises)}"
        for run in runs
        if (promises := broken(run, healthy, without_usage))
    ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(runs)}:", *wrong])
