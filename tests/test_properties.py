"""What holds for any input at all: hypothesis feeds the checks that ``fuzz/checks.py`` shares with the fuzzer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from freegpt_auth import Token
from freegpt_auth.stores.file.decoding import decode
from freegpt_auth.stores.file.document import Document

from .fuzz.checks import (
    CARRIERS,
    DEAD,
    FUTURE,
    GENERATED,
    IMPORTED,
    KEY,
    LIVE,
    NOW,
    PAST,
    PREFIX,
    PREFLIGHT,
    SECRETS,
    TARGETS,
    Headers,
    check_arguments,
    check_file,
    check_name,
    check_request,
    digest,
    row,
    written,
)

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
WORDS = [
    *("create", "list", "revoke", "delete", "--store", "--store=", "--expires-in", "--expires-in=1d", "--json", "--js"),
    *("--", "-", "-h", "--help", "--version", "--v", "ci", "30d", "t.json", "api_tokens.json", "missing/t.json"),
    *("", " ", ".", "..", "~", "postgresql://h/d", "x" * 201, "two\nlines", "\x1b[2J", "\u202e", "\udcff", "9" * 12),
    *(GENERATED, IMPORTED, GENERATED[:14], f"--store={GENERATED}", f"--expires-in={IMPORTED}", f"--{GENERATED}"),
]


def some(examples: int) -> settings:
    """Return how thoroughly one promise is tried, on a machine that may be busy."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


blanks = st.text(" \t\xa0\x85\x1c\x1f\x0b\x0c\r\n", max_size=2)
secrets = st.sampled_from([KEY, *LIVE, *DEAD, b""]) | st.binary(max_size=8)
schemes = st.sampled_from([b"Bearer ", b"bEARER ", b"Bearer", b"Basic ", b""])
spaces = blanks.map(lambda blank: blank.encode("latin-1"))
values = st.tuples(spaces, schemes, spaces, secrets, spaces).map(b"".join)
names = st.sampled_from([*CARRIERS, *PREFLIGHT, b"Authorization", b"cookie"]) | st.binary(max_size=8)
starts = st.sampled_from([PREFIX, PREFIX.upper(), ""])
offers = st.tuples(blanks, starts, secrets.map(lambda secret: secret.decode("latin-1")), blanks).map("".join)
protocols = st.lists(st.lists(offers | st.text(max_size=8), max_size=2).map(",".join), max_size=3)


@some(300)
@given(
    st.sampled_from(["GET", "HEAD", "OPTIONS", "PRI"]),
    st.text(max_size=9),
    st.lists(st.tuples(names, values), max_size=4),
)
def test_no_headers_but_the_right_ones_pass(method: str, path: str, headers: Headers) -> None:
    """Whatever bytes a client sends as headers, a valid secret in one carrier lets it in, or it is told no properly."""
    check_request("http", method, path, headers, [PREFIX + LIVE[0].decode()])


@some(300)
@given(st.lists(st.tuples(names, values), max_size=1), protocols)
def test_no_subprotocols_but_the_right_ones_pass(headers: Headers, subprotocols: list[str]) -> None:
    """Whatever a WebSocket client offers, it is let in for a valid secret only, which the application never sees."""
    check_request("websocket", "GET", "/", headers, subprotocols)


# --- token files


text = st.text(st.characters(), max_size=8)
numbers = st.integers() | st.sampled_from([10**400, -(2**64), 2**63]) | st.floats()
fields = st.sampled_from(
    ["version", "tokens", "id", "digest", "expires_at", "revoked_at", "active", "created_at", *SECRETS]
)
meaningful = st.sampled_from([PAST.isoformat(), FUTURE.isoformat(), row("two")["digest"]])
anything = st.recursive(
    st.none() | st.booleans() | numbers | text | meaningful,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | text, inner, max_size=3),
    max_leaves=8,
)
instants = st.sampled_from([None, PAST.isoformat(), FUTURE.isoformat()])
rows = st.builds(row, st.sampled_from(SECRETS[:4]), revoked_at=instants, expires_at=instants)
odd_rows = st.builds(lambda one, odd: {**one, **odd}, rows, st.dictionaries(fields | text, anything, max_size=2))
entries = {"name": text, "created_at": st.just("2024-01-01T00:00:00")}
plain = st.fixed_dictionaries(entries, optional={"active": st.booleans()})
envelopes = {"version": st.just(1) | anything, "tokens": st.lists(odd_rows, max_size=3) | anything}
documents = anything | st.dictionaries(st.sampled_from(SECRETS[:4]), plain) | st.fixed_dictionaries(envelopes)
layouts = st.sampled_from([written, lambda each: json.dumps({"version": 1, "tokens": each}, indent=1).encode()])
files = st.builds(lambda layout, each: layout(each), layouts, st.lists(rows | odd_rows, max_size=3))
encoded = st.builds(
    lambda document, ascii_: json.dumps(document, ensure_ascii=ascii_).encode("utf-8", "surrogatepass"),
    documents,
    st.booleans(),
)
splinters = st.sampled_from(
    [b"{}", b",\n", b"\n]}\n", b"null", b"\xff", b"\\ud800", b"1e999", b"\xef\xbb\xbf", b"\x00"]
)
splinters |= st.sampled_from([b"9" * 5000, b"[" * 100_000])


