"""What stands in a token file: bytes to tokens and back, and one sentence with the place for every bad file."""

from __future__ import annotations

import bisect
import contextlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.stores.tokenfile import Document, read
from freegpt_auth.tokens import Token, digest_of, issue, prefix_of

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
INSTANT = "2025-06-01T12:00:00Z"
ENTRY = {"name": "old", "created_at": "2024-01-01T00:00:00"}

quick = settings(max_examples=100, deadline=None)


def _row(number: int = 0, **changes: object) -> dict[str, Any]:
    """Return a record as it stands in a file; a change to ``None`` leaves the field out."""
    row: dict[str, object] = {
        "id": f"id{number}",
        "name": f"name {number}",
        "prefix": "sk-a1b2c3d4e5f",
        "digest": f"sha256${number:064x}",
        "created_at": INSTANT,
    }
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


def _lines(*rows: object) -> bytes:
    """Return a file as this library writes it: one record a line."""
    return b'{"version": 1, "tokens": [\n' + b",\n".join(json.dumps(row).encode() for row in rows) + b"\n]}\n"


def _pretty(*rows: object) -> bytes:
    """Return the same file in an editor's layout."""
    return json.dumps({"version": 1, "tokens": rows}, indent=2).encode()


def _problem(content: bytes) -> str:
    """Return what is said of a bad file, in reading it to serve and in reading it to change it."""
    with pytest.raises(ValueError, match=r".") as caught:
        read(content)
    with pytest.raises(ValueError, match=r".") as again:
        Document(content)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


# --- what is read


@pytest.mark.parametrize("layout", [_lines, _pretty])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_file_is_read_in_any_layout(layout: Any, count: int) -> None:
    """A file that was formatted by hand means what it meant before."""
    contents = read(layout(*map(_row, range(count))))
    assert [token.id for token in contents.tokens.values()] == [f"id{number}" for number in range(count)]
    assert list(contents.tokens) == [number.to_bytes(32) for number in range(count)]
    assert (contents.blank, contents.ancestral) == (False, False)


def test_a_record_may_span_lines() -> None:
    """A file half in this library's layout and half in another is read all the same."""
    content = _lines(_row(0, note=["a", "b"]), _row(1)).replace(b'"a", "b"', b'"a",\n"b"')
    assert len(read(content).tokens) == 2


@pytest.mark.parametrize("content", [b"{}", b" {\n}\n"])
def test_an_empty_object_says_nothing(content: bytes) -> None:
    """A file that is an empty JSON object is told from one without tokens."""
    assert read(content) == ({}, True, False)


def test_digests_are_read_in_either_case() -> None:
    """A digest that another tool wrote in capitals is the same digest."""
    assert list(read(_lines(_row(digest="sha256$" + "AB" * 32))).tokens) == [b"\xab" * 32]


def test_a_digest_is_not_kept_in_the_record() -> None:
    """What the application sees of a token holds nothing by which its secret could be checked."""
    (token,) = read(_lines(_row(digest="sha256$" + "ab" * 32))).tokens.values()
    assert "abab" not in repr(token)


# --- what is refused

