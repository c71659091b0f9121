"""Properties of any input: hypothesis feeds the checks of ``fuzz/checks.py``, which the fuzzer shares."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from .fuzz import checks

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SECRET, PLAIN = checks.GENERATED, checks.IMPORTED
WORDS = [
    *("create", "list", "revoke", "delete", "--store", "--store=", "--expires-in", "--expires-in=1d", "--json", "--js"),
    *("--", "-", "-h", "--help", "--version", "--v", "ci", "30d", "t.json", "api_tokens.json", "missing/t.json"),
    *("", " ", ".", "..", "~", "postgresql://h/d", "x" * 201, "two\nlines", "\x1b[2J", "\u202e", "\udcff", "9" * 12),
    *(SECRET, PLAIN, SECRET[:14], f"--store={SECRET}", f"--expires-in={PLAIN}", f"--{SECRET}"),
]


def some(examples: int) -> settings:
    """Return settings for so many examples, without a time limit: the machine may be busy."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


blanks = st.text(" \t\xa0\x85\x1c\x1f\x0b\x0c\r\n", max_size=2)
secrets = st.sampled_from([checks.KEY, *checks.LIVE, *checks.DEAD, b""]) | st.binary(max_size=8)
schemes = st.sampled_from([b"Bearer ", b"bEARER ", b"Bearer", b"Basic ", b""])
spaces = blanks.map(lambda blank: blank.encode("latin-1"))
values = st.tuples(spaces, schemes, spaces, secrets, spaces).map(b"".join)
names = st.sampled_from([*checks.CARRIERS, *checks.PREFLIGHT, b"Authorization", b"cookie"]) | st.binary(max_size=8)
starts = st.sampled_from([checks.PREFIX, checks.PREFIX.upper(), ""])
offers = st.tuples(blanks, starts, secrets.map(lambda secret: secret.decode("latin-1")), blanks).map("".join)
protocols = st.lists(st.lists(offers | st.text(max_size=8), max_size=2).map(",".join), max_size=3)


methods = st.sampled_from(["GET", "HEAD", "OPTIONS", "PRI"])


@some(300)
@given(methods, st.text(max_size=9), st.lists(st.tuples(names, values), max_size=4))
def test_only_valid_headers_pass(method: str, path: str, headers: checks.Headers) -> None:
    """Of all bytes in headers, only a valid secret in one carrier is accepted; other requests get a complete denial."""
    checks.check_request("http", method, path, headers, [checks.PREFIX + checks.LIVE[0].decode()])


@some(300)
@given(st.lists(st.tuples(names, values), max_size=1), protocols)
def test_only_valid_subprotocols_pass(headers: checks.Headers, subprotocols: list[str]) -> None:
    """Of all subprotocols, only a valid secret is accepted, and the application does not see it."""
    checks.check_request("websocket", "GET", "/", headers, subprotocols)


# --- token files


text = st.text(st.characters(), max_size=8)
numbers = st.integers() | st.sampled_from([10**400, -(2**64), 2**63]) | st.floats()
fields = st.sampled_from(
    ["version", "tokens", "id", "digest", "expires_at", "revoked_at", "active", "created_at", *checks.SECRETS]
)
meaningful = st.sampled_from([checks.PAST.isoformat(), checks.FUTURE.isoformat(), checks.row("two")["digest"]])
anything = st.recursive(
    st.none() | st.booleans() | numbers | text | meaningful,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | text, inner, max_size=3),
    max_leaves=8,
)
instants = st.sampled_from([None, checks.PAST.isoformat(), checks.FUTURE.isoformat()])
rows = st.builds(checks.row, st.sampled_from(checks.SECRETS[:4]), revoked_at=instants, expires_at=instants)
odd_rows = st.builds(lambda one, odd: {**one, **odd}, rows, st.dictionaries(fields | text, anything, max_size=2))
entries = {"name": text, "created_at": st.just("2024-01-01T00:00:00")}
plain = st.fixed_dictionaries(entries, optional={"active": st.booleans()})
envelopes = {"version": st.just(1) | anything, "tokens": st.lists(odd_rows, max_size=3) | anything}
documents = anything | st.dictionaries(st.sampled_from(checks.SECRETS[:4]), plain) | st.fixed_dictionaries(envelopes)
layouts = st.sampled_from([checks.written, lambda each: json.dumps({"version": 1, "tokens": each}, indent=1).encode()])
files = st.builds(lambda layout, each: layout(each), layouts, st.lists(rows | odd_rows, max_size=3))
texts = st.builds(lambda document, ascii_: json.dumps(document, ensure_ascii=ascii_), documents, st.booleans())
encoded = texts.map(lambda json_: json_.encode("utf-8", "surrogatepass"))
splinters = st.sampled_from([b"{}", b",\n", b"\n]}\n", b"null", b"\xff", b"\\ud800", b"1e999"])
splinters |= st.sampled_from([b"\xef\xbb\xbf", b"\x00", b"9" * 5000, b"[" * 100_000])


@some(200)
@given(st.binary(max_size=30) | encoded | files)
@example(b"[" * 100_000)
def test_no_file_accepts_an_unlisted_secret(content: bytes) -> None:
    """A server reads a token file or rejects it; no content opens the server or accepts an unlisted secret."""
    checks.check_file(content)


@some(200)
@given(files, st.data())
def test_no_damage_accepts_an_unlisted_secret(content: bytes, data: st.DataObject) -> None:
    """A file that was cut, flipped, doubled or mixed up accepts no secret that its remains do not list."""
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        after = start + 1
        lines = content.splitlines(keepends=True)
        way = data.draw(st.sampled_from(["flip", "cut", "truncate", "double", "insert"]))
        content = {
            "flip": content[:start] + bytes(byte ^ 1 << start % 8 for byte in content[start:after]) + content[after:],
            "cut": content[:start] + content[end:],
            "truncate": content[:end],
            "double": b"".join(line * (1 + (number == start % (len(lines) or 1))) for number, line in enumerate(lines)),
            "insert": content[:start] + data.draw(splinters) + content[start:],
        }[way]
    checks.check_file(content)


@some(60)
@given(st.lists(rows, unique_by=lambda each: each["id"]), layouts)
def test_sound_file_accepts_exactly_its_active_tokens(records: list[Any], layout: Any) -> None:
    """A valid file accepts every active token, and no other."""
    works = [each for each in records if each["revoked_at"] is None and each["expires_at"] != checks.PAST.isoformat()]
    accepted = checks.check_file(layout(records))
    assert {checks.row(secret)["id"] for secret in accepted} == {each["id"] for each in works}


# --- arguments


typed = st.binary(max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"").replace(b"/", b"")))
words = st.sampled_from(WORDS) | typed | typed.map("--store={}".format) | typed.map("--expires-in={}".format)
commands = st.builds(lambda command, more: [command, *more], st.sampled_from(WORDS[:4]), st.lists(words, max_size=4))
lines = st.lists(words, max_size=5) | commands


@some(180)
@given(lines)
def test_arguments_cause_no_traceback(arguments: list[str]) -> None:
    """For any arguments, a command succeeds or fails in one line without a secret."""
    checks.check_arguments(arguments)


# --- the corpus of the fuzzer


@pytest.mark.parametrize("seed", sorted(CORPUS.glob("*/*")), ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_fuzz_corpus(seed: Path) -> None:
    """Every input in the corpus of the fuzzer passes its check."""
    checks.TARGETS[seed.parent.name](seed.read_bytes())
