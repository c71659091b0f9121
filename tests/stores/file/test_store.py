"""The file store beyond the contract: faults and changes of the file, and the log lines about them."""

from __future__ import annotations

import gc
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable  # noqa: TC003  beside the annotations that pytest may resolve
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from freegpt_auth import UNRESOLVED, FileTokenStore, StoreError, StoreUnavailableError, Token
from freegpt_auth.exceptions import FileError, StoreBusyError
from freegpt_auth.stores.file import access, disk, store as file_store, timestamps, worker_notes
from freegpt_auth.stores.file.document import Document
from freegpt_auth.stores.file.lock import locked
from freegpt_auth.stores.file.snapshot import Snapshot
from freegpt_auth.stores.file.store import RETRY_INTERVAL
from freegpt_auth.stores.file.table import SHARDS, Table
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.scarcity import no_descriptors

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = bytes(32)
EMPTY = b'{"version": 1, "tokens": [\n\n]}\n'


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="freegpt_auth")


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.instant = 1000.0

    def __call__(self, seconds: float = 0.0) -> float:
        """Advance, and return the time."""
        self.instant += seconds
        return self.instant


@pytest.fixture
def clock() -> Clock:
    """Return the clock by which the store of the test measures ages."""
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the token file."""
    return tmp_path / "api_tokens.json"


@pytest.fixture
def store(path: Path, clock: Clock) -> FileTokenStore:
    """Return the store of a server that checks the file at each request, and whose writers wait for nothing."""
    return FileTokenStore(path, freshness=0.0, clock=clock)


def _said(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the lines logged since the last call."""
    lines = [(record.levelname, record.getMessage()) for record in log.records]
    log.clear()
    return lines


def _look(store: FileTokenStore, digest: bytes) -> Token | None:
    """Return the token in the steps of the middleware."""
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token


def _id(token: Token | None) -> str | None:
    return None if token is None else token.id


def _issued(name: str = "ci") -> tuple[bytes, Token]:
    token, secret = issue(name, now=NOW)
    return digest_of(secret), token


def _content(*issued: tuple[bytes, Token]) -> bytes:
    """Return the bytes of a file with these tokens."""
    document = Document(None)
    for digest, token in issued:
        document.append(digest, token)
    return document.encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file in place, as an editor does."""
    path.write_bytes(content)
    path.chmod(0o600)


def _clear(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


# --- noticing a change


def test_file_is_checked_every_10_ms(path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Requests check the file at most every 10 ms, and at least that often while there are requests."""
    store = FileTokenStore(path, clock=clock)
    checks: list[str] = []
    real = disk.signature_at

    def check(name: str) -> disk.Signature:
        checks.append(name)
        return real(name)

    monkeypatch.setattr(disk, "signature_at", check)
    store.resolve(UNKNOWN)
    for seconds, expected in ((0.0, 0), (0.0099, 0), (0.0002, 1)):
        checks.clear()
        clock(seconds)
        for _ in range(100):
            assert store.peek(UNKNOWN) is None
        assert len(checks) == expected
    _write(path, EMPTY)
    assert store.peek(UNKNOWN) is None
    clock(0.0101)
    assert store.peek(UNKNOWN) is UNRESOLVED


def test_writers_outlast_the_freshness(path: Path, clock: Clock) -> None:
    """After a change its command waits until no server relies on an earlier check; so does a command that changes nothing."""
    store = FileTokenStore(path, freshness=0.05, clock=clock, sleep=clock)
    digest, token = _issued()
    store.add(digest, token)
    store.revoke(token.id, NOW)
    written, before = path.stat(), clock()
    assert store.revoke(token.id, NOW + timedelta(days=1)).revoked_at == NOW
    assert clock() == pytest.approx(before + 0.1)
    assert before == pytest.approx(1000.2)
    assert path.stat() == written


# --- several threads, several processes


def test_waiting_requests_share_one_reading(path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change waiting requests share one reading; meanwhile nothing blocks, and no old token is accepted."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    begun, go_on, readings, real = threading.Event(), threading.Event(), [], disk.read_file

    def read_slowly(name: str, *arguments: Any) -> Any:
        readings.append(name)
        begun.set()
        assert go_on.wait(10)
        return real(name, *arguments)

    monkeypatch.setattr(disk, "read_file", read_slowly)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(store.resolve, digest) for _ in range(8)]
        assert begun.wait(10)
        assert store.peek(digest) is UNRESOLVED
        go_on.set()
        assert {_id(answer.result(10)) for answer in answers} == {token.id}
    assert len(readings) == 1


