"""The contract that every place for usage keeps: each sentence of ``freegpt_auth/usage/base.py``, for each of them.

A further one takes one function that returns its opener, and one entry in ``OPENERS``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.exceptions import UsageError
from freegpt_auth.location import Location
from freegpt_auth.stores import open_store, open_usage
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import Token
from freegpt_auth.usage.base import Batch, Usage

if TYPE_CHECKING:
    from freegpt_auth.usage.base import UsageStore

NOON = 1764158400.0
"""When the tokens of these tests were used, more or less."""

CLOSE = 2.0
"""Largest error in seconds of an instant that two clocks measured."""

Opener = Callable[[], "UsageStore"]


def _sqlite(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("tmp_path") / "usage.db")


def _postgres(request: pytest.FixtureRequest) -> str:
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415  its driver is an extra

    url: str = request.getfixturevalue("database")
    created_at = datetime.fromtimestamp(NOON, UTC)
    # A use is counted only for a token that is there.
    tokens = [Token(id=f"t{number}", name="", prefix="", created_at=created_at) for number in range(8)]
    PostgresTokenStore(url).merge({bytes([number]) * 32: token for number, token in enumerate(tokens)})
    return url


def _damaged_sqlite(request: pytest.FixtureRequest) -> str:
    path = Path(_sqlite(request))
    UsageDatabase(str(path)).write(Batch("old", 1, {f"t{number}": (1, NOON) for number in range(2000)}), 1.0)
    path.write_bytes(path.read_bytes()[:4096].ljust(path.stat().st_size, b"\xff"))
    return str(path)


LOCATIONS = {"sqlite": _sqlite, "damaged-sqlite": _damaged_sqlite, "postgres": _postgres}
POSTGRES = pytest.param("postgres", marks=pytest.mark.database)


@pytest.fixture(params=["sqlite", POSTGRES])
def location(request: pytest.FixtureRequest) -> str:
    """Return where usage is kept, once for each kind of place; tokens t0 to t7 may be used there."""
    return LOCATIONS[request.param](request)


@pytest.fixture
def opener(request: pytest.FixtureRequest, location: str) -> Opener:
    """Return a function that opens the same place once more, as another process does."""

    def open_another() -> UsageStore:
        store = open_usage(location)
        request.addfinalizer(store.close)
        return store

    return open_another


@pytest.fixture
def store(opener: Opener) -> UsageStore:
    """Return a place without any usage."""
    return opener()


def at(seconds: float = 0.0) -> datetime:
    """Return an instant so many seconds after noon."""
    return datetime.fromtimestamp(NOON + seconds, UTC)


def batch(sequence: int = 1, process: str = "p", **counts: tuple[int, float]) -> Batch:
    """Return a batch of uses: for each token how many, and how many seconds after noon the last of them was."""
    return Batch(process, sequence, {token_id: (count, NOON + after) for token_id, (count, after) in counts.items()})


def counts(store: UsageStore) -> dict[str, int]:
    """Return the use counts."""
    return {token_id: usage.use_count for token_id, usage in store.read().items()}


def test_unused_tokens_have_no_usage(store: UsageStore) -> None:
    """A token that was never used has no usage."""
    assert dict(store.read()) == {}


def test_the_source_names_the_place_without_a_password(store: UsageStore, location: str) -> None:
    """The line in the log says where usage is, and no password."""
    assert store.source.endswith(location.rpartition("/")[2])
    assert "password" not in store.source


def test_counts_add_up_and_the_last_use_moves_forward(opener: Opener) -> None:
    """Each batch of each process adds to the counts, and none turns the last use back."""
    store, other = opener(), opener()
    store.write(batch(t0=(2, 10.0), t1=(1, 5.0)), 1.0)
    store.write(batch(2, t0=(3, 20.0)), 1.0)
    other.write(batch(1, "q", t0=(1, 0.0), t2=(4, 30.0)), 1.0)
    for each in (store, other, opener()):
        assert counts(each) == {"t0": 6, "t1": 1, "t2": 4}
        usage = each.read()
        for token_id, seconds in {"t0": 20.0, "t1": 5.0, "t2": 30.0}.items():
            assert abs((usage[token_id].last_used_at - at(seconds)).total_seconds()) < CLOSE
            assert usage[token_id].last_used_at.utcoffset() == at().utcoffset()


def test_a_batch_that_is_given_again_counts_once(opener: Opener) -> None:
    """A batch that a process writes again, also an older one, counts once; each process has its own numbers."""
    store, other = opener(), opener()
    for each in (store, store, other):
        each.write(batch(1, t0=(2, 0.0)), 1.0)
    store.write(batch(2, t0=(10, 0.0), t1=(1, 0.0)), 1.0)
    for sequence in (1, 2):
        store.write(batch(sequence, t0=(100, 0.0)), 1.0)
    other.write(batch(1, "q", t0=(1000, 0.0)), 1.0)
    assert counts(store) == {"t0": 1012, "t1": 1}


def test_merged_usage_is_raised_to_and_not_added(store: UsageStore) -> None:
    """A copy raises counts to at least the given ones, lowers none, and is idempotent."""
    store.write(batch(t0=(5, 0.0), t1=(1, 60.0)), 1.0)
    given = {"t0": Usage(2, at(90.0)), "t1": Usage(9, at(1.0)), "t2": Usage(3, at(2.5))}
    for _ in range(2):
        store.merge(given)
        assert counts(store) == {"t0": 5, "t1": 9, "t2": 3}
        usage = store.read()
        assert (usage["t0"].last_used_at, usage["t2"].last_used_at) == (at(90.0), at(2.5))
        assert abs((usage["t1"].last_used_at - at(60.0)).total_seconds()) < CLOSE
    store.merge({})
    assert counts(store) == {"t0": 5, "t1": 9, "t2": 3}


def test_usage_of_a_deleted_token_stays_away(opener: Opener, location: str) -> None:
    """A deleted token has no usage, not even by uses before its deletion that a server writes afterwards."""
    store, server = opener(), opener()
    server.write(batch(1, t0=(5, 0.0), t1=(1, 0.0)), 1.0)
    if Location.of(location).is_database:
        open_store(location).delete("t0")
    store.forget(["t0"])
    server.write(batch(2, t0=(2, 0.0), t1=(1, 0.0)), 1.0)
    assert counts(store) == {"t1": 2}


def test_several_threads_may_add_at_the_same_time(opener: Opener) -> None:
    """Nothing is lost and nothing fails when threads of two processes write the same tokens at once."""
    stores = (opener(), opener())

    def write(number: int) -> None:
        for sequence in range(1, 11):
            uses = {f"t{(number + step) % 8}": (1, 0.0) for step in range(8)}  # each thread in another order
            stores[number % 2].write(batch(sequence, f"p{number}", **uses), 5.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert counts(stores[0]) == {f"t{number}": 40 for number in range(8)}


@pytest.mark.parametrize("location", ["sqlite", "damaged-sqlite", POSTGRES], indirect=True)
def test_processes_count_exactly(opener: Opener, location: str) -> None:
    """Uses of several processes that end normally are counted to the last one, even if they begin afresh together."""
    program = f"""
