"""The commands: what they print and where, what they accept, and how they fail."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import MemoryTokenStore, StoreError, Token
from freegpt_auth.cli import main
from freegpt_auth.stores.file import store as file_store
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, generate_secret, has_valid_checksum, issue, prefix_of
from freegpt_auth.usage.base import Batch

TOKEN_FILE = Path("api_tokens.json")
USAGE_FILE = Path("api_tokens.usage.db")
REVOKED_AT = "2025-11-30T08:00:00Z"
SECRET, OTHER = generate_secret(), generate_secret()
COMMANDS = (["create", "ci"], ["list"], ["list", "--json"], ["revoke", SECRET], ["delete", SECRET])


@dataclass(frozen=True)
class Done:
    """What a command that has ended left behind."""

    status: int
    out: str
    err: str

    def failed_in_one_line(self, about: str = "") -> bool:
        """Whether it failed as a command may: one line for the operator, nothing that passes for data."""
        one_line = re.fullmatch(r"freegpt-auth: [^\n]+\n", self.err)
        return self.status == 1 and not self.out and bool(one_line) and about in self.err


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _no_wait_and_buffered_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server runs beside the commands, so none is waited for; in buffered output a full disk strikes late."""
    monkeypatch.setattr(file_store, "FRESHNESS", 0.0)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, with *stdin* in the place of the terminal."""

    def call(*arguments: str, stdin: Any = None) -> Done:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            status: Any = main(arguments)
        except SystemExit as exit_:
            status = exit_.code
        return Done(status, *capsys.readouterr())

    return call


def in_shell(line: str) -> Done:
    """Run a line of shell in which ``freegpt`` stands for the commands."""
    definition = f'freegpt() {{ {shlex.quote(sys.executable)} -m freegpt_auth "$@"; }}\n'
    done = subprocess.run(["sh", "-c", definition + line], capture_output=True, text=True, timeout=30, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def row(secret: str, **fields: Any) -> dict[str, Any]:
    """Return a record as the token file has it."""
    digest = digest_of(secret).hex()
    common = {"id": digest[:12], "name": "a-token", "prefix": prefix_of(secret), "digest": f"sha256${digest}"}
    return {**common, "created_at": "2025-11-26T10:30:00Z", **fields}


def put(*rows: dict[str, Any]) -> bytes:
    """Write a token file and return its content."""
    TOKEN_FILE.write_text(json.dumps({"version": 1, "tokens": rows}))
    return TOKEN_FILE.read_bytes()


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
    assert has_valid_checksum(done.out.strip())
    assert done.err == (
        f"Created token {done.out[:14]}... for ci in {TOKEN_FILE.absolute()}.\nSave this token now: it is not shown again.\n"
    )


def test_the_secret_is_nowhere_else(run: Run, tmp_path: Path) -> None:
    """A secret is shown once: no file, no message and no later output of any command holds it."""
    done = run("create", "ci")
    secret = done.out.strip()
    said = [done.err]
    for arguments in (["list"], ["list", "--json"], ["revoke", secret], ["revoke", secret], ["delete", secret]):
        done = run(*arguments)
        assert done.status == 0
        said += [done.out, done.err, *(path.read_text() for path in tmp_path.iterdir())]
    # What follows the prefix is the secret part; not even that may be found.
    assert not [text for text in said if secret[14:] in text]


@pytest.mark.parametrize(
    "name",
    [
        """it's "quoted" `twice` $HOME {braces} %s back\\slash""",
        " büro-日本-🔑 ",
        "田中\u3000太郎",
        "👩\u200d💻 laptop",
    ],
)
def test_a_name_is_kept_as_it_was_typed(run: Run, name: str) -> None:
    """Any name that prints comes back unchanged in the list, for a person and in JSON."""
    assert run("create", name).status == 0
    assert f"   Name: {name}\n" in run("list").out
    assert json.loads(run("list", "--json").out)[0]["name"] == name
    assert f"({name})" in run("revoke", name).err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90d", 7_776_000), ("12h", 43_200), ("30m", 1800), ("2w", 1_209_600), ("45s", 45), ("36", 36)],
)
def test_a_token_that_expires_as_json(run: Run, text: str, seconds: int) -> None:
    """A token ends exactly so long after it was created, as both outputs say; only JSON holds its secret."""
    done = run("create", "ci", "--expires-in", text, "--json")
    record = json.loads(done.out)
    secret = record.pop("token")
    expires_at = datetime.fromisoformat(record["expires_at"])
    assert expires_at - datetime.fromisoformat(record["created_at"]) == timedelta(seconds=seconds)
    assert f" until {expires_at.astimezone().replace(tzinfo=None).isoformat()} in " in done.err
    assert has_valid_checksum(secret)
    assert secret not in done.err
    assert [record] == json.loads(run("list", "--json").out)


