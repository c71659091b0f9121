"""The commands on a database: what they do in a file they do there; ``copy`` between both; ``migrate`` has its own tests."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from freegpt_auth import FileTokenStore, MemoryTokenStore
from freegpt_auth.cli import main
from freegpt_auth.commands import tokens
from freegpt_auth.stores import open_store, open_usage
from freegpt_auth.stores.file import store as file_store
from freegpt_auth.stores.postgres import PostgresTokenStore, schema
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.presence import Presence
from freegpt_auth.tokens import Token, digest_of, has_valid_checksum, issue
from freegpt_auth.usage.base import Usage

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
FILE, BACK = "api_tokens.json", "back.json"


@dataclass(frozen=True)
class Done:
    """What a command that has ended left behind."""

    status: int
    out: str
    err: str

    def failed_in_one_line(self, about: str) -> bool:
        """Whether it failed as a command may: one line for the operator, nothing that passes for data."""
        one_line = re.fullmatch(r"freegpt-auth: [^\n]+\n", self.err)
        return self.status == 1 and not self.out and bool(one_line) and about in self.err


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server runs with the token files, so none is waited for."""
    monkeypatch.setattr(file_store, "FRESHNESS", 0.0)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process."""

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = main(arguments)
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture(params=["here", "module"])
def run(request: pytest.FixtureRequest) -> Run:
    """Return a function that runs a command in this process, or as ``python -m freegpt_auth``."""
    if request.param == "here":
        in_process: Run = request.getfixturevalue("here")
        return in_process
    command = request.getfixturevalue("command")

    def call(*arguments: str) -> Done:
        done = command(*arguments)
        return Done(done.returncode, done.stdout, done.stderr)

    return call


def place(location: str) -> str:
    """Return how a location is shown."""
    return re.sub(r":[^:@]*@", "@", location) if "://" in location else str(Path(location).absolute())


def facts(location: str) -> list[tuple[bytes, dict[str, Any]]]:
    """Return all that a store knows of each token, oldest first."""
    fields = Token.__struct_fields__
    tokens = open_store(location).tokens()
    return [(digest, {name: getattr(token, name) for name in fields}) for digest, token in tokens.items()]


def names(location: str) -> list[str]:
    """Return the names of the tokens in a store, oldest first."""
    return [each["name"] for _, each in facts(location)]


def usage_at(location: str) -> dict[str, Usage]:
    """Return the usage in a place."""
    with closing(open_usage(location)) as store:
        return dict(store.read())


def put_usage(location: str, usage: dict[str, Usage]) -> None:
    """Put usage into a place."""
    with closing(open_usage(location)) as store:
        store.merge(usage)


def put(location: str, *tokens: Token) -> None:
    """Put tokens into a store; the digest of each is made of its name."""
    store = open_store(location)
    for token in tokens:
        store.add(digest_of(token.name), token)


def token(name: str, **fields: Any) -> Token:
    """Return a token."""
    return Token(**{"id": f"id-{name}", "name": name, "prefix": f"sk-{name}", "created_at": NOW, **fields})


SAMPLE = (
    token("plain"),
    token("used", last_used_at=LATER),
    token("revoked", revoked_at=LATER, expires_at=NOW + timedelta(days=9999)),
    token("scopes", scopes=("chat", "mod,els", '"{}\\'), models=("gpt-4", "ünï")),
    token("no-models", models=()),
    token("expired", expires_at=LATER),
    token("bürö 日本 🔑", created_at=datetime(2024, 2, 29, 23, 59, 59, 123456, UTC)),
)
USED = {"id-plain": Usage(3, LATER), "id-revoked": Usage(2**40, NOW), "id-of-nobody": Usage(1, NOW)}


# --- a token's life in a database


def test_a_tokens_life(run: Run, database: str) -> None:
    """Each command does with a database what it does with a file, and shows no password of it."""
    done = run("--store", database, "create", "ci", "--expires-in", "30d")
    assert done.status == 0
    secret = done.out.strip()
    assert has_valid_checksum(secret)
    assert re.fullmatch(
        rf"Created token {secret[:14]}\.\.\. for ci until \S+ in {re.escape(place(database))}\.\nSave this [^\n]+\n",
        done.err,
    )
    [record] = json.loads(run("--store", database, "list", "--json").out)
    assert (record["status"], record["use_count"], record["last_used_at"]) == ("active", 0, None)
    assert f"1. {secret[:14]}...\n   Name: ci\n   Status: ✓ Active\n" in run("--store", database, "list").out
    for said in ("Revoked token", "was already revoked at"):
        done = run("--store", database, "revoke", f"{secret[:14]}...")
        assert (done.status, done.out) == (0, "")
        assert said in done.err
    done = run("--store", database, "delete", record["id"])
    assert done == Done(0, "", f"Deleted token {secret[:14]}... (ci). It is refused from now on.\n")
    assert run("--store", database, "list") == Done(
        0,
        "No tokens found.\n",
        f"Is {place(database)} where your server's tokens are? If not, give --store. To add a token: create NAME\n",
    )


def test_a_command_names_servers_out_of_reach(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a server process has not confirmed says within how many seconds it is in force, and not "now"."""
    monkeypatch.setattr(tokens, "open_store", lambda url: PostgresTokenStore(url, confirmation=0.1))
    run("--store", database, "create", "first")
    run("--store", database, "create", "second")
    first, second = [one["id"] for one in json.loads(run("--store", database, "list", "--json").out)]
    with contextlib.closing(Address(database).connect()) as connection:
        Presence(900.0).register(connection)  # a server that is never heard of again
    for said, *arguments in (
        (r"Revoked token \S+ \(first\)\.", "--store", database, "revoke", first),
        (r"Token \S+ \(first\) was already revoked at \S+\.", "--store", database, "revoke", first),
        (r"Deleted token \S+ \(second\)\.", "--store", database, "delete", second),
        (r"Copied 1 token\(s\) .* 1 there already\.", "copy", database, database),
    ):
        done = run(*arguments)
        late = r" In force everywhere within \d{3} s: 1 server process\(es\) have not confirmed it\.\n"
        assert re.fullmatch(said + late, done.err), done


