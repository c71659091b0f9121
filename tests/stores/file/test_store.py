"""The file store beyond the contract: faults and changes of the file, and the log lines about them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from freegpt_auth import UNRESOLVED, FileTokenStore, StoreError, StoreUnavailableError, Token
from freegpt_auth.exceptions import FileError, StoreBusyError
from freegpt_auth.stores.file import access, disk, store as file_store, timestamps, worker_notes
from freegpt_auth.stores.file.lock import locked
from freegpt_auth.stores.file.snapshot import Snapshot
from freegpt_auth.stores.file.store import RETRY_INTERVAL
from freegpt_auth.stores.file.table import SHARDS, Table
from freegpt_auth.tokens import digest_of
from tests.helpers.scarcity import no_descriptors
from tests.stores.file.common import NOW, in_lines, issued, open_files, row

UNKNOWN, ONE, TWO = (number.to_bytes(32) for number in range(3))
EMPTY, FIRST, SECOND = in_lines(), in_lines(row(1)), in_lines(row(2))
"""Files of equal size with the tokens of the digests ONE and TWO, and one without a token."""

Said = Callable[[], list[tuple[str, str]]]
Patch = pytest.MonkeyPatch


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.instant = 1000.0

    def __call__(self, seconds: float = 0.0) -> float:
        """Advance, and return the time."""
        self.instant += seconds
        return self.instant


@pytest.fixture
def path(path: Path) -> Path:
    """Return the path of a token file with one token."""
    _write(path, FIRST)
    return path


@pytest.fixture
def clock() -> Clock:
    """Return the clock by which the store of the test measures ages."""
    return Clock()


@pytest.fixture
def store(path: Path, clock: Clock) -> FileTokenStore:
    """Return the store of a server that checks the file at each request, and whose writers wait for nothing."""
    return FileTokenStore(path, freshness=0.0, clock=clock)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Return a function that returns the lines logged since its last call."""
    caplog.set_level(logging.INFO, logger="freegpt_auth")

    def lines() -> list[tuple[str, str]]:
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return lines


def _look(store: FileTokenStore, digest: bytes) -> Token | None:
    """Return the token in the steps of the middleware."""
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token


def _write(path: Path, content: bytes) -> None:
    """Write a file in place, as an editor does."""
    path.write_bytes(content)
    path.chmod(0o600)


# --- noticing a change


def test_file_is_checked_every_10_ms(path: Path, monkeypatch: Patch, clock: Clock) -> None:
    """Requests check the file at most every 10 ms, and at least that often while there are requests."""
    store, check = FileTokenStore(path, clock=clock), Mock(wraps=disk.signature_at)
    monkeypatch.setattr(disk, "signature_at", check)
    store.resolve(UNKNOWN)
    for seconds, expected in ((0.0, 0), (0.0099, 0), (0.0002, 1)):
        check.reset_mock()
        clock(seconds)
        assert {store.peek(UNKNOWN) for _ in range(100)} == {None}
        assert check.call_count == expected
    _write(path, EMPTY)
    assert store.peek(UNKNOWN) is None
    clock(0.0101)
    assert store.peek(UNKNOWN) is UNRESOLVED


def test_writers_outlast_the_freshness(path: Path, clock: Clock) -> None:
    """A command returns when no server relies on an earlier check, even if another made its change just before."""
    store = FileTokenStore(path, freshness=0.05, clock=clock, sleep=clock)
    digest, token = issued()
    store.add(digest, token)
    store.revoke(token.id, NOW)
    written, before = path.stat(), clock()
    assert store.revoke(token.id, NOW + timedelta(days=1)).revoked_at == NOW
    assert [before, clock()] == pytest.approx([1000.2, 1000.3])
    assert path.stat() == written


# --- several threads, several processes


