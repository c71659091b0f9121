"""What the token file adds to the contract: every fault of it, every change to it, and what is said about them."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator  # noqa: TC003  beside the annotations that pytest may resolve
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from freegpt_auth import UNRESOLVED, FileTokenStore, StoreError, StoreUnavailableError, Token
from freegpt_auth.exceptions import StoreBusyError, TokenFileError
from freegpt_auth.stores import disk, file, tokenfile
from freegpt_auth.tokens import digest_of, issue

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = bytes(32)
EMPTY = b'{"version": 1, "tokens": [\n\n]}\n'
NOBODY = 65534
ENTRY = {"name": "old", "created_at": "2024-01-01T00:00:00"}


@pytest.fixture(autouse=True)
def _every_look_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no look be relied on, so that no test and no writer has to wait for one to grow old."""
    monkeypatch.setattr(file, "FRESHNESS", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock by which a store measures ages, and return a function that moves it on."""
    instant = time.monotonic()

    def move(seconds: float) -> None:
        nonlocal instant
        instant += seconds

    monkeypatch.setattr(file, "time", SimpleNamespace(monotonic=lambda: instant, sleep=time.sleep))
    return move


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the token file is, or will be."""
    return tmp_path / "api_tokens.json"


@pytest.fixture
def store(path: Path) -> FileTokenStore:
    """Return the store of a server."""
    return FileTokenStore(path)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """Return a function that returns what was logged since it was called last."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")

    def take() -> list[tuple[str, str]]:
        lines = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return lines

    return take


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Go on as a user who may not do everything, with a folder of that user's own."""
    user = os.geteuid()
    other = NOBODY if user == 0 else user
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, other, -1)
        os.seteuid(other)
        try:
            yield Path(folder)
        finally:
            Path(folder).chmod(0o700)
            os.seteuid(user)


def _look(store: FileTokenStore, digest: bytes) -> Token | None:
    """Ask a store as the middleware does."""
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token


def _issued(name: str = "ci") -> tuple[bytes, Token]:
    token, secret = issue(name, now=NOW)
    return digest_of(secret), token


def _content(*issued: tuple[bytes, Token]) -> bytes:
    """Return the bytes of a file that holds these tokens."""
    document = tokenfile.Document(None)
    for digest, token in issued:
        document.append(digest, token)
    return document.encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file as an editor may: not as this library does."""
    path.write_bytes(content)
    path.chmod(0o600)


def _clear(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


# --- noticing a change


def test_a_change_is_seen_at_the_next_look(path: Path, store: FileTokenStore) -> None:
    """What another process writes is in force at the next request: made, changed, deleted, and back."""
    digest, token = _issued()
    assert _look(store, digest) is None
    for _ in range(2):
        _write(path, _content((digest, token)))
        assert store.peek(digest) is UNRESOLVED
        assert getattr(_look(store, digest), "id", None) == token.id
        FileTokenStore(path).revoke(token.id, NOW)
        assert getattr(_look(store, digest), "revoked_at", None) == NOW
        path.unlink()
        assert _look(store, digest) is None


def test_an_older_file_that_is_restored_is_seen(path: Path, store: FileTokenStore) -> None:
    """A backup moved into place is in force, although it is older than what it replaces."""
    (old, _), new = issued = (_issued(), _issued())
    backup = path.with_name("backup")
    _write(backup, _content(issued[0]))
    os.utime(backup, (0, 0))
    _write(path, _content(new))
    assert _look(store, old) is None
    backup.replace(path)
    assert _look(store, old) is not None
    assert _look(store, new[0]) is None


def test_a_swapped_link_is_seen(path: Path, store: FileTokenStore) -> None:
    """A Kubernetes secret is changed by swapping a link in the path, and that is noticed."""
    issued = [_issued("one"), _issued("two")]
    for number, each in enumerate(issued):
        path.with_name(f"v{number}").mkdir()
        _write(path.with_name(f"v{number}") / path.name, _content(each))
    data = path.with_name("..data")
    data.symlink_to("v0")
    path.symlink_to(f"..data/{path.name}")
    assert _look(store, issued[0][0]) is not None
    swapped = path.with_name("..new")
    swapped.symlink_to("v1")
    swapped.replace(data)
    assert _look(store, issued[0][0]) is None
    assert _look(store, issued[1][0]) is not None


def test_a_look_may_be_relied_on_for_20_ms(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    """The request path looks at the file at most every 20 ms, and at least that often while it is asked."""
    monkeypatch.setattr(file, "FRESHNESS", 0.020)
    looks: list[str] = []
    real = disk.signature_at
    monkeypatch.setattr(disk, "signature_at", lambda name: looks.append(name) or real(name))
    store.resolve(UNKNOWN)
    looks.clear()
    for _ in range(100):
        assert store.peek(UNKNOWN) is None
    clock(0.0199)
    assert store.peek(UNKNOWN) is None
    assert looks == []
    clock(0.0002)
    for _ in range(100):
        assert store.peek(UNKNOWN) is None
    assert looks == [str(path)]
    _write(path, EMPTY)
    assert store.peek(UNKNOWN) is None
    clock(0.0201)
    assert store.peek(UNKNOWN) is UNRESOLVED


def test_a_writer_waits_until_nobody_relies_on_the_past(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When ``revoke`` has returned, no look taken before it can still be relied on."""
    monkeypatch.setattr(file, "FRESHNESS", 0.020)
    digest, token = _issued()
    for change in (
        lambda: store.add(digest, token),
        lambda: store.revoke(token.id, NOW),
        lambda: store.delete(token.id),
    ):
        change()
        age = time.time_ns() - path.stat().st_ctime_ns
        assert age >= 0.030e9  # twice 20 ms, less the coarseness of a file's time


