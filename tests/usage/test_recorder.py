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
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Log = Callable[[int], list[str]]

PATH = "api_tokens.usage.db"
NEVER = 3600.0
"""An interval longer than any test: only flush() writes."""


class Fickle(UsageDatabase):
    """A usage database whose writes may get stuck, and whose replies may be lost."""

    def __init__(self) -> None:
        super().__init__(PATH)
        self.given: list[Batch] = []
        self.stuck = threading.Lock()
        self.answers = True
        self.closed = 0

    def write(self, batch: Batch, timeout: float) -> None:
        """Write a batch, and answer or not."""
        assert 0 <= timeout <= 5
        self.given.append(batch._replace(counts=dict(batch.counts)))
        with self.stuck:
            super().write(batch, timeout)
        if not self.answers:
            raise UsageError("the reply was lost")

    def close(self) -> None:
        """Count the calls."""
        self.closed += 1


def recorder_of(uses: dict[str, int], store: UsageDatabase | None = None, **limits: Any) -> UsageRecorder:
    """Return a recorder that has recorded each token so many times and has written nothing."""
    recorder = UsageRecorder(store or UsageDatabase(PATH), **{"interval": NEVER, **limits})
    use(recorder, **uses)
    return recorder


def use(recorder: UsageRecorder, **uses: int) -> None:
    """Record each token so many times."""
    for token_id, count in uses.items():
        for _ in range(count):
            recorder.record((token_id, 1000.0))


def counts(path: str = PATH) -> dict[str, int]:
    """Return the use counts in the database."""
    return {token_id: usage.use_count for token_id, usage in UsageDatabase(path).read().items()}


def wait_for(expected: dict[str, int]) -> None:
    """Wait until another thread has written the counts."""
    wait_until(lambda: counts() == expected, counts)


def run(program: str) -> None:
    """Run a program that ends without an error and prints none."""
    start = [sys.executable, "-c", program]
    done = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """Return a function that returns the messages of one level so far."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")
    return lambda level: [entry.getMessage() for entry in caplog.records if entry.levelno == level]


@contextlib.contextmanager
def without_threads() -> Generator[None]:
    """Let no thread start."""

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as context:
        context.setattr(threading.Thread, "start", start)
        yield


# --- counting


def test_counts_add_up() -> None:
    """Each use counts once, for its own token, over restarts too, and no write turns the last use back."""
    recorder = recorder_of({})
    for token_id, instant in [("a", 10.0), ("b", 20.0), ("a", 30.5), ("a", 20.0)]:
        recorder.record((token_id, instant))
    recorder.flush()
    recorder.flush()
    restarted = recorder_of({})
    restarted.record(("a", 25.0))
    restarted.record(("b", 40.0))
    restarted.flush()
    assert UsageDatabase(PATH).read() == {
        "a": Usage(4, datetime.fromtimestamp(30.5, UTC)),
        "b": Usage(2, datetime.fromtimestamp(40, UTC)),
    }


def test_nothing_is_lost_between_threads() -> None:
    """Requests that are recorded by several threads while others are written all count."""
    recorder = recorder_of({}, interval=0.001)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: use(recorder, a=2000), range(4)))
    recorder.flush()
    assert counts() == {"a": 8000}


def test_two_first_requests_start_one_writer() -> None:
    """Two threads that record the first use at once start one writer, and both uses count."""
    recorder = recorder_of({})

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


def test_each_batch_has_a_number_of_its_own() -> None:
    """A batch has the id of its process and the next number; an empty batch is never written."""
    store = Fickle()
    recorder = recorder_of({"a": 2, "b": 1}, store)
    recorder.flush()
    recorder.flush()
    use(recorder, a=1)
    recorder.flush()
    recorder_of({"a": 1}, store).flush()
    process, another = store.given[0].process, store.given[-1].process
    assert process != another
    assert store.given == [
        Batch(process, 1, {"a": (2, 1000.0), "b": (1, 1000.0)}),
        Batch(process, 2, {"a": (1, 1000.0)}),
        Batch(another, 1, {"a": (1, 1000.0)}),
    ]


def test_unconfirmed_batch_is_retried_unchanged(log: Log) -> None:
    """Later uses go into a later batch: a store that knows the number counts each use once."""
    store = Fickle()
    recorder = recorder_of({"a": 1}, store)
    store.answers = False
    for _ in range(3):
        recorder.flush()
        use(recorder, a=2, b=1)
    assert store.given == [Batch(store.given[0].process, 1, {"a": (1, 1000.0)})] * 3
    store.answers = True
    recorder.flush()
    assert [batch.sequence for batch in store.given] == [1, 1, 1, 1, 2]
    assert counts() == {"a": 7, "b": 3}
    assert log(logging.WARNING) == [
        f"usage cannot be written to {store.source}: the reply was lost. It is kept in memory until it can"
    ]
    assert log(logging.INFO) == [f"usage is written to {store.source} again"]


def test_shutdown_writes_and_releases() -> None:
    """At shutdown pending uses are written, then resources are released; both may happen repeatedly."""
    store = Fickle()
    recorder = recorder_of({"a": 1}, store)
    recorder.finish()
    assert (len(store.given), store.closed) == (1, 1)
    use(recorder, a=1)
    store.answers = False
    recorder.finish()
    assert (len(store.given), store.closed) == (2, 2)
    store.answers = True
    recorder.flush()
    assert counts() == {"a": 2}


def test_a_child_begins_batches_of_its_own() -> None:
    """After a fork a process has another name, and writes nothing that its parent has still to write."""
    store = Fickle()
    recorder = recorder_of({"a": 1}, store)
    store.answers = False
    recorder.flush()
    recorder.after_fork_in_child()
    store.answers = True
    recorder.flush()
    assert len(store.given) == 1
    use(recorder, a=1)
    recorder.flush()
    assert (store.given[1].process != store.given[0].process, store.given[1].sequence) == (True, 1)


def test_fork_during_a_write_counts_once() -> None:
    """A fork waits until a write ends, so no lock crosses it; parent and child each write their own uses."""
    run(f"""