BAD = {
    "zero bytes": (b"", "truncated"),
    "truncated": (_lines(_row())[:-20], "truncated"),
    "truncated after a line": (_lines(_row(), _row(1)).rsplit(b",\n", 1)[0], "truncated"),
    "no JSON": (b"tokens: []", "malformed"),
    "two documents": (b"{}{}", "malformed"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "malformed"),
    "a list": (b"[]", "it is not a JSON object"),
    "null": (b"null", "it is not a JSON object"),
    "NaN": (b'{"version": NaN}', "malformed"),
    "NaN in a record": (_lines(_row(note=float("nan"))), "malformed"),
    "Infinity": (b'{"version": 1, "tokens": [], "x": Infinity}', "malformed"),
    "deep arrays": (b"[" * 100_000, "it is nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "it is nested too deeply"),
    "a deep record": (_lines(_row()).replace(b'"id0"', b"[" * 100_000), "it is nested too deeply"),
    "5000 digits": (b'{"version": ' + b"9" * 5000 + b"}", "out of range"),
    "a long version": (b'{"version": ' + b"9" * 400 + b"}", "its version is 99999999999999999999;"),
    "no UTF-8": (b'{"\xff": 1}', "it is not UTF-8"),
    "no UTF-8 in a record": (_lines(_row()).replace(b"name 0", b"name \xff"), "it is not UTF-8"),
    "half a surrogate pair": (b'{"\\ud800": {}}', "malformed"),
    "a newer version": (b'{"version": 2, "tokens": []}', "its version is 2; this release reads version 1"),
    "a version of another type": (b'{"version": true, "tokens": []}', "$.version"),
    "no version": (b'{"tokens": []}', "its version is None; this release reads version 1"),
    "no tokens": (b'{"version": 1}', "`tokens`"),
    "tokens of another type": (b'{"version": 1, "tokens": {}}', "$.tokens"),
    "a record of another type": (_lines(_row(), 3), "$.tokens[1]"),
    "no digest": (_lines(*map(_row, range(3)), _row(3, digest=None)), "`digest` - at `$.tokens[3]`"),
    "a digest of another type": (_lines(*map(_row, range(3)), _row(3, digest=7)), "`$.tokens[3].digest`"),
    "a short digest": (_lines(*map(_row, range(3)), _row(3, digest="sha256$ab")), "$.tokens[3].digest"),
    "another algorithm": (_lines(_row(digest="sha512$" + "a" * 64)), "$.tokens[0].digest"),
    "no hexadecimal": (_pretty(_row(), _row(1, digest="sha256$" + "g" * 64)), "$.tokens[1].digest"),
    "blanks in a digest": (_lines(_row(digest="sha256$" + "ab " * 21 + "a")), "$.tokens[0].digest"),
    "half a digest and blanks": (_lines(_row(digest="sha256$" + " ab" * 20 + "    ")), "$.tokens[0].digest"),
    "a digest twice": (_lines(_row(), _row(1), _row(2, digest=_row()["digest"])), "the digest at $.tokens[2]"),
    "an id twice": (_pretty(_row(), _row(1, id="id0")), "the id at $.tokens[1] stands there twice: id0"),
    "an id that forges": (_lines(_row(id="\n\x1b"), _row(1, id="\n\x1b")), "twice: \\n\\x1b"),
    "an empty id": (_lines(_row(id="")), "$.tokens[0].id"),
    "a long id": (_lines(_row(id="a" * 65)), "$.tokens[0].id"),
    "an instant without offset": (_lines(_row(), _row(1, expires_at="2025-01-01T00:00:00")), "$.tokens[1].expires_at"),
    "an instant that is none": (_lines(_row(revoked_at="soon")), "$.tokens[0].revoked_at"),
    "scopes as text": (_lines(_row(scopes="chat")), "$.tokens[0].scopes"),
    "a wrong plain entry": (json.dumps({"sk-a": ENTRY, "sk-secret": {"name": 1}}).encode(), "in entry 2 of a file of"),
    "an empty plain token": (json.dumps({"": ENTRY}).encode(), "entry 1 of a file of plain tokens is an empty token"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_gets_one_sentence_with_the_place(fault: str) -> None:
    """An operator is told in one short line what is wrong with the file and where, and no secret is in it."""
    content, expected = BAD[fault]
    problem = _problem(content)
    assert expected in problem
    assert "sk-" not in problem
    assert len(problem) < 200
    assert problem.isprintable()


@pytest.mark.parametrize("instant", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_instants_at_the_ends_of_time_are_a_bad_file(instant: str) -> None:
    """A file of plain tokens with an absurd date is refused like any other bad file."""
    _problem(json.dumps({"sk-secret": {**ENTRY, "created_at": instant}}).encode())


def test_nesting_at_the_limit_is_a_bad_file() -> None:
    """Changing a file fails with one sentence, or not at all, however deep an unknown field is nested."""

    def nested(depth: int) -> bytes:
        return _lines(_row()).replace(b'"id0"', b'"id0", "note": ' + b"[" * depth + b"]" * depth)

    def is_refused(depth: int) -> bool:
        try:
            return not read(nested(depth)).tokens
        except ValueError:
            return True

    limit = bisect.bisect_left(range(100_000), x=True, key=is_refused)
    for depth in range(limit - 10, limit + 10):
        # Either outcome is right, but no other.
        with contextlib.suppress(ValueError):
            assert len(read(Document(nested(depth)).encode()).tokens) == 1
    assert _problem(nested(limit + 100)) == "it is nested too deeply"


@quick
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever happens to the bytes of a file, reading them ends in tokens or in one kind of error."""
    content = bytearray(data.draw(st.sampled_from([_lines(_row(), _row(1)), json.dumps({"sk-a": ENTRY}).encode()])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        tokens = read(bytes(content)).tokens
    except ValueError as error:
        assert str(error)  # noqa: PT017  either outcome is right
    else:
        assert all(len(digest) == 32 and isinstance(token, Token) for digest, token in tokens.items())


@quick
@given(
    st.recursive(
        st.sampled_from([None, True, 1, -1.5, "", "sk-a", INSTANT, "sha256$" + "ab" * 32]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*_row(), "version", "tokens", "x"]), inner, max_size=6)
        ),
        max_leaves=12,
    )
)
def test_json_of_any_shape_is_read_or_refused(value: object) -> None:
    """Whatever JSON a file holds, reading it ends in tokens or in one kind of error."""
    content = json.dumps(value).encode()
    try:
        assert all(isinstance(token, Token) for token in read(content).tokens.values())
    except ValueError as error:
        assert str(error)  # noqa: PT017  either outcome is right


# --- what is written


def _issued(number: int) -> tuple[bytes, Token]:
    token, secret = issue(f"name {number}", now=NOW + timedelta(seconds=number))
    return digest_of(secret), token


def test_a_file_is_written_one_token_a_line() -> None:
    """A difference between two versions of the file reads well: one line for each token, in stable order."""
    document = Document(None)
    issued = [_issued(number) for number in range(3)]
    for digest, token in issued:
        document.append(digest, token)
    lines = document.encode().decode().splitlines()
    assert (lines[0], lines[-1]) == ('{"version": 1, "tokens": [', "]}")
    assert [json.loads(line.removesuffix(","))["id"] for line in lines[1:-1]] == [token.id for _, token in issued]
    assert json.loads(lines[1].removesuffix(",")) == {
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


def test_an_empty_file_is_written_with_its_version() -> None:
    """A file whose last token was deleted still says that authentication is on."""
    assert read(Document(None).encode()) == ({}, False, False)
    assert json.loads(Document(b"{}").encode()) == {"version": 1, "tokens": []}


@pytest.mark.parametrize("layout", [_lines, _pretty])
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


@quick
@given(
    st.lists(
        st.tuples(
            st.text(max_size=20), st.none() | st.datetimes(timezones=st.just(UTC)), st.lists(st.text(), max_size=3)
        ),
        max_size=4,
    )
)
def test_what_is_written_is_read_again(values: list[tuple[str, datetime | None, list[str]]]) -> None:
    """Every name, instant and scope comes back from the file as it went in."""
    document, put = Document(None), {}
    for number, (text, instant, scopes) in enumerate(values):
        digest, token = _issued(number)
        put[digest] = msgspec.structs.replace(
            token,
            name=text,
            prefix=text,
            expires_at=instant,
            revoked_at=instant,
            last_used_at=instant,
            scopes=tuple(scopes),
            models=tuple(scopes) or None,
        )
        document.append(digest, put[digest])
    read_again = read(document.encode()).tokens
    fields = Token.__struct_fields__
    assert list(read_again) == list(put)
    for digest, token in put.items():
        assert [getattr(read_again[digest], name) for name in fields] == [getattr(token, name) for name in fields]


# --- the ancestor's format


def test_plain_tokens_become_records() -> None:
    """A file of the ancestor's format keeps its tokens, with their names, dates and state."""
    used = "2024-03-01T10:00:00+00:00"
    ancestor = {
        "sk-old-and-working": {**ENTRY, "last_used": used, "active": True, "unknown": 1},
        "sk-old-and-revoked": {**ENTRY, "last_used": used, "active": False},
        "sk-old-never-used": {**ENTRY, "last_used": None, "active": False},
    }
    contents = read(json.dumps(ancestor).encode())
    created_at, used_at = datetime(2024, 1, 1).astimezone(), datetime.fromisoformat(used)
    assert contents.ancestral
    assert list(contents.tokens) == [digest_of(secret) for secret in ancestor]
    assert [token.prefix for token in contents.tokens.values()] == [prefix_of(secret) for secret in ancestor]
    assert [(token.created_at, token.revoked_at, token.last_used_at) for token in contents.tokens.values()] == [
        (created_at, None, used_at),
        (created_at, used_at, used_at),
        (created_at, created_at, None),
    ]


def test_plain_tokens_keep_their_ids_from_reading_to_reading() -> None:
    """Usage that was recorded before the file was converted still belongs to its token afterwards."""
    content = json.dumps({"sk-one": ENTRY, "sk-two": ENTRY}).encode()
    first = [token.id for token in read(content).tokens.values()]
    assert first == [token.id for token in read(Document(content).encode()).tokens.values()]
    assert len(set(first)) == 2


def test_bytes_that_only_a_change_would_read_are_a_bad_file() -> None:
    """A field that this release does not know and that is not UTF-8 makes a change fail, and is never half-written."""
    content = _lines(_row(note="x")).replace(b'"x"', b'"\xff"')
    with pytest.raises(ValueError, match="not UTF-8"):
        Document(content)


def test_a_converted_file_holds_no_plain_token() -> None:
    """Whoever reads a converted file learns no token from it, and each still works."""
    content = json.dumps({"sk-one-and-only": {**ENTRY, "last_used": ENTRY["created_at"]}}).encode()
    written = Document(content).encode()
    assert b"sk-one" not in written
    assert read(written)._replace(ancestral=True) == read(content)