def test_nothing_changes_in_memory_while_the_file_stays_as_it_is(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    """An unchanged file is not read again, however long the server runs and however often the store is asked."""
    _write(path, _content(_issued()))
    store.survey()
    monkeypatch.setattr(disk, "read_file", None)
    for _ in range(3):
        clock(3600)
        assert store.resolve(UNKNOWN) is store.peek(UNKNOWN) is None
        assert store.survey() == (True, 1, str(path))


# --- several threads, several processes


class _SlowReading:
    """Holds up every reading of a file until it is let go, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.begun, self.go_on = 0, threading.Event(), threading.Event()
        self._real = disk.read_file
        monkeypatch.setattr(disk, "read_file", self._read)

    def _read(self, path: str) -> tuple[os.stat_result, bytes]:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(10)
        return self._real(path)


def test_many_waiting_requests_share_one_reading(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of requests after a change reads the file once, and all of them are decided on the new tokens."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    reading, together = _SlowReading(monkeypatch), threading.Barrier(17)

    def resolve(_: int) -> Token | None:
        together.wait(10)
        return store.resolve(digest)

    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(resolve, range(16))
        together.wait(10)
        assert reading.begun.wait(10)
        reading.go_on.set()
        assert {getattr(answer, "id", None) for answer in answers} == {token.id}
    assert reading.count == 1


def test_peek_does_not_wait_for_a_reading(path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a large file is being read the event loop goes on, and nothing is decided on the old tokens."""
    reading = _SlowReading(monkeypatch)
    _write(path, EMPTY)
    with ThreadPoolExecutor() as pool:
        resolving = pool.submit(store.resolve, UNKNOWN)
        assert reading.begun.wait(10)
        assert store.peek(UNKNOWN) is UNRESOLVED
        reading.go_on.set()
        assert resolving.result(10) is None


def test_an_answer_rests_on_one_state_of_the_file(store: FileTokenStore) -> None:
    """A token is not called unknown because the file was mended by another thread in the middle of the answer."""
    digest, token = _issued()

    class MendedMeanwhile(dict[bytes, Token]):
        def get(self, key: bytes, default: Any = None) -> Any:
            store._snapshot = file._Snapshot({digest: token}, disk.MISSING)
            return super().get(key, default)

    store._snapshot = file._Snapshot(MendedMeanwhile(), disk.MISSING, "broken")
    with contextlib.suppress(StoreUnavailableError):
        assert store._answer(digest) is token


def test_a_fork_in_the_middle_of_a_reading_leaves_a_working_child(path: Path) -> None:
    """A preloading server may fork at any moment: the child reads the file itself and never waits for the parent."""
    script = (
        """
import os, sys, threading, warnings
from freegpt_auth.stores import FileTokenStore if False else disk, file
""".replace(" FileTokenStore if False else", "")
        + """
store, begun, go_on, real = file.FileTokenStore(sys.argv[1]), threading.Event(), threading.Event(), disk.read_file
def slow(path):
    begun.set()
    go_on.wait(20)
    return real(path)
disk.read_file = slow
thread = threading.Thread(target=store.survey)
thread.start()
begun.wait(20)
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
disk.read_file = real
if child == 0:
    print(store.survey().active, flush=True)
    sys.exit()
go_on.set()
thread.join()
os.waitpid(child, 0)
"""
    )
    _write(path, _content(_issued(), _issued()))
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=15, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


# --- faults

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: _write(path, b""), "Input data was truncated"),
    "truncated": (lambda path: _write(path, EMPTY[:-5]), "truncated"),
    "corrupt": (lambda path: _write(path, b"\0" * 100), "JSON is malformed"),
    "wrong shape": (lambda path: _write(path, b"[]"), "it is not a JSON object"),
    "wrong field": (lambda path: _write(path, b'{"version": 1, "tokens": [{}]}'), r"$.tokens[0]"),
    "newer version": (lambda path: _write(path, b'{"version": 2, "tokens": []}'), "its version is 2"),
    "NaN": (lambda path: _write(path, b'{"version": NaN}'), "JSON is malformed"),
    "deep": (lambda path: _write(path, b"[" * 10**6), "it is nested too deeply"),
    "5000 digits": (lambda path: _write(path, b"[" + b"9" * 5000 + b"]"), "out of range"),
    "no UTF-8": (lambda path: _write(path, b'{"\xff": {}}'), "it is not UTF-8"),
    "year 0": (
        lambda path: _write(path, b'{"a": {"name": "a", "created_at": "0001-01-01T00:00:00+14:00"}}'),
        "cannot be used",
    ),
    "a directory": (Path.mkdir, "not a regular file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file or directory"),
    "link to itself": (lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    "too large": (lambda path: _write(path, b" " * 200_001), "it is larger than"),
}


