"""The usage database beside a token file, beyond the contract."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth.exceptions import UsageError
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.stores.file.usage_faults import explained
from freegpt_auth.usage.base import Batch, Usage

NOON = datetime(2025, 11, 26, 12, tzinfo=UTC)


ONE = {"a": (1, 0.0)}
MANY = {f"t{number}": (1, 0.0) for number in range(2000)}


def database(*batches: Batch) -> UsageDatabase:
    """Return a usage database with these batches."""
    store = UsageDatabase("usage.db")
    for batch in batches:
        store.write(batch, 1.0)
    return store


def test_merging_is_all_or_nothing() -> None:
    """Of usage that cannot be kept in full nothing is."""
    store = database()
    store.merge({"a": Usage(1, NOON)})
    with pytest.raises((UsageError, OverflowError)):
        store.merge({"a": Usage(5, NOON), "b": Usage(2**63, NOON)})
    assert store.read() == {"a": Usage(1, NOON)}


def test_a_restored_token_is_counted_again() -> None:
    """A deleted token that is restored from a backup counts its later uses; those before the deletion are dropped."""
    store = database(Batch("p", 1, {"a": (5, 0.0)}))
    store.forget(["a"])
    store.write(Batch("p", 2, {"a": (7, time.time() - 60)}), 1.0)
    store.write(Batch("p", 3, {"a": (2, time.time() + 60)}), 1.0)
    assert store.read()["a"].use_count == 2


def test_forgetting_makes_no_database(tmp_path: Path) -> None:
    """A command whose user is another than the server's makes no database that the server could not write."""
    database().forget(["a"])
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link() -> None:
    """A symbolic link to the database is followed: the file behind it is made, and moved aside if it is damaged."""
    real = Path("data/real.db")
    real.parent.mkdir()
    Path("usage.db").symlink_to(real)
    store = database(Batch("p", 1, MANY))
    real.write_bytes(real.read_bytes()[:4096].ljust(real.stat().st_size, b"\xff"))
    store.merge({"a": Usage(3, NOON)})
    assert store.read() == {"a": Usage(3, NOON)}
    assert Path("usage.db").is_symlink()
    assert len(list(Path("data").glob("real.db.corrupt-*"))) == 1


READ_ONLY = "it or its folder is read-only; run this as the user who owns them, or change their permissions"
DENIED = "permission denied; run this as the user who owns it, or change its permissions"


@pytest.mark.parametrize(
    ("mode", "folder_mode", "problem"),
    [(0o400, 0o700, READ_ONLY), (0o000, 0o700, DENIED), (0o600, 0o500, READ_ONLY)],
)
def test_missing_permission_is_explained(unprivileged: Path, mode: int, folder_mode: int, problem: str) -> None:
    """Each missing permission is one sentence of ours, at the start too, where it does not stop the server."""
    path = unprivileged / "usage.db"
    store = UsageDatabase(str(path))
    store.merge({"a": Usage(1, NOON)})
    path.chmod(mode)
    unprivileged.chmod(folder_mode)
    store.check()
    with pytest.raises(UsageError, match=f"^{problem}$"):
        store.merge({"a": Usage(2, NOON)})


def test_reading_times_out() -> None:
    """A database that another program has locked is one sentence, after the time limit."""
    database(Batch("p", 1, ONE))
    store = UsageDatabase("usage.db", read_timeout=0.05)
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match=r"^another program holds its lock; end that program"):
            store.read()


@pytest.mark.parametrize("code", range(1, 30))
def test_sqlite_messages_are_not_repeated(code: int) -> None:
    """Each of SQLite's errors is a sentence of ours, and an unknown one names its code."""
    error = sqlite3.OperationalError("as SQLite words it")
    error.sqlite_errorcode = code | 1 << 8
    with pytest.raises(UsageError, match=r"; |memory|result code") as caught, explained():
        raise error
    assert "as SQLite words it" not in str(caught.value)


def test_passing_read_error_moves_nothing_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error of the disk, which SQLite calls damage, is tried again before a healthy database is moved aside."""
    store = database(Batch("p", 1, ONE))
    connect, error = sqlite3.connect, sqlite3.DatabaseError()
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    failing = [error]

    def once_broken(*args: Any, **kwargs: Any) -> Any:
        if failing:
            raise failing.pop()
        return connect(*args, **kwargs)

    monkeypatch.setattr(sqlite3, "connect", once_broken)
    store.write(Batch("p", 2, ONE), 1.0)
    assert store.read()["a"].use_count == 2
    assert not list(Path().glob("usage.db.corrupt-*"))


def test_error_of_the_path_is_explained() -> None:
    """An error of the operating system is in an operator's words."""
    store = database()
    Path("usage.db").symlink_to("usage.db")
    with pytest.raises(UsageError, match="too many levels of symbolic links"):
        store.read()


def test_a_last_use_that_is_no_instant_is_an_error() -> None:
    """A row with an instant outside the calendar is one error, not a traceback in the middle of a list."""
    store = database(Batch("p", 1, {"a": (1, 1e20)}))
    with pytest.raises(UsageError, match="it holds a count or an instant that cannot be read"):
        store.read()
    with contextlib.closing(sqlite3.connect("usage.db")) as connection:
        assert connection.execute("SELECT use_count FROM usage").fetchone() == (1,)


def test_killed_writer_loses_nothing(unprivileged: Path) -> None:
    """The next reader rolls an unfinished write back; a reader without write permission gets the reason."""
    whole, path = str(unprivileged / "whole.db"), str(unprivileged / "usage.db")
    UsageDatabase(whole).write(Batch("p", 1, MANY), 1.0)
    with contextlib.closing(sqlite3.connect(whole, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 2")  # changes reach the disk before they are committed
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("UPDATE usage SET use_count = 77")
        for end in ("", "-journal"):
            shutil.copy(f"{whole}{end}", f"{path}{end}")  # as a killed writer leaves them
    store = UsageDatabase(path)
    unprivileged.chmod(0o500)
    with pytest.raises(UsageError, match=r"^cannot lock .*: permission denied; run this as the user who owns it"):
        store.read()
    unprivileged.chmod(0o700)
    assert [usage.use_count for usage in store.read().values()] == [1] * 2000
    assert not Path(f"{path}-journal").exists()


def test_processes_that_ended_are_forgotten() -> None:
    """The last batch of an ended process is deleted after 30 days, by the first batch of another process."""
    store = database(Batch("ended", 1, ONE), Batch("alive", 1, ONE))
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as connection:
        connection.execute("UPDATE batches SET written_at = written_at - 30 * 86400 - 1 WHERE process = 'ended'")
        connection.execute("INSERT INTO forgotten VALUES ('old', unixepoch() - 30 * 86400 - 1), ('new', unixepoch())")
        store.write(Batch("alive", 2, ONE), 1.0)
        assert connection.execute("SELECT count(*) FROM batches").fetchone() == (2,)
        store.write(Batch("new", 1, ONE), 1.0)
        assert connection.execute("SELECT process FROM batches ORDER BY 1").fetchall() == [("alive",), ("new",)]
        assert connection.execute("SELECT token_id FROM forgotten").fetchall() == [("new",)]
    assert store.read()["a"].use_count == 4
