"""Usage: exact counts from any number of processes, whatever happens to the database or to a process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread
from hypothesis import given, settings, strategies as st

from freegpt_auth import BearerTokenMiddleware, FileTokenStore
from freegpt_auth.stores import disk
from freegpt_auth.usage import UsageRecorder
from freegpt_auth.usage_database import Usage, read_usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

PATH = "api_tokens.usage.db"
NEVER = 3600.0
"""An interval that no test lives to see: what is written then, flush() wrote."""


def recorder_of(uses: dict[str, int], path: str = PATH, *, instant: float = 1000.0) -> UsageRecorder:
    """Return a recorder that has recorded each token so many times and has written nothing."""
    recorder = UsageRecorder(path, interval=NEVER)
    for token_id, count in uses.items():
        for _ in range(count):
            recorder.record(token_id, instant)
    return recorder


def counts(path: str = PATH) -> dict[str, int]:
    """Return the use counts in the database."""
    return {token_id: usage.use_count for token_id, usage in read_usage(path).items()}


def wait_for(expected: dict[str, int]) -> None:
    """Wait until somebody else has written the counts."""
    deadline = time.monotonic() + 10
    while counts() != expected:
        assert time.monotonic() < deadline, counts()
        time.sleep(0.005)


def run_script(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )


@contextlib.contextmanager
def exclusively_locked() -> Generator[None]:
    """Hold the database as another program may, so that nobody can read or write it."""
    connection = sqlite3.connect(PATH, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """Return a function that returns the messages of one level so far."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")
    return lambda level: [entry.getMessage() for entry in caplog.records if entry.levelno == level]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stopping server wait for a tenth of a second only."""
    monkeypatch.setattr("freegpt_auth.usage.SHUTDOWN_TIMEOUT", 0.1)


# --- counting


def test_counts_are_exact() -> None:
    """Each accepted request counts once, for its own token, and the last use is the latest instant."""
    recorder = UsageRecorder(PATH, interval=NEVER)
    for token_id, instant in [("a", 10.0), ("b", 20.0), ("a", 30.5), ("a", 20.0)]:
        recorder.record(token_id, instant)
    recorder.flush()
    assert read_usage(PATH) == {
        "a": Usage(3, datetime(1970, 1, 1, 0, 0, 30, 500_000, UTC)),
        "b": Usage(1, datetime(1970, 1, 1, 0, 0, 20, 0, UTC)),
    }


def test_counts_are_added_to_what_is_there() -> None:
    """A restarted server goes on counting where the last one stopped, and flushing again adds nothing."""
    for _ in range(3):
        recorder = recorder_of({"a": 2})
        recorder.flush()
        recorder.flush()
    assert counts() == {"a": 6}


def test_the_last_use_only_moves_forward() -> None:
    """A process that is behind, or whose clock is, cannot turn the last use back."""
    recorder_of({"a": 1}, instant=2000.0).flush()
    recorder_of({"a": 1}, instant=1000.0).flush()
    assert read_usage(PATH)["a"] == Usage(2, datetime.fromtimestamp(2000, UTC))


def test_nothing_is_lost_between_threads() -> None:
    """Requests that are recorded by several threads while others are written all count."""
    recorder = UsageRecorder(PATH, interval=0.001)

    def record() -> None:
        for number in range(2000):
            recorder.record("a", float(number))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush()
    assert counts() == {"a": 8000}


class _Overtaken:
    """A lock in front of which another thread is faster."""

    def __init__(self, recorder: UsageRecorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder._starting = threading.Lock()
        other = threading.Thread(target=self._recorder.record, args=("a", 1.0))
        other.start()
        other.join()

    def __exit__(self, *_: object) -> None:
        pass


def test_two_first_requests_start_one_writer() -> None:
    """Two threads that record the first use at once start one writer, and both uses count."""
    recorder = UsageRecorder(PATH, interval=NEVER)
    recorder._starting = _Overtaken(recorder)  # type: ignore[assignment]
    before = threading.active_count()
    recorder.record("a", 1.0)
    assert threading.active_count() == before + 1
    recorder.flush()
    assert counts() == {"a": 2}


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0, 4e9)), max_size=8), min_size=1, max_size=4
    )
)
def test_any_batches_add_up(batches: list[list[tuple[str, float]]]) -> None:
    """However uses are spread over writes and writers, the sums and the last uses are those of all uses together."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / PATH)
        recorders = [UsageRecorder(path, interval=NEVER) for _ in range(2)]
        for number, batch in enumerate(batches):
            for token_id, instant in batch:
                recorders[number % 2].record(token_id, instant)
            recorders[number % 2].flush()
        uses = [use for batch in batches for use in batch]
        assert counts(path) == Counter(token_id for token_id, _ in uses)
        latest = {token_id: max(instant for key, instant in uses if key == token_id) for token_id, _ in uses}
        assert {key: usage.last_used_at for key, usage in read_usage(path).items()} == {
            key: datetime.fromtimestamp(instant, UTC) for key, instant in latest.items()
        }