import os, sys, threading, time, warnings
from freegpt_auth.usage.recorder import UsageRecorder
from freegpt_auth.stores.file.usage import UsageDatabase
warnings.simplefilter("ignore")
recorder = UsageRecorder(UsageDatabase({PATH!r}), interval=3600, shutdown_timeout=60, fork_timeout=60)
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
""")
    assert counts() == {**{str(number): 1 for number in range(50_000)}, "parent": 1, "child": 1}


# --- when and where it is written


def test_idle_recorder_writes_nothing(tmp_path: Path) -> None:
    """A server without requests makes no database, and a missing, empty or new one holds no usage."""
    recorder_of({}).flush()
    recorder = recorder_of({"a": 1})
    assert counts() == {}
    assert not list(tmp_path.iterdir())
    Path(PATH).touch()
    assert counts() == {}
    with contextlib.closing(sqlite3.connect(PATH)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    assert counts() == {}
    recorder.flush()
    assert counts() == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {PATH, f"{PATH}.lock"}


def test_it_is_written_on_an_interval() -> None:
    """Usage appears by itself while a server goes on, again and again."""
    recorder = recorder_of({}, interval=0.01)
    for expected in (1, 2, 3):
        use(recorder, a=1)
        wait_for({"a": expected})


@pytest.mark.parametrize("name", ["a?mode=memory#b.db", "ü %20'.db"])
def test_the_database_is_where_it_was_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Any file name works, relative to the directory of the start, and only the owner may read the file."""
    recorder = recorder_of({"a": 1}, UsageDatabase(name))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    before = os.umask(0)
    try:
        recorder.flush()
    finally:
        os.umask(before)
    assert counts(f"../{name}") == {"a": 1}
    assert stat.S_IMODE(Path("..", name).stat().st_mode) == 0o600


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


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_no_folder, "its folder does not exist; create the folder first"),
        (_no_permission, "cannot lock {}.lock: permission denied; run this as the user who owns it, or change its"),
        (_another_program, "another program holds its lock; end that program, or let it close the database"),
    ],
)
def test_counts_wait_until_they_can_be_written(
    log: Log, unprivileged: Path, spoil: Callable[[Path], Callable[[], None]], problem: str
) -> None:
    """A fault of the usage store is logged once, delays no request and loses no count; its end is logged."""
    path = unprivileged / "folder" / "usage.db"
    recorder = recorder_of({}, UsageDatabase(str(path)), shutdown_timeout=0.1)
    for number in (1, 2):
        mend = spoil(path)
        start = time.monotonic()
        for _ in range(2):
            use(recorder, a=1)
            recorder.flush()
        assert time.monotonic() - start < 4
        mend()
        recorder.flush()
        assert counts(str(path)) == {"a": 2}
        assert len(log(logging.WARNING)) == number
        assert log(logging.WARNING)[-1].startswith(f"usage cannot be written to {path}: {problem.format(path)}")
        assert log(logging.INFO) == [f"usage is written to {path} again"] * number
        shutil.rmtree(path.parent)


