"""The commands: what they print and where, what they accept, and how they fail."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from freegpt_auth.cli import main
from freegpt_auth.stores import disk, file
from freegpt_auth.tokens import digest_of, generate_secret, has_valid_checksum, prefix_of
from freegpt_auth.usage import UsageRecorder

TOKEN_FILE = Path("api_tokens.json")
REVOKED_AT = "2025-11-30T08:00:00Z"


@dataclass(frozen=True)
class Done:
    """What a command that has ended left behind."""

    status: int
    out: str
    err: str

    @property
    def failed_in_one_line(self) -> bool:
        """Whether it failed as a command may: one line for the operator, nothing that passes for data."""
        return self.status == 1 and not self.out and bool(re.fullmatch(r"freegpt-auth: [^\n]+\n", self.err))


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _no_wait_after_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server runs beside the commands of this process, so none has to be waited for."""
    monkeypatch.setattr(file, "FRESHNESS", 0.0)


@pytest.fixture(autouse=True)
def _buffered_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that is buffered, as it is by default, is where a full disk strikes late."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process."""

    def call(*arguments: str) -> Done:
        try:
            status: Any = main(arguments)
        except SystemExit as exit_:
            status = exit_.code
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets the time zone of this machine."""

    def enter(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield enter
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that every user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


# A first command imports what commands import: the interpreter may lie where nobody may read.
_AS_NOBODY = """
import contextlib, io, os, sys
import filelock
from freegpt_auth.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(["--store", "nothing.json", "list"])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main())
"""


def as_nobody(*arguments: str) -> Done:
    """Run a command as a user to whom permissions apply; they do not apply to root."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def in_shell(line: str) -> Done:
    """Run a line of shell in which ``freegpt`` stands for the commands."""
    definition = f'freegpt() {{ {shlex.quote(sys.executable)} -m freegpt_auth "$@"; }}\n'
    done = subprocess.run(["sh", "-c", definition + line], capture_output=True, text=True, timeout=30, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def row(secret: str, **fields: Any) -> dict[str, Any]:
    """Return a record as the token file has it."""
    digest = digest_of(secret).hex()
    return {
        "id": digest[:12],
        "name": "a-token",
        "prefix": prefix_of(secret),
        "digest": f"sha256${digest}",
        "created_at": "2025-11-26T10:30:00Z",
        **fields,
    }


def put(*rows: dict[str, Any]) -> bytes:
    """Write a token file and return its content."""
    content = json.dumps({"version": 1, "tokens": rows}).encode()
    TOKEN_FILE.write_bytes(content)
    return content


def kept() -> list[dict[str, Any]]:
    """Return the records in the token file."""
    rows: list[dict[str, Any]] = json.loads(TOKEN_FILE.read_bytes())["tokens"]
    return rows


# --- create


def test_create_prints_the_secret_alone(run: Run) -> None:
    """``TOKEN=$(... create ci)`` holds the secret and nothing else; the note to save it goes to stderr."""
    done = run("create", "ci")
    assert done.status == 0
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}\n", done.out)
    secret = done.out.strip()
    assert has_valid_checksum(secret)
    assert done.err == (
        f"Created token {secret[:14]}... for ci in api_tokens.json.\nSave this token now: it is not shown again.\n"
    )


def test_the_secret_is_nowhere_else(run: Run, tmp_path: Path) -> None:
    """A secret is shown once: no file, no message and no later output of any command holds it."""
    done = run("create", "ci")
    secret = done.out.strip()
    said = [done.err]
    for arguments in (["list"], ["list", "--json"], ["revoke", secret], ["revoke", secret], ["delete", secret]):
        done = run(*arguments)
        assert done.status == 0
        said += [done.out, done.err]
        said += [path.read_text() for path in tmp_path.iterdir()]
    # What follows the prefix is the secret part; not even that may be found.
    assert not [text for text in said if secret[14:] in text]


def test_a_new_token_file_is_its_owners(run: Run) -> None:
    """The token file can be read by its owner only, however lax the umask is."""
    before = os.umask(0)
    try:
        assert run("create", "ci").status == 0
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in Path().iterdir()] == [0o600, 0o600]