# --- when it is written


def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    """A server that nobody uses makes no database, and recording alone touches no disk."""
    UsageRecorder(PATH, interval=NEVER).flush()
    recorder = recorder_of({"a": 1})
    assert not list(tmp_path.iterdir())
    recorder.flush()
    assert [path.name for path in tmp_path.iterdir()] == [PATH]


def test_it_is_written_on_an_interval() -> None:
    """Usage appears by itself while a server goes on, again and again."""
    recorder = UsageRecorder(PATH, interval=0.01)
    for expected in (1, 2, 3):
        recorder.record("a", 1.0)
        wait_for({"a": expected})


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "os.kill(os.getpid(), signal.SIGINT)"])
def test_it_is_written_when_the_interpreter_exits(end: str) -> None:
    """However a program ends by itself, what it recorded is written."""
    run_script(
        f"""
import os, signal, sys
from freegpt_auth.usage import UsageRecorder
recorder = UsageRecorder({PATH!r}, interval=3600)
for _ in range(1000):
    recorder.record("a", 1.0)
{end}
"""
    )
    assert counts() == {"a": 1000}


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", ["lifespan.shutdown.complete", "lifespan.shutdown.failed"])
async def test_it_is_written_before_a_server_may_stop(
    ask: Callable[..., Awaitable[Any]], keep: Callable[..., Any], hello: Any, outcome: str
) -> None:
    """When the server is told that the shutdown is over, every accepted request is in the database."""
    token, secret = keep(FileTokenStore("api_tokens.json"))
    authorization = [(b"authorization", f"Bearer {secret}".encode())]
    written: list[dict[str, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await hello(scope, receive, send)
            return
        await send({"type": "lifespan.startup.complete"})
        for _ in range(3):
            assert (await ask(middleware, headers=authorization)).status == 200
        await send({"type": outcome})

    async def send(message: Any) -> None:
        written.append(await to_thread.run_sync(counts))
        sent.append(message["type"])

    sent: list[str] = []
    middleware = BearerTokenMiddleware(app)
    await middleware({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
    assert sent == ["lifespan.startup.complete", outcome]
    assert written == [{}, {token.id: 3}]


@pytest.mark.anyio
async def test_only_accepted_tokens_are_recorded(
    ask: Callable[..., Awaitable[Any]], keep: Callable[..., Any], hello: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused requests and the environment key leave nothing on the disk: a flood of them cannot fill it."""
    keep(FileTokenStore("api_tokens.json"))
    monkeypatch.setenv("FREEGPT_API_KEY", "key-of-the-environment")
    middleware = BearerTokenMiddleware(hello)
    assert (await ask(middleware)).status == 401
    assert (await ask(middleware, headers=[(b"authorization", b"Bearer sk-wrong")])).status == 401
    assert (await ask(middleware, headers=[(b"authorization", b"Bearer key-of-the-environment")])).status == 200
    assert middleware._usage is not None
    await to_thread.run_sync(middleware._usage.flush)
    assert not await to_thread.run_sync(Path(PATH).exists)


def test_the_path_stays_when_the_directory_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its directory goes on writing where it began."""
    recorder = recorder_of({"a": 1})
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    recorder.flush()
    assert counts(f"../{PATH}") == {"a": 1}


@pytest.mark.parametrize("name", ["a b.db", "a?mode=memory.db", "a#b.db", "a%20b.db", "ü.db", "'.db"])
def test_any_file_name_will_do(name: str) -> None:
    """A name that means something in a URI means a file here."""
    recorder_of({"a": 1}, name).flush()
    assert counts(name) == {"a": 1}
    assert Path(name).is_file()


def test_the_database_is_its_owners() -> None:
    """The database can be read by its owner only, however lax the umask is."""
    before = os.umask(0)
    try:
        recorder_of({"a": 1}).flush()
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(PATH).stat().st_mode) == 0o600


# --- several processes


def test_several_processes_add_up_exactly() -> None:
    """Workers that write side by side lose no use of each other's."""
    program = f"""
from freegpt_auth.usage import UsageRecorder
recorder = UsageRecorder({PATH!r}, interval=0.001)
for number in range(2000):
    recorder.record(str(number % 5), 1.0)
"""
    workers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0, 0, 0]
    assert counts() == {str(number): 1600 for number in range(5)}


def test_a_fork_counts_nothing_twice() -> None:
    """What a preloading server recorded before it forked is written once, and each child writes its own."""
    done = run_script(
        f"""
import os, sys, warnings
from freegpt_auth.usage import UsageRecorder
warnings.simplefilter("ignore")
recorder = UsageRecorder({PATH!r}, interval=3600)
for _ in range(100):
    recorder.record("parent", 1.0)
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        recorder.record("child", 1.0)
        sys.exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert counts() == {"parent": 100, "child": 2}


def test_a_child_forked_in_the_middle_of_a_write_can_write() -> None:
    """No lock crosses a fork: a child whose parent was writing at that moment records and writes."""
    done = run_script(
        f"""
import os, threading, time, warnings
from freegpt_auth import usage
warnings.simplefilter("ignore")
usage.SHUTDOWN_TIMEOUT = 2
recorder = usage.UsageRecorder({PATH!r}, interval=3600)
for number in range(50_000):
    recorder.record(str(number), 1.0)
writing = threading.Thread(target=recorder.flush)
writing.start()
while not os.path.exists({PATH!r} + "-journal"):
    time.sleep(0)
child = os.fork()
if not child:
    recorder.record("child", 1.0)
    recorder.flush()
    os._exit(0)
writing.join()
os._exit(os.waitpid(child, 0)[1])
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert counts() == {**{str(number): 1 for number in range(50_000)}, "child": 1}


def test_a_killed_process_loses_what_was_not_written_and_no_more() -> None:
    """After kill -9 everything is there but the last interval, nothing is invented, and others go on."""
    program = f"""
import sys, time
from freegpt_auth.usage import UsageRecorder
from freegpt_auth.usage_database import read_usage
recorder = UsageRecorder({PATH!r}, interval=0.02)
for _ in range(500):
    recorder.record("a", 1.0)
while read_usage({PATH!r}).get("a", (0,))[0] != 500:
    time.sleep(0.001)
for _ in range(7):
    recorder.record("a", 1.0)
print("recorded", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"recorded\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    survived = counts()["a"]
    assert 500 <= survived <= 507
    recorder_of({"a": 1}).flush()
    assert counts() == {"a": survived + 1}


# --- trouble with the disk


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """Where the folder is not writable one WARNING says so; the counts wait and are written when it is."""
    program = """
import logging, os, sys
from freegpt_auth.usage import UsageRecorder
from freegpt_auth.usage_database import read_usage
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level="INFO")
folder = sys.argv[1]
os.chmod(folder, 0o555)
if os.geteuid() == 0:
    os.chown(folder, 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
recorder = UsageRecorder(folder + "/usage.db", interval=3600)
for _ in range(3):
    recorder.record("a", 1.0)
    recorder.flush()
os.chmod(folder, 0o755)
recorder.record("a", 1.0)
recorder.flush()
print(read_usage(folder + "/usage.db")["a"].use_count)
"""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        done = subprocess.run(
            [sys.executable, "-c", program, folder],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=environment,
            cwd=tmp_path,
        )
        assert done.stdout.splitlines() == [
            (
                f"WARNING usage cannot be written to {folder}/usage.db: permission denied; run this as the user who owns "
                "it, or mend its permissions. It is kept in memory until it can"
            ),
            f"INFO usage is written to {folder}/usage.db again",
            "4",
        ]
        assert done.stderr == ""


def _no_folder(path: Path) -> Callable[[], None]:
    return path.parent.mkdir


def _a_file_for_a_folder(path: Path) -> Callable[[], None]:
    path.parent.touch()

    def mend() -> None:
        path.parent.unlink()
        path.parent.mkdir()

    return mend


def _a_folder_for_a_file(path: Path) -> Callable[[], None]:
    path.mkdir(parents=True)
    return path.rmdir


def _a_dangling_link(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    path.symlink_to(path.parent / "nowhere" / "usage.db")
    return path.unlink


def _a_table_of_another_shape(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE usage (token_id PRIMARY KEY, n)")
    connection.close()
    return path.unlink


@pytest.mark.parametrize(
    "spoil", [_no_folder, _a_file_for_a_folder, _a_folder_for_a_file, _a_dangling_link, _a_table_of_another_shape]
)
def test_counts_wait_until_they_can_be_written(
    log: Callable[[int], list[str]], spoil: Callable[[Path], Callable[[], None]]
) -> None:
    """Whatever keeps usage from being written is said once, costs no count, and its end is said too."""
    path = Path("folder") / PATH
    mend = spoil(path)
    recorder = recorder_of({"a": 2}, str(path))
    recorder.flush()
    recorder.record("a", 1.0)
    recorder.flush()
    assert len(log(logging.WARNING)) == 1
    assert str(path) in log(logging.WARNING)[0]
    mend()
    recorder.flush()
    assert counts(str(path)) == {"a": 3}
    assert log(logging.INFO) == [f"usage is written to {path.absolute()} again"]
    assert len(log(logging.WARNING)) == 1


def test_new_trouble_after_recovery_is_said_again(log: Callable[[int], list[str]]) -> None:
    """A fault that comes back is not passed over because it was mentioned once."""
    recorder = UsageRecorder("folder/usage.db", interval=NEVER)
    for number in (1, 2):
        recorder.record("a", 1.0)
        recorder.flush()
        assert len(log(logging.WARNING)) == number
        Path("folder").mkdir()
        recorder.flush()
        assert counts("folder/usage.db") == {"a": 1}
        Path("folder/usage.db").unlink()
        Path("folder").rmdir()


@pytest.mark.usefixtures("short")
def test_a_locked_database_holds_nobody_up(log: Callable[[int], list[str]]) -> None:
    """While another program holds the database, recording returns at once and flushing within its time limit."""
    recorder_of({"a": 1}).flush()
    recorder = recorder_of({"a": 1})
    with exclusively_locked():
        start = time.monotonic()
        recorder.flush()
        assert time.monotonic() - start < 2
        assert log(logging.WARNING) == [
            f"usage cannot be written to {Path(PATH).absolute()}: database is locked. It is kept in memory until it can"
        ]
    recorder.flush()
    assert counts() == {"a": 2}


def test_recording_goes_on_while_a_write_is_stuck() -> None:
    """Requests are not slowed by a write that waits for the database."""
    recorder_of({"a": 1}).flush()
    recorder = recorder_of({"a": 1})
    writing = threading.Thread(target=recorder.flush)
    with exclusively_locked():
        writing.start()
        for _ in range(1000):
            recorder.record("a", 1.0)
        # Had recording waited for the write, the write would have ended.
        assert writing.is_alive()
        assert recorder._writing.locked()
    writing.join()
    recorder.flush()
    assert counts() == {"a": 1002}


@pytest.mark.usefixtures("short")
def test_a_write_that_never_ends_does_not_hold_up_the_shutdown(log: Callable[[int], list[str]]) -> None:
    """A stopping server waits for a stuck write within its time limit, and says what that costs."""
    recorder = recorder_of({"a": 1})
    with recorder._writing:
        start = time.monotonic()
        recorder.flush()
        assert time.monotonic() - start < 2
    assert log(logging.WARNING) == ["usage is being written for too long; what came last is lost"]
    recorder.flush()
    assert counts() == {"a": 1}


def test_a_machine_without_threads_to_spare_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started a request still passes; its use is kept and written later."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    recorder = UsageRecorder(PATH, interval=0.01)
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        recorder.record("a", 1.0)
    recorder.record("a", 1.0)
    wait_for({"a": 2})


# --- too much to keep


def test_requests_beyond_the_limit_are_counted_as_dropped(
    log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: what does not fit is dropped, and how much that was is said, once."""
    monkeypatch.setattr("freegpt_auth.usage.PENDING_LIMIT", 3)
    recorder = recorder_of({"a": 5})
    recorder.flush()
    assert counts() == {"a": 3}
    assert log(logging.WARNING) == ["usage of 2 requests was dropped while it could not be written"]
    recorder.record("a", 1.0)
    recorder.flush()
    assert counts() == {"a": 4}
    assert len(log(logging.WARNING)) == 1


def test_tokens_beyond_the_limit_are_counted_as_dropped(
    log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing can be written the tokens known already go on counting; uses of further ones are dropped."""
    monkeypatch.setattr("freegpt_auth.usage.PENDING_LIMIT", 2)
    recorder = recorder_of({"a": 1, "b": 1}, "folder/usage.db")
    recorder.flush()
    recorder.record("c", 1.0)
    recorder.record("a", 1.0)
    recorder.flush()
    Path("folder").mkdir()
    recorder.flush()
    assert counts("folder/usage.db") == {"a": 2, "b": 1}
    assert log(logging.WARNING)[1:] == ["usage of 1 requests was dropped while it could not be written"]


# --- a corrupt database


def _rubbish() -> None:
    Path(PATH).write_bytes(b"this is no database\n" * 500)


def _broken_pages() -> None:
    recorder_of({f"token-{number:05}": 1 for number in range(2000)}).flush()
    size = Path(PATH).stat().st_size
    with Path(PATH).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))


def _truncated() -> None:
    recorder_of({f"token-{number:05}": 1 for number in range(2000)}).flush()
    os.truncate(PATH, 4096)


@pytest.mark.parametrize("spoil", [_rubbish, _broken_pages, _truncated])
def test_a_corrupt_database_is_moved_aside(log: Callable[[int], list[str]], spoil: Callable[[], None]) -> None:
    """A corrupt database costs its own counts only: it is kept under another name, and counting starts afresh."""
    spoil()
    content = Path(PATH).read_bytes()
    recorder = recorder_of({"a": 2})
    recorder.flush()
    assert counts() == {"a": 2}
    (aside,) = Path().glob(f"{PATH}.corrupt-*")
    assert aside.read_bytes() == content
    assert log(logging.WARNING) == [
        f"{Path(PATH).absolute()} was corrupt and is now {aside.absolute()}; usage is counted afresh"
    ]
    assert stat.S_IMODE(Path(PATH).stat().st_mode) == 0o600


def test_the_journal_of_a_corrupt_database_goes_with_it() -> None:
    """What a corrupt database had left unfinished is not played back into the new one."""
    _rubbish()
    Path(f"{PATH}-journal").write_bytes(b"old pages")
    recorder_of({"a": 1}).flush()
    assert counts() == {"a": 1}
    assert not Path(f"{PATH}-journal").exists()


def test_workers_that_meet_a_corrupt_database_together_lose_nothing() -> None:
    """Two workers that find the database corrupt at the same moment both get their counts into the new one."""
    _rubbish()
    program = f"""
import sys
from freegpt_auth.usage import UsageRecorder
recorder = UsageRecorder({PATH!r}, interval=3600)
for _ in range(100):
    recorder.record("a", 1.0)
print("ready", flush=True)
sys.stdin.read()
recorder.flush()
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
    assert counts() == {"a": 300}
    assert len(list(Path().glob(f"{PATH}.corrupt-*"))) == 1


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return a function that lets another worker act while a recorder waits to move the database aside."""
    locked = disk.locked

    def arrange(act: Callable[[], object]) -> None:
        @contextlib.contextmanager
        def later(path: str, seconds: float) -> Generator[None]:
            with locked(path, seconds):
                act()
                yield

        monkeypatch.setattr(disk, "locked", later)

    return arrange


def _begun_afresh() -> None:
    Path(PATH).unlink()
    connection = sqlite3.connect(PATH)
    connection.executescript(
        "CREATE TABLE usage (token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL)"
        " WITHOUT ROWID; INSERT INTO usage VALUES ('a', 5, 1.0);"
    )
    connection.close()


def test_a_database_that_another_worker_mended_is_kept(faster: Callable[[Callable[[], object]], None]) -> None:
    """A worker that comes second does not throw away the database that the first has begun."""
    _rubbish()
    faster(_begun_afresh)
    recorder_of({"a": 1}).flush()
    assert counts() == {"a": 6}
    assert not list(Path().glob(f"{PATH}.corrupt-*"))


@pytest.mark.usefixtures("short")
def test_a_database_that_another_worker_is_mending_is_kept(faster: Callable[[Callable[[], object]], None]) -> None:
    """A new database that is being written at that moment is not taken for a corrupt one."""
    _rubbish()
    with contextlib.ExitStack() as stack:

        def mend() -> None:
            _begun_afresh()
            stack.enter_context(exclusively_locked())

        faster(mend)
        recorder = recorder_of({"a": 1})
        recorder.flush()
        assert not list(Path().glob(f"{PATH}.corrupt-*"))
    recorder.flush()
    assert counts() == {"a": 6}


@pytest.mark.usefixtures("short")
def test_a_corrupt_database_that_cannot_be_moved_yet(log: Callable[[int], list[str]]) -> None:
    """While another worker holds the lock for moving it aside, the counts wait."""
    _rubbish()
    recorder = recorder_of({"a": 1})
    with disk.locked(str(Path(PATH).absolute()), 1):
        recorder.flush()
    assert [message.rpartition(": ")[2] for message in log(logging.WARNING)] == [
        "file is not a database. It is kept in memory until it can"
    ]
    recorder.flush()
    assert counts() == {"a": 1}


# --- reading


def test_where_nothing_was_recorded_nothing_is_read() -> None:
    """No file, an empty one and one without the table all mean no usage, and reading makes no file."""
    assert read_usage(PATH) == {}
    assert not Path(PATH).exists()
    Path(PATH).touch()
    assert read_usage(PATH) == {}
    connection = sqlite3.connect(PATH)
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    assert read_usage(PATH) == {}


@pytest.mark.parametrize("spoil", [_rubbish, _broken_pages, _truncated])
def test_a_corrupt_database_is_an_error_to_its_reader(spoil: Callable[[], None]) -> None:
    """Who reads a corrupt database is told, and it is left where it is for a recorder to deal with."""
    spoil()
    content = Path(PATH).read_bytes()
    with pytest.raises(sqlite3.DatabaseError):
        read_usage(PATH)
    assert Path(PATH).read_bytes() == content