@pytest.fixture(params=list(FAULTS))
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[Path], object], str]:
    """Return each way in which a token file can be broken, and what is said about it."""
    if request.param == "too large":
        monkeypatch.setattr(disk, "SIZE_LIMIT", 200_000)
    return FAULTS[request.param]


def test_a_fault_while_serving_keeps_the_last_good_tokens(
    path: Path,
    store: FileTokenStore,
    fault: tuple[Callable[[Path], object], str],
    said: Callable[[], list[tuple[str, str]]],
    clock: Callable[[float], None],
) -> None:
    """A broken file stops no token that worked, accepts none, is logged once, and its recovery is logged too."""
    good = _content((digest := _issued())[:2])
    _write(path, good)
    token = _look(store, digest[0])
    said()
    _clear(path)
    fault[0](path)
    for _ in range(3):
        assert _look(store, digest[0]) is token
        assert store.survey() == (True, 1, str(path))
        for method in (store.resolve, store.peek):
            with pytest.raises(StoreUnavailableError):
                method(UNKNOWN)
        clock(file.RETRY_INTERVAL)
    ((level, message),) = said()
    assert level == "ERROR"
    assert message.startswith(f"{path} cannot be used: ")
    assert fault[1] in message
    assert message.endswith(" Tokens read before (1) stay in force, all others are refused")
    _clear(path)
    _write(path, good)
    assert _look(store, UNKNOWN) is None
    assert said() == [("INFO", f"{path} was read again: 1 active tokens")]