# --- list


def test_list_shows_status_and_recorded_use(run: Run) -> None:
    """The list, for a person and in JSON, shows every token with its status, its last use and its number of uses."""
    put(row(SECRET, name="ünï", expires_at="2125-11-26T10:30:00+02:00"), row(OTHER, revoked_at=REVOKED_AT))
    UsageDatabase(str(USAGE_FILE)).add(Batch("p", 1, {kept()[0]["id"]: (2, 1764153923.0)}), 1.0)
    used, revoked = json.loads(run("list", "--json").out)
    assert (used["status"], used["use_count"], used["last_used_at"]) == ("active", 2, "2025-11-26T10:45:23+00:00")
    assert (revoked["status"], revoked["use_count"], revoked["last_used_at"]) == ("revoked", 0, None)
    done = run("list")
    assert done.out.startswith(f"Found 2 token(s):\n\n1. {SECRET[:14]}...\n   Name: ünï\n   Status: ✓ Active\n")
    assert f"\n\n2. {OTHER[:14]}...\n   Name: a-token\n   Status: ✗ Revoked\n" in done.out


def test_list_of_nothing(run: Run) -> None:
    """Where no token is, the list says so, tells how to create one, and makes no file."""
    done = run("list")
    assert (done.status, done.out) == (0, "No tokens found.\n")
    assert f"Is {TOKEN_FILE.absolute()} where your server's tokens are?" in done.err
    assert run("list", "--json") == Done(0, "[]\n", "")
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "values", [None, (), ("x", 1, None), ("x", 1, 1e20)], ids=["corrupt", "loop", "no-instant", "far-away"]
)
def test_list_goes_on_without_usage_that_cannot_be_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, values: tuple[Any, ...] | None
) -> None:
    """A broken usage database costs the last uses and one line, never the list; switched off it is not looked at."""
    put(row(SECRET))
    if values is None:
        USAGE_FILE.write_bytes(b"not a database at all" * 100)
    elif not values:
        USAGE_FILE.symlink_to(USAGE_FILE)
    else:
        with contextlib.closing(sqlite3.connect(USAGE_FILE)) as connection, connection:
            connection.execute("CREATE TABLE usage (token_id, use_count, last_used_at)")
            connection.execute("INSERT INTO usage VALUES (?, ?, ?)", values)
    done = run("list")
    assert done.status == 0
    assert "   Last used: Never\n" in done.out
    assert re.fullmatch(r"freegpt-auth: usage cannot be read [^\n]+: \S+/api_tokens\.usage\.db: [^\n]+\n", done.err)
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "off")
    assert run("list") == Done(0, done.out, "")


# --- revoke and delete


@pytest.mark.parametrize("kind", ["prefix", "dotted", "id", "name", "secret", "piped"])
@pytest.mark.parametrize(("way", "said"), [("revoke", "Revoked"), ("delete", "Deleted")])
def test_a_token_goes_by_many_names(run: Run, way: str, said: str, kind: str) -> None:
    """A token is revoked or deleted by what list shows, dots or not, by its id, its name, or the secret, piped or typed."""
    put(row(OTHER), row(SECRET, name="ci"))
    shown = SECRET[:14]
    names = {
        "prefix": shown,
        "dotted": f"{shown}...",
        "id": kept()[1]["id"],
        "name": "ci",
        "secret": SECRET,
        "piped": "-",
    }
    done = run(way, names[kind], stdin=io.StringIO(f"{SECRET}\r\n"))
    assert done == Done(0, "", f"{said} token {shown}... (ci). It is refused from now on.\n")
    states = [(each["name"], bool(each.get("revoked_at"))) for each in kept()]
    assert states == [("a-token", False)] + [("ci", True)] * (way == "revoke")


@pytest.mark.parametrize("way", ["revoke", "delete"])
def test_several_matches_change_nothing(run: Run, way: str) -> None:
    """Where two tokens answer to a prefix nothing is done, and their ids are listed to choose from."""
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
    assert run(way, ids[1]).status == 0
    assert "revoked_at" not in kept()[0]


