"""The recorder: exact counts from any number of processes, in spite of faults of the database and killed processes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.exceptions import UsageError
from freegpt_auth.stores.file import usage
from freegpt_auth.stores.file.lock import locked
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.stores.file.usage_header import APPLICATION_ID
from freegpt_auth.usage.base import Batch, Usage
from freegpt_auth.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

PATH = "api_tokens.usage.db"
NEVER = 3600.0
"""An interval longer than any test: only flush() writes."""


def recorder_of(uses: dict[str, int], path: str = PATH) -> UsageRecorder:
    """Return a recorder that has recorded each token so many times and has written nothing."""
    recorder = UsageRecorder(UsageDatabase(path), interval=NEVER)
    for token_id, count in uses.items():
        for _ in range(count):
            recorder.record((token_id, 1000.0))
    return recorder


def counts(path: str = PATH) -> dict[str, int]:
    """Return the use counts in the database."""
    return {token_id: usage.use_count for token_id, usage in UsageDatabase(path).read().items()}


def wait_for(expected: dict[str, int]) -> None:
    """Wait until somebody else has written the counts."""
    wait_until(lambda: counts() == expected)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, counts()
        time.sleep(0.001)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """Return a function that returns the messages of one level so far."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")
    return lambda level: [entry.getMessage() for entry in caplog.records if entry.levelno == level]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stopping server wait for a tenth of a second only."""
    monkeypatch.setattr("freegpt_auth.usage.recorder.SHUTDOWN_TIMEOUT", 0.1)


def no_thread(_thread: threading.Thread) -> None:
    """Take the place of ``Thread.start`` on a machine that has none to spare."""
    raise RuntimeError("can't start new thread")


# --- counting


def test_counts_add_up() -> None:
    """Each use counts once, for its own token, over restarts too, and no write turns the last use back."""
    recorder = UsageRecorder(UsageDatabase(PATH), interval=NEVER)
    for token_id, instant in [("a", 10.0), ("b", 20.0), ("a", 30.5), ("a", 20.0)]:
        recorder.record((token_id, instant))
    recorder.flush()
    recorder.flush()
    restarted = UsageRecorder(UsageDatabase(PATH), interval=NEVER)
    restarted.record(("a", 25.0))
    restarted.record(("b", 40.0))
    restarted.flush()
    assert UsageDatabase(PATH).read() == {
        "a": Usage(4, datetime(1970, 1, 1, 0, 0, 30, 500_000, UTC)),
        "b": Usage(2, datetime(1970, 1, 1, 0, 0, 40, 0, UTC)),
    }


def test_nothing_is_lost_between_threads() -> None:
    """Requests that are recorded by several threads while others are written all count."""
    recorder = UsageRecorder(UsageDatabase(PATH), interval=0.001)

    def record(instant: float) -> None:
        for _ in range(2000):
            recorder.record(("a", instant))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, range(4)))
    recorder.flush()
    assert counts() == {"a": 8000}


def test_two_first_requests_start_one_writer() -> None:
    """Two threads that record the first use at once start one writer, and both uses count."""
    recorder = UsageRecorder(UsageDatabase(PATH), interval=NEVER)

    @contextlib.contextmanager
    def overtaken() -> Generator[None]:
        recorder._starting = threading.Lock()
        other = threading.Thread(target=recorder.record, args=(("a", 1.0),))
        other.start()
        other.join()
        yield

    recorder._starting = overtaken()  # type: ignore[assignment]
    before = threading.active_count()
    recorder.record(("a", 1.0))
    assert threading.active_count() == before + 1
    recorder.flush()
    assert counts() == {"a": 2}


# --- batches


class Fickle:
    """A usage store in memory whose replies may be lost."""

    source = "a fickle place"

    def __init__(self) -> None:
        self.given: list[Batch] = []
        self.answers = True
        self.closed = 0

    def write(self, batch: Batch, timeout: float) -> None:
        """Keep a batch, and answer or not."""
        assert 0 <= timeout <= 5
        self.given.append(batch._replace(counts=dict(batch.counts)))
        if not self.answers:
            raise UsageError("the answer was lost")

    def read(self) -> dict[str, Usage]:
        """Count each batch once, as a database does."""
        used: dict[str, int] = {}
        for batch in {(batch.process, batch.sequence): batch for batch in self.given}.values():
            for token_id, (count, _) in batch.counts.items():
                used[token_id] = used.get(token_id, 0) + count
        return {token_id: Usage(count, datetime.fromtimestamp(0, UTC)) for token_id, count in used.items()}

    def merge(self, _usage: object) -> None:
        """Take nothing."""

    def check(self) -> None:
        """Find nothing wrong."""

    def forget(self, _token_ids: object) -> None:
        """Keep everything."""

    def close(self) -> None:
        """Be closed."""
        self.closed += 1


def fickle(**uses: int) -> tuple[UsageRecorder, Fickle]:
    """Return a recorder that has recorded each token so many times, and the place it writes to."""
    store = Fickle()
    recorder = UsageRecorder(store, interval=NEVER)
    use(recorder, **uses)
    return recorder, store


def use(recorder: UsageRecorder, **uses: int) -> None:
    """Record uses."""
    for token_id, count in uses.items():
        for _ in range(count):
            recorder.record((token_id, 1000.0))


def test_each_batch_has_a_number_of_its_own() -> None:
    """A batch has the id of its process and the next number; an empty batch is never written."""
    recorder, store = fickle(a=2, b=1)
    recorder.flush()
    recorder.flush()
    use(recorder, a=1)
    recorder.flush()
    first, second = store.given
    assert (first.sequence, dict(first.counts)) == (1, {"a": (2, 1000.0), "b": (1, 1000.0)})
    assert (second.sequence, dict(second.counts)) == (2, {"a": (1, 1000.0)})
    assert first.process == second.process
    assert fickle()[0]._process != fickle()[0]._process


def test_unconfirmed_batch_is_retried_unchanged(log: Callable[[int], list[str]]) -> None:
    """Later uses go into a later batch: a store that knows the number counts each use once."""
    recorder, store = fickle(a=1)
    store.answers = False
    for _ in range(3):
        recorder.flush()
        use(recorder, a=2, b=1)
    assert {(batch.sequence, tuple(batch.counts.items())) for batch in store.given} == {(1, (("a", (1, 1000.0)),))}
    store.answers = True
    recorder.flush()
    assert [batch.sequence for batch in store.given] == [1, 1, 1, 1, 2]
    assert {token_id: used.use_count for token_id, used in store.read().items()} == {"a": 7, "b": 3}
    assert log(logging.WARNING) == [
        "usage cannot be written to a fickle place: the answer was lost. It is kept in memory until it can"
    ]
    assert log(logging.INFO) == ["usage is written to a fickle place again"]


def test_failed_batch_counts_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of pending tokens includes a failed batch: its tokens are still counted, others are dropped."""
    monkeypatch.setattr("freegpt_auth.usage.recorder.PENDING_LIMIT", 2)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    recorder, store = fickle(a=1, b=1)
    store.answers = False
    recorder.flush()
    for token_id in ("a", "c", "b", "d"):
        use(recorder, **{token_id: 1})
        recorder.flush()
    store.answers = True
    recorder.flush()
    assert {token_id: used.use_count for token_id, used in store.read().items()} == {"a": 2, "b": 2}


