"""The tokens in a server's memory: the same as commands decode, read and released in short steps."""

from __future__ import annotations

import gc
import json
from io import BytesIO
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.stores import steps
from freegpt_auth.stores.file import decoding, table
from freegpt_auth.tokens import digest_of
from tests.stores.file.common import in_lines, row

Rows = list[tuple[int, int]]
"""The numbers of the digest and of the id of each token of a file."""


def _content(rows: Rows) -> bytes:
    """Return a file in this library's own layout."""
    return in_lines(*(row(number, digest=f"sha256${digest:064x}") for digest, number in rows))


def _read(content: bytes) -> table.Table:
    """Return the tokens of a file."""
    return table.read(BytesIO(content)).tokens


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
    """However a file falls into batches, a server finds the same tokens as a command, or the same fault."""
    content = _content(rows).replace(decoding.FOOT, end + decoding.FOOT)
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


@pytest.mark.parametrize(("pieces", "lengths"), [(1, [9]), (2, [4, 4, 1])])
def test_others_have_a_turn_after_each_batch(monkeypatch: pytest.MonkeyPatch, pieces: int, lengths: list[int]) -> None:
    """The interpreter lock is free after each batch, which is as large as may be, and when tokens are counted."""
    content, pause = in_lines(*map(row, range(9))), mock.Mock()
    monkeypatch.setattr(table, "PIECE_SIZE", len(content) // pieces)
    monkeypatch.setattr(steps, "STEP", -1.0)  # each step takes too long
    monkeypatch.setattr("freegpt_auth.stores.steps.time.sleep", pause)
    tokens = _read(content)
    assert [len(part) for part in tokens.parts] == lengths
    assert pause.call_count == len(lengths) + 1 + table.SHARDS  # and while the ids are dropped that were compared
    assert tokens.count_active() == 9
    assert pause.call_count == 2 * len(lengths) + 1 + table.SHARDS


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_never_looks_at_tokens(monkeypatch: pytest.MonkeyPatch, *, enabled: bool) -> None:
    """No collection of the application's takes longer for a million tokens, and none is made where it wants none."""
    monkeypatch.setattr(gc, "isenabled", lambda: enabled)
    collect = mock.Mock(wraps=gc.collect)
    monkeypatch.setattr(gc, "collect", collect)
    tokens = _read(in_lines(row()))
    assert collect.mock_calls == [mock.call(0)] * enabled
    if enabled:
        assert not any(map(gc.is_tracked, [*tokens.all_parts(), *tokens.parts[0]]))
