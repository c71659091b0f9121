"""The tokens in a server's memory: the same as commands decode, read and released in short steps."""

from __future__ import annotations

import gc
import json
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.stores import steps
from freegpt_auth.stores.file import decoding, table
from freegpt_auth.tokens import digest_of

INSTANT = "2025-06-01T12:00:00Z"

Rows = list[tuple[int, int]]
"""The numbers of the digest and of the id of each token of a file."""


def _content(rows: Rows, end: bytes = b"") -> bytes:
    """Return a file in this library's own layout."""
    lines = [
        {"id": f"id{number}", "name": "", "prefix": "", "digest": f"sha256${digest:064x}", "created_at": INSTANT}
        for digest, number in rows
    ]
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(line).encode() for line in lines) + end + b"\n]}\n"


def _read(content: bytes) -> table.Table:
    """Return the tokens of a file."""
    return table.read(BytesIO(content)).tokens


def _lines(count: int) -> bytes:
    """Return a file of so many tokens, all of whose lines but the first and the last are of one length."""
    return _content([(number, number) for number in range(count)])


def _outcome(read: Any, content: Any) -> Any:
    """Return the tokens of a reading, by digest and in order, or the text of its error."""
    try:
        tokens, *others = read(content)
    except ValueError as error:
        return str(error)
    if isinstance(tokens, table.Table):
        by_digest = {digest: token for shard in tokens.shards for digest, token in shard.items()}
        assert all(tokens.find(digest) is token for digest, token in by_digest.items())
        return by_digest, [token.id for part in tokens.parts for token in part], others
    return tokens, [token.id for token in tokens.values()], others


_numbers = st.integers(0, 2).map(lambda number: number << 248) | st.integers(3, 99)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(_numbers, st.integers(0, 9)), max_size=6),
    size=st.integers(1, 1_000),
    end=st.sampled_from([b"", b"", b",", b",\n", b",\n ", b"]", b"\xff"]),
)
def test_a_server_reads_what_a_command_reads(rows: Rows, size: int, end: bytes) -> None:
    """However a file falls into batches, a server finds the same tokens as a command, or the same fault in the same place."""
    content = _content(rows, end)
    expected = _outcome(decoding.decode, content)
    for length in (size, len(content), len(content) // 2):
        with mock.patch.object(table, "PIECE_SIZE", length):
            assert _outcome(table.read, BytesIO(content)) == expected


def test_other_files_are_read_too() -> None:
    """Servers and commands read the same tokens from an editor's layout, an empty object and plain tokens."""
    plain = {"sk-plain": {"name": "old", "created_at": "2024-01-01T00:00:00"}}
    for content in (json.dumps(json.loads(_content([(1, 1), (2, 2)]))), "{}", json.dumps(plain)):
        assert _outcome(table.read, BytesIO(content.encode())) == _outcome(decoding.decode, content.encode())


def test_what_is_no_digest_is_not_found() -> None:
    """An empty table, and a digest that is none, give no token and no error."""
    full = _read(_content([(0, 1)]))
    for digest in (b"", b"\x00", digest_of("unknown")):
        assert table.EMPTY.find(digest) is full.find(digest) is None
    assert (len(table.EMPTY), len(full)) == (0, 1)


# --- in steps


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of all pauses, on a machine on which each step takes as long as it may."""
    instant = 0.0
    taken: list[float] = []

    def perf_counter() -> float:
        nonlocal instant
        instant += steps.STEP * 1.01
        return instant

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=perf_counter, sleep=taken.append))
    monkeypatch.setattr(table, "PIECE_SIZE", len(_lines(1)))  # a line or two
    return taken


def test_whoever_waits_has_a_turn_between_two_steps(pauses: list[float]) -> None:
    """The lock is given up after every batch that is read, for longer than no time, and when tokens are counted."""
    tokens = _read(_lines(9))
    batches = len(tokens.parts)
    assert batches > 3
    assert len(pauses) == batches + 1 + table.SHARDS  # and while the ids are dropped that were compared
    assert min(pauses) > 0
    pauses.clear()
    assert tokens.count_active() == 9
    assert len(pauses) == batches


def test_no_time_is_lost_where_nothing_takes_long(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file is read without a pause for each of its batches, and in a batch are as many tokens as it has room for."""
    monkeypatch.setattr("freegpt_auth.stores.steps.time.perf_counter", lambda: 0.0)
    content = _lines(9)
    for size, lengths in ((len(content) // 2, [4, 4, 1]), (len(content), [9])):
        monkeypatch.setattr(table, "PIECE_SIZE", size)
        pauses.clear()
        assert [len(part) for part in _read(content).parts] == lengths
        assert len(pauses) == 1


def test_a_table_is_dropped_piece_by_piece(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """Releasing waits for a present reader, and then takes one step per part."""
    pieces, left = [object() for _ in range(9)], []
    monkeypatch.setattr("freegpt_auth.stores.steps.time.sleep", lambda _: left.append(len(pieces)))
    steps.release(pieces)
    assert left == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert pauses == []


def test_released_table_misses_no_token() -> None:
    """A valid token is never refused because the file is read again at the same moment."""
    tokens = _read(_content([(number << 248, number) for number in range(9)]))
    steps.release(tokens.all_parts())
    assert all(tokens.find((number << 248).to_bytes(32)) for number in range(9))
    assert len(tokens) == tokens.count_active() == 9


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_never_looks_at_tokens(monkeypatch: pytest.MonkeyPatch, *, enabled: bool) -> None:
    """No collection of the application's takes longer for a million tokens, and none is made where it wants none."""
    monkeypatch.setattr(gc, "isenabled", lambda: enabled)
    collections: list[str] = []
    gc.callbacks.append(lambda phase, _: collections.append(phase))
    try:
        tokens = _read(_lines(9))
    finally:
        gc.callbacks.pop()
    assert bool(collections) is enabled
    if enabled:
        assert not any(map(gc.is_tracked, [*tokens.all_parts(), *tokens.parts[0]]))