@pytest.mark.parametrize("way", ["revoke", "delete"])
def test_no_match_changes_nothing(run: Run, way: str) -> None:
    """A reference that means no token is a failure, and is not repeated: it may be a secret."""
    # The second token is an imported one, too short to show a prefix.
    content = put(row(SECRET), row("ab"))
    mistyped = SECRET[:-1] + ("a" if SECRET[-1] != "a" else "b")
    for reference in (mistyped, SECRET + "x", OTHER):
        done = run(way, reference)
        assert done.failed_in_one_line(f"no token of {TOKEN_FILE.absolute()} matches")
        assert ("it is mistyped" in done.err) is (reference == mistyped)
        assert reference not in done.err
    for reference in (SECRET[:13], "a-toke", "", "..."):
        assert run(way, reference).failed_in_one_line()
    assert TOKEN_FILE.read_bytes() == content


class Broken(io.StringIO):
    """A terminal that has gone."""

    def readline(self, _size: int | None = -1, /) -> str:
        """Fail as it does."""
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (None, "its line is empty"),
        (io.StringIO(""), "its line is empty"),
        (io.StringIO(" \n"), "its line is empty"),
        (io.StringIO("...\n"), "it is none of them"),
        (io.StringIO("x" * 4096), "it is none of them"),
        (io.StringIO("x" * 4097), "its line is over 4096 characters"),
        (io.TextIOWrapper(io.BytesIO(b"sk-\xff\xfe\n"), encoding="utf-8"), "it is not text"),
        (Broken(), "stdin cannot be read"),
    ],
)
def test_stdin_without_a_token(run: Run, stdin: Any, problem: str) -> None:
    """Whatever stands behind - in place of a token is one line that says what, and nothing is done."""
    content = put(row(SECRET))
    assert run("revoke", "-", stdin=stdin).failed_in_one_line(problem)
    assert TOKEN_FILE.read_bytes() == content


def test_endless_stdin_is_given_up() -> None:
    """A line without an end fills no memory: a few KB of it are read."""
    put(row(SECRET))
    done = in_shell("ulimit -v 2000000; freegpt revoke - < /dev/zero")
    assert done.failed_in_one_line("its line is over 4096 characters")


@pytest.mark.parametrize(("way", "said"), [("revoke", "Revoked"), ("delete", "Deleted")])
def test_several_tokens_at_once(run: Run, way: str, said: str) -> None:
    """Each token has one line, in the order in which they were named, however often; ``-`` stands for a line each."""
    put(*(row(f"sk-{name}", id=f"id-{name}", name=name) for name in ("a", "b", "c", "d")))
    done = run(way, "c", "-", "id-c", "-", "sk-c", stdin=io.StringIO("sk-a\nb\n"))
    lines = [f"{said} token {prefix_of(f'sk-{name}')}... ({name}). It is refused from now on.\n" for name in "cab"]
    assert done == Done(0, "", "".join(lines))
    assert [each["name"] for each in kept() if not each.get("revoked_at")] == ["d"]


class OneByOne(MemoryTokenStore):
    """A store that changes one token at a time, and can do no more after the second."""

    changes = 0

    def delete(self, token_id: str) -> Token:
        """Remove a token, if it is the first or second."""
        self.count()
        return super().delete(token_id)

    def revoke(self, token_id: str, at: datetime) -> Token:
        """Revoke a token, if it is the first or second."""
        self.count()
        return super().revoke(token_id, at)

    def count(self) -> None:
        """Fail at the third change."""
        self.changes += 1
        if self.changes > 2:
            raise StoreError("the database has gone")


@pytest.mark.parametrize(("way", "said"), [("revoke", "Revoked"), ("delete", "Deleted")])
def test_failure_in_the_middle_says_what_is_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, way: str, said: str
) -> None:
    """Where tokens are changed one after the other and that fails, each that is done has its line, and then the reason."""
    store, issued = OneByOne(), [issue(name, now=datetime.now(UTC)) for name in ("a", "b", "c")]
    for token, secret in issued:
        store.add(digest_of(secret), token)
    monkeypatch.setattr("freegpt_auth.commands.tokens.open_store", lambda _: store)
    UsageDatabase(str(USAGE_FILE)).add(Batch("p", 1, {token.id: (1, 1.0) for token, _ in issued}), 1.0)
    done = run(way, "c", "a", "b")
    prefixes = {token.name: token.prefix for token, _ in issued}
    lines = [f"{said} token {prefixes[name]}... ({name}). It is refused from now on.\n" for name in "ca"]
    assert done == Done(1, "", "".join([*lines, "freegpt-auth: the database has gone\n"]))
    assert [token.name for token in store.tokens().values() if token.revoked_at is None] == ["b"]
    assert len(UsageDatabase(str(USAGE_FILE)).read()) == (1 if way == "delete" else 3)


