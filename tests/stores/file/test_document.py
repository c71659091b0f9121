"""Changes of a token file: other fields stay, and the new bytes are readable by people and by the decoder."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.stores.file.decoding import decode as read
from freegpt_auth.stores.file.document import Document
from freegpt_auth.tokens import Token, digest_of, issue

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
INSTANT = "2025-06-01T12:00:00Z"

quick = settings(max_examples=50, deadline=None)


def _row(number: int, **changes: object) -> dict[str, Any]:
    """Return a record as it stands in a file."""
    row: dict[str, object] = {
        "id": f"id{number}",
        "name": f"name {number}",
        "prefix": "sk-a1b2c3d4e5f",
        "digest": f"sha256${number:064x}",
        "created_at": INSTANT,
    }
    return row | changes


def _in_lines(*rows: object) -> bytes:
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(row).encode() for row in rows) + b"\n]}\n"


def _indented(*rows: object) -> bytes:
    return json.dumps({"version": 1, "tokens": rows}, indent=2).encode()


def _issued(number: int) -> tuple[bytes, Token]:
    token, secret = issue(f"name {number}", now=NOW + timedelta(seconds=number))
    return digest_of(secret), token


def test_a_file_is_written_one_token_a_line() -> None:
    """A difference between two versions of the file reads well: one line for each token, in stable order."""
    document, issued = Document(None), [_issued(number) for number in range(3)]
    for each in issued:
        document.append(*each)
    first, *lines, last = document.encode().decode().splitlines()
    assert (first, last) == ('{"version": 1, "tokens": [', "]}")
    assert [json.loads(line.removesuffix(","))["id"] for line in lines] == [token.id for _, token in issued]
    assert json.loads(lines[0].removesuffix(",")) == {
        "id": issued[0][1].id,
        "name": "name 0",
        "prefix": issued[0][1].prefix,
        "digest": "sha256$" + issued[0][0].hex(),
        "created_at": INSTANT,
        "expires_at": None,
        "revoked_at": None,
        "scopes": [],
        "models": None,
    }


@pytest.mark.parametrize("layout", [_in_lines, _indented])
def test_a_change_leaves_everything_else_as_it_was(layout: Any) -> None:
    """Fields that this release does not know, in the file and in its records, survive every change."""
    odd = {"team": ["ä", 1.5, None, 2**70], "x": {"y": {}}}
    document = Document(layout(_row(0, **odd), _row(1), _row(2, **odd)).replace(b"{", b'{"owner": "ops", ', 1))
    document.append(*_issued(3))
    document.revoke("id0", NOW)
    document.remove("id1")
    written = json.loads(document.encode())
    assert written["owner"] == "ops"
    assert written["tokens"][:2] == [_row(0, **odd, revoked_at=INSTANT), _row(2, **odd)]
    assert len(read(document.encode()).tokens) == 3
    assert Document(document.encode()).encode() == document.encode()


def test_any_layout_of_lines_is_decoded() -> None:
    """A change meets the record that it means, however the lines of a file are broken by hand."""
    nested = _row(2, x=[{}, _row(0), {}])
    content = _in_lines(_row(0), _row(1), nested).replace(b",\n", b", ", 1).replace(b"[{}, ", b"[{},\n")
    content = content.replace(b"}, {}]", b"},\n{}]")
    document = Document(content)
    document.remove("id0")
    assert json.loads(document.encode())["tokens"] == [_row(1), nested]


def test_many_tokens_are_removed_in_linear_time() -> None:
    """A cleaning of a large file holds its lock for a moment: other writers give up after 10 s."""
    document = Document(_in_lines(*(_row(number) for number in range(20_000))))
    begun = time.process_time()
    for number in range(20_000):
        document.remove(f"id{number}")
    assert time.process_time() - begun < 1  # 20 ms; in quadratic time 4 s


@quick
@given(st.text(max_size=20), st.none() | st.datetimes(timezones=st.just(UTC)), st.lists(st.text(), max_size=3))
def test_what_is_written_is_read_again(text: str, instant: datetime | None, scopes: list[str]) -> None:
    """Every name, instant and scope comes back from the file as it went in."""
    digest, token = _issued(0)
    instants = dict.fromkeys(("expires_at", "revoked_at", "last_used_at"), instant)
    lists = {"scopes": tuple(scopes), "models": tuple(scopes) or None}
    token = msgspec.structs.replace(token, name=text, prefix=text, **instants, **lists)
    document = Document(None)
    document.append(digest, token)
    again = read(document.encode()).tokens[digest]
    assert [getattr(again, name) for name in Token.__struct_fields__] == list(msgspec.structs.astuple(token))