def test_a_server_that_stops_lets_go_of_the_place() -> None:
    """At shutdown pending uses are written, then resources are released; both may happen repeatedly."""
    recorder, store = fickle(a=1)
    recorder.finish()
    assert (len(store.given), store.closed) == (1, 1)
    use(recorder, a=1)
    store.answers = False
    recorder.finish()
    assert (len(store.given), store.closed) == (2, 2)


def test_a_child_begins_batches_of_its_own() -> None:
    """After a fork a process has another name, and writes nothing that its parent has still to write."""
    recorder, store = fickle(a=1)
    store.answers = False
    recorder.flush()
    before = recorder._process
    recorder.after_fork_in_child()
    store.answers = True
    recorder.flush()
    assert len(store.given) == 1
    use(recorder, a=1)
    recorder.flush()
    assert (store.given[1].process != before, store.given[1].sequence) == (True, 1)


# --- when and where it is written


def test_idle_recorder_writes_nothing(tmp_path: Path) -> None:
    """A server that nobody uses makes no database, and a missing, empty or new one holds no usage."""
    UsageRecorder(UsageDatabase(PATH), interval=NEVER).flush()
    recorder = recorder_of({"a": 1})
    assert UsageDatabase(PATH).read() == {}
    assert not list(tmp_path.iterdir())
    Path(PATH).touch()
    assert UsageDatabase(PATH).read() == {}
    with contextlib.closing(sqlite3.connect(PATH)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    assert UsageDatabase(PATH).read() == {}
    recorder.flush()
    assert counts() == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {PATH, f"{PATH}.lock"}


def test_it_is_written_on_an_interval() -> None:
    """Usage appears by itself while a server goes on, again and again."""
    recorder = UsageRecorder(UsageDatabase(PATH), interval=0.01)
    for expected in (1, 2, 3):
        recorder.record(("a", 1.0))
        wait_for({"a": expected})


@pytest.mark.parametrize("name", ["a?mode=memory#b.db", "ü %20'.db"])
def test_the_database_is_where_it_was_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Any file name works, relative to the directory of the start, and only the owner may read the file."""
    recorder = recorder_of({"a": 1}, name)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    before = os.umask(0)
    try:
        recorder.flush()
    finally:
        os.umask(before)
    assert counts(f"../{name}") == {"a": 1}
    assert stat.S_IMODE(Path("..", name).stat().st_mode) == 0o600


# --- several processes


def test_corrupt_database_loses_no_use() -> None:
    """Workers that write side by side, and find the database corrupt at the same moment, lose no use of each other's."""
    _broken_pages()
    program = f"""
import sys
from freegpt_auth.usage.recorder import UsageRecorder
from freegpt_auth.stores.file.usage import UsageDatabase
recorder = UsageRecorder(UsageDatabase({PATH!r}), interval=0.001)
print("ready", flush=True)
sys.stdin.read()
for number in range(2000):
    recorder.record((str(number % 5), 1.0))
"""
    start = [sys.executable, "-c", program]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
            for _ in range(3)
        ]
        assert [worker.stdout.readline() for worker in workers if worker.stdout] == [b"ready\n"] * 3
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert counts() == {str(number): 1200 for number in range(5)}
    assert len(list(Path().glob(f"{PATH}.corrupt-*"))) == 1