def test_waiting_requests_share_one_reading(store: FileTokenStore, monkeypatch: Patch) -> None:
    """After a change waiting requests share one reading; meanwhile nothing blocks, and no old token is accepted."""
    gate, real = threading.Barrier(2, timeout=10), disk.read_file
    reading = Mock(side_effect=lambda *arguments: (gate.wait(), gate.wait(), real(*arguments))[2])
    monkeypatch.setattr(disk, "read_file", reading)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(store.resolve, ONE) for _ in range(8)]
        gate.wait()
        assert store.peek(ONE) is UNRESOLVED
        gate.wait()
        assert all(answer.result(10) for answer in answers)
    reading.assert_called_once()


def test_old_tokens_are_released_at_leisure(path: Path, store: FileTokenStore, monkeypatch: Patch) -> None:
    """Old tokens are released in steps once the new ones are in force, and no request waits for that."""
    held: list[bool] = []

    def drop(pieces: list[object]) -> None:
        assert not store._loading.locked()
        assert _look(store, TWO)
        alone = [sys.getrefcount(piece) for piece in [object()]]
        held.extend(sys.getrefcount(piece) > max(alone) for piece in pieces)

    store.survey()
    _write(path, SECOND)
    monkeypatch.setattr(file_store, "release", drop)
    store.survey()
    assert held == [False] * (1 + SHARDS)


def test_an_answer_rests_on_one_state_of_the_file(path: Path, store: FileTokenStore) -> None:
    """A token is not unknown because another thread read the repaired file during the answer."""
    path.unlink()
    digest, token = issued()

    class MendedMeanwhile(dict[bytes, Token]):
        def get(self, key: bytes, default: Any = None) -> Any:
            store._snapshot = Snapshot(Table(({digest: token},) * SHARDS), disk.MISSING)
            return super().get(key, default)

    store._snapshot = Snapshot(Table((MendedMeanwhile(),) * SHARDS), disk.MISSING, "broken")
    with pytest.raises(StoreUnavailableError):
        store.resolve(digest)


_FORK_WHILE_READING = """
with store._loading:  # as another thread holds it while it reads
    if os.fork() == 0:
        signal.alarm(10)
        print(store.survey().active)
        sys.exit()
os.wait()
"""
_FORK_WHILE_OPEN = """
print(store.survey().configured, flush=True)
worker_notes.found = lambda path: True  # a sibling was closed, and then the file moved away
if os.fork() == 0:
    print(store.peek(b"").name, store.survey().configured)
    sys.exit()
os.wait()
"""


@pytest.mark.parametrize(
    ("content", "script", "printed"),
    [
        (in_lines(row(), row(1)), _FORK_WHILE_READING, "2"),
        (b"{}", _FORK_WHILE_OPEN, "False UNRESOLVED True"),
    ],
    ids=["during a reading", "while open"],
)
def test_forked_worker_reads_for_itself(path: Path, content: bytes, script: str, printed: str) -> None:
    """A forked worker never waits for its parent's reading, and is closed if another required authentication since."""
    path.write_bytes(content)
    imports = "import os, signal, sys; from freegpt_auth.stores.file import FileTokenStore, worker_notes\n"
    program = f"{imports}store = FileTokenStore('t.json')\n{script}"
    assert subprocess.check_output([sys.executable, "-c", program], timeout=60, text=True).split() == printed.split()


def test_note_is_left_again(path: Path, store: FileTokenStore, clock: Clock, monkeypatch: Patch) -> None:
    """While the file is missing the note for the next worker is left again each second: it may have been deleted."""
    leave = Mock()
    monkeypatch.setattr(worker_notes, "leave", leave)
    store.survey()
    path.unlink()
    for number in range(1, 4):
        assert leave.mock_calls == [call(str(path))] * number
        assert _look(store, UNKNOWN) is None
        clock(RETRY_INTERVAL)


