"""All commands: arguments, store, output streams and exit status, and no secret in a message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from freegpt_auth.tokens import digest_of, generate_secret, has_valid_checksum
from tests.commands.conftest import TOKEN_FILE, Done, Run, kept, put, row

SECRET = generate_secret()
COMMANDS = (["create", "ci"], ["list"], ["list", "--json"], ["revoke", SECRET], ["delete", SECRET])


def in_shell(line: str) -> Done:
    """Run a line of shell in which ``freegpt`` stands for the commands."""
    definition = f'freegpt() {{ {shlex.quote(sys.executable)} -m freegpt_auth "$@"; }}\n'
    done = subprocess.run(["sh", "-c", definition + line], capture_output=True, text=True, timeout=30, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


# --- the store


def test_store_option_before_and_after_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--store may stand on either side of the command; it precedes FREEGPT_AUTH_STORE, which precedes the default."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "environment.json")
    assert run("--store", "before.json", "create", "one").status == 0
    assert run("create", "two", "--store", "after.json").status == 0
    assert run("create", "three").status == 0
    monkeypatch.delenv("FREEGPT_AUTH_STORE")
    assert run("create", "four").status == 0
    stores = {"before.json": "one", "after.json": "two", "environment.json": "three", "api_tokens.json": "four"}
    for path, name in stores.items():
        assert [each["name"] for each in json.loads(Path(path).read_text())["tokens"]] == [name]
    assert {path.name for path in Path().glob("*.json")} == set(stores)


@pytest.mark.parametrize("location", ["", ".", "folder", "TOKENS/t.json", "postgresql://h/d"])
def test_unusable_location_writes_nothing(run: Run, location: str) -> None:
    """A location that cannot hold tokens fails in one line, and nothing is written anywhere."""
    Path("folder").mkdir()
    Path("TOKENS").touch()
    for arguments in COMMANDS:
        done = run(*arguments, "--store", location)
        assert done.failed_in_one_line()
        assert "the output" not in done.err
    # A folder can be locked before it is found not to be a token file.
    assert {path.name for path in Path().rglob("*")} <= {"folder", "folder.lock", "TOKENS"}


def test_missing_folder_is_not_made(run: Run) -> None:
    """A folder is not made by accident: ``create`` reports that it is missing."""
    assert run("create", "ci", "--store", "missing/t.json").failed_in_one_line("create the folder first")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments", [["list"], ["create", "ci"], ["copy", "a.json", "b.json"]])
def test_deleted_working_directory_is_named(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    """A relative path without a working directory is explained, not reported as a fault of the output."""
    (tmp_path / "gone").mkdir()
    with contextlib.chdir("gone"):
        (tmp_path / "gone").rmdir()
        done = run(*arguments)
        os.chdir(tmp_path)
    assert done.failed_in_one_line("the working directory was deleted")


@pytest.mark.parametrize("content", [b'{"version": 1, "tok', b'{"sk-plain-old-token": {"name": 3, "created_at": ""}}'])
def test_bad_token_file_is_one_line(run: Run, content: bytes) -> None:
    """A command reports a fault of the token file in one line without secrets, and leaves the file unchanged."""
    TOKEN_FILE.write_bytes(content)
    for arguments in COMMANDS:
        done = run(*arguments)
        assert done.failed_in_one_line("api_tokens.json: ")
        assert "sk-plain-old-token" not in done.err
    assert TOKEN_FILE.read_bytes() == content


# --- the output


FULL = ["create ci >/dev/full", "create ci --json >&-", "list >/dev/full", "list --json >&-", "--help >/dev/full"]


@pytest.mark.parametrize("line", FULL)
def test_unwritable_stdout_fails(line: str) -> None:
    """If stdout is full or closed a command fails in one line, and leaves no token with an unseen secret."""
    put(row(SECRET, name="before"))
    assert in_shell(f"freegpt {line}").failed_in_one_line("cannot write the output")
    assert [each["name"] for each in kept()] == ["before"]


@pytest.mark.parametrize("line", ["create ci", "list"])
def test_closed_pipe_is_quiet(line: str) -> None:
    """If the reader of stdout has gone a command fails without a message, and leaves no token with an unseen secret."""
    put(row(SECRET, name="before"))
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "freegpt_auth", *line.split()]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert [each["name"] for each in kept()] == ["before"]


@pytest.mark.parametrize("line", ["create ci 2>&-", "create ci 2>/dev/full", "create ci"])
def test_unwritable_stderr_fails_nothing(line: str) -> None:
    """Without a stderr, and with unbuffered output as in containers, stdout still has the secret and only that."""
    done = in_shell(f"PYTHONUNBUFFERED=1 freegpt {line}")
    assert done.status == 0
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}\n", done.out)
    assert [each["digest"] for each in kept()] == [f"sha256${digest_of(done.out.strip()).hex()}"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_partly_written_secret_is_no_token(monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    """If the disk takes only a part of the secret the token is removed again, with unbuffered output too."""
    for name in [each for each in os.environ if "COVERAGE" in each]:
        monkeypatch.delenv(name)  # it needs room too
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    Path("output").write_bytes(b" " * 10_230)
    done = in_shell("ulimit -f 20; freegpt create ci >>output")  # 20 blocks of 512 bytes
    assert done == Done(1, "", "freegpt-auth: cannot write the output: File too large\n")
    assert Path("output").stat().st_size == 10_240
    assert kept() == []


def test_ascii_terminal_gets_the_list() -> None:
    """A terminal without the check mark shows the code of the character instead."""
    put(row(SECRET, name="büro"))
    done = in_shell("PYTHONIOENCODING=ascii freegpt list")
    assert (done.status, done.err) == (0, "")
    assert "   Name: b\\xfcro\n   Status: \\u2713 Active\n" in done.out


def test_any_text_stream_is_a_stdout(run: Run) -> None:
    """A program that calls the commands may replace stdout by any text stream."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        assert run("create", "ci").out == ""
    assert has_valid_checksum(stream.getvalue().strip())


