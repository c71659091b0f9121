"""References to tokens, typed or on stdin. The kinds of references are tested with ``find`` and with every store."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from freegpt_auth.tokens import generate_secret
from tests.commands.conftest import TOKEN_FILE, Done, Run, kept, put, row

SECRET, OTHER = generate_secret(), generate_secret()
WAYS = pytest.mark.parametrize("way", ["revoke", "delete"])


def test_dash_is_the_next_line_of_stdin(run: Run) -> None:
    """A secret can be piped to a command; each ``-`` is one line, with the line end of any system."""
    put(row(SECRET), row("sk-b", name="b"), row(OTHER))
    done = run("revoke", "-", "-", stdin=io.StringIO(f"{SECRET}\r\nb\n{OTHER}\n"))
    assert done.status == 0
    assert [bool(each.get("revoked_at")) for each in kept()] == [True, True, False]


@WAYS
def test_several_matches_change_nothing(run: Run, way: str) -> None:
    """If a prefix matches two tokens nothing is done, and their ids are printed to choose from."""
    content = put(row("sk-aaaaaaaaaaa" + "1" * 38, name="web"), row("sk-aaaaaaaaaaa" + "2" * 38, name="\x1b[2J"))
    ids = [each["id"] for each in kept()]
    assert run(way, "sk-aaaaaaaaaaa...") == Done(
        1,
        "",
        "freegpt-auth: 2 tokens match and nothing was done; give the id or prefix of one of these:\n"
        f"  {ids[0]}  sk-aaaaaaaaaaa... (web)\n"
        f"  {ids[1]}  sk-aaaaaaaaaaa... (\\x1b[2J)\n",
    )
    assert TOKEN_FILE.read_bytes() == content


@WAYS
def test_no_match_changes_nothing(run: Run, way: str) -> None:
    """A reference without a match is a failure, and is not repeated: it may be a secret."""
    content = put(row(SECRET), row("ab"))
    mistyped = SECRET[:-1] + ("a" if SECRET[-1] != "a" else "b")
    for reference in (mistyped, SECRET + "x", OTHER, SECRET[:13], "a-toke"):
        done = run(way, reference)
        assert done.failed_in_one_line(f"no token of {TOKEN_FILE.absolute()} matches")
        assert ("it is mistyped" in done.err) is (reference == mistyped)
        assert reference not in done.err
    assert TOKEN_FILE.read_bytes() == content


@WAYS
def test_one_bad_reference_changes_nothing(run: Run, way: str) -> None:
    """If one of several references matches no token or two, nothing is done; its position is named, not its text."""
    content = put(row(SECRET), row(OTHER, name="b"), row("sk-third", name="b"))
    for wrong, problem in (("nobody", "no token of .* matches"), ("b", "2 tokens match")):
        done = run(way, SECRET, OTHER, wrong)
        assert (done.status, done.out) == (1, "")
        assert re.match(f"freegpt-auth: {problem} reference 3 of 3[ ,].*nothing was done", done.err)
        assert "nobody" not in done.err
    assert TOKEN_FILE.read_bytes() == content


class Unreadable(io.BytesIO):
    """A terminal that was closed."""

    def read1(self, _size: int | None = -1, /) -> bytes:
        """Fail."""
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (None, "its line is empty"),
        (b"", "its line is empty"),
        (b" \n", "its line is empty"),
        (b"...\n", "it is none of them"),
        (b"x" * 4096, "it is none of them"),
        (b"x" * 4097, "its line is over 4096 characters"),
        (b"sk-\xff\xfe\n", "it is not text"),
        (Unreadable(), "stdin cannot be read"),
    ],
)
def test_stdin_without_a_token(run: Run, stdin: Any, problem: str) -> None:
    """A line of stdin that is no token is reported in one line, and nothing is done."""
    content = put(row(SECRET))
    stream = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
    done = run("revoke", "-", stdin=stream and io.TextIOWrapper(stream, encoding="utf-8"))
    assert done.failed_in_one_line(problem)
    assert TOKEN_FILE.read_bytes() == content


def test_endless_stdin_is_not_read_whole() -> None:
    """A line without an end does not fill the memory: a few KB of it are read."""
    put(row(SECRET))
    script = 'ulimit -v 2000000; exec "$0" -m freegpt_auth revoke - < /dev/zero'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, text=True, timeout=30, check=False)
    assert Done(done.returncode, done.stdout, done.stderr).failed_in_one_line("its line is over 4096 characters")