def test_a_fault_at_start_closes_until_it_is_mended(
    path: Path, store: FileTokenStore, fault: tuple[Callable[[Path], object], str]
) -> None:
    """A server that starts on a broken file is closed, and works as soon as the file does."""
    fault[0](path)
    assert store.survey() == (True, 0, str(path))
    with pytest.raises(StoreUnavailableError):
        store.peek(UNKNOWN)
    _clear(path)
    digest, token = _issued()
    _write(path, _content((digest, token)))
    assert getattr(_look(store, digest), "id", None) == token.id


def test_a_fault_is_one_error_for_commands_and_nothing_is_written(
    path: Path, store: FileTokenStore, fault: tuple[Callable[[Path], object], str]
) -> None:
    """A command on a broken file fails with one sentence that names it, and leaves it as it was."""
    fault[0](path)
    before = disk.signature_at(str(path))
    for call in (
        store.tokens,
        lambda: store.add(*_issued()),
        lambda: store.revoke("x", NOW),
        lambda: store.delete("x"),
    ):
        with pytest.raises(TokenFileError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert disk.signature_at(str(path)) == before


def test_a_fault_holds_no_file_open(
    path: Path,
    store: FileTokenStore,
    fault: tuple[Callable[[Path], object], str],
    clock: Callable[[float], None],
) -> None:
    """A server can live with a broken file for years: trying it again costs no file descriptor."""
    fault[0](path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        # What is raised is another test's matter.
        with contextlib.suppress(Exception):
            store.survey()
        clock(file.RETRY_INTERVAL)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_each_cause_is_logged_once(
    path: Path, store: FileTokenStore, said: Callable[[], list[tuple[str, str]]]
) -> None:
    """A file that is broken in a new way is a new line in the log, and the same way after a recovery is one again."""
    for content in (b"", b" ", b"[]", b"[] ", EMPTY, b"[]"):
        _write(path, content)
        store.survey()
    assert [level for level, _ in said()] == ["ERROR", "ERROR", "INFO", "ERROR"]


def test_expiry_goes_on_while_the_file_is_broken(path: Path, store: FileTokenStore) -> None:
    """A broken file does not lengthen the life of a token: the record is answered with its end."""
    digest, token = _issued()
    ended, secret = issue("ended", now=NOW, expires_at=NOW + timedelta(seconds=1))
    _write(path, _content((digest, token), (digest_of(secret), ended)))
    store.survey()
    _write(path, b"")
    assert store.survey().active == 1
    assert getattr(_look(store, digest_of(secret)), "expires_at", None) == ended.expires_at


def test_a_failed_reading_is_tried_again_after_a_second(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    """A fault that leaves no trace in the file, such as a disk error, ends by itself; it is not tried at each request."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    readings: list[str] = []

    def fail(name: str) -> None:
        readings.append(name)
        raise TokenFileError(name, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "read_file", fail)
        assert store.survey() == (True, 0, str(path))
        clock(file.RETRY_INTERVAL - 0.01)
        with pytest.raises(StoreUnavailableError, match="input/output error"):
            store.peek(digest)
        store.survey()
        assert len(readings) == 1
        clock(0.02)
        assert store.peek(digest) is UNRESOLVED
        store.survey()
        assert len(readings) == 2
    clock(file.RETRY_INTERVAL)
    assert getattr(_look(store, digest), "id", None) == token.id


def test_a_folder_that_cannot_be_read_is_a_fault(unprivileged: Path) -> None:
    """A folder whose permissions were taken away keeps the tokens, opens nothing, and recovers with its permissions."""
    path = unprivileged / "api_tokens.json"
    digest, token = _issued()
    _write(path, _content((digest, token)))
    running = FileTokenStore(path)
    assert running.survey().active == 1
    unprivileged.chmod(0)
    started = FileTokenStore(path)
    assert (started.survey().configured, running.survey().configured) == (True, True)
    assert getattr(_look(running, digest), "id", None) == token.id
    for store in (running, started):
        with pytest.raises(StoreUnavailableError, match="permission denied"):
            store.peek(UNKNOWN)
        with pytest.raises(TokenFileError, match="permission denied"):
            store.tokens()
    unprivileged.chmod(0o700)
    assert getattr(_look(started, digest), "id", None) == token.id


def test_a_file_that_may_not_be_read_is_a_fault(unprivileged: Path) -> None:
    """A server whose user may not read the file is closed and says so."""
    path = unprivileged / "api_tokens.json"
    _write(path, EMPTY)
    path.chmod(0)
    store = FileTokenStore(path)
    assert store.survey().configured
    with pytest.raises(StoreUnavailableError, match="permission denied; run this as the user who owns it"):
        store.peek(UNKNOWN)


# --- missing, blank, configured


def test_a_missing_file_says_nothing(
    path: Path, store: FileTokenStore, said: Callable[[], list[tuple[str, str]]]
) -> None:
    """Where no token file ever was, nothing is configured, nothing is logged and nothing is made."""
    assert store.survey() == (False, 0, str(path))
    assert store.peek(UNKNOWN) is None
    assert dict(store.tokens()) == {}
    assert FileTokenStore(path.parent / "missing" / "t.json").survey().configured is False
    assert said() == []
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "configured"),
    [(b"{}", False), (b" {\n} ", False), (EMPTY, True), (b'{"version": 1, "tokens": []}', True), (b"", True)],
)
def test_only_an_empty_object_is_not_configured(
    path: Path, store: FileTokenStore, content: bytes, *, configured: bool
) -> None:
    """A file that this library wrote keeps authentication on, even without tokens; an empty object never did."""
    _write(path, content)
    assert store.survey() == (configured, 0, str(path))


@pytest.mark.parametrize("end", [Path.unlink, lambda path: _write(path, b"{}")])
@pytest.mark.parametrize("start", [EMPTY, b""])
def test_configured_once_is_configured_for_good(
    path: Path, store: FileTokenStore, start: bytes, end: Callable[[Path], object]
) -> None:
    """Nothing that happens to the file opens a server that was closed once."""
    _write(path, start)
    assert store.survey().configured
    end(path)
    assert store.survey() == (True, 0, str(path))
    assert _look(store, UNKNOWN) is None


def test_a_deleted_file_is_an_error_and_its_return_is_logged(
    path: Path, store: FileTokenStore, said: Callable[[], list[tuple[str, str]]]
) -> None:
    """When the file goes its tokens are refused and the operator is told what that means; when it returns they work."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    store.survey()
    aside = path.with_name("aside")
    for _ in range(2):
        path.rename(aside)
        assert _look(store, digest) is None
        assert store.survey() == (True, 0, str(path))
        aside.rename(path)
        assert getattr(_look(store, digest), "id", None) == token.id
    gone = f"{path} is gone: its tokens are refused until it is back. To open this server, restart it without the file"
    assert said() == [("ERROR", gone), ("INFO", f"{path} was read again: 1 active tokens")] * 2


def test_a_file_replaced_behind_its_mount_is_refused_and_said(said: Callable[[], list[tuple[str, str]]]) -> None:
    """A file mounted by itself shows its old tokens for ever after it was replaced: they are refused."""
    digest, token = _issued()
    with tempfile.TemporaryFile() as mounted:
        mounted.write(_content((digest, token)))
        mounted.flush()
        store = FileTokenStore(f"/proc/self/fd/{mounted.fileno()}")
        assert store.survey().configured
        assert _look(store, digest) is None
        with pytest.raises(StoreError):
            store.tokens()
    ((level, message),) = said()
    assert level == "ERROR"
    assert "mount its directory instead" in message


# --- permissions


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o640, False), (0o604, True), (0o620, True), (0o602, True)]
)
def test_a_file_open_to_others_is_loaded_with_a_warning(
    path: Path, store: FileTokenStore, said: Callable[[], list[tuple[str, str]]], mode: int, *, warned: bool
) -> None:
    """Digests that everybody may read, or tokens that others may add, are said once; they work all the same."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    path.chmod(mode)
    assert store.survey().active == 1
    path.touch()
    assert store.survey().active == 1
    warnings = [message for level, message in said() if level == "WARNING"]
    assert warnings == [f"{path} can be read or written by others; chmod 600 it"] * warned
    store.add(*_issued())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_file_is_born_for_its_owner_only(path: Path, store: FileTokenStore, umask: int) -> None:
    """Whatever the umask, the token file and its lock are for their owner alone."""
    before = os.umask(umask)
    try:
        store.add(*_issued())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}


def test_root_keeps_the_owner(path: Path, store: FileTokenStore) -> None:
    """A token made by root leaves the file to the server's user."""
    store.add(*_issued())
    owner = NOBODY if os.geteuid() == 0 else os.geteuid()
    os.chown(path, owner, -1)
    for _ in range(2):
        store.add(*_issued())
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (owner, 0o600)