@pytest.mark.parametrize(
    "reference", ["\udcff", "sk-\udcff", "a\0b", "sk-a1b2c3d4e5f", "'; DROP TABLE tokens; --", "%s", ""]
)
def test_what_means_no_token_changes_nothing(here: Run, database: str, reference: str) -> None:
    """Whatever bytes are typed as a reference, where they mean no token one line says so."""
    put(database, token("a"))
    for way in ("revoke", "delete"):
        assert here("--store", database, way, reference).failed_in_one_line(f"no token of {place(database)} matches")
    assert names(database) == ["a"]


def test_a_token_is_found_by_all_its_names(here: Run, database: str) -> None:
    """A token in a database is meant by its whole secret, its id, the shown prefix or more of it; two are told apart."""
    first, secret = issue("first", now=NOW)
    store = PostgresTokenStore(database)
    store.add(digest_of(secret), first)
    store.add(digest_of("another"), msgspec.structs.replace(first, id="second", name="second"))
    done = here("--store", database, "revoke", secret[:14])
    assert done.status == 1
    assert "2 tokens match and nothing was done" in done.err
    assert f"  second  {secret[:14]}... (second)\n" in done.err
    for reference in (secret, first.id):
        assert here("--store", database, "revoke", reference).status == 0
    assert [bool(each["revoked_at"]) for _, each in facts(database)] == [True, False]
    assert here("--store", database, "delete", "second").status == 0
    assert here("--store", database, "delete", secret[:30]).status == 0
    assert names(database) == []


def test_a_secret_that_nobody_saw_is_no_token(database: str) -> None:
    """Where the secret cannot be written, the token is taken back out of the database."""
    line = f"{shlex.quote(sys.executable)} -m freegpt_auth --store {shlex.quote(database)} create ci >/dev/full"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30, check=False)
    assert Done(done.returncode, done.stdout, done.stderr).failed_in_one_line("cannot write the output")
    assert names(database) == []