def test_failed_commit_counts_once(monkeypatch: pytest.MonkeyPatch, log: Callable[[int], list[str]]) -> None:
    """Where SQLite says that it could not write, and yet it has, the uses count once."""
    recorder = recorder_of({"a": 1})
    connect = sqlite3.connect
    with monkeypatch.context() as context:

        def without_journal(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*args, **kwargs)
            connection.set_trace_callback(
                lambda statement: Path(f"{PATH}-journal").unlink() if statement == "COMMIT" else None
            )
            return connection

        context.setattr(sqlite3, "connect", without_journal)
        recorder.flush()
    (message,) = log(logging.WARNING)
    assert message.startswith(
        f"usage cannot be written to {Path(PATH).absolute()}: the disk failed to read or write it"
    )
    assert counts() == {"a": 1}
    for _ in range(2):
        recorder.record(("a", 1.0))
        recorder.flush()
    assert counts() == {"a": 3}


def test_fork_during_a_write_counts_once() -> None:
    """A fork waits until a write ends, so no lock crosses it; parent and child each write their own uses."""
    program = f"""
import os, sys, threading, time, warnings
from freegpt_auth.usage import recorder as usage
from freegpt_auth.stores.file.usage import UsageDatabase
warnings.simplefilter("ignore")
usage.SHUTDOWN_TIMEOUT = usage.FORK_TIMEOUT = 60
recorder = usage.UsageRecorder(UsageDatabase({PATH!r}), interval=3600)
for number in range(50_000):
    recorder.record((str(number), 1.0))
writing = threading.Thread(target=recorder.flush)
writing.start()
while not os.path.exists({PATH!r} + "-journal"):
    time.sleep(0)
recorder.record(("parent", 1.0))
began = time.monotonic()
child = os.fork()
assert time.monotonic() - began < 30
if not child:
    recorder.record(("child", 1.0))
    sys.exit()
sys.exit(os.waitpid(child, 0)[1])
"""
    start = [sys.executable, "-c", program]
    done = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert counts() == {**{str(number): 1 for number in range(50_000)}, "parent": 1, "child": 1}