def test_interrupt_is_quiet(run: Run) -> None:
    """Ctrl-C ends a waiting command with the usual status and no traceback."""

    class Interrupted:
        def readline(self, _size: int) -> str:
            raise KeyboardInterrupt

    assert run("revoke", "-", stdin=Interrupted()) == Done(130, "", "")


# --- the arguments


def test_version_and_help(run: Run) -> None:
    """--version prints the version; --help names the six commands, and each help ends with a command to copy."""
    assert re.fullmatch(r"freegpt-auth \d+\.\d+\.\d+\S*\n", run("--version").out)
    names = re.findall(r"^    (\w+)  ", run("--help").out, re.MULTILINE)
    assert names == ["create", "list", "revoke", "delete", "copy", "migrate"]
    for name in ("", *names):
        done = run(*name.split(), "--help")
        assert (done.status, done.err) == (0, "")
        assert ("--store PATH" in done.out) is (name != "copy")
        assert re.search(rf"\nExample: python -m freegpt_auth .*{name or 'create'}\b[^\n]*\n\Z", done.out)


_TIMES = ["", "0d", "-1", "1y", "1.5h", "d", "٣d", " 1d", "1D", "9" * 12, "1" * 13, "9" * 11 + "w", "\x1b[2J", SECRET]


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["create"], ["revoke"], ["create", "two", SECRET], ["list", "\x1b[2J"], ["rename", "x"], [SECRET]),
        *(["create", name] for name in ("-x", " ", "x" * 201, "\x1b[31mred", "two\nlines", "\udcff")),
        *(["create", "ci", f"--expires-in={text}"] for text in _TIMES),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    """Wrong usage ends with status 2 and one line that points to the help; it shows no secret and does nothing."""
    done = run(*arguments)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"python -m freegpt_auth[^\n]*: [^\n]+; see python -m freegpt_auth[^\n]* --help\n", done.err)
    assert done.err.rstrip("\n").isprintable()
    assert SECRET[14:] not in done.err
    assert not TOKEN_FILE.exists()


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("postgresql://u:hunter2@h/d", 2),
        ("postgresql://h/d?user=u&password=hunter2&sslmode=disable", 2),
        ("host=h password=hunter2", 1),
        ("postgresql:/u:hunter2@h/d", 1),
        pytest.param(f"{SECRET}/t.json", 1, id="secret"),
    ],
)
def test_secrets_are_masked(run: Run, url: str, status: int) -> None:
    """A secret or URL in the wrong place, and a mistyped URL, are reported masked, and make no file."""
    misplaced = (["list", url], ["create", "ci", url], ["copy", url], [url])
    mistyped = (["create", "ci", "--store", url], ["copy", url, "t.json"], ["copy", "t.json", url])
    for arguments in misplaced if status == 2 else mistyped:
        done = run(*arguments)
        assert done.status == status
        assert "hunter2" not in done.err
        assert SECRET[14:] not in done.err
    assert list(Path().iterdir()) == []