def test_stuck_write_delays_nothing(log: Log) -> None:
    """Recording goes on during a stuck write; a fork and a shutdown wait within their limits; a loss is logged."""
    store = Fickle()
    recorder = recorder_of({"a": 1}, store, interval=0.01, shutdown_timeout=0.1, fork_timeout=0.1)
    with store.stuck:
        wait_until(lambda: store.given)
        use(recorder, a=1)
        start = time.monotonic()
        recorder.before_fork()
        recorder.after_fork_in_parent()
        recorder.flush()
        assert time.monotonic() - start < 30
    assert log(logging.WARNING) == ["usage is being written for too long; what came last is lost"]
    wait_for({"a": 2})


def test_pending_uses_are_limited(log: Log) -> None:
    """A hung disk does not fill the memory of a busy server; the number of dropped uses is logged later."""
    store = Fickle()
    recorder = recorder_of({"a": 1}, store, interval=0.01, pending_limit=3)
    with store.stuck:
        wait_until(lambda: store.given)
        use(recorder, a=9)
    wait_for({"a": 4})
    wait_until(lambda: log(logging.WARNING) == ["usage of 6 requests was dropped while it could not be written"])


def test_lack_of_threads_fails_no_request() -> None:
    """If no thread can be started a request still passes; its use is kept and written later."""
    with without_threads():
        recorder = recorder_of({"a": 1}, interval=0.01)
    use(recorder, a=1)
    wait_for({"a": 2})


@without_threads()
def test_uses_beyond_the_limit_are_dropped(log: Log) -> None:
    """Uses and tokens in memory are limited: known tokens are still counted, and the number of drops is logged."""
    path = "folder/usage.db"
    recorder = recorder_of({"a": 1, "b": 3}, UsageDatabase(path), pending_limit=2)
    recorder.flush()
    use(recorder, c=1, a=1)
    recorder.flush()
    Path("folder").mkdir()
    recorder.flush()
    assert counts(path) == {"a": 2, "b": 1}
    use(recorder, a=1)
    recorder.flush()
    assert counts(path) == {"a": 3, "b": 1}
    assert log(logging.WARNING)[1:] == ["usage of 3 requests was dropped while it could not be written"]


def test_memory_is_bounded_between_writes() -> None:
    """Between two writes, however far apart, memory holds a count and the last use of each token, not every use."""
    recorder = recorder_of({"a": 5, "b": 1}, longest_sleep=0.01)
    wait_until(lambda: not recorder._pending)
    assert not Path(PATH).exists()
    recorder.record(("a", 1.0))
    recorder.flush()
    last = datetime.fromtimestamp(1000, UTC)
    assert UsageDatabase(PATH).read() == {"a": Usage(6, last), "b": Usage(1, last)}


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
def test_a_corrupt_database_is_moved_aside(log: Log, spoil: Callable[[], None]) -> None:
    """A corrupt database is an error to its reader; a writer keeps it under another name and starts afresh."""
    spoil()
    content = Path(PATH).read_bytes()
    with pytest.raises(UsageError, match=r"^it (is damaged|holds a count or an instant)"):
        counts()
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


@pytest.mark.parametrize("spoil", [lambda: None, _broken_pages], ids=["none", "corrupt"])
def test_writers_of_the_database_take_turns(
    monkeypatch: pytest.MonkeyPatch, log: Log, spoil: Callable[[], None]
) -> None:
    """One process writes, or moves a corrupt database aside; the others wait without opening it, and lose no count.

    A database that is renamed while it is open may be corrupted (https://www.sqlite.org/howtocorrupt.html).
    """
    spoil()
    recorder = recorder_of({"a": 1}, shutdown_timeout=0.1)
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
    store = Fickle()
    recorder = recorder_of({"a": 1}, store)
    with ThreadPoolExecutor(1) as pool, locked(str(Path(PATH).absolute()), 1):
        written = pool.submit(recorder.flush)
        wait_until(lambda: store.given)
        Path(PATH).write_bytes(mended)
    written.result()
    assert counts() == {"a": 6}
    assert not list(Path().glob(f"{PATH}.corrupt-*"))