# --- trouble with the disk


def _no_folder(path: Path) -> Callable[[], None]:
    return path.parent.mkdir


def _no_permission(path: Path) -> Callable[[], None]:
    path.parent.mkdir(0o500)
    return lambda: path.parent.chmod(0o700)


def _another_program(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    return connection.close


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_no_folder, "its folder does not exist; create the folder first"),
        (
            _no_permission,
            "cannot lock {}.lock: permission denied; run this as the user who owns it, or change its permissions",
        ),
        (_another_program, "another program holds its lock; end that program, or let it close the database"),
    ],
)
def test_counts_wait_until_they_can_be_written(
    log: Callable[[int], list[str]], unprivileged: Path, spoil: Callable[[Path], Callable[[], None]], problem: str
) -> None:
    """A fault of the usage store is logged once, delays no request and loses no count; its end is logged."""
    path = unprivileged / "folder" / "usage.db"
    recorder = UsageRecorder(UsageDatabase(str(path)), interval=NEVER)
    said = f"usage cannot be written to {path}: {problem.format(path)}. It is kept in memory until it can"
    for number in (1, 2):
        mend = spoil(path)
        start = time.monotonic()
        for _ in range(2):
            recorder.record(("a", 1.0))
            recorder.flush()
        assert time.monotonic() - start < 4
        mend()
        recorder.flush()
        assert counts(str(path)) == {"a": 2}
        assert log(logging.WARNING) == [said] * number
        assert log(logging.INFO) == [f"usage is written to {path} again"] * number
        shutil.rmtree(path.parent)


@pytest.mark.usefixtures("short")
def test_stuck_write_delays_nothing(log: Callable[[int], list[str]]) -> None:
    """Recording goes on during a stuck write; shutdown waits within its limit, and logs the number of lost uses."""
    recorder = recorder_of({"a": 1})
    with recorder._writing:
        recorder.record(("a", 1.0))
        start = time.monotonic()
        recorder.flush()
        assert time.monotonic() - start < 30
    assert log(logging.WARNING) == ["usage is being written for too long; what came last is lost"]
    recorder.flush()
    assert counts() == {"a": 2}


def test_lack_of_threads_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started a request still passes; its use is kept and written later."""
    recorder = UsageRecorder(UsageDatabase(PATH), interval=0.01)
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", no_thread)
        recorder.record(("a", 1.0))
    recorder.record(("a", 1.0))
    wait_for({"a": 2})


def test_what_does_not_fit_into_memory_is_dropped(
    log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded in uses and in tokens: known tokens go on counting, and how much was dropped is said, once."""
    monkeypatch.setattr("freegpt_auth.usage.recorder.PENDING_LIMIT", 2)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    recorder = recorder_of({"a": 1, "b": 3}, "folder/usage.db")
    recorder.flush()
    recorder.record(("c", 1.0))
    recorder.record(("a", 1.0))
    recorder.flush()
    Path("folder").mkdir()
    recorder.flush()
    assert counts("folder/usage.db") == {"a": 2, "b": 1}
    recorder.record(("a", 1.0))
    recorder.flush()
    assert counts("folder/usage.db") == {"a": 3, "b": 1}
    assert log(logging.WARNING)[1:] == ["usage of 3 requests was dropped while it could not be written"]