@pytest.mark.parametrize("way", ["revoke", "delete"])
def test_one_bad_reference_changes_nothing(run: Run, way: str) -> None:
    """Where one of several references means no token or two, none is touched, and its place is named, not its text."""
    content = put(row(SECRET), row(OTHER, name="b"), row("sk-third", name="b"))
    for wrong, problem in (("nobody", "no token of .* matches"), ("b", "2 tokens match")):
        done = run(way, SECRET, OTHER, wrong)
        assert (done.status, done.out) == (1, "")
        assert re.match(f"freegpt-auth: {problem} reference 3 of 3[ ,].*nothing was done", done.err)
        assert "nobody" not in done.err
    assert TOKEN_FILE.read_bytes() == content


def test_deleting_all_tokens_keeps_authentication_on(run: Run) -> None:
    """The last tokens can be deleted together, and their deletion too leaves authentication on."""
    put(row(SECRET), row(OTHER))
    assert "They were the last ones. Authentication stays on; to turn it off, move " in run("delete", SECRET, OTHER).err


def test_delete_removes_usage(run: Run) -> None:
    """The usage of a deleted token leaves with it; that of a revoked one stays for the list."""
    put(row(SECRET), row(OTHER), row("sk-third"))
    first, second, third = (each["id"] for each in kept())
    usage = UsageDatabase(str(USAGE_FILE))
    usage.add(Batch("p", 1, {first: (2, 1.0), second: (3, 1.0), third: (4, 1.0)}), 1.0)
    assert run("revoke", SECRET).status == 0
    assert run("delete", OTHER, "sk-third").err.count("\n") == 2
    assert {token_id: used.use_count for token_id, used in usage.read().items()} == {first: 2}


def _without_database(_: pytest.MonkeyPatch) -> None:
    """Leave it as it is: no use was ever written."""


def _switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "off")


def _wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", " ")


def _fifo(_: pytest.MonkeyPatch) -> None:
    os.mkfifo(USAGE_FILE)


def _text(_: pytest.MonkeyPatch) -> None:
    USAGE_FILE.write_text("my notes")


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (_without_database, ""),
        (_switched_off, ""),
        (_wrong_setting, "FREEGPT_AUTH_USAGE is set but empty"),
        (_fifo, "it is a FIFO, not a file"),
        (_text, "it is no usage database"),
    ],
)
def test_delete_does_not_depend_on_usage(
    run: Run, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[pytest.MonkeyPatch], None], problem: str
) -> None:
    """Whatever is in the way of the usage, the token is deleted, and one line says that its usage may be left."""
    put(row(SECRET), row(OTHER))
    prepare(monkeypatch)
    done = run("delete", SECRET)
    said, *others = done.err.splitlines()
    assert (done.status, said) == (0, f"Deleted token {SECRET[:14]}... (a-token). It is refused from now on.")
    assert [each["digest"] for each in kept()] == [f"sha256${digest_of(OTHER).hex()}"]
    assert len(others) == bool(problem)
    assert all(
        re.match("freegpt-auth: the usage of the deleted token.s. could not be removed", line) for line in others
    )
    assert problem in done.err


def test_revoking_twice_is_no_failure(run: Run) -> None:
    """A script may revoke again: the answer says since when, and the first instant stays."""
    content = put(row(SECRET, revoked_at=REVOKED_AT))
    done = run("revoke", SECRET)
    assert (done.status, done.out) == (0, "")
    assert re.fullmatch(rf"Token {SECRET[:14]}\.\.\. \(a-token\) was already revoked at \S+\.\n", done.err)
    assert TOKEN_FILE.read_bytes() == content


def test_deleting_the_last_token_tells_how_to_turn_authentication_off(run: Run) -> None:
    """Whoever deletes the last token learns that authentication stays on, and how to turn it off."""
    put(row(SECRET), row(OTHER))
    assert "last one" not in run("delete", SECRET).err
    assert run("delete", OTHER).err.endswith(
        "It was the last one. Authentication stays on; to turn it off, "
        f"move {TOKEN_FILE.absolute()} away and restart the server.\n"
    )
    assert kept() == []


