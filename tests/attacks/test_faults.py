"""Every file system call of a command fails once, with each possible error: no change is half done.

A healthy run under ``strace`` lists the calls. Then each call fails in a run of its own, on a copy of the same files,
by fault injection of ``strace``. Commands run in forks of a launcher that has imported everything: only the command is
traced, not the start of an interpreter.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.usage.base import Batch
from tests.helpers.programs import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.attacks.conftest import Record

STRACE = shutil.which("strace")
AT_ONCE = 4
CREATED = datetime(2025, 11, 26, 22, 30, tzinfo=UTC)

# For each line on stdin: fork, redirect the output to files, stop until a tracer is attached, run the command.
LAUNCHER = """
import ctypes, json, locale, os, shutil, signal, sqlite3, sys
import filelock
from freegpt_auth import cli
from freegpt_auth.stores.file import usage
from freegpt_auth.stores.file import store as file_store

file_store.FRESHNESS = 0.0  # no server runs beside the commands: none is waited for
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

# The errors of each call; retval=0 is a truncated file, and a write of nothing.
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
        "ioctl": "",  # the width of the terminal
        "mmap": "",  # memory is no disk
    }.items()
    for call in calls.split()
}


@dataclass(frozen=True)
class Run:
    """One run of a command: its trace and output, and the token file before and after."""

    trace: str
    status: int
    out: str
    err: str
    before: bytes | None
    after: bytes | None
    known: set[bytes]  # digests before
    tokens: dict[bytes, Any]  # after
    left: dict[str, int]  # the type and mode of every file after one more write

    @property
    def hit(self) -> str:
        """The traced line of the injected fault."""
        return " ".join(line for line in self.trace.splitlines() if "(INJECTED)" in line)


class Launcher(Program):
    """Runs commands one after the other, each under its own ``strace``."""

    def run(self, home: Path, arguments: list[str], *tracing: str) -> int:
        """Run one command in *home* and return its exit status; output and trace are written beside *home*."""
        self.send([str(home), arguments])
        child = self.receive()
        with subprocess.Popen(
            ["strace", "-o", home.parent / "trace", *tracing, "-p", str(child)], stderr=subprocess.PIPE, text=True
        ) as strace:
            assert strace.stderr is not None
            attached = strace.stderr.readline()
            os.kill(child, signal.SIGCONT)
            strace.wait(timeout=90)
        assert "attached" in attached
        return int(self.receive())


@contextmanager
def launchers(*options: str) -> Iterator[queue.SimpleQueue[Launcher]]:
    """Start one launcher for each simultaneous run."""
    assert STRACE, "these tests need strace: install it (on Debian and Ubuntu: apt install strace)"
    ready: queue.SimpleQueue[Launcher] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(AT_ONCE):
            ready.put(stack.enter_context(Launcher(LAUNCHER, *options)))
        yield ready


SECRET = issue("doomed", now=CREATED)[1]


def no_file(home: Path) -> None:
    """Prepare nothing: the command creates the first token."""


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
    """Run a command on a copy of *template*, and return the state it left."""
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
    trace, out, err = ((folder / name).read_text().replace(str(home), "HOME") for name in ("trace", "out", "err"))
    return Run(trace, status, out, err, before, after, known, tokens, left)


def broken(run: Run, healthy: Run, without_usage: str) -> list[str]:
    """Return the broken promises of a run."""
    new = [digest for digest in run.tokens if digest not in run.known]
    promises = {
        "it succeeds or fails": run.status in (0, 1),
        "the printed secrets are those of the new tokens": new
        == [digest_of(secret) for secret in re.findall(r"sk-\w{49}", run.out)],
        "no secret is in the messages": re.search(r"sk-\w{12}", run.err) is None,
        "after the next write all files are in order": run.left == healthy.left,
        **(promises_of_failure(run) if run.status == 1 else promises_of_success(run, healthy, without_usage)),
    }
    return [promise for promise, kept in promises.items() if not kept]