def test_pending_uses_are_limited(log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung disk does not fill the memory of a busy server; the number of dropped uses is logged later."""
    monkeypatch.setattr("freegpt_auth.usage.recorder.PENDING_LIMIT", 3)
    recorder = UsageRecorder(UsageDatabase(PATH), interval=0.01)
    with recorder._writing:
        recorder.record(("a", 1.0))
        wait_until(lambda: recorder.record != recorder._record_within_limit)  # the writer sleeps
        wait_until(lambda: recorder.record == recorder._record_within_limit)  # it wants to write
        for _ in range(9):
            recorder.record(("a", 1.0))
        assert len(recorder._pending) == 3
    wait_for({"a": 3})
    wait_until(lambda: log(logging.WARNING) == ["usage of 7 requests was dropped while it could not be written"])


def test_what_is_seldom_written_has_a_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two writes, however far apart, memory holds a count for each token and not every use."""
    monkeypatch.setattr("freegpt_auth.usage.recorder.LONGEST_SLEEP", 0.01)
    recorder = recorder_of({"a": 5, "b": 1})
    wait_until(lambda: not recorder._pending)
    assert not Path(PATH).exists()
    recorder.flush()
    assert counts() == {"a": 5, "b": 1}


# --- a corrupt database


def _broken_pages() -> None:
    recorder_of({f"token-{number:05}": 1 for number in range(2000)}).flush()
    content = Path(PATH).read_bytes()
    Path(PATH).write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def _broken_text() -> None:
    recorder_of({"a": 1}).flush()
    content = Path(PATH).read_bytes()
    Path(PATH).write_bytes(content.replace(b"NOT NULL", b"NOT N\xabLL", 1))


def _another_table() -> None:
    with contextlib.closing(sqlite3.connect(PATH)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("CREATE TABLE usage (id, uses)")
        connection.execute("INSERT INTO usage VALUES ('a', 1)")
        connection.commit()


@pytest.mark.parametrize("spoil", [_broken_pages, _broken_text, _another_table])
def test_a_corrupt_database_is_moved_aside(log: Callable[[int], list[str]], spoil: Callable[[], None]) -> None:
    """A corrupt database is an error to its reader; a writer keeps it under another name and starts afresh."""
    spoil()
    content = Path(PATH).read_bytes()
    with pytest.raises(UsageError, match=r"^it (is damaged|holds a count or an instant)"):
        UsageDatabase(PATH).read()
    Path(f"{PATH}-journal").write_bytes(b"old pages")
    recorder_of({"a": 2}).flush()
    assert counts() == {"a": 2}
    assert not Path(f"{PATH}-journal").exists()
    (aside,) = Path().glob(f"{PATH}.corrupt-*")
    assert aside.read_bytes() == content
    assert log(logging.WARNING) == [
        f"{Path(PATH).absolute()} was corrupt and is now {aside.absolute()}; usage is counted afresh"
    ]
    assert stat.S_IMODE(Path(PATH).stat().st_mode) == 0o600


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("spoil", [lambda: None, _broken_pages], ids=["none", "corrupt"])
def test_writers_of_the_database_take_turns(
    monkeypatch: pytest.MonkeyPatch, log: Callable[[int], list[str]], spoil: Callable[[], None]
) -> None:
    """One writes, or moves a corrupt database aside; the others wait without having it open, and their counts with them.

    To rename a database in use is one of the ways to corrupt one that https://www.sqlite.org/howtocorrupt.html names.
    """
    spoil()
    recorder = recorder_of({"a": 1})
    with locked(str(Path(PATH).absolute()), 1), monkeypatch.context() as context:
        context.setattr(usage, "_connected", None)
        recorder.flush()
    (message,) = log(logging.WARNING)
    assert message.endswith(": other processes write to it for too long. It is kept in memory until it can")
    recorder.flush()
    assert counts() == {"a": 1}


def test_a_database_that_another_worker_mends_is_kept() -> None:
    """A worker that comes second throws away no database that the first has begun."""
    recorder_of({"a": 5}).flush()
    mended = Path(PATH).read_bytes()
    _broken_pages()
    recorder = recorder_of({"a": 1})
    with ThreadPoolExecutor(1) as pool, locked(str(Path(PATH).absolute()), 1):
        written = pool.submit(recorder.flush)
        wait_until(recorder._writing.locked)
        Path(PATH).write_bytes(mended)
    written.result()
    assert counts() == {"a": 6}
    assert not list(Path().glob(f"{PATH}.corrupt-*"))