@pytest.mark.parametrize(
    "name",
    [
        "production web app",
        """it's "quoted" `twice` $HOME""",
        "büro-日本-🔑",
        " edges ",
        "back\\slash",
        "x" * 200,
        "{braces} %s",
        "[]",
    ],
)
def test_a_name_is_kept_as_it_was_typed(run: Run, name: str) -> None:
    """Any name that prints comes back unchanged in the list, for a person and in JSON."""
    assert run("create", name).status == 0
    assert f"   Name: {name}\n" in run("list").out
    assert json.loads(run("list", "--json").out)[0]["name"] == name


@pytest.mark.parametrize(
    "name",
    ["", "   ", "x" * 201, "\x1b[31mred", "two\nlines", "bell\x07", "\x7f", "\x9b2J", "\u202eevil", "\u2028", "\udcff"],
)
def test_a_name_that_does_not_print_is_refused(run: Run, name: str) -> None:
    """A name with terminal escapes or control characters makes no token, and does not reach the terminal either."""
    done = run("create", name)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"[^\n]*a token's name must not [^\n]+; see [^\n]+ --help\n", done.err)
    assert done.err.rstrip("\n").isprintable()
    assert not TOKEN_FILE.exists()


@pytest.mark.parametrize(
    ("text", "lifetime"),
    [
        ("90d", timedelta(days=90)),
        ("12h", timedelta(hours=12)),
        ("30m", timedelta(minutes=30)),
        ("2w", timedelta(weeks=2)),
        ("45s", timedelta(seconds=45)),
        ("3600", timedelta(hours=1)),
    ],
)
def test_expires_in_sets_the_end(run: Run, text: str, lifetime: timedelta) -> None:
    """A token made with --expires-in ends exactly that time after it was created, and the message says when."""
    done = run("create", "ci", "--expires-in", text, "--json")
    record = json.loads(done.out)
    expires_at = datetime.fromisoformat(record["expires_at"])
    assert expires_at - datetime.fromisoformat(record["created_at"]) == lifetime
    assert f" until {expires_at.astimezone().replace(tzinfo=None).isoformat()} in " in done.err


@pytest.mark.parametrize(
    "text",
    ["", "0", "0d", "-1", "1y", "1.5h", "d", "٣d", " 1d", "1d ", "1D", "soon", "1" * 13, "9" * 11 + "w", "\x1b[2J"],
)
def test_a_bad_time_is_wrong_usage(run: Run, text: str) -> None:
    """A time that cannot be understood makes no token; one line says what can be written."""
    done = run("create", "ci", f"--expires-in={text}")
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"[^\n]+--expires-in[^\n]+\n", done.err)
    assert done.err.rstrip("\n").isprintable()
    assert not TOKEN_FILE.exists()