# --- faults


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (Path.touch, "it is empty; a new token file is made by create, not by touch"),
        (Path.mkdir, "as Docker makes one in the place of a missing file that is mounted by itself"),
        (lambda path: path.symlink_to("nowhere"), "no such file or directory"),
    ],
)
def test_fault_keeps_the_last_good_tokens(
    path: Path, store: FileTokenStore, said: Said, clock: Clock, make: Callable[[Path], object], problem: str
) -> None:
    """A broken file ends no token and adds none; the fault and its recovery are logged once; no lease applies."""
    good = in_lines(row(1), row(2, expires_at="2025-06-01T12:00:01Z"))
    _write(path, good)
    kept = [_look(store, ONE), _look(store, TWO)]
    path.unlink()
    make(path)
    before = open_files()
    for _ in range(3):
        assert [_look(store, ONE), _look(store, TWO)] == kept
        assert store.survey()[:3] == (True, 1, str(path))
        for method in (store.resolve, store.peek):
            with pytest.raises(StoreUnavailableError):
                method(UNKNOWN)
        with pytest.raises(FileError, match=problem):
            store.tokens()
        clock(60)
    assert open_files() == before
    ((level, message),) = said()
    assert (level, problem in message) == ("ERROR", True)
    assert message.startswith(f"{path} cannot be used: ")
    assert message.endswith(" Tokens read before (2) stay in force, all others are refused")
    path.rename(path.with_name("aside"))
    _write(path, good)
    assert _look(store, UNKNOWN) is None
    assert said() == [("INFO", f"{path} was read again: 1 active token(s)")]


def test_failed_reading_is_retried(store: FileTokenStore, monkeypatch: Patch, clock: Clock) -> None:
    """A fault without a change of the file, such as a disk error, is retried each second, not at each request."""
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SIZE_LIMIT", 0)
        store.survey()
    clock(RETRY_INTERVAL - 0.01)
    for method in (store.peek, store.resolve):
        with pytest.raises(StoreUnavailableError, match="it is larger than 0 MiB"):
            method(ONE)
    clock(0.02)
    assert store.peek(ONE) is UNRESOLVED
    assert _look(store, ONE)


# --- a change that is hidden


def test_exhausted_descriptors_hide_no_revocation(path: Path, store: FileTokenStore) -> None:
    """A revocation is in force at once although connections occupy every descriptor of the server."""
    changed = path.with_name("changed")
    _write(changed, EMPTY)
    assert _look(store, ONE)
    with no_descriptors():
        changed.replace(path)
        assert not _look(store, ONE)


def _replace_by_memory(path: Path) -> None:
    """Let reading *path* fail with EIO."""
    path.rename(path.with_name("aside"))
    path.symlink_to("/proc/self/mem")


HIDDEN: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "file": (lambda path: path.chmod(0), lambda path: path.chmod(0o600), "permission denied"),
    "folder": (lambda path: path.parent.chmod(0), lambda path: path.parent.chmod(0o700), "permission denied"),
    "disk": (_replace_by_memory, lambda path: path.with_name("aside").replace(path), ""),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_change_ends_tokens_after_lease(unprivileged: Path, said: Said, clock: Clock, kind: str) -> None:
    """A file that cannot be opened, read or checked may hide a revocation: its tokens work for one lease, then 503."""
    hide, mend, problem = HIDDEN[kind]
    path = unprivileged / "t.json"
    store = FileTokenStore(path, lease=30, freshness=0.0, clock=clock)
    _write(path, FIRST)
    store.survey()
    clock(10)
    assert _look(store, ONE)
    hide(path)
    for seconds in (0.5, 1.0, 28.4):
        clock(seconds)
        assert _look(store, ONE)
        with pytest.raises(StoreUnavailableError):
            _look(store, UNKNOWN)
    for seconds in (0.2, 100):
        clock(seconds)
        for each in (ONE, UNKNOWN):
            with pytest.raises(StoreUnavailableError):
                _look(store, each)
    first, last = said()
    assert (problem in first[1], first[1].endswith(" stay in force for 30 s, all others are refused")) == (True, True)
    assert last[1].endswith(". It could not be read for 30 s: all tokens are refused until it can be")
    mend(path)
    clock(RETRY_INTERVAL)
    assert _look(store, ONE)
    assert said() == [("INFO", f"{path} was read again: 1 active token(s)")]
    hide(path)
    clock(60)  # without a request: the change cannot be dated
    with pytest.raises(StoreUnavailableError):
        _look(store, ONE)