@some(200)
@given(st.binary(max_size=30) | encoded | files)
@example(b"[" * 100_000)
def test_no_file_opens_a_server_or_lets_a_stranger_in(content: bytes) -> None:
    """Whatever stands in a token file, a server reads it or says why not, and nobody gets in who is not listed."""
    check_file(content)


@some(200)
@given(files, st.data())
def test_no_damage_opens_a_server_or_lets_a_stranger_in(content: bytes, data: st.DataObject) -> None:
    """A file that was cut, flipped, doubled or mixed up never lets anybody in who is not in what is left of it."""
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
    check_file(content)


@some(60)
@given(st.lists(rows, unique_by=lambda each: each["id"]), layouts)
def test_a_sound_file_lets_in_exactly_who_is_active(records: list[Any], layout: Any) -> None:
    """Of a file that is in order every active token works, and no other."""
    works = [each for each in records if each["revoked_at"] is None and each["expires_at"] != PAST.isoformat()]
    accepted = check_file(layout(records))
    assert {row(secret)["id"] for secret in accepted} == {each["id"] for each in works}


known = ["id", "name", "prefix", "digest", "created_at", "expires_at", "revoked_at", "scopes", "models", "last_used_at"]
clean = st.text(max_size=20)
unknown = st.dictionaries(
    clean.filter(lambda name: name not in [*known, "version", "tokens"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | clean,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(clean, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
lists = st.lists(clean, max_size=3)
changes = st.lists(st.sampled_from("arx"), max_size=6)  # add, revoke, remove


@some(100)
@given(unknown, st.lists(st.tuples(clean, unknown, lists), max_size=4), changes, clean)
@example({}, [], ["r", "a", "r", "x"], "each change, the first of them in an empty file")
def test_any_file_survives_any_changes(envelope: Any, given_rows: list[Any], changes: list[str], name: str) -> None:
    """However often a file is changed, every name, scope and field that this release does not know stays as it was."""
    model = [row(f"old {n}", name=text, scopes=more, **odd) for n, (text, odd, more) in enumerate(given_rows)]
    content = json.dumps({"version": 1, "tokens": model, **envelope}).encode()
    for number, change in enumerate(changes):
        document, ids = Document(content), [each["id"] for each in model]
        if change == "a":
            token = Token(id=f"new {number}", name=name, prefix=name, created_at=NOW, scopes=(name,))
            document.append(digest(token.id), token)
            record = row(
                token.id, id=token.id, name=name, prefix=name, created_at="2025-01-01T00:00:00Z", scopes=[name]
            )
            model.append(record | dict.fromkeys(("expires_at", "revoked_at", "models")))
        elif ids and change == "r":
            document.revoke(ids[number % len(ids)], NOW)
            model[number % len(ids)]["revoked_at"] = "2025-01-01T00:00:00Z"
        elif ids:
            document.remove(ids[number % len(ids)])
            del model[number % len(ids)]
        content = document.encode()
    assert json.loads(content) == {"version": 1, "tokens": model, **envelope}
    assert [token.name for token in read(content).tokens.values()] == [each["name"] for each in model]


# --- arguments


typed = st.binary(max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"").replace(b"/", b"")))
words = st.sampled_from(WORDS) | typed | typed.map("--store={}".format) | typed.map("--expires-in={}".format)
commands = st.builds(lambda command, more: [command, *more], st.sampled_from(WORDS[:4]), st.lists(words, max_size=4))
lines = st.lists(words, max_size=5) | commands


@some(180)
@given(lines)
def test_no_arguments_end_in_a_traceback(arguments: list[str]) -> None:
    """Whatever is typed, a command does it or says in one line why not, and repeats no secret."""
    check_arguments(arguments)


# --- names


driving = st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Zs", "Mn", "Lu"]), max_size=5)


@some(80)
@given(st.text(st.characters(), max_size=20) | driving | st.sampled_from("xü ").map(lambda letter: letter * 201))
@example("a good name")
@example("\x1b[2J")
@example("\ud800")
def test_no_name_reaches_a_terminal_as_it_is(name: str) -> None:
    """A token can have any name of up to 200 characters that prints; of others in a file only what prints is shown."""
    check_name(name)


# --- what the fuzzer starts from


@pytest.mark.parametrize("seed", sorted(CORPUS.glob("*/*")), ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_what_a_fuzzer_starts_from_holds(seed: Path) -> None:
    """Every input that was once worth keeping for the fuzzer is tried by each run of the tests too."""
    TARGETS[seed.parent.name](seed.read_bytes())