def test_the_far_end_of_the_calendar(run: Run, zone: Callable[[str], None]) -> None:
    """A token may last to the end of the calendar or be refused; neither ends in a traceback."""
    zone("XXX-14")
    seconds = int((datetime.max.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()) - 3600
    assert run("create", "ci", "--expires-in", str(seconds)).status in (0, 2)


def test_create_json(run: Run) -> None:
    """``create --json`` prints the secret together with the record, and nothing else on stdout."""
    done = run("create", "ci", "--json", "--expires-in", "1d")
    content = json.loads(done.out)
    assert list(content) == [
        "token",
        "id",
        "name",
        "prefix",
        "status",
        "created_at",
        "expires_at",
        "revoked_at",
        "last_used_at",
        "use_count",
    ]
    assert content["prefix"] == content["token"][:14]
    assert (content["status"], content["use_count"], content["last_used_at"]) == ("active", 0, None)
    assert content["token"] not in done.err


def test_creating_at_once_loses_no_token() -> None:
    """Several people who create tokens at the same moment all get one that stays."""
    done = in_shell("for n in 1 2 3 4; do freegpt create n$n & done; wait")
    assert {row_["digest"] for row_ in kept()} == {
        f"sha256${digest_of(secret).hex()}" for secret in done.out.splitlines()
    }
    assert len(kept()) == 4


# --- list


def test_list_is_laid_out_as_the_guide_shows(run: Run, zone: Callable[[str], None]) -> None:
    """Every line of the list stands where the guide has it, in local time without an offset."""
    zone("XXX-01:30")
    used = row("sk-aaaaaaaaaaa" + "1" * 38, name="my-application", last_used_at="2025-11-26T10:15:23Z")
    put(
        used,
        row("sk-bbbbbbbbbbb" + "2" * 38, name="mobile-app"),
        row("sk-ccccccccccc" + "3" * 38, name="old", revoked_at=REVOKED_AT),
        row("sk-ddddddddddd" + "4" * 38, name="guest", expires_at="2025-12-01T00:00:00+00:00"),
        row("sk-eeeeeeeeeee" + "5" * 38, name="both", expires_at="2025-12-01T00:00:00Z", revoked_at=REVOKED_AT),
    )
    done = run("list")
    assert done == Done(
        0,
        """\
Found 5 token(s):

1. sk-aaaaaaaaaaa...
   Name: my-application
   Status: ✓ Active
   Created: 2025-11-26T12:00:00
   Last used: 2025-11-26T11:45:23

2. sk-bbbbbbbbbbb...
   Name: mobile-app
   Status: ✓ Active
   Created: 2025-11-26T12:00:00
   Last used: Never

3. sk-ccccccccccc...
   Name: old
   Status: ✗ Revoked
   Created: 2025-11-26T12:00:00
   Last used: Never

4. sk-ddddddddddd...
   Name: guest
   Status: ✗ Expired
   Created: 2025-11-26T12:00:00
   Last used: Never

5. sk-eeeeeeeeeee...
   Name: both
   Status: ✗ Revoked
   Created: 2025-11-26T12:00:00
   Last used: Never
""",
        "",
    )


def test_list_json_has_offsets_and_counts(run: Run) -> None:
    """``list --json`` gives every documented field, in UTC with its offset, and the number of uses."""
    secret = generate_secret()
    put(row(secret, name="ünï", expires_at="2125-11-26T10:30:00+02:00"))
    UsageRecorder("api_tokens.usage.db", interval=0.01).record(kept()[0]["id"], 1764153923.0)
    recorded = UsageRecorder("api_tokens.usage.db", interval=3600)
    recorded.record(kept()[0]["id"], 1764150000.0)
    recorded.flush()
    deadline = time.monotonic() + 10
    while (content := json.loads(run("list", "--json").out))[0]["use_count"] != 2:
        assert time.monotonic() < deadline
    assert content == [
        {
            "id": kept()[0]["id"],
            "name": "ünï",
            "prefix": secret[:14],
            "status": "active",
            "created_at": "2025-11-26T10:30:00+00:00",
            "expires_at": "2125-11-26T08:30:00+00:00",
            "revoked_at": None,
            "last_used_at": "2025-11-26T10:45:23+00:00",
            "use_count": 2,
        }
    ]


def test_list_of_nothing(run: Run) -> None:
    """Where no token is, the list says so, tells how to create one, and makes no file."""
    done = run("list")
    assert done == Done(0, "No tokens found.\n", "Create one: python -m freegpt_auth create NAME\n")
    assert run("list", "--json") == Done(0, "[]\n", "")
    assert not list(Path().iterdir())


def test_list_escapes_what_would_drive_a_terminal(run: Run) -> None:
    """A file made by other hands cannot send escapes to the terminal through a name or a prefix."""
    put(row("sk-aaaaaaaaaaa", name="\x1b[2J\u202eevil\n   Status: ✓ Active", prefix="sk-\x9bA"))
    lines = run("list").out.splitlines()
    assert lines[2:4] == ["1. sk-\\x9bA...", r"   Name: \x1b[2J\u202eevil\n   Status: ✓ Active"]
    assert len(lines) == 7


def test_list_where_usage_is_switched_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FREEGPT_AUTH_USAGE=off the list looks for no database."""
    put(row(generate_secret()))
    Path("api_tokens.usage.db").write_bytes(b"not a database at all")
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "off")
    done = run("list")
    assert (done.status, done.err) == (0, "")
    assert "   Last used: Never\n" in done.out


def _corrupt(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


def _a_folder(path: Path) -> None:
    path.mkdir()


def _table(*columns: str, values: tuple[Any, ...]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(f"CREATE TABLE usage ({', '.join(columns)})")
        connection.execute(f"INSERT INTO usage VALUES ({', '.join('?' * len(values))})", values)
        connection.commit()
        connection.close()

    return make


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_corrupt, id="corrupt"),
        pytest.param(_a_folder, id="a-folder"),
        pytest.param(_table("token_id", "n", values=("x", 1)), id="other-columns"),
        pytest.param(_table("token_id", "use_count", "last_used_at", values=("x", 1, None)), id="no-instant"),
        pytest.param(_table("token_id", "use_count", "last_used_at", values=("x", 1, 1e20)), id="far-away"),
    ],
)
def test_list_goes_on_without_usage_that_cannot_be_read(run: Run, spoil: Callable[[Path], None]) -> None:
    """A broken usage database costs the last uses in the list and one line of explanation, never the list."""
    put(row(generate_secret(), name="ci"))
    spoil(Path("api_tokens.usage.db"))
    done = run("list")
    assert done.status == 0
    assert "   Name: ci\n" in done.out
    assert "   Last used: Never\n" in done.out
    assert re.fullmatch(r"freegpt-auth: the usage in api_tokens\.usage\.db cannot be read [^\n]+\n", done.err)


# --- revoke and delete


def _references(secret: str) -> dict[str, str]:
    return {
        "the shown prefix": secret[:14],
        "the prefix with its dots": secret[:14] + "...",
        "the prefix with an ellipsis": secret[:14] + "…",
        "a longer part": secret[:30],
        "a longer part with dots": secret[:30] + "...",
        "its id": digest_of(secret).hex()[:12],
        "the whole secret": secret,
    }


_KINDS = list(_references(generate_secret()))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("piped", [False, True])
def test_revoke_takes_any_name_of_a_token(run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, *, piped: bool) -> None:
    """A token can be revoked by what list shows, pasted with its dots or not, by its id or by the secret itself."""
    secret, other = generate_secret(), generate_secret()
    put(row(other), row(secret, name="ci"))
    reference = _references(secret)[kind]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{reference}\r\n"))
    done = run("revoke", "-" if piped else reference)
    assert done == Done(0, "", f"Revoked token {secret[:14]}... (ci). It is refused from now on.\n")
    assert [bool(kept_row["revoked_at"]) for kept_row in [{"revoked_at": None, **each} for each in kept()]] == [
        False,
        True,
    ]


@pytest.mark.parametrize("kind", _KINDS)
def test_delete_takes_any_name_of_a_token(run: Run, kind: str) -> None:
    """A token can be deleted by what list shows, pasted with its dots or not, by its id or by the secret itself."""
    secret, other = generate_secret(), generate_secret()
    put(row(other), row(secret, name="ci"))
    done = run("delete", _references(secret)[kind])
    assert done == Done(0, "", f"Deleted token {secret[:14]}... (ci). It is refused from now on.\n")
    assert [kept_row["prefix"] for kept_row in kept()] == [other[:14]]


@pytest.mark.parametrize("command_name", ["revoke", "delete"])
def test_several_matches_change_nothing(run: Run, command_name: str) -> None:
    """Where two tokens answer to a prefix nothing is done, and their ids are listed to choose from."""
    first, second = "sk-aaaaaaaaaaa" + "1" * 38, "sk-aaaaaaaaaaa" + "2" * 38
    content = put(row(first, name="web"), row(second, name="\x1b[2J"))
    done = run(command_name, "sk-aaaaaaaaaaa...")
    ids = [kept_row["id"] for kept_row in kept()]
    assert done == Done(
        1,
        "",
        "freegpt-auth: 2 tokens match and nothing was done; give one of these ids:\n"
        f"  {ids[0]}  sk-aaaaaaaaaaa... (web)\n"
        f"  {ids[1]}  sk-aaaaaaaaaaa... (\\x1b[2J)\n",
    )
    assert TOKEN_FILE.read_bytes() == content
    assert run(command_name, ids[1]).status == 0
    assert [bool(each.get("revoked_at")) for each in kept() if each["id"] == ids[0]] == [False]


@pytest.mark.parametrize("command_name", ["revoke", "delete"])
def test_no_match_changes_nothing(run: Run, command_name: str) -> None:
    """A reference that means no token is a failure, and is not repeated: it may be a secret."""
    secret = generate_secret()
    content = put(row(secret))
    mistyped = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    for reference in (mistyped, secret + "x", secret[:13], "sk-", "a-token", generate_secret(), "", "..."):
        done = run(command_name, reference)
        assert done.failed_in_one_line
        assert not reference or reference not in done.err.replace("sk-a", "")
    assert TOKEN_FILE.read_bytes() == content


@pytest.mark.parametrize("typed", ["", "\n", " \n", "...\n"])
def test_an_empty_pipe_means_no_token(run: Run, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """``cat missing | ... revoke -`` revokes nothing, not even an imported token too short to show a prefix."""
    TOKEN_FILE.write_text('{"ab": {"name": "short", "created_at": "2025-11-26T10:30:00"}}')
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert run("revoke", "-").failed_in_one_line


@pytest.mark.parametrize("redirection", ["<&-", "</dev/null", "<bytes"])
def test_a_stdin_that_gives_nothing_sensible(redirection: str) -> None:
    """A reference that cannot be read from stdin is one line and exit 1."""
    content = put(row(generate_secret()))
    Path("bytes").write_bytes(b"sk-\xff\xfe\n")
    assert in_shell(f"export PYTHONIOENCODING=utf-8:strict; freegpt revoke - {redirection}").failed_in_one_line
    assert TOKEN_FILE.read_bytes() == content


def test_revoking_twice_is_no_failure(run: Run) -> None:
    """A script may revoke again: the answer says since when, and the first instant stays."""
    secret = generate_secret()
    content = put(row(secret, revoked_at=REVOKED_AT))
    done = run("revoke", secret)
    assert (done.status, done.out) == (0, "")
    assert re.fullmatch(rf"Token {secret[:14]}\.\.\. \(a-token\) was revoked before, at \S+\.\n", done.err)
    assert TOKEN_FILE.read_bytes() == content


def test_deleting_the_last_token_tells_how_to_turn_authentication_off(run: Run) -> None:
    """Whoever deletes the last token learns that authentication stays on, and how to turn it off."""
    first, last = generate_secret(), generate_secret()
    put(row(first), row(last))
    assert "last one" not in run("delete", first).err
    assert run("delete", last).err.splitlines()[1:] == [
        "It was the last one. Authentication stays on; to turn it off, move api_tokens.json away and restart the server."
    ]
    assert kept() == []
    assert run("list").out == "No tokens found.\n"


# --- where the tokens are


def test_store_is_accepted_before_and_after_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--store may stand on either side of the command; it wins over FREEGPT_AUTH_STORE, which wins over the default."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "from-environment.json")
    assert run("--store", "before.json", "create", "one").status == 0
    assert run("create", "two", "--store", "after.json").status == 0
    assert run("create", "three").status == 0
    monkeypatch.delenv("FREEGPT_AUTH_STORE")
    assert run("create", "four").status == 0
    names = {
        path.name: [each["name"] for each in json.loads(path.read_text())["tokens"]] for path in Path().glob("*.json")
    }
    assert names == {
        "before.json": ["one"],
        "after.json": ["two"],
        "from-environment.json": ["three"],
        "api_tokens.json": ["four"],
    }
    assert "   Name: one\n" in run("--store", "before.json", "list").out
    assert (
        run("revoke", "--store=after.json", json.loads(Path("after.json").read_text())["tokens"][0]["id"]).status == 0
    )


@pytest.mark.parametrize("location", ["", " ", ".", "/", "..", "folder", "TOKENS/t.json", "postgresql://h/d"])
def test_a_location_that_cannot_hold_tokens(run: Run, location: str) -> None:
    """A location that is no token file fails in one line, and nothing is written anywhere."""
    Path("folder").mkdir()
    Path("TOKENS").touch()
    for command_line in ("create ci", "list", "revoke sk-a1b2c3d4e5f", "delete sk-a1b2c3d4e5f"):
        done = run(*command_line.split(), "--store", location)
        assert done.failed_in_one_line, done
        assert "the output" not in done.err
    # A folder can be locked before it is found to be no token file.
    assert {path.name for path in Path().rglob("*")} <= {"folder", "folder.lock", "TOKENS"}


def test_a_folder_that_is_missing(run: Run) -> None:
    """A folder is not made by accident: create says that it is missing. To look where nothing is yet is no failure."""
    done = run("create", "ci", "--store", "missing/t.json")
    assert done.failed_in_one_line
    assert "create the folder first" in done.err
    assert run("list", "--store", "missing/t.json").out == "No tokens found.\n"
    assert not list(Path().iterdir())


def test_an_empty_store_variable_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """FREEGPT_AUTH_STORE set but empty is a mistake that is named, not the default."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "")
    done = run("list")
    assert done.failed_in_one_line
    assert "FREEGPT_AUTH_STORE" in done.err


# --- faults


def test_create_where_nobody_may_write(folder: Path) -> None:
    """In a folder without write permission no token is made: one line, exit 1, nothing written."""
    folder.chmod(0o555)
    done = as_nobody("--store", str(folder / "t.json"), "create", "ci")
    assert done.failed_in_one_line
    assert "permission denied" in done.err
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command_line", ["create ci", "list", "revoke a1b2c3d4e5f6", "delete a1b2c3d4e5f6"])
def test_a_token_file_that_may_not_be_read(folder: Path, command_line: str) -> None:
    """Somebody else's token file is not touched: one line that says it is permission that lacks."""
    path = folder / "t.json"
    path.write_bytes(put(row(generate_secret())))
    path.chmod(0o000)
    folder.chmod(0o777)
    done = as_nobody("--store", str(path), *command_line.split())
    assert done.failed_in_one_line
    assert "permission denied" in done.err
    path.chmod(0o600)
    assert path.read_bytes() == TOKEN_FILE.read_bytes()


def test_a_folder_that_may_not_be_entered(folder: Path) -> None:
    """A token file behind a closed folder is one line and exit 1."""
    closed = folder / "closed"
    closed.mkdir(mode=0o000)
    for command_line in (["create", "ci"], ["list"]):
        done = as_nobody("--store", str(closed / "t.json"), *command_line)
        assert done.failed_in_one_line
        assert "permission denied" in done.err


def test_a_lock_that_is_held_for_ever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gives up on a stuck one after its time limit, in one line that says so."""
    content = put(row(generate_secret()))
    monkeypatch.setattr(file, "LOCK_TIMEOUT", 0.05)
    with disk.locked(str(TOKEN_FILE.absolute()), 1):
        done = run("create", "ci")
    assert done.failed_in_one_line
    assert "held its lock" in done.err
    assert TOKEN_FILE.read_bytes() == content


def _file_of(**fields: Any) -> bytes:
    return json.dumps({"version": 1, "tokens": [row("sk-aaaaaaaaaaa", **fields)]}).encode()


_BAD_FILES = {
    "empty": b"",
    "a-nul": b"\0",
    "truncated": b'{"version": 1, "tok',
    "deep-list": b"[" * 200_000,
    "deep-object": b'{"a":' * 100_000,
    "a-list": b"[]",
    "null": b"null",
    "a-string": b'"x"',
    "a-huge-number": b"1" * 5000,
    "a-huge-version": b'{"version": ' + b"1" * 5000 + b', "tokens": []}',
    "nan": b'{"version": NaN, "tokens": []}',
    "infinite": b'{"version": 1e999, "tokens": []}',
    "of-the-future": b'{"version": 2, "tokens": []}',
    "version-as-text": b'{"version": "1", "tokens": []}',
    "version-true": b'{"version": true, "tokens": []}',
    "no-tokens": b'{"version": 1}',
    "tokens-null": b'{"version": 1, "tokens": null}',
    "tokens-object": b'{"version": 1, "tokens": {}}',
    "not-utf-8": b'{"version": 1, "tokens": [{"id": "\xff\xfe"}]}',
    "utf-16": '{"version": 1, "tokens": []}'.encode("utf-16"),
    "a-lone-surrogate": _file_of(name="\ud800"),
    "no-offset": _file_of(created_at="2025-11-26T10:30:00"),
    "no-digest": _file_of(digest="md5$0123"),
    "twice-the-same": json.dumps({"version": 1, "tokens": [row("sk-aaaaaaaaaaa")] * 2}).encode(),
    "an-ancestor-of-numbers": b'{"sk-plain-old-token": {"name": 3, "created_at": "2025-11-26T10:30:00"}}',
    "an-ancestor-of-the-end": b'{"sk-plain-old-token": {"name": "x", "created_at": "9999-12-31T23:59:59"}}',
    "an-ancestor-without-token": b'{"": {"name": "x", "created_at": "2025-11-26T10:30:00"}}',
}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in _BAD_FILES.items()])
def test_a_bad_token_file_is_one_line(run: Run, zone: Callable[[str], None], content: bytes) -> None:
    """Whatever stands in the token file, a command says in one line what is wrong, and leaves it as it is."""
    zone("XXX+12")
    TOKEN_FILE.write_bytes(content)
    for command_line in ("create ci", "list", "list --json", "revoke sk-aaaa", "delete sk-aaaa"):
        done = run(*command_line.split())
        assert done.failed_in_one_line, done
        assert "api_tokens.json: " in done.err
        assert "sk-plain-old-token" not in done.err
        assert TOKEN_FILE.read_bytes() == content


@pytest.mark.parametrize("zone_name", ["UTC", "XXX-14", "XXX+12"])
@pytest.mark.parametrize(
    "instant",
    [
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59-12:00",
    ],
)
def test_instants_at_the_ends_of_the_calendar(
    run: Run, zone: Callable[[str], None], instant: str, zone_name: str
) -> None:
    """A file with the first or last instant of the calendar is shown or refused in one line, never a traceback."""
    zone(zone_name)
    put(row("sk-aaaaaaaaaaa" + "1" * 38, created_at=instant, revoked_at=instant))
    for arguments in (["list"], ["list", "--json"], ["revoke", "sk-aaaaaaaaaaa"], ["delete", "sk-aaaaaaaaaaa"]):
        done = run(*arguments)
        assert done.status == 0 or done.failed_in_one_line


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0e.\\x', max_size=60).map(str.encode))
def test_any_bytes_in_the_token_file(run: Run, content: bytes) -> None:
    """No bytes make a command break: it lists tokens, or fails in one line."""
    TOKEN_FILE.write_bytes(content)
    done = run("list")
    assert done.status == 0 or done.failed_in_one_line


# --- where the output goes


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command_line", ["create ci", "create ci --json", "list", "list --json"])
def test_output_that_cannot_be_written(redirection: str, command_line: str) -> None:
    """Where stdout is full or closed a command fails in one line, and leaves no token whose secret nobody saw."""
    put(row(generate_secret(), name="before"))
    done = in_shell(f"freegpt {command_line} {redirection}")
    assert [each["name"] for each in kept()] == ["before"]
    assert done.failed_in_one_line


@pytest.mark.parametrize("command_line", ["create ci", "list", "list --json"])
def test_a_reader_that_has_gone(command: Callable[..., Any], command_line: str) -> None:
    """Where nobody reads the output any more a command ends quietly, and leaves no token whose secret nobody saw."""
    put(row(generate_secret(), name="before"))
    reader, writer = os.pipe()
    os.close(reader)
    # The fixture captures stdout; a shell puts the broken pipe in its place.
    done = subprocess.run(
        [sys.executable, "-m", "freegpt_auth", *command_line.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert [each["name"] for each in kept()] == ["before"]
    assert command("list").stdout.startswith("Found 1 token(s):\n")


def test_list_into_head() -> None:
    """``list | head -1`` shows one line and no traceback, however long the list is."""
    put(*(row(f"sk-{number:011}{'1' * 38}") for number in range(3000)))
    assert in_shell("freegpt list | head -1") == Done(0, "Found 3000 token(s):\n", "")


def test_a_closed_stderr_leaves_stdout_to_the_secret() -> None:
    """``TOKEN=$(... create ci 2>&-)`` holds the secret alone, even though the notes have nowhere to go."""
    done = in_shell("freegpt create ci 2>&-")
    assert done.status == 0
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}\n", done.out)


def test_a_terminal_that_knows_ascii_only() -> None:
    """A terminal without the check mark still gets the list, with the character's code in its place."""
    put(row(generate_secret(), name="büro"))
    done = in_shell("PYTHONIOENCODING=ascii freegpt list")
    assert (done.status, done.err) == (0, "")
    assert "   Name: b\\xfcro\n   Status: \\u2713 Active\n" in done.out


def test_any_text_stream_will_do(run: Run) -> None:
    """A program that calls the commands may put any text stream in the place of stdout."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert run("create", "ci").out == ""
    assert has_valid_checksum(stream.getvalue().strip())


class _Interrupted:
    def readline(self) -> str:
        raise KeyboardInterrupt


def test_an_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a command waits ends it with the usual status and no traceback."""
    monkeypatch.setattr(sys, "stdin", _Interrupted())
    assert run("revoke", "-") == Done(130, "", "")


# --- what is typed


def test_version(run: Run) -> None:
    """--version prints the version that is installed."""
    done = run("--version")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"freegpt-auth \d+\.\d+\.\d+\S*\n", done.out)