@pytest.fixture
def _coarse(monkeypatch: Patch) -> None:
    """Give files of equal size one signature, as within one tick of the file system's clock."""
    monkeypatch.setattr(disk, "signature_of", lambda status: (status.st_ino, status.st_size))


@pytest.mark.parametrize("delay", [0, timestamps.FINE_TICK], ids=["old by the host's clock", "slow reading"])
@pytest.mark.usefixtures("_coarse")
def test_rewrite_within_one_tick_is_found(
    path: Path, store: FileTokenStore, monkeypatch: Patch, said: Said, clock: Clock, delay: float
) -> None:
    """A rewrite of equal size within one tick is found by one reading after the tick, from the last reading on."""
    real = disk.read_file
    monkeypatch.setattr(disk, "read_file", lambda *arguments: (clock(delay), real(*arguments))[1])
    time.sleep(2 * timestamps.FINE_TICK)
    assert all(_look(store, ONE) for _ in range(2))
    _write(path, SECOND)
    clock(timestamps.FINE_TICK)
    token = _look(store, TWO)
    assert token
    assert not _look(store, ONE)
    clock(timestamps.FINE_TICK)
    assert _look(store, TWO) is token
    monkeypatch.setattr(disk, "read_file", None)
    clock(60)
    assert _look(store, TWO) is token
    assert said() == [("INFO", f"{path} was read again: 1 active token(s)")]


@pytest.mark.usefixtures("_coarse")
def test_return_within_one_tick_is_compared_again(
    path: Path, store: FileTokenStore, monkeypatch: Patch, clock: Clock
) -> None:
    """A file that changes back within one tick is still compared after the tick: it may change again."""
    store.survey()
    clock(timestamps.FINE_TICK / 2)
    seen, real = [disk.MISSING], disk.signature_at
    monkeypatch.setattr(disk, "signature_at", lambda name: seen.pop() if seen else real(name))
    assert store.resolve(ONE)
    _write(path, SECOND)
    clock(timestamps.FINE_TICK)
    assert _look(store, TWO)


# --- missing, blank, configured


def test_a_missing_file_says_nothing(path: Path, store: FileTokenStore, said: Said) -> None:
    """Without a token file nothing is configured, logged or created."""
    path.unlink()
    assert store.survey()[:3] == (False, 0, str(path))
    assert store.peek(UNKNOWN) is None
    assert dict(store.tokens()) == {}
    assert FileTokenStore(path.parent / "missing" / "t.json").survey().configured is False
    assert said() == []
    assert list(path.parent.iterdir()) == []


def test_empty_object_counts_as_no_file(path: Path, store: FileTokenStore) -> None:
    """An empty JSON object leaves a server open, as no file does, but opens none that was closed."""
    path.write_bytes(b" {\n} ")
    assert store.survey()[:3] == (False, 0, str(path))
    assert store.peek(b"") is None
    _write(path, EMPTY)
    assert store.survey().configured
    assert store.peek(b"") is UNRESOLVED  # a request that began in open mode
    path.write_bytes(b"{}")
    assert store.survey().configured


def test_deleted_file_and_its_return_are_logged(path: Path, store: FileTokenStore, said: Said) -> None:
    """Tokens of a deleted file are refused, with one line for the operator; after its return they work again."""
    store.survey()
    aside = path.with_name("aside")
    for _ in range(2):
        path.rename(aside)
        assert not _look(store, ONE)
        assert store.survey()[:3] == (True, 0, str(path))
        aside.rename(path)
        assert _look(store, ONE)
    gone = f"{path} is gone: its tokens are refused until it is back. To open this server, restart it without the file"
    assert said() == [("ERROR", gone), ("INFO", f"{path} was read again: 1 active token(s)")] * 2