def test_delete_in_a_directory_that_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the working directory was removed, and usage is named relative to it, the token is deleted all the same."""
    put(row(SECRET), row(OTHER))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "usage.db")
    (tmp_path / "gone").rmdir()
    done = run("--store", str(tmp_path / TOKEN_FILE), "delete", SECRET)
    assert (done.status, done.err.count("\n")) == (0, 2)
    assert "could not be removed: no such file or directory" in done.err


@pytest.mark.parametrize("arguments", [["list"], ["create", "ci"], ["copy", "a.json", "b.json"]])
def test_deleted_working_directory_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    """A relative path without a working directory is explained; the output is not to blame."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert run(*arguments).failed_in_one_line("the working directory was deleted")


# --- where the tokens are


def test_store_is_accepted_before_and_after_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--store may stand on either side of the command; it wins over FREEGPT_AUTH_STORE, which wins over the default."""
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


@pytest.mark.parametrize("address", ["host=h password=hunter2", "postgresql:/u:hunter2@h/d"])
def test_mistyped_address_makes_no_file(run: Run, address: str) -> None:
    """A mistyped address of a database is no path of a token file, and its password is not shown."""
    for arguments in (["create", "ci", "--store", address], ["copy", address, "t.json"], ["copy", "t.json", address]):
        done = run(*arguments)
        assert done.status == 1
        assert "resembles the address of a database but is no URL of one; write a postgresql:// URL" in done.err
        assert "hunter2" not in done.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("location", ["", ".", "folder", "TOKENS/t.json", "postgresql://h/d"])
def test_a_location_that_cannot_hold_tokens(run: Run, location: str) -> None:
    """A location that is no token file fails in one line, and nothing is written anywhere."""
    Path("folder").mkdir()
    Path("TOKENS").touch()
    for arguments in COMMANDS:
        done = run(*arguments, "--store", location)
        assert done.failed_in_one_line()
        assert "the output" not in done.err
    # A folder can be locked before it is found to be no token file.
    assert {path.name for path in Path().rglob("*")} <= {"folder", "folder.lock", "TOKENS"}


def test_a_folder_that_is_missing(run: Run) -> None:
    """A folder is not made by accident: create says that it is missing. To look where nothing is yet is no failure."""
    assert run("create", "ci", "--store", "missing/t.json").failed_in_one_line("create the folder first")
    assert run("list", "--store", "missing/t.json").out == "No tokens found.\n"
    assert not list(Path().iterdir())


# --- faults


def test_permission_that_lacks_is_said(run: Run, unprivileged: Path) -> None:
    """Where the user may not read, write or enter, a command changes nothing and says that it is permission."""
    path = unprivileged / "t.json"
    path.write_bytes(b"somebody else's")
    for closed, mode in ((path, 0), (unprivileged, 0o500), (unprivileged, 0)):
        closed.chmod(mode)
        for arguments in COMMANDS:
            assert run(*arguments, "--store", str(path)).failed_in_one_line("permission denied")
    unprivileged.chmod(0o700)
    path.chmod(0o600)
    assert path.read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"version": 1, "tok',
        b"[" * 200_000,
        b'{"version": 2, "tokens": []}',
        b'{"sk-plain-old-token": {"name": 3, "created_at": "2025-11-26T10:30:00"}}',
    ],
    ids=["empty", "truncated", "deep", "of-the-future", "of-plain-tokens"],
)
def test_a_bad_token_file_is_one_line(run: Run, content: bytes) -> None:
    """Whatever stands in the token file, a command says in one line what is wrong, and leaves it as it is."""
    TOKEN_FILE.write_bytes(content)
    for arguments in COMMANDS:
        done = run(*arguments)
        assert done.failed_in_one_line("api_tokens.json: ")
        assert "sk-plain-old-token" not in done.err
    assert TOKEN_FILE.read_bytes() == content


# --- where the output goes


@pytest.mark.parametrize(
    "line",
    ["create ci >/dev/full", "create ci --json >&-", "list >/dev/full", "list --json >&-", "--help >/dev/full"],
)
def test_output_that_cannot_be_written(line: str) -> None:
    """Where stdout is full or closed a command fails in one line, and leaves no token whose secret nobody saw."""
    put(row(SECRET, name="before"))
    assert in_shell(f"freegpt {line}").failed_in_one_line("cannot write the output")
    assert [each["name"] for each in kept()] == ["before"]


@pytest.mark.parametrize("line", ["create ci", "list"])
def test_a_reader_that_has_gone(line: str) -> None:
    """Where nobody reads the output any more a command ends quietly, and leaves no token whose secret nobody saw."""
    put(row(SECRET, name="before"))
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "freegpt_auth", *line.split()]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert [each["name"] for each in kept()] == ["before"]


def test_a_closed_stderr_leaves_stdout_to_the_secret() -> None:
    """``TOKEN=$(... create ci 2>&-)`` holds the secret alone, even though the notes have nowhere to go."""
    done = in_shell("freegpt create ci 2>&-")
    assert done.status == 0
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}\n", done.out)


def test_notes_that_cannot_be_told_fail_nothing() -> None:
    """A full disk behind stderr costs the notes. The token is made and printed, and the status says so."""
    done = in_shell("freegpt create ci 2>/dev/full")
    assert done.status == 0
    assert [each["digest"] for each in kept()] == [f"sha256${digest_of(done.out.strip()).hex()}"]


def test_unbuffered_output_is_the_same() -> None:
    """In a container, where output is often unbuffered, a command prints what it does elsewhere."""
    done = in_shell("PYTHONUNBUFFERED=1 freegpt create ci")
    assert done.status == 0
    assert [each["digest"] for each in kept()] == [f"sha256${digest_of(done.out.strip()).hex()}"]


def test_half_a_secret_is_no_secret(tmp_path: Path) -> None:
    """Where the disk took only a part of the secret, unbuffered output or not, there is no token that nobody knows."""
    room, written = 10_000, 9_990
    for name, options in ("buffered", []), ("unbuffered", ["-u"]):
        output = tmp_path / name
        output.write_bytes(b" " * written)
        with output.open("ab") as stdout:
            done = subprocess.run(
                [sys.executable, *options, "-m", "freegpt_auth", "create", "ci"],
                stdout=stdout,
                stderr=subprocess.PIPE,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
                env={name: value for name, value in os.environ.items() if "COVERAGE" not in name},  # it needs room too
                timeout=30,
                check=False,
            )
        assert (done.returncode, done.stderr) == (1, b"freegpt-auth: cannot write the output: File too large\n")
        assert output.stat().st_size == room
        assert kept() == []


def test_a_terminal_that_knows_ascii_only() -> None:
    """A terminal without the check mark still gets the list, with the character's code in its place."""
    put(row(SECRET, name="büro"))
    done = in_shell("PYTHONIOENCODING=ascii freegpt list")
    assert (done.status, done.err) == (0, "")
    assert "   Name: b\\xfcro\n   Status: \\u2713 Active\n" in done.out


