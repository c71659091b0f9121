"""Changes of a token file: other fields stay, and the new bytes are readable by people and by the decoder."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.stores.file.decoding import decode
from freegpt_auth.stores.file.document import Document
from freegpt_auth.tokens import Token
from tests.stores.file.common import INSTANT, NOW, in_lines, indented, issued, row


def test_a_file_is_written_one_token_a_line() -> None:
    """A difference between two versions of the file reads well: one line for each token, in stable order."""
    document, tokens = Document(None), [issued(f"name {number}") for number in range(3)]
    for digest, token in tokens:
        document.append(digest, token)
    first, *lines, last = document.encode().decode().splitlines()
    assert (first, last) == ('{"version": 1, "tokens": [', "]}")
    assert [json.loads(line.removesuffix(",")) for line in lines] == [
        row(number, id=token.id, prefix=token.prefix, digest=f"sha256${digest.hex()}")
        | {"expires_at": None, "revoked_at": None, "scopes": [], "models": None}
        for number, (digest, token) in enumerate(tokens)
    ]


@pytest.mark.parametrize("layout", [in_lines, indented])
def test_a_change_leaves_everything_else_as_it_was(layout: Any) -> None:
    """Fields that this release does not know, in the file and in its records, survive every change."""
    odd = {"team": ["ä", 1.5, [None], 2**70], "x": {"y": {}}}
    document = Document(layout(row(0, **odd), row(1), row(2, **odd)).replace(b"{", b'{"owner": "ops", ', 1))
    document.append(*issued())
    document.revoke("id0", NOW)
    document.remove("id1")
    written = json.loads(document.encode())
    assert written["owner"] == "ops"
    assert written["tokens"][:2] == [row(0, **odd, revoked_at=INSTANT), row(2, **odd)]
    assert len(decode(document.encode()).tokens) == 3
    assert Document(document.encode()).encode() == document.encode()


def test_numbers_of_unknown_fields_are_kept() -> None:
    """A change keeps numbers that no Python float or int of msgspec holds, digit by digit."""
    document = Document(in_lines(row(note=[])).replace(b"[]}", b"[1e999, 0.10000000000000000001]}"))
    document.revoke("id0", NOW)
    assert b"[1e999,0.10000000000000000001]" in document.encode().replace(b" ", b"")


def test_fields_read_only_by_changes_are_whole() -> None:
    """A field that this release does not know, with bytes that are not UTF-8, makes a change fail."""
    with pytest.raises(ValueError, match="not UTF-8"):
        Document(in_lines(row(note="x")).replace(b'"x"', b'"\xff"'))


def test_any_layout_of_lines_is_decoded() -> None:
    """A change meets the record that it means, however the lines of a file are broken by hand."""
    nested = row(2, x=[{}, row(0), {}])
    content = in_lines(row(0), row(1), nested).replace(b",\n", b", ", 1).replace(b"[{}, ", b"[{},\n")
    document = Document(content.replace(b"}, {}]", b"},\n{}]"))
    document.remove("id0")
    assert json.loads(document.encode())["tokens"] == [row(1), nested]


def test_many_tokens_are_removed_in_linear_time() -> None:
    """A cleaning of a large file holds its lock for a moment: other writers give up after 10 s."""
    document = Document(in_lines(*map(row, range(20_000))))
    begun = time.process_time()
    for number in range(20_000):
        document.remove(f"id{number}")
    assert time.process_time() - begun < 1  # 20 ms; in quadratic time 4 s


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.none() | st.datetimes(timezones=st.just(UTC)), st.lists(st.text(), max_size=3))
def test_what_is_written_is_read_again(text: str, instant: datetime | None, scopes: list[str]) -> None:
    """Every name, instant and scope comes back from the file as it went in."""
    digest, token = issued()
    instants = dict.fromkeys(("expires_at", "revoked_at", "last_used_at"), instant)
    lists = {"scopes": tuple(scopes), "models": tuple(scopes) or None}
    token = msgspec.structs.replace(token, name=text, prefix=text, **instants, **lists)
    document = Document(None)
    document.append(digest, token)
    again = decode(document.encode()).tokens[digest]
    assert [getattr(again, name) for name in Token.__struct_fields__] == list(msgspec.structs.astuple(token))
