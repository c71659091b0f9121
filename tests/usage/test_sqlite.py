"""What the usage database beside a token file keeps to beyond the contract."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from freegpt_auth.exceptions import UsageError
from freegpt_auth.usage.base import Batch, Usage
from freegpt_auth.usage.sqlite import UsageDatabase

NOON = datetime(2025, 11, 26, 12, tzinfo=UTC)


def test_merging_makes_the_database(tmp_path: Path) -> None:
    """Usage that is copied to where none was kept before makes a database that only its owner can read."""
    store = UsageDatabase("usage.db")
    store.merge({"a": Usage(3, NOON)})
    assert store.read() == {"a": Usage(3, NOON)}
    assert stat.S_IMODE((tmp_path / "usage.db").stat().st_mode) == 0o600


def test_merging_is_all_or_nothing() -> None:
    """Of usage that cannot be kept in full nothing is."""
    store = UsageDatabase("usage.db")
    store.merge({"a": Usage(1, NOON)})
    with pytest.raises((UsageError, OverflowError)):
        store.merge({"a": Usage(5, NOON), "b": Usage(2**63, NOON)})
    assert store.read() == {"a": Usage(1, NOON)}


def test_a_corrupt_database_is_moved_aside_for_what_is_merged() -> None:
    """Copying into a corrupt usage database keeps that one under another name, as writing does."""
    Path("usage.db").write_bytes(b"this is no database\n" * 500)
    store = UsageDatabase("usage.db")
    with pytest.raises(UsageError, match="file is not a database"):
        store.read()
    store.merge({"a": Usage(3, NOON)})
    assert store.read() == {"a": Usage(3, NOON)}
    assert len(list(Path().glob("usage.db.corrupt-*"))) == 1


def test_what_is_no_database_says_what_it_is(tmp_path: Path) -> None:
    """An error says in an operator's words why usage can be neither read nor written."""
    store = UsageDatabase("loop.db")
    Path("loop.db").symlink_to("loop.db")
    with pytest.raises(UsageError, match="too many levels of symbolic links"):
        store.read()
    with pytest.raises(UsageError, match=r"^its folder does not exist; create the folder first$"):
        UsageDatabase(str(tmp_path / "missing" / "usage.db")).merge({"a": Usage(1, NOON)})


def test_a_last_use_that_is_no_instant_is_an_error() -> None:
    """A row that nobody can read is one error, and no traceback in the middle of a list."""
    store = UsageDatabase("usage.db")
    store.add(Batch("p", 1, {"a": (1, 1e20)}), 1.0)
    with pytest.raises(UsageError, match="it holds no usage"):
        store.read()
    with contextlib.closing(sqlite3.connect("usage.db")) as connection:
        assert connection.execute("SELECT use_count FROM usage").fetchone() == (1,)


def test_a_writer_that_is_killed_in_the_middle_takes_nothing_with_it(unprivileged: Path) -> None:
    """What it had begun is taken back by whoever looks next; who may not write is told why, and what was there stays."""
    whole, path = str(unprivileged / "whole.db"), str(unprivileged / "usage.db")
    UsageDatabase(whole).add(Batch("p", 1, {f"t{number}": (1, 0.0) for number in range(5000)}), 1.0)
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
    assert {usage.use_count for usage in store.read().values()} == {1}
    assert len(store.read()) == 5000
    assert not Path(f"{path}-journal").exists()


def test_processes_that_ended_are_forgotten() -> None:
    """The database does not grow with each process: its last batch is forgotten after 30 days, when another one begins."""
    store = UsageDatabase("usage.db")
    for process in ("ended", "alive"):
        store.add(Batch(process, 1, {"a": (1, 0.0)}), 1.0)
    with contextlib.closing(sqlite3.connect("usage.db", isolation_level=None)) as connection:
        connection.execute("UPDATE batches SET written_at = written_at - 30 * 86400 - 1 WHERE process = 'ended'")
        store.add(Batch("alive", 2, {"a": (1, 0.0)}), 1.0)
        assert connection.execute("SELECT count(*) FROM batches").fetchone() == (2,)
        store.add(Batch("new", 1, {"a": (1, 0.0)}), 1.0)
        assert connection.execute("SELECT process FROM batches ORDER BY 1").fetchall() == [("alive",), ("new",)]
    assert store.read()["a"].use_count == 4