def test_any_text_stream_will_do(run: Run) -> None:
    """A program that calls the commands may put any text stream in the place of stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        assert run("create", "ci").out == ""
    assert has_valid_checksum(stream.getvalue().strip())


def test_an_interrupt_is_quiet(run: Run) -> None:
    """Ctrl-C while a command waits ends it with the usual status and no traceback."""

    class Interrupted:
        def readline(self, _size: int) -> str:
            raise KeyboardInterrupt

    assert run("revoke", "-", stdin=Interrupted()) == Done(130, "", "")


# --- what is typed


def test_version_and_help(run: Run) -> None:
    """--version prints the version; --help names the six commands, and each help ends with a line to copy."""
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
        [],
        ["create"],
        ["revoke"],
        ["create", "two", SECRET],
        ["list", "\x1b[2J"],
        ["rename", "x"],
        [SECRET],
        *(["create", name] for name in ("-x", " ", "x" * 201, "\x1b[31mred", "two\nlines", "\u202eevil", "\udcff")),
        *(["create", "ci", f"--expires-in={text}"] for text in _TIMES),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    """What cannot be understood ends with 2 and one line that points to the help, shows no secret, does nothing."""
    done = run(*arguments)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"python -m freegpt_auth[^\n]*: [^\n]+; see python -m freegpt_auth[^\n]* --help\n", done.err)
    assert done.err.rstrip("\n").isprintable()
    assert SECRET[14:] not in done.err
    assert not TOKEN_FILE.exists()


@pytest.mark.parametrize(
    "url", ["postgresql://u:hunter2@h/d", "postgresql://h/d?user=u&password=hunter2&sslmode=disable"]
)
def test_a_password_in_a_url_is_not_repeated(run: Run, url: str) -> None:
    """A URL that was typed in a wrong place is not shown with its password, which would be in the log of a build."""
    for arguments in (["list", url], ["create", "ci", url], ["copy", url], [url]):
        done = run(*arguments)
        assert done.status == 2
        assert "hunter2" not in done.err