# --- writing


def test_a_link_stays_a_link(path: Path, store: FileTokenStore) -> None:
    """A token file that is a symbolic link stays one: what it points to is replaced, under the lock beside that."""
    target = path.with_name("data") / "tokens.json"
    target.parent.mkdir()
    _write(target, EMPTY)
    path.symlink_to("data/tokens.json")
    store.add(*_issued())
    assert path.is_symlink()
    assert len(FileTokenStore(target).tokens()) == len(store.tokens()) == 1
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, "data"]


def test_unknown_fields_survive_every_change(path: Path, store: FileTokenStore) -> None:
    """What a later release or an operator added to the file is still there after each command."""
    issued = [_issued(name) for name in ("one", "two", "three")]
    document = json.loads(_content(*issued))
    document |= {"owner": "ops", "policy": {"days": [1, 2.5, None]}}
    document["tokens"][0] |= {"team": "ä", "limits": {"rpm": 10}}
    document["tokens"][1]["team"] = "b"
    _write(path, json.dumps(document, indent=4).encode())
    store.add(*_issued("four"))
    store.revoke(issued[0][1].id, NOW)
    store.delete(issued[2][1].id)
    written = json.loads(path.read_bytes())
    assert {name: value for name, value in written.items() if name != "tokens"} == {
        "version": 1,
        "owner": "ops",
        "policy": {"days": [1, 2.5, None]},
    }
    assert written["tokens"][:2] == [
        {**document["tokens"][0], "revoked_at": "2025-06-01T12:00:00Z"},
        document["tokens"][1],
    ]
    assert [token.name for token in store.tokens().values()] == ["one", "two", "four"]


