"""Recognition of the usage database: only ours is ever changed or moved, and nothing can hold up a look at it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from freegpt_auth.exceptions import ConfigurationError, UsageError
from freegpt_auth.stores.file import usage_header
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = Path("usage.db")
USED = Batch("p", 1, {"a": (1, 0.0)})
FIRST_RELEASE = """
    CREATE TABLE IF NOT EXISTS usage (
        token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS batches (
        process TEXT PRIMARY KEY, sequence INTEGER NOT NULL, written_at REAL NOT NULL
    ) WITHOUT ROWID;
"""


def database(script: str) -> None:
    """Make a database of another program."""
    with contextlib.closing(sqlite3.connect(PATH)) as connection:
        connection.executescript(script)


def without_header() -> None:
    """Make a usage database whose header is overwritten."""
    UsageDatabase(str(PATH)).write(USED, 1.0)
    PATH.write_bytes(b"no database" * 10 + PATH.read_bytes()[110:])


def damaged_stranger() -> None:
    """Make a database of another program that SQLite cannot read."""
    database("CREATE TABLE t (x)")
    PATH.write_bytes(PATH.read_bytes()[:100] + b"\xff" * 3996)


def with_log() -> None:
    """Make a database of another program with a write-ahead log that is not folded into it yet."""
    source = sqlite3.connect("source.db")
    source.executescript("PRAGMA journal_mode = wal; CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    for end in ("", "-wal"):
        Path(f"{PATH}{end}").write_bytes(Path(f"source.db{end}").read_bytes())
    source.close()


STRANGERS: dict[str, Callable[[], object]] = {
    "text": lambda: PATH.write_text("my notes"),
    "token-file": lambda: PATH.write_text('{"version": 1, "tokens": []}'),
    "our-header-destroyed": without_header,
    "application": lambda: database("CREATE TABLE t (x); INSERT INTO t VALUES (1)"),
    "application-with-our-table": lambda: database(FIRST_RELEASE + "CREATE TABLE t (x)"),
    "application-with-id": lambda: database(f"PRAGMA application_id = 7; {FIRST_RELEASE}"),
    "application-with-log": with_log,
    "application-damaged": damaged_stranger,
    "no-tables": lambda: database("PRAGMA user_version = 1"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_foreign_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    """Another program's file is an error to a server that starts and to each use of it, and no byte of it changes."""
    STRANGERS[kind]()

    def state() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}

    before, store = state(), UsageDatabase(str(PATH))
    for call in (lambda: store.write(USED, 1.0), store.read, lambda: store.merge({}), lambda: store.forget(["a"])):
        with pytest.raises(UsageError, match=r"^it is no usage database .*; move it away, or name another file in"):
            call()
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/usage.db cannot hold usage: it is no usage database"):
        UsageRecorder(store, interval=1.0)
    assert state() == before


SPECIAL: dict[str, Callable[[], object]] = {
    "a FIFO": lambda: os.mkfifo(PATH),
    "a directory": PATH.mkdir,
    "a socket": lambda: os.mknod(PATH, stat.S_IFSOCK | 0o600),
    "a device": lambda: PATH.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_file_is_refused(kind: str) -> None:
    """A file that is no regular one is named at once: a FIFO holds up neither a command nor the start of a server."""
    SPECIAL[kind]()
    program = f"""
from freegpt_auth.exceptions import FreeGPTAuthError
from freegpt_auth.usage.base import Batch
from freegpt_auth.stores.file.usage import UsageDatabase
store = UsageDatabase({str(PATH)!r})
for call in (store.check, store.read, lambda: store.forget(["a"]), lambda: store.write(Batch("p", 1, {{}}), 1.0)):
    try:
        call()
    except FreeGPTAuthError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.count(f"it is {kind}, not a file; move it away, or name another") == 4


@pytest.mark.parametrize("spoilt", [False, True])
def test_database_of_the_first_release_is_adopted(*, spoilt: bool) -> None:
    """A database of 0.1.0, which has no mark, keeps its counts and gets the mark; a damaged one is moved aside."""
    rows = ", ".join(f"('t{number}', 4, 1.0)" for number in range(2000))
    database(f"{FIRST_RELEASE} INSERT INTO usage VALUES {rows}")
    if spoilt:
        PATH.write_bytes(PATH.read_bytes()[:4096].ljust(PATH.stat().st_size, b"\xff"))
    store = UsageDatabase(str(PATH))
    store.check()
    store.write(Batch("p", 1, {"t7": (1, 0.0)}), 1.0)
    assert store.read()["t7"].use_count == (1 if spoilt else 5)
    assert PATH.read_bytes()[68:72] == b"fgua"
    assert bool(list(Path().glob("usage.db.corrupt-*"))) is spoilt


def test_threads_take_turns() -> None:
    """Threads of one process never have the database open at once: closing it would drop each other's locks.

    A child that is forked meanwhile is not held up by its parent's threads.
    """
    store = UsageDatabase(str(PATH))
    store.write(USED, 1.0)
    taking_too_long = pytest.raises(UsageError, match="other processes write to it for too long")
    with usage_header.turn(str(PATH.absolute()), 1.0), ThreadPoolExecutor(1) as pool, taking_too_long:
        pool.submit(store.write, USED, 0.01).result()
    program = f"""
import os, threading
from freegpt_auth.stores.file import usage_header
from freegpt_auth.stores.file.usage import UsageDatabase
turn = usage_header.turn({str(PATH.absolute())!r}, 1.0)
threading.Thread(target=turn.__enter__).run()
child = os.fork()
if not child:
    os._exit(len(UsageDatabase({str(PATH)!r}).read()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