def on_a_host_that_is(ahead: int, *arguments: str) -> str:
    """Run a command on a host whose clock is so many seconds ahead, and return its output."""
    program = (
        f"import sys, time; true = time.time; time.time = lambda: true() + {ahead};"
        "from freegpt_auth.cli import main; sys.exit(main())"
    )
    start = [sys.executable, "-c", program, *arguments]
    return subprocess.run(start, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout


@pytest.mark.parametrize("ahead", [300, -300])
def test_instants_are_by_the_databases_clock(database: str, ahead: int) -> None:
    """On a host whose clock is 5 minutes off a token is created, ends and is revoked by the one clock of all servers."""
    secret = on_a_host_that_is(ahead, "--store", database, "create", "ci", "--expires-in", "1h").strip()
    on_a_host_that_is(ahead, "--store", database, "revoke", secret)
    [(_, known)] = facts(database)
    for name, seconds in (("created_at", 0), ("expires_at", 3600), ("revoked_at", 0)):
        assert abs((known[name] - datetime.now(UTC)).total_seconds() - seconds) < 60, name


def test_a_list_shows_expiry_by_the_databases_clock(database: str) -> None:
    """On a host whose clock is ahead a token that still works is not shown as expired."""
    put(database, token("a", expires_at=datetime.now(UTC) + timedelta(seconds=200)))
    listed = on_a_host_that_is(300, "--store", database, "list", "--json")
    assert json.loads(listed)[0]["status"] == "active"


def test_names_are_text_in_any_database(cluster: Any, here: Run) -> None:
    """In a database made without an encoding, as PostgreSQL makes them for the locale C, names are what was typed."""
    cluster.sql("CREATE DATABASE plain ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        url = cluster.url("plain")
        assert here("--store", url, "migrate").status == 0
        assert here("--store", url, "create", "bürö 日本").status == 0
        assert "   Name: bürö 日本\n" in here("--store", url, "list").out
    finally:
        cluster.sql("DROP DATABASE plain WITH (FORCE)")


def test_a_command_leaves_nothing_open(database: str) -> None:
    """With every warning of Python shown a command says what it has to say, and nothing of connections."""
    put(FILE, *SAMPLE)
    for arguments in (["copy", FILE, database], ["copy", database, BACK], ["--store", database, "list"]):
        start = [sys.executable, "-X", "dev", "-m", "freegpt_auth", *arguments]
        done = subprocess.run(start, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0
        assert "Warning" not in done.stderr


def test_stderr_of_a_command_has_our_lines_only(database: str) -> None:
    """Where the connection breaks in a transaction, no line of the driver's logger stands beside ours."""
    program = (
        "import sys; from freegpt_auth.stores.postgres import writes;"
        "writes.DURABLE = 'SELECT pg_terminate_backend(pg_backend_pid())';"
        "from freegpt_auth.cli import main; sys.exit(main())"
    )
    start = [sys.executable, "-c", program, "--store", database, "create", "ci"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert Done(done.returncode, done.stdout, done.stderr).failed_in_one_line("try again once it runs")


def test_a_database_that_cannot_be_reached_is_one_line(here: Run, cluster: Any) -> None:
    """Where no database answers, or the password is wrong, a command says so in one line that holds no password."""
    put(FILE, token("a"))
    for url, why in (
        ("postgresql://u:hunter2@127.0.0.1:1/d", "does not answer: "),
        ("postgresql://u:hunter2@a..b/d", "does not answer: the name of the host is none that can be looked up"),
        ("postgresql://u:hunter2@127.0.0.1:1/d?connect_timeout=x", "check that the database runs"),
        (cluster.url("migrated", password="hunter2"), "password authentication failed"),
        (cluster.url("missing", password="hunter2"), "password authentication failed"),
        (cluster.url("missing"), 'database "missing" does not exist'),
    ):
        for arguments in (["list"], ["create", "ci"], ["migrate"], ["copy", FILE, url], ["copy", url, BACK]):
            store = [] if arguments[0] == "copy" else ["--store", url]
            done = here(*store, *arguments)
            assert done.failed_in_one_line(why), done
            assert "hunter2" not in done.err
    assert not Path(BACK).exists()


# --- copy


@pytest.mark.parametrize("usage", [None, "counts.db"])
def test_growing_and_going_back_keeps_everything(
    run: Run, database: str, monkeypatch: pytest.MonkeyPatch, usage: str | None
) -> None:
    """From a file to a database and back every field, the order and the usage are kept; twice changes nothing more."""
    put(FILE, *SAMPLE)
    before, counts = facts(FILE), usage or "api_tokens.usage.db"
    put_usage(counts, USED)
    if usage:
        monkeypatch.setenv("FREEGPT_AUTH_USAGE", usage)
    for new, there in ((7, 0), (0, 7)):
        done = run("copy", FILE, database)
        said = f"Copied 7 token(s) from {place(FILE)} to {place(database)}: {new} new, 0 revoked now, {there} there already.\n"
        assert done == Done(0, "", said)
        assert facts(database) == before
        assert usage_at(database) == {token_id: used for token_id, used in USED.items() if token_id != "id-of-nobody"}
    if usage:
        Path(usage).rename("of-the-file.db")
    revision = open_store(database)
    content = None
    for _ in range(2):
        assert run("copy", database, BACK).status == 0
        assert facts(BACK) == before
        assert usage_at(usage or "back.usage.db") == usage_at(database)
        assert content in (None, Path(BACK).read_bytes())
        content = Path(BACK).read_bytes()
    assert list(revision.tokens().values()) == list(SAMPLE)


def test_copying_twice_raises_no_revision(cluster: Any, here: Run, database: str) -> None:
    """A copy that finds everything there already lets no server read anything again."""
    put(FILE, *SAMPLE)
    revisions = []
    for _ in range(3):
        assert here("copy", FILE, database).status == 0
        revisions += cluster.sql("SELECT revision FROM freegpt_auth.state", database.rpartition("/")[2])
    assert revisions == [(1,)] * 3


@pytest.mark.parametrize("to_database", [True, False])
def test_what_is_revoked_on_either_side_is_revoked(run: Run, database: str, *, to_database: bool) -> None:
    """Copying never un-revokes, and carries a revocation to where it was not known, with its first instant."""
    origin, target = (FILE, database) if to_database else (database, FILE)
    for location in (origin, target):
        put(location, token("here"), token("there"), token("both"), token("neither"))
    for location, ids in ((origin, ("id-here", "id-both")), (target, ("id-there", "id-both"))):
        for token_id in ids:
            open_store(location).revoke(token_id, NOW if location == origin else LATER)
    done = run("copy", origin, target)
    assert done.status == 0
    assert done.err.endswith(": 0 new, 1 revoked now, 3 there already.\n")
    revoked = {each["name"]: each["revoked_at"] for _, each in facts(target)}
    assert revoked == {"here": NOW, "there": LATER, "both": LATER, "neither": None}
    assert {each["name"] for _, each in facts(origin) if each["revoked_at"]} == {"here", "both"}


@pytest.mark.parametrize("to_database", [True, False])
def test_a_token_that_was_deleted_is_named_and_deleted_if_that_is_asked_for(
    run: Run, database: str, *, to_database: bool
) -> None:
    """What TO would go on accepting though FROM does not hold it is named; --delete deletes it, and nothing else."""
    origin, target = (FILE, database) if to_database else (database, FILE)
    others = (token("live"), token("gone", revoked_at=NOW), token("past", expires_at=NOW))
    put(origin, token("kept"))
    put(target, *others, token("kept"))
    for _ in range(2):
        done = run("copy", origin, target)
        assert (done.status, done.out) == (0, "")
        assert done.err.splitlines()[1:] == [
            f"{place(target)} accepts 1 token(s) more, which {place(origin)} does not hold:",
            "  id-live  sk-live... (live)",
            "If they were deleted there, run the same again with --delete.",
        ]
        assert names(target) == ["live", "gone", "past", "kept"]
    done = run("copy", origin, target, "--delete")
    assert done.err.splitlines()[1:] == [
        f"Deleted token sk-{each.name}... ({each.name}), which {place(origin)} does not hold." for each in others
    ]
    assert names(target) == ["kept"]
    assert len(run("copy", origin, target, "--delete").err.splitlines()) == 1


@pytest.mark.parametrize("to_database", [True, False])
def test_two_tokens_with_one_id_are_not_mixed_up(run: Run, database: str, *, to_database: bool) -> None:
    """Where a new token has the id of another one line says so, and nothing was changed: no token and no revocation."""
    origin, target = (FILE, database) if to_database else (database, FILE)
    put(origin, token("new"), token("same", revoked_at=NOW), token("mine", id="taken"))
    put(target, token("same"), token("theirs", id="taken"))
    put_usage(target if to_database else "api_tokens.usage.db", {"taken": Usage(1, NOW)})
    before = facts(target)
    for more in ([], ["--delete"]):
        assert run("copy", origin, target, *more).failed_in_one_line("is there already")
        assert facts(target) == before


def test_the_same_secret_may_have_another_id(run: Run, database: str) -> None:
    """A secret that was imported twice keeps the id that it has in each store, and its usage finds it there."""
    put(FILE, token("a", id="in-the-file"), token("b", id="x"))
    put(database, token("a", id="in-the-database"), token("b", id="y"))
    put_usage("api_tokens.usage.db", {"in-the-file": Usage(5, LATER), "x": Usage(1, NOW)})
    put_usage(database, {"in-the-database": Usage(2, NOW), "y": Usage(9, LATER)})
    assert run("copy", FILE, database).status == 0
    assert [each["id"] for _, each in facts(database)] == ["in-the-database", "y"]
    assert usage_at(database) == {"in-the-database": Usage(5, LATER), "y": Usage(9, LATER)}
    assert run("copy", database, FILE).status == 0
    assert [each["id"] for _, each in facts(FILE)] == ["in-the-file", "x"]
    assert usage_at("api_tokens.usage.db") == {"in-the-file": Usage(5, LATER), "x": Usage(9, LATER)}


def test_a_dash_is_the_store_in_the_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL of a database and its password need not stand among the arguments, which every user of a host sees."""
    put(FILE, token("a"))
    assert run("copy", FILE, "-").failed_in_one_line("FREEGPT_AUTH_STORE, which is not set")
    monkeypatch.setenv("FREEGPT_AUTH_STORE", BACK)
    assert run("copy", "-", "-").failed_in_one_line("FROM and TO are both -")
    for origin, target in ((FILE, "-"), ("-", "third.json")):
        assert run("copy", origin, target).status == 0
    assert names(BACK) == names("third.json") == ["a"]


@pytest.mark.parametrize("origin", ["missing.json", "empty.json", "database"])
def test_nothing_is_copied_from_where_nothing_is(run: Run, database: str, origin: str) -> None:
    """A slip in the name of FROM changes nothing and is no success: least of all does --delete empty TO."""
    Path("empty.json").write_text('{"version": 1, "tokens": []}')
    put(FILE, token("kept"))
    for more in ([], ["--delete"]):
        done = run("copy", database if origin == "database" else origin, FILE, *more)
        assert done.failed_in_one_line("holds no tokens, so nothing was copied; is it the right one?")
    assert names(FILE) == ["kept"]
    assert not Path("missing.json").exists()


def test_a_database_without_the_schema_is_said(run: Run, empty: str) -> None:
    """Copying from or to a database that was not migrated tells what to run first, and writes nothing."""
    put(FILE, token("a"))
    for arguments in ([FILE, empty], [empty, BACK], [empty, FILE, "--delete"]):
        done = run("copy", *arguments)
        assert done.failed_in_one_line(
            f"has no schema, and this release needs {schema.VERSION}: run python -m freegpt_auth migrate"
        )
    assert names(FILE) == ["a"]
    assert not Path(BACK).exists()


def test_a_file_that_cannot_be_written_or_read_is_said(run: Run, database: str) -> None:
    """A broken token file, or a folder that is missing, is one line, and the database stays as it is."""
    put(database, token("a"))
    Path("broken.json").write_text("{ broken")
    assert run("copy", "broken.json", database, "--delete").failed_in_one_line("broken.json: ")
    assert run("copy", database, "missing/t.json").failed_in_one_line("create the folder first")
    assert names(database) == ["a"]


def test_a_store_copied_to_itself_stays_as_it_is(run: Run, database: str) -> None:
    """FROM and TO may be the same by mistake: nothing is changed, added to itself or deleted."""
    put(database, *SAMPLE)
    with closing(open_usage(database)) as counts:
        counts.merge(USED)
        before = facts(database), dict(counts.read())
        assert run("copy", database, database, "--delete").status == 0
        assert (facts(database), dict(counts.read())) == before


def test_usage_may_be_left_out(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FREEGPT_AUTH_USAGE=off no usage is looked at, copied or made."""
    put(FILE, token("plain"))
    put_usage("api_tokens.usage.db", USED)
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "off")
    assert run("copy", FILE, database).status == 0
    assert usage_at(database) == {}
    assert run("copy", database, BACK).status == 0
    assert sorted(path.name for path in Path().glob("*.db")) == ["api_tokens.usage.db"]


def test_files_that_share_their_usage_copy_tokens_only(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two files with one usage database there is nothing of it to copy; between two with their own there is."""
    put(FILE, token("plain"))
    put_usage("api_tokens.usage.db", USED)
    assert here("copy", FILE, BACK).status == 0
    assert usage_at("back.usage.db") == {"id-plain": USED["id-plain"]}
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "api_tokens.usage.db")
    Path("back.usage.db").unlink()
    assert here("copy", FILE, BACK).status == 0
    assert usage_at("api_tokens.usage.db") == USED
    assert not Path("back.usage.db").exists()


def test_copy_deletes_usage_with_the_tokens(here: Run) -> None:
    """The usage of a token that ``copy --delete`` deletes from a file leaves the usage database of that file."""
    put(FILE, token("plain"))
    put(BACK, token("revoked"))
    put_usage("back.usage.db", USED)
    assert here("copy", FILE, BACK, "--delete").status == 0
    assert set(usage_at("back.usage.db")) == {"id-plain", "id-of-nobody"}


def test_a_wrong_setting_is_said_before_anything_is_changed(
    here: Run, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting of usage that cannot be is one line, and no token was copied."""
    put(FILE, token("plain"))
    for wrong, said in (("", "FREEGPT_AUTH_USAGE is set but empty"), (database, "is the URL of another database")):
        monkeypatch.setenv("FREEGPT_AUTH_USAGE", wrong)
        assert here("copy", FILE, database).failed_in_one_line(said)
    assert names(database) == []


def test_usage_that_cannot_be_copied_is_said(run: Run, database: str) -> None:
    """Where usage cannot be read the tokens are copied all the same, and one line says what is still to do."""
    put(FILE, token("plain"))
    Path("api_tokens.usage.db").write_bytes(b"not a database at all" * 100)
    said = f"the tokens were copied; their usage could not be copied: {place('api_tokens.usage.db')}: it is no usage"
    assert run("copy", FILE, database).failed_in_one_line(said)
    assert names(database) == ["plain"]
    Path("api_tokens.usage.db").unlink()
    put_usage("api_tokens.usage.db", USED)
    assert run("copy", FILE, database).status == 0
    assert usage_at(database) == {"id-plain": USED["id-plain"]}


def test_a_token_that_is_deleted_meanwhile_does_no_harm(
    here: Run, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody deletes a token while it is being copied, its usage is left out and the rest is copied."""
    put(FILE, token("plain"), token("revoked"))
    put_usage("api_tokens.usage.db", USED)
    merge = PostgresTokenStore.merge

    def overtaken(store: PostgresTokenStore, tokens: Any) -> Any:
        merged = merge(store, tokens)
        PostgresTokenStore(database).delete("id-plain")
        return merged

    monkeypatch.setattr(PostgresTokenStore, "merge", overtaken)
    assert here("copy", FILE, database).status == 0
    assert names(database) == ["revoked"]
    assert usage_at(database) == {"id-revoked": USED["id-revoked"]}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("9999-12-31T23:59:59-08:00", datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)),
        ("0001-01-01T00:00:00+14:00", datetime(1, 1, 1, tzinfo=UTC)),
        ("2025-06-01T14:00:00+02:00", NOW),
    ],
)
def test_every_instant_of_a_file_has_a_place_in_a_database(
    here: Run, database: str, written: str, kept: datetime
) -> None:
    """An imported token that "never" ends, on the last day there is in America, is read by every server and copied back."""
    instants = {"created_at": written, "expires_at": written, "revoked_at": written, "last_used_at": written}
    record = {"id": "a", "name": "a", "prefix": "", "digest": "sha256$" + "0" * 64, **instants}
    Path(FILE).write_text(json.dumps({"version": 1, "tokens": [record]}))
    for _ in range(2):
        assert here("copy", FILE, database).status == 0
    [(_, known)] = facts(database)
    assert {known[name] for name in instants} == {kept}
    assert here("--store", database, "list").status == 0
    assert here("copy", database, BACK).status == 0
    assert facts(BACK) == facts(database)


def test_what_a_database_cannot_keep_is_one_line(here: Run, database: str) -> None:
    """A field that PostgreSQL has no text for stops the copy as a whole, in one line."""
    put(FILE, token("fine"))
    good = json.loads(Path(FILE).read_text())
    bad = {**good["tokens"][0], "id": "bad", "name": "nul\x00", "digest": "sha256$" + "0" * 64}
    Path(FILE).write_text(json.dumps({"version": 1, "tokens": [*good["tokens"], bad]}))
    assert here("copy", FILE, database).failed_in_one_line("text must be UTF-8 without the character NUL")
    assert names(database) == []


def test_ten_thousand_tokens_are_copied_in_reasonable_time(here: Run, database: str) -> None:
    """Growing and going back with 10,000 tokens and their usage is a matter of seconds, the second time too."""
    tokens = {digest_of(f"{n}"): token(f"{n}", last_used_at=LATER) for n in range(10_000)}
    FileTokenStore(FILE).merge(tokens)
    put_usage("api_tokens.usage.db", {each.id: Usage(1, NOW) for each in tokens.values()})
    began = time.monotonic()
    for origin, target in ((FILE, database), (FILE, database), (database, BACK), (database, BACK)):
        assert here("copy", origin, target).status == 0
    assert time.monotonic() - began < 60
    assert facts(BACK) == facts(FILE)
    assert len(usage_at("back.usage.db")) == 10_000


def test_a_copy_may_take_longer_than_other_commands(
    cluster: Any, here: Run, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million tokens take the database longer than any other change, and are copied all the same."""
    monkeypatch.setattr("freegpt_auth.stores.postgres.store.PATIENCE", 0.5)
    name = database.rpartition("/")[2]
    slow = "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END $$"
    cluster.sql(slow, name)
    cluster.sql("CREATE TRIGGER slow BEFORE INSERT ON freegpt_auth.tokens FOR EACH ROW EXECUTE FUNCTION slow()", name)
    put(FILE, token("a"))
    assert here("copy", FILE, database).status == 0
    assert names(database) == ["a"]


# --- what is no database


def test_only_databases_are_migrated(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has no tables says that there is nothing to do, and is not touched."""
    assert here("migrate").err == f"{place(FILE)} is a token file, which needs no schema: there is nothing to do.\n"
    assert not Path(FILE).exists()
    monkeypatch.setattr("freegpt_auth.commands.tokens.open_store", lambda _: MemoryTokenStore())
    assert here("migrate").err.startswith("memory is ")