def promises_of_failure(run: Run) -> dict[str, bool]:
    """Return the promises of a command that failed, and whether the run keeps them."""
    # A first token that cannot be printed is removed again; the file without tokens stays and keeps a server closed.
    taken_back = "write(1" in run.hit and run.before is None and not run.tokens
    return {
        "one line gives the reason": is_one_line(run.err) or is_muted(run),
        "the file is unchanged": run.after == run.before or taken_back,
        "nothing was printed": not run.out,
    }


def promises_of_success(run: Run, healthy: Run, without_usage: str) -> dict[str, bool]:
    """Return the promises of a command that succeeded, and whether the run keeps them."""
    # A token is deleted even if its usage cannot be removed, and listed even if its usage cannot be read.
    usage_failed = re.fullmatch(re.escape(plain(healthy.err)) + r"freegpt-auth: (the usage )?[^\n]+\n", plain(run.err))
    without = usage_failed is not None and "usage" in run.err
    return {
        "it is done": {token.name: token.revoked_at is not None for token in run.tokens.values()}
        == {token.name: token.revoked_at is not None for token in healthy.tokens.values()},
        "it was reported": plain(run.err) == plain(healthy.err) or without or is_muted(run),
        "all was printed": plain(run.out) == plain(healthy.out) or (is_one_line(run.err) and run.out == without_usage),
    }


def is_one_line(text: str) -> bool:
    """Return whether a message of the command is one line."""
    return re.fullmatch(r"freegpt-auth: [^\n]+\n", text) is not None


def is_muted(run: Run) -> bool:
    """Return whether the message itself could not be written."""
    return "write(2" in run.hit


def plain(text: str) -> str:
    """Return *text* without secrets, ids and times, which differ in each run."""
    return re.sub(r"sk-\w+|\b[0-9a-f]{12}\b|\d{4}-\d\d-\d\dT[\d:]+", "…", text)


CASES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "revoke": (a_file, f"revoke {SECRET}", []),
    "create-the-first": (no_file, "create new", []),
    "create": (a_file, "create new", []),
    "create-unbuffered": (a_file, "create new", ["-u"]),
    "create-json": (a_file, "create new --json", []),
    "create-through-a-link": (a_link, "create new", []),
    "list": (a_file, "list", []),
    "list-json": (a_file, "list --json", []),
    "revoke-and-convert": (an_ancestor, f"revoke {SECRET}", []),
    "delete": (a_file, f"delete {SECRET}", []),
}
"""What is there before, a command, and options of the interpreter."""


@pytest.mark.parametrize("case", ["revoke", *(pytest.param(each, marks=pytest.mark.slow) for each in [*CASES][1:])])
def test_failing_call_leaves_nothing_half_done(tmp_path: Path, case: str, record: Record) -> None:
    """A command whose disk fails reports that in one line with status 1, and leaves the token file unchanged.

    It prints no secret of a token that was not kept and no traceback, and the next command works.
    """
    prepare, arguments, options = CASES[case]
    template = tmp_path / "template"
    template.mkdir()
    prepare(template)
    with launchers(*options) as ready, ThreadPoolExecutor(AT_ONCE) as pool:

        def run(number: int, *tracing: str, source: Path = template) -> Run:
            folder = tmp_path / str(number)
            folder.mkdir()
            launcher = ready.get()
            try:
                return run_once(launcher, folder, source, arguments.split(), *tracing)
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
    record(faults=len(runs))
    assert len(runs) > 100
    assert [fault for fault, run in zip(faults, runs, strict=True) if not run.hit] == []
    wrong = [
        f"{run.hit}: exit {run.status}, {run.err!r}, but NOT {', NOT '.join(promises)}"
        for run in runs
        if (promises := broken(run, healthy, without_usage))
    ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(runs)}:", *wrong])