@pytest.mark.parametrize("command_name", ["", "create", "list", "revoke", "delete"])
def test_help_ends_with_an_example(run: Run, command_name: str) -> None:
    """The help of every command shows one line that can be copied."""
    done = run(*command_name.split(), "--help")
    assert (done.status, done.err) == (0, "")
    assert "--store PATH" in done.out
    assert re.search(rf"\nExample: python -m freegpt_auth {command_name or 'create'}\b[^\n]*\n\Z", done.out)


def test_help_names_every_command(run: Run) -> None:
    """The help without a command lists the four there are."""
    out = run("--help").out
    assert re.findall(r"^    (\w+)  ", out, re.MULTILINE) == ["create", "list", "revoke", "delete"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["create"],
        ["create", "two", "names"],
        ["list", "something"],
        ["revoke"],
        ["delete"],
        ["rename", "x"],
        ["--nothing"],
        ["create", "ci", "--expires-in"],
        ["\x1b[2J"],
        ["create", "-x"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    """What cannot be understood ends with 2 and one line that points to the help, and does nothing."""
    done = run(*arguments)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"python -m freegpt_auth[^\n]*: [^\n]+; see python -m freegpt_auth[^\n]* --help\n", done.err)
    assert done.err.rstrip("\n").isprintable()
    assert not TOKEN_FILE.exists()


def test_a_whole_round_in_processes_of_their_own(command: Callable[..., Any]) -> None:
    """Created, listed, revoked through stdin, deleted: each in a process of its own, as an operator does it."""
    created = command("create", "john's laptop")
    secret = created.stdout.strip()
    assert created.returncode == 0
    assert "   Name: john's laptop\n   Status: ✓ Active\n" in command("list").stdout
    assert command("revoke", "-", input=f"{secret}\n").returncode == 0
    assert "   Status: ✗ Revoked\n" in command("list").stdout
    assert command("delete", f"{secret[:14]}...").returncode == 0
    assert command("list").stdout == "No tokens found.\n"
