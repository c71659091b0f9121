"""Decoding of a token file: bytes to tokens, or one sentence with the place of the fault."""

from __future__ import annotations

import bisect
import contextlib
import json
from codecs import BOM_UTF8
from datetime import datetime
from typing import Any

import pytest

from freegpt_auth.stores.file.decoding import decode
from freegpt_auth.stores.file.document import Document
from freegpt_auth.tokens import digest_of, prefix_of
from tests.stores.file.common import in_lines, indented, row

ENTRY = {"name": "old", "created_at": "2024-01-01T00:00:00"}


def _plain(**entries: object) -> bytes:
    """Return a file of plain tokens."""
    return json.dumps({f"sk-{name}": entry for name, entry in entries.items()}).encode()


# --- accepted


@pytest.mark.parametrize("layout", [in_lines, indented])
@pytest.mark.parametrize("count", [0, 2])
def test_a_file_is_read_in_any_layout(layout: Any, count: int) -> None:
    """A file that was formatted by hand has the same tokens, and no record in memory holds its digest."""
    contents = decode(layout(*(row(number, note=["a", "b"]) for number in range(count))))
    assert [token.id for token in contents.tokens.values()] == [f"id{number}" for number in range(count)]
    assert list(contents.tokens) == [number.to_bytes(32) for number in range(count)]
    assert (contents.blank, contents.ancestral) == (False, False)
    assert "00000000" not in repr(contents.tokens.values())


@pytest.mark.parametrize("layout", [in_lines, indented])
def test_byte_order_mark_is_skipped(layout: Any) -> None:
    """A file saved by an editor that adds a byte order mark means the same, and the next change drops the mark."""
    content = layout(row(), row(1))
    assert decode(BOM_UTF8 + content) == decode(content)
    document = Document(BOM_UTF8 + content)
    document.remove("id0")
    assert json.loads(document.encode())["tokens"] == [row(1)]


def test_record_over_lines_and_capital_digest() -> None:
    """A file half in this library's layout and half in another is read all the same."""
    content = in_lines(row(digest="sha256$" + "AB" * 32, note=["a", "b"])).replace(b'"a", "b"', b'"a",\n"b"')
    assert list(decode(content).tokens) == [b"\xab" * 32]


def test_empty_object_is_blank_and_empty_list_is_not() -> None:
    """A file that is an empty JSON object is told from one whose last token was deleted."""
    assert decode(b" {\n}\n") == ({}, True, False)
    assert decode(Document(None).encode()) == decode(Document(b"{}").encode()) == ({}, False, False)


# --- refused