def test_what_is_in_force_no_more_is_let_go_at_leisure(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old tokens are released in steps once the new ones are in force, and no request waits for that."""
    held: list[bool] = []

    def drop(pieces: list[object]) -> None:
        assert not store._loading.locked()
        assert _id(store._find(digest)) == token.id
        alone = [sys.getrefcount(piece) for piece in [object()]]
        held.extend(sys.getrefcount(piece) > max(alone) for piece in pieces)

    _write(path, _content(_issued()))
    store.survey()
    digest, token = _issued()
    _write(path, _content((digest, token)))
    monkeypatch.setattr(file_store, "release", drop)
    store._refresh()
    assert held == [False] * (1 + SHARDS)


def test_an_answer_rests_on_one_state_of_the_file(store: FileTokenStore) -> None:
    """A token is not unknown because another thread read the repaired file during the answer."""
    digest, token = _issued()

    class MendedMeanwhile(dict[bytes, Token]):
        def get(self, key: bytes, default: Any = None) -> Any:
            store._snapshot = Snapshot(Table(({digest: token},) * SHARDS), disk.MISSING)
            return super().get(key, default)

    store._snapshot = Snapshot(Table((MendedMeanwhile(),) * SHARDS), disk.MISSING, "broken")
    with pytest.raises(StoreUnavailableError):
        store._find(digest)


_FORK_WHILE_READING = """
import os, signal, sys
from freegpt_auth import FileTokenStore
store = FileTokenStore("api_tokens.json")
with store._loading:  # as another thread holds it while it reads
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        print(store.survey().active)
        sys.exit()
os.waitpid(child, 0)
"""


def test_fork_during_a_reading(path: Path) -> None:
    """After a fork during a reading the child reads the file itself and never waits for the parent."""
    _write(path, _content(_issued(), _issued()))
    assert subprocess.check_output([sys.executable, "-c", _FORK_WHILE_READING], timeout=60) == b"2\n"


_FORK_WHILE_OPEN = """
import os, sys
from freegpt_auth import FileTokenStore
from freegpt_auth.stores.file import worker_notes
store = FileTokenStore("api_tokens.json")
print(store.survey().configured, flush=True)
worker_notes.found = lambda path: True  # a sibling was closed, and then the file moved away
if os.fork() == 0:
    print(store.peek(b"").name, store.survey().configured)
    sys.exit()
os.wait()
"""


def test_fork_of_an_open_process_reads_the_note() -> None:
    """A worker forked from an open process is closed if another worker required authentication since."""
    output = subprocess.check_output([sys.executable, "-c", _FORK_WHILE_OPEN], timeout=60, text=True)
    assert output.split() == ["False", "UNRESOLVED", "True"]


def test_note_is_written_again(
    path: Path, store: FileTokenStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the file is missing a lost note is written again each second: the next worker needs it."""
    monkeypatch.setattr(worker_notes, "_servers", lambda _: (worker_notes._Server(os.getpid(), b""),))
    monkeypatch.setattr(worker_notes, "_folders", lambda: [tmp_path / "notes"])
    store.add(*_issued())
    store.survey()
    path.unlink()
    for _ in range(2):
        [note] = (tmp_path / "notes").iterdir()
        note.unlink()
        clock(RETRY_INTERVAL)
        assert _look(store, UNKNOWN) is None
        assert note.exists()


@pytest.mark.parametrize("content", [None, b"{}"])
def test_recycled_worker_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """If an earlier worker required authentication, a missing or blank file does not open its successor."""
    if content is not None:
        _write(path, content)
    assert not FileTokenStore(path).survey().configured
    monkeypatch.setattr(worker_notes, "found", lambda _: True)
    assert FileTokenStore(path).survey().configured


# --- faults

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (Path.touch, "it is empty; a new token file is made by create, not by touch"),
    "deep": (lambda path: path.write_bytes(b"[" * 10**6), "it is nested too deeply"),
    "a directory": (
        Path.mkdir,
        "as Docker makes one in the place of a missing file that is mounted by itself; remove it",
    ),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file or directory"),
    "link to itself": (lambda path: path.symlink_to(path), "too many levels"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_keeps_the_last_good_tokens(
    path: Path, caplog: pytest.LogCaptureFixture, clock: Clock, kind: str
) -> None:
    """A broken file ends no token and adds none; the fault and its recovery are logged once; no lease applies."""
    store, (digest, token) = FileTokenStore(path, freshness=0.0, clock=clock), _issued()
    ended, secret = issue("ended", now=NOW, expires_at=NOW + timedelta(seconds=1))
    good = _content((digest, token), (digest_of(secret), ended))
    _write(path, good)
    kept = [_look(store, digest), _look(store, digest_of(secret))]
    path.unlink()
    FAULTS[kind][0](path)
    gc.collect()  # files that earlier tests have left to the garbage collector
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        assert [_look(store, digest), _look(store, digest_of(secret))] == kept
        assert store.survey()[:3] == (True, 1, str(path))
        for method in (store.resolve, store.peek):
            with pytest.raises(StoreUnavailableError):
                method(UNKNOWN)
        clock(60)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
    ((level, message),) = _said(caplog)
    assert (level, FAULTS[kind][1] in message) == ("ERROR", True)
    assert message.startswith(f"{path} cannot be used: ")
    assert message.endswith(" Tokens read before (2) stay in force, all others are refused")
    _clear(path)
    _write(path, good)
    assert _look(store, UNKNOWN) is None
    assert _said(caplog) == [("INFO", f"{path} was read again: 1 active token(s)")]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_start_closes_until_it_is_mended(path: Path, store: FileTokenStore, kind: str) -> None:
    """With a broken file a server starts closed, and commands change nothing and name the fault; both recover."""
    FAULTS[kind][0](path)
    before = disk.signature_at(str(path))
    assert store.survey()[:3] == (True, 0, str(path))
    with pytest.raises(StoreUnavailableError):
        store.peek(UNKNOWN)
    for call in (store.tokens, lambda: store.add(*_issued())):
        with pytest.raises(FileError, match=FAULTS[kind][1]):
            call()
    assert disk.signature_at(str(path)) == before
    _clear(path)
    store.add(*_issued())
    assert store.survey().active == 1


def test_failed_reading_is_retried(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A fault without a change of the file, such as a disk error, is retried each second, not at each request."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SIZE_LIMIT", 0)
        store.survey()
    clock(RETRY_INTERVAL - 0.01)
    for method in (store.peek, store.resolve):
        with pytest.raises(StoreUnavailableError, match="it is larger than 0 MiB"):
            method(digest)
    clock(0.02)
    assert store.peek(digest) is UNRESOLVED
    assert _id(_look(store, digest)) == token.id


# --- a change that is hidden


def test_exhausted_descriptors_hide_no_revocation(path: Path, store: FileTokenStore, tmp_path: Path) -> None:
    """A revocation is in force at once although connections occupy every descriptor of the server."""
    digest, token = _issued()
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "next", _content((digest, token)) if name == "good" else EMPTY)
    (tmp_path / "good" / "next").replace(path)
    assert _id(_look(store, digest)) == token.id
    with no_descriptors():
        (tmp_path / "bad" / "next").replace(path)
        assert _look(store, digest) is None


def _replace_by_memory(path: Path) -> None:
    """Let reading *path* fail with EIO."""
    path.rename(path.with_name("aside"))
    path.symlink_to("/proc/self/mem")


HIDDEN: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "file": (lambda path: path.chmod(0), lambda path: path.chmod(0o600), "permission denied"),
    "folder": (lambda path: path.parent.chmod(0), lambda path: path.parent.chmod(0o700), "permission denied"),
    "disk": (
        _replace_by_memory,
        lambda path: path.with_name("aside").replace(path),
        "",
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_change_ends_tokens_after_lease(
    unprivileged: Path, caplog: pytest.LogCaptureFixture, clock: Clock, kind: str
) -> None:
    """A file that cannot be opened, read or checked may hide a revocation: its tokens work for one lease, then 503."""
    hide, mend, problem = HIDDEN[kind]
    path, (digest, token) = unprivileged / "t.json", _issued()
    store = FileTokenStore(path, lease=30, freshness=0.0, clock=clock)
    _write(path, _content((digest, token)))
    store.survey()
    clock(10)
    assert _id(_look(store, digest)) == token.id
    hide(path)
    for seconds in (0.5, 1.0, 28.4):
        clock(seconds)
        assert _id(_look(store, digest)) == token.id
        with pytest.raises(StoreUnavailableError):
            _look(store, UNKNOWN)
    for seconds in (0.2, 100):
        clock(seconds)
        for known in (digest, UNKNOWN):
            with pytest.raises(StoreUnavailableError):
                _look(store, known)
    first, last = _said(caplog)
    assert (problem in first[1], first[1].endswith(" stay in force for 30 s, all others are refused")) == (True, True)
    assert last[1].endswith(". It could not be read for 30 s: all tokens are refused until it can be")
    mend(path)
    clock(RETRY_INTERVAL)
    assert _id(_look(store, digest)) == token.id
    assert _said(caplog) == [("INFO", f"{path} was read again: 1 active token(s)")]


def test_lease_counts_from_last_look(path: Path, clock: Clock) -> None:
    """A server without requests for a minute cannot date a hidden change: it has no lease."""
    store, (digest, token) = FileTokenStore(path, lease=30, freshness=0.0, clock=clock), _issued()
    _write(path, _content((digest, token)))
    assert _id(_look(store, digest)) == token.id
    path.unlink()
    path.symlink_to("/proc/self/mem")
    clock(60)
    with pytest.raises(StoreUnavailableError):
        _look(store, digest)


def test_rewrite_within_one_tick_is_found(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """A rewrite of equal size within one tick is found by one reading after the tick."""
    monkeypatch.setattr(disk, "signature_of", lambda status: (status.st_ino, status.st_size))
    (one, first), (two, second) = _issued(), _issued()
    _write(path, _content((one, first)))
    assert _id(_look(store, one)) == first.id
    path.write_bytes(_content((two, second)))
    clock(timestamps.FINE_TICK)
    assert (_look(store, one), _id(_look(store, two))) == (None, second.id)
    known = _look(store, two)
    clock(timestamps.FINE_TICK)
    assert _look(store, two) is known
    monkeypatch.setattr(disk, "read_file", None)
    clock(60)
    assert _look(store, two) is known
    assert _said(caplog) == [("INFO", f"{path} was read again: 1 active token(s)")]


@pytest.mark.parametrize("delay", [0, timestamps.FINE_TICK], ids=["old by the host's clock", "slow reading"])
def test_tick_counts_from_the_end_of_a_reading(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Clock, delay: float
) -> None:
    """A rewrite is found although the file server's clock is late, or the reading was slow."""
    monkeypatch.setattr(disk, "signature_of", lambda status: (status.st_ino, status.st_size))
    real = disk.read_file
    monkeypatch.setattr(disk, "read_file", lambda *arguments: (clock(delay), real(*arguments))[1])
    (one, first), (two, second) = _issued(), _issued()
    _write(path, _content((one, first)))
    time.sleep(2 * timestamps.FINE_TICK)
    assert [_id(_look(store, one)) for _ in range(2)] == [first.id, first.id]
    path.write_bytes(_content((two, second)))
    clock(timestamps.FINE_TICK)
    assert _id(_look(store, two)) == second.id


def test_return_within_one_tick_is_compared_again(
    path: Path, store: FileTokenStore, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A file that changes back within one tick is still compared after the tick: it may change again."""
    monkeypatch.setattr(disk, "signature_of", lambda status: (status.st_ino, status.st_size))
    (one, first), (two, second) = _issued(), _issued()
    _write(path, _content((one, first)))
    store.survey()
    clock(timestamps.FINE_TICK / 2)
    seen, real = [disk.MISSING], disk.signature_at
    monkeypatch.setattr(disk, "signature_at", lambda name: seen.pop() if seen else real(name))
    assert _id(store.resolve(one)) == first.id
    path.write_bytes(_content((two, second)))
    clock(timestamps.FINE_TICK)
    assert _id(_look(store, two)) == second.id


# --- missing, blank, configured


def test_a_missing_file_says_nothing(path: Path, store: FileTokenStore, caplog: pytest.LogCaptureFixture) -> None:
    """Without a token file nothing is configured, logged or created."""
    assert store.survey()[:3] == (False, 0, str(path))
    assert store.peek(UNKNOWN) is None
    assert dict(store.tokens()) == {}
    assert FileTokenStore(path.parent / "missing" / "t.json").survey().configured is False
    assert _said(caplog) == []
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("content", "configured"), [(b" {\n} ", False), (EMPTY, True), (b"", True)])
def test_configured_once_is_configured_for_good(path: Path, content: bytes, *, configured: bool) -> None:
    """Only an empty object counts as unconfigured, and no change of the file opens a server that was closed once."""
    for end in (Path.unlink, lambda path: path.write_bytes(b"{}")):
        store = FileTokenStore(path)
        _write(path, content)
        assert store.survey()[:3] == (configured, 0, str(path))
        end(path)
        assert store.survey()[:3] == (configured, 0, str(path))
        assert _look(store, UNKNOWN) is None


def test_deleted_file_and_its_return_are_logged(
    path: Path, store: FileTokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens of a deleted file are refused, with one line for the operator; after its return they work again."""
    digest, token = _issued()
    _write(path, _content((digest, token)))
    store.survey()
    aside = path.with_name("aside")
    for _ in range(2):
        path.rename(aside)
        assert _look(store, digest) is None
        assert store.survey()[:3] == (True, 0, str(path))
        aside.rename(path)
        assert _id(_look(store, digest)) == token.id
    gone = f"{path} is gone: its tokens are refused until it is back. To open this server, restart it without the file"
    assert _said(caplog) == [("ERROR", gone), ("INFO", f"{path} was read again: 1 active token(s)")] * 2


def test_replaced_mount_is_refused_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A file mounted by itself shows its old content after a replacement: its tokens are refused."""
    digest, token = _issued()
    with tempfile.TemporaryFile() as mounted:
        mounted.write(_content((digest, token)))
        mounted.flush()
        store = FileTokenStore(f"/proc/self/fd/{mounted.fileno()}")
        assert store.survey().configured
        assert _look(store, digest) is None
        with pytest.raises(FileError):  # and not a new file that would lose them
            store.tokens()
    ((level, message),) = _said(caplog)
    assert (level, "mount its directory instead" in message) == ("ERROR", True)


@pytest.mark.parametrize(
    ("mode", "warned", "left"),
    [(0o640, False, 0o640), (0o604, True, 0o604), (0o620, True, 0o600), (0o602, True, 0o600)],
)
def test_file_open_to_others_is_loaded_with_a_warning(
    path: Path, store: FileTokenStore, caplog: pytest.LogCaptureFixture, mode: int, left: int, *, warned: bool
) -> None:
    """Digests that everybody may read, or tokens that others may add, are said once; they work all the same.

    The next change removes the write permission of others.
    """
    _write(path, _content(_issued()))
    path.chmod(mode)
    assert store.survey().active == 1
    path.touch()
    assert store.survey().active == 1
    warnings = [message for level, message in _said(caplog) if level == "WARNING"]
    assert warnings == [access.exposure(str(path), path.stat())] * warned
    store.add(*_issued())
    assert stat.S_IMODE(path.stat().st_mode) == left


# --- writing


def test_a_link_stays_a_link(path: Path, store: FileTokenStore) -> None:
    """A token file that is a symbolic link stays one: its target is replaced, under the lock beside the target."""
    target = path.with_name("data") / "tokens.json"
    target.parent.mkdir()
    _write(target, EMPTY)
    path.symlink_to("data/tokens.json")
    store.add(*_issued())
    assert path.is_symlink()
    assert len(FileTokenStore(target).tokens()) == 1
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, "data"]


def test_held_lock_times_out(path: Path) -> None:
    """A command fails while another holds the lock; requests and lists never wait for it."""
    store = FileTokenStore(path, lock_timeout=0)
    digest, token = _issued()
    _write(path, _content((digest, token)))
    with locked(str(path), 0), ThreadPoolExecutor() as pool:
        for call in (store.delete, lambda token_id: store.revoke(token_id, NOW), lambda _: store.add(*_issued())):
            with pytest.raises(StoreBusyError):
                pool.submit(call, token.id).result(10)
        assert _id(_look(store, digest)) == token.id
        assert list(store.tokens()) == [digest]


def test_what_could_not_be_read_again_is_not_written(path: Path, store: FileTokenStore) -> None:
    """A record that would make the file unreadable is refused, and the file stays unchanged."""
    digest, token = _issued()
    store.add(digest, token)
    before, no_offset = path.read_bytes(), NOW.replace(tzinfo=None)
    for changes in ({}, {"id": ""}, {"created_at": no_offset}, {"name": "\ud800"}):
        values: dict[str, Any] = {"id": "id", "name": "ci", "prefix": "sk-", "created_at": NOW, **changes}
        with pytest.raises(StoreError):
            store.add(UNKNOWN if changes else b"short", Token(**values))
    with pytest.raises(StoreError):
        store.revoke(token.id, no_offset)
    assert path.read_bytes() == before


def test_first_change_converts_plain_tokens(
    path: Path, store: FileTokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of plain tokens works, with a warning; the first command replaces them by digests."""
    entry = {"name": "old", "created_at": "2024-01-01T00:00:00"}
    one, two = digest_of("sk-plain-one"), digest_of("sk-plain-two")
    _write(path, json.dumps({"sk-plain-one": entry, "sk-plain-two": {**entry, "active": False}}).encode())
    assert store.survey()[:3] == (True, 1, str(path))
    before = dict(store.tokens())
    assert _said(caplog) == [("WARNING", f"{path} holds plain tokens; the next create, revoke or delete mends it")]
    store.revoke(before[one].id, NOW)
    assert b"sk-plain" not in path.read_bytes()
    assert getattr(_look(store, one), "revoked_at", None) == NOW
    assert _look(store, two) == before[two]
    assert [level for level, _ in _said(caplog)] == ["INFO"]


# --- any order of events


class AnyOrder(RuleBasedStateMachine):
    """For any order of changes, faults and requests a server decides by the file, or by its last good reading.

    Commands, a server and an operator with an editor, compared with a dict of the expected tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "api_tokens.json"
        self.writer, self.server = FileTokenStore(self.path, freshness=0.0), FileTokenStore(self.path, freshness=0.0)
        self.state, self.saved, self.configured = "missing", b"", False
        self.written: dict[bytes, Token] = {}
        self.served: dict[bytes, Token] = {}
        self.ever: list[bytes] = [UNKNOWN]

    def teardown(self) -> None:
        """Remove the folder."""
        self.folder.cleanup()

    @precondition(lambda self: self.state in ("missing", "good"))
    @rule()
    def add(self) -> None:
        """Issue a token. Its name is longer than all before, so that no two files have one size."""
        digest, token = _issued("x" * len(self.ever))
        self.writer.add(digest, token)
        self.ever.append(digest)
        self.written[digest], self.state = token, "good"

    @precondition(lambda self: self.state == "good" and self.written)
    @rule(data=st.data(), delete=st.booleans())
    def end(self, data: st.DataObject, *, delete: bool) -> None:
        """Revoke a token, perhaps once more, or delete it."""
        digest = data.draw(st.sampled_from(sorted(self.written)))
        if delete:
            self.writer.delete(self.written.pop(digest).id)
        else:
            self.written[digest] = self.writer.revoke(self.written[digest].id, NOW)

    @precondition(lambda self: self.state == "good")
    @rule(content=st.sampled_from([None, b"", b"[]", EMPTY[:-3]]))
    def spoil(self, content: bytes | None) -> None:
        """Remove or break the file."""
        self.saved, self.state = self.path.read_bytes(), "missing" if content is None else "broken"
        if content is None:
            self.path.unlink()
            self.written = {}
        else:
            _write(self.path, content)

    @precondition(lambda self: self.state == "broken")
    @rule()
    def restore(self) -> None:
        """Restore the file."""
        _write(self.path, self.saved)
        self.state = "good"

    @rule()
    def look(self) -> None:
        """Check every token so far, and the server's survey."""
        self.configured = self.configured or self.state != "missing"
        self.served = self.served if self.state == "broken" else dict(self.written)
        for digest in self.ever:
            if self.state == "broken" and digest not in self.served:
                with pytest.raises(StoreUnavailableError):
                    _look(self.server, digest)
            else:
                token, expected = _look(self.server, digest), self.served.get(digest)
                assert _id(token) == _id(expected)
                assert getattr(token, "revoked_at", None) == getattr(expected, "revoked_at", None)
        active = [token for token in self.served.values() if token.revoked_at is None]
        assert self.server.survey()[:3] == (self.configured, len(active), str(self.path))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