import sys
from freegpt_auth.stores import open_usage
from freegpt_auth.usage.recorder import UsageRecorder
recorder = UsageRecorder(open_usage({location!r}), interval=0.01)
print("ready", flush=True)
sys.stdin.read()
for number in range(2000):
    recorder.record((f"t{{number % 5}}", {NOON}))
"""
    start = [sys.executable, "-c", program]
    processes = [subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) for _ in range(3)]
    assert [process.stdout.readline() for process in processes if process.stdout] == [b"ready\n"] * 3
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert counts(opener()) == {f"t{number}": 1200 for number in range(5)}


def test_uses_of_child_and_parent_are_counted(opener: Opener, location: str) -> None:
    """A fork after the first write, when something is held open, costs and doubles no use in either process."""
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from freegpt_auth.stores import open_usage
from freegpt_auth.usage.recorder import UsageRecorder
recorder = UsageRecorder(open_usage({location!r}), interval=3600)
def use():
    for _ in range(50):
        recorder.record(("t0", {NOON}))
        recorder.flush()
use()
child = os.fork()
use()
if not child:
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
use()
"""
    start = [sys.executable, "-c", program]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert counts(opener()) == {"t0": 200}


def test_after_it_was_closed_it_opens_again(store: UsageStore) -> None:
    """Closing releases open resources and loses nothing: later writes reopen them."""
    store.close()
    store.write(batch(t0=(1, 0.0)), 1.0)
    store.close()
    store.close()
    store.write(batch(2, t0=(1, 0.0)), 1.0)
    assert counts(store) == {"t0": 2}


def _spoil_sqlite(location: str) -> Any:
    Path(location).mkdir()


def _spoil_postgres(location: str) -> Any:
    import psycopg  # noqa: PLC0415

    with psycopg.connect(location) as connection:
        connection.execute("DROP FUNCTION freegpt_auth.add_usage")
        connection.execute("DROP TABLE freegpt_auth.usage")


@pytest.mark.parametrize(("kind", "spoil"), [("sqlite", _spoil_sqlite), ("postgres", _spoil_postgres)])
def test_failed_call_is_an_error_of_one_line(request: pytest.FixtureRequest, kind: str, spoil: Any) -> None:
    """If usage can be neither written nor read, each call fails with the reason in one line, and no password."""
    location = LOCATIONS[kind](request)
    spoil(location)
    store = open_usage(location)
    request.addfinalizer(store.close)
    for call in (lambda: store.write(batch(t0=(1, 0.0)), 0.1), store.read, lambda: store.merge({"t0": Usage(1, at())})):
        with pytest.raises(UsageError, match=r"^[^\n]+$") as caught:
            call()
        assert "password" not in str(caught.value)
        assert caught.value.__cause__ is None