BAD = {
    "zero bytes": (b"", "it is empty; a new token file is made by create, not by touch"),
    "a byte order mark alone": (BOM_UTF8, "it is empty"),
    "truncated": (in_lines(row(), row(1))[:-20], "it is cut off in line 3"),
    "truncated between two tokens": (in_lines(row(), row(1))[:-4], "it is cut off in line 3"),
    "no JSON": (b"tokens: []", "it is not JSON: line 1, column 1 cannot be read"),
    "no quotes": (in_lines(row()).replace(b'"id"', b"id"), "it is not JSON: line 2, column 2 cannot be read"),
    "NaN": (in_lines(row(note=float("nan"))), "it holds NaN, which is no number of JSON"),
    "half a character": (in_lines(row(note="\ud800")), "a number out of range, or half of a surrogate pair"),
    "a list": (b"[]", "it is not a JSON object"),
    "deep": (b'{"a":' * 100_000, "it is nested too deeply"),
    "a deep record": (in_lines(row()).replace(b'"id0"', b"[" * 100_000), "it is nested too deeply"),
    "a long version": (b'{"version": ' + b"9" * 400 + b"}", "its version is 99999999999999999999;"),
    "no UTF-8": (b'{"\xff": 1}', "it is not UTF-8: line 1 holds the byte 0xff"),
    "no UTF-8 in a record": (in_lines(row()).replace(b"name 0", b"name \xff"), "it is not UTF-8: line 2 holds"),
    "a newer version": (b'{"version": 2, "tokens": []}', "its version is 2; this release reads version 1"),
    "a version that equals 1": (b'{"version": true, "tokens": []}', "its version is True;"),
    "no version": (b'{"tokens": []}', "its version is None; this release reads version 1"),
    "no tokens": (b'{"version": 1}', "$.tokens must be a list"),
    "no record": (in_lines(row(), 5), "$.tokens[1] must be an object"),
    "no digest": (in_lines(*map(row, range(3)), row(3, digest=None)), "$.tokens[3].digest is missing"),
    "a short digest": (in_lines(row(), row(1, digest="sha256$ab")), "$.tokens[1].digest must be 'sha256$' and 64"),
    "another algorithm": (in_lines(row(digest="sha512$" + "a" * 64)), "$.tokens[0].digest"),
    "no hexadecimal": (indented(row(), row(1, digest="sha256$" + "g" * 64)), "$.tokens[1].digest"),
    "half a digest and blanks": (in_lines(row(digest="sha256$" + " ab" * 20 + "    ")), "$.tokens[0].digest"),
    "a digest twice": (in_lines(row(), row(1), row(2, digest=row()["digest"])), "the digest at $.tokens[2]"),
    "an id that forges, twice": (in_lines(row(id="\n\x1b"), row(1, id="\n\x1b")), "twice: \\n\\x1b"),
    "an empty id": (in_lines(row(id="")), "$.tokens[0].id must be a string of 1 to 64 characters"),
    "a long id": (in_lines(row(id="a" * 65)), "$.tokens[0].id must be a string of 1 to 64 characters"),
    "no offset": (in_lines(row(), row(1, expires_at="2025-01-01T00:00:00")), "$.tokens[1].expires_at must be a time"),
    "scopes in one string": (indented(row(scopes="a b")), "$.tokens[0].scopes must be a list of strings"),
    "a field twice": (in_lines(row()).replace(b'{"id', b'{"id": 1, "id', 1), "a field of $.tokens[0] stands there"),
    "tokens twice": (in_lines(row()).replace(b'"tok', b'"tokens": [1], "tok', 1), "a field of $ stands there twice"),
    "a wrong plain entry": (_plain(a=ENTRY, secret={"name": 1}), "entry 2 of a file of plain tokens: name must be a"),
    "half a plain entry": (_plain(secret={"name": ""}), "entry 1 of a file of plain tokens: created_at is missing"),
    "an empty plain token": (json.dumps({"": ENTRY}).encode(), "entry 1 of a file of plain tokens is an empty token"),
    "the year 0": (_plain(a={**ENTRY, "created_at": "0001-01-01T00:00:00+14:00"}), ""),
    "the year 10000": (_plain(a={**ENTRY, "last_used": "9999-12-31T23:59:59-14:00"}), ""),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_gets_one_sentence_with_the_place(fault: str) -> None:
    """The error is one short line with the fault and its place, and without a secret."""
    content, expected = BAD[fault]
    for reader in (decode, Document):
        with pytest.raises(ValueError, match=r".") as caught:
            reader(content)
        problem = str(caught.value)
        assert expected in problem
        assert "sk-" not in problem
        assert len(problem) < 120
        assert problem.isprintable()


def test_nesting_at_the_limit_is_a_bad_file() -> None:
    """Changing a file fails with one sentence, or not at all, however deep an unknown field is nested."""

    def nested(depth: int) -> bytes:
        return in_lines(row()).replace(b'"id0"', b'"id0", "note": ' + b"[" * depth + b"]" * depth)

    def is_refused(depth: int) -> bool:
        try:
            return not decode(nested(depth)).tokens
        except ValueError:
            return True

    limit = bisect.bisect_left(range(100_000), x=True, key=is_refused)
    for depth in range(limit - 10, limit + 10):
        # Either outcome is right, but no other.
        with contextlib.suppress(ValueError):
            assert len(decode(Document(nested(depth)).encode()).tokens) == 1


# --- the ancestor's format


def test_plain_tokens_become_records() -> None:
    """A file of the ancestor's format keeps its tokens, with their names, dates, state, and the ids in the usage."""
    used = "2024-03-01T10:00:00+00:00"
    content = _plain(
        old_and_working={**ENTRY, "last_used": used, "active": True, "unknown": 1},
        old_and_revoked={**ENTRY, "last_used": used, "active": False},
        old_never_used={**ENTRY, "last_used": None, "active": False},
    )
    contents, secrets = decode(content), list(json.loads(content))
    created_at, used_at = datetime(2024, 1, 1).astimezone(), datetime.fromisoformat(used)
    assert list(contents.tokens) == [digest_of(secret) for secret in secrets]
    assert [token.prefix for token in contents.tokens.values()] == [prefix_of(secret) for secret in secrets]
    assert [(token.created_at, token.revoked_at, token.last_used_at) for token in contents.tokens.values()] == [
        (created_at, None, used_at),
        (created_at, used_at, used_at),
        (created_at, created_at, None),
    ]