def test_replaced_mount_is_refused_and_logged(said: Said) -> None:
    """A file mounted by itself shows its old content after a replacement: its tokens are refused."""
    with tempfile.TemporaryFile() as mounted:
        mounted.write(FIRST)
        mounted.flush()
        store = FileTokenStore(f"/proc/self/fd/{mounted.fileno()}")
        assert store.survey().configured
        assert not _look(store, ONE)
        with pytest.raises(FileError):  # and not a new file that would lose them
            store.tokens()
    ((level, message),) = said()
    assert (level, "mount its directory instead" in message) == ("ERROR", True)


@pytest.mark.parametrize(("mode", "warned"), [(0o640, False), (0o604, True), (0o620, True), (0o602, True)])
def test_file_open_to_others_is_loaded_with_a_warning(
    path: Path, store: FileTokenStore, said: Said, mode: int, *, warned: bool
) -> None:
    """Digests that everybody may read, or tokens that others may add, are said once; they work all the same."""
    path.chmod(mode)
    assert store.survey().active == 1
    path.touch()
    assert store.survey().active == 1
    warnings = [message for level, message in said() if level == "WARNING"]
    assert warnings == [access.exposure(str(path), path.stat())] * warned


# --- writing


def test_a_link_stays_a_link(path: Path, store: FileTokenStore) -> None:
    """A token file that is a symbolic link stays one: its target is replaced, under the lock beside the target."""
    target = path.with_name("data") / "tokens.json"
    target.parent.mkdir()
    path.rename(target)
    path.symlink_to("data/tokens.json")
    store.add(*issued())
    assert path.is_symlink()
    assert len(FileTokenStore(target).tokens()) == 2
    assert sorted(each.name for each in path.parent.iterdir()) == ["data", path.name]


def test_held_lock_times_out(path: Path) -> None:
    """A command fails while another holds the lock; requests and lists never wait for it."""
    store = FileTokenStore(path, lock_timeout=0)
    with locked(str(path), 0), ThreadPoolExecutor() as pool:
        for command in (store.delete, lambda token_id: store.revoke(token_id, NOW), lambda _: store.add(*issued())):
            with pytest.raises(StoreBusyError):
                pool.submit(command, "id1").result(10)
        assert _look(store, ONE)
        assert list(store.tokens()) == [ONE]


def test_unreadable_record_is_not_written(path: Path, store: FileTokenStore) -> None:
    """A record that would make the file unreadable is refused, and the file stays unchanged."""
    before, no_offset = path.read_bytes(), NOW.replace(tzinfo=None)
    for changes, problem in (
        ({}, "digest must be"),
        ({"id": ""}, "id must be a string"),
        ({"created_at": no_offset}, "created_at must be a time"),
        ({"name": "\ud800"}, "half of a surrogate pair"),
    ):
        values: dict[str, Any] = {"id": "id", "name": "ci", "prefix": "sk-", "created_at": NOW, **changes}
        with pytest.raises(StoreError, match=problem):
            store.add(UNKNOWN if changes else b"short", Token(**values))
    with pytest.raises(StoreError):
        store.revoke("id1", no_offset)
    assert path.read_bytes() == before


def test_first_change_converts_plain_tokens(path: Path, store: FileTokenStore, said: Said) -> None:
    """A file of plain tokens works with a warning; the first command, even without effect, replaces them by digests."""
    entry = {"name": "old", "created_at": "2024-01-01T00:00:00"}
    one, two = digest_of("sk-plain-one"), digest_of("sk-plain-two")
    _write(path, json.dumps({"sk-plain-one": entry, "sk-plain-two": {**entry, "active": False}}).encode())
    assert store.survey()[:3] == (True, 1, str(path))
    before = dict(store.tokens())
    assert said() == [("WARNING", f"{path} holds plain tokens; the next create, revoke or delete mends it")]
    assert store.revoke(before[two].id, NOW) == before[two]  # revoked already: no other change
    assert b"sk-plain" not in path.read_bytes()
    assert [_look(store, digest) for digest in (one, two)] == [before[one], before[two]]
    assert [level for level, _ in said()] == ["INFO"]