def test_a_leftover_of_a_killed_writer_is_removed(path: Path, store: FileTokenStore) -> None:
    """A half-written temporary file does not outlive the next change."""
    leftover = path.with_name(f".{path.name}.0123456789abcdef.tmp")
    leftover.write_bytes(b"half")
    store.add(*_issued())
    assert not leftover.exists()


def test_a_change_gives_up_while_another_process_writes(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command says in one sentence that another one holds the lock; requests and lists never wait for it."""
    monkeypatch.setattr(file, "LOCK_TIMEOUT", 0.01)
    digest, token = _issued()
    _write(path, _content((digest, token)))
    script = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, f"{path}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        for call in (
            lambda: store.add(*_issued()),
            lambda: store.revoke(token.id, NOW),
            lambda: store.delete(token.id),
        ):
            with pytest.raises(StoreBusyError) as caught:
                call()
            assert str(caught.value) == f"{path}: another process held its lock for 0.01 s; try again"
        assert getattr(_look(store, digest), "id", None) == token.id
        assert list(store.tokens()) == [digest]
        holder.communicate(b"\n")
    monkeypatch.setattr(file, "LOCK_TIMEOUT", 5)
    store.delete(token.id)


def test_a_missing_folder_is_said_and_not_made(tmp_path: Path) -> None:
    """A mistyped path makes no folder."""
    with pytest.raises(TokenFileError, match="its folder does not exist; create the folder first"):
        FileTokenStore(tmp_path / "missing" / "t.json").add(*_issued())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", range(2))
def test_a_file_replaced_by_others_in_the_middle_loses_no_token(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A tool that replaces the file while a command opens it never makes the command start an empty file."""
    kept = _issued("kept")
    _write(path, _content(kept))
    other = path.with_name("other")
    _write(other, _content(kept))
    real = os.open

    def open_and_replace(name: Any, *arguments: Any, **options: Any) -> int:
        fd = real(name, *arguments, **options)
        if os.fspath(name) == str(path) and other.exists():
            other.replace(path)
        return fd

    monkeypatch.setattr(os, "open", open_and_replace)
    calls: list[Callable[[], object]] = [lambda: store.add(*_issued("new")), store.tokens]
    with contextlib.suppress(StoreError):
        calls[number]()
    assert kept[0] in store.tokens()


@pytest.mark.parametrize(
    ("digest", "changes"),
    [
        pytest.param(b"short", {}, id="digest"),
        pytest.param(UNKNOWN, {"id": ""}, id="empty id"),
        pytest.param(UNKNOWN, {"id": "a" * 65}, id="long id"),
        # Without an offset, as a mistake.
        pytest.param(UNKNOWN, {"created_at": NOW.replace(tzinfo=None)}, id="instant"),
        pytest.param(UNKNOWN, {"name": "\ud800"}, id="surrogate"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    path: Path, store: FileTokenStore, digest: bytes, changes: dict[str, Any]
) -> None:
    """A record that would break the file for every server is refused, and the file stays as it was."""
    store.add(*_issued())
    before = path.read_bytes()
    values: dict[str, Any] = {"id": "id", "name": "ci", "prefix": "sk-", "created_at": NOW, **changes}
    with pytest.raises(StoreError):
        store.add(digest, Token(**values))
    assert path.read_bytes() == before


def test_an_instant_without_offset_breaks_no_file(path: Path, store: FileTokenStore) -> None:
    """A revocation with a careless instant is refused or understood, and never breaks the file."""
    digest, token = _issued()
    store.add(digest, token)
    with contextlib.suppress(StoreError):
        store.revoke(token.id, NOW.replace(tzinfo=None))
    assert list(FileTokenStore(path).tokens()) == [digest]


# --- the ancestor's format


def test_plain_tokens_work_and_are_converted_by_the_first_change(
    path: Path, store: FileTokenStore, said: Callable[[], list[tuple[str, str]]]
) -> None:
    """A file of plain tokens works as it is, with a warning; after one command no plain token is left in it."""
    used = "2024-03-01T10:00:00+00:00"
    secrets = {"working": "sk-old-and-working", "revoked": "sk-old-and-revoked"}
    ancestor = {
        secrets["working"]: {**ENTRY, "last_used": used, "active": True},
        secrets["revoked"]: {**ENTRY, "last_used": used, "active": False},
    }
    _write(path, json.dumps(ancestor).encode())
    assert store.survey() == (True, 1, str(path))
    before = dict(store.tokens())
    assert said() == [("WARNING", f"{path} holds plain tokens; the next create, revoke or delete mends it")]

    digest, token = _issued("new")
    FileTokenStore(path).add(digest, token)

    assert b"sk-old-" not in path.read_bytes()
    assert not list(path.parent.glob(".*.tmp"))
    assert getattr(_look(store, digest), "id", None) == token.id
    assert {key: each for key, each in store.tokens().items() if key != digest} == before
    working, revoked = (_look(store, digest_of(secret)) for secret in secrets.values())
    assert getattr(working, "revoked_at", NOW) is None
    assert getattr(revoked, "revoked_at", None) == datetime.fromisoformat(used)
    assert getattr(working, "last_used_at", None) == getattr(revoked, "last_used_at", None)
    assert said() == [("INFO", f"{path} was read again: 2 active tokens")]


@pytest.mark.parametrize("change", ["revoke", "delete"])
def test_every_command_converts(path: Path, store: FileTokenStore, change: str) -> None:
    """Revoking or deleting a plain token takes effect and converts the file as well."""
    _write(path, json.dumps({"sk-plain-one": ENTRY, "sk-plain-two": ENTRY}).encode())
    one = store.resolve(digest_of("sk-plain-one"))
    assert one is not None
    calls: dict[str, Callable[[], object]] = {
        "revoke": lambda: store.revoke(one.id, NOW),
        "delete": lambda: store.delete(one.id),
    }
    calls[change]()
    assert b"sk-plain" not in path.read_bytes()
    assert getattr(_look(store, digest_of("sk-plain-one")), "revoked_at", NOW) == NOW
    assert getattr(_look(store, digest_of("sk-plain-two")), "revoked_at", NOW) is None


# --- any order of events


class _Reader:
    """A server's store, and what is expected of it: the tokens it read last, and whether it is configured."""

    def __init__(self, path: Path) -> None:
        self.store = FileTokenStore(path)
        self.tokens: dict[bytes, datetime | None] = {}
        self.configured = False


class AnyOrder(RuleBasedStateMachine):
    """In whatever order tokens, faults and looks come, each server answers what the file says or said last.

    One writer, two servers and an operator with an editor, against a dict from digests to revocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "api_tokens.json"
        self.writer = FileTokenStore(self.path)
        self.readers = [_Reader(self.path), _Reader(self.path)]
        self.state = "missing"
        self.saved = b""
        self.model: dict[bytes, datetime | None] = {}
        self.ids: dict[bytes, str] = {}
        self.numbers = itertools.count(1)

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.folder.cleanup()

    @precondition(lambda self: self.state in ("missing", "good"))
    @rule()
    def add(self) -> None:
        """Issue a token. Its name is longer than all before, so that no two files have one size."""
        digest, token = _issued("x" * next(self.numbers))
        self.writer.add(digest, token)
        self.model[digest], self.ids[digest], self.state = None, token.id, "good"

    @precondition(lambda self: self.state == "good" and self.model)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        """Revoke a token, perhaps once more."""
        digest = data.draw(st.sampled_from(sorted(self.model)))
        at = NOW + timedelta(seconds=next(self.numbers))
        self.model[digest] = self.model[digest] or at
        assert self.writer.revoke(self.ids[digest], at).revoked_at == self.model[digest]

    @precondition(lambda self: self.state == "good" and self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete a token."""
        digest = data.draw(st.sampled_from(sorted(self.model)))
        assert self.writer.delete(self.ids[digest]).revoked_at == self.model.pop(digest)

    @precondition(lambda self: self.state == "good")
    @rule()
    def move_away(self) -> None:
        """Take the file away."""
        self.saved, self.state = self.path.read_bytes(), "gone"
        self.path.unlink()

    @precondition(lambda self: self.state == "good")
    @rule(content=st.sampled_from([b"", b"[]", EMPTY[:-3], b'{"version": 9}']))
    def break_it(self, content: bytes) -> None:
        """Spoil the file; no command writes it then."""
        self.saved, self.state = self.path.read_bytes(), "broken"
        _write(self.path, content)
        with pytest.raises(TokenFileError):
            self.writer.add(*_issued())

    @precondition(lambda self: self.state in ("gone", "broken"))
    @rule()
    def restore(self) -> None:
        """Put back what was there."""
        _write(self.path, self.saved)
        self.state = "good"

    @rule(number=st.integers(0, 1))
    def look(self, number: int) -> None:
        """Ask one server for every token that ever was, and whether it is configured."""
        reader = self.readers[number]
        reader.configured = reader.configured or self.state in ("good", "broken")
        reader.tokens = {"broken": reader.tokens, "good": dict(self.model)}.get(self.state, {})
        for digest in [*self.ids, UNKNOWN]:
            try:
                token = _look(reader.store, digest)
            except StoreUnavailableError:
                assert self.state == "broken"
                assert digest not in reader.tokens
            else:
                assert (token is not None) == (digest in reader.tokens)
                assert token is None or (token.id, token.revoked_at) == (self.ids[digest], reader.tokens[digest])
        survey = reader.store.survey()
        active = list(reader.tokens.values()).count(None)
        assert (survey.configured, survey.active) == (reader.configured, active)

    @invariant()
    def the_file_is_what_was_written(self) -> None:
        """A command always reads the file itself."""
        if self.state in ("missing", "good"):
            assert {digest: token.revoked_at for digest, token in self.writer.tokens().items()} == self.model


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
