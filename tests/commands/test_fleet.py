"""``copy`` between files and databases, and every command on a database. ``migrate`` is tested with the schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth.commands import FAMILIES
from freegpt_auth.stores import open_store, open_usage
from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.presence import Presence
from freegpt_auth.tokens import Token, digest_of, has_valid_checksum
from freegpt_auth.usage.base import Usage
from tests.commands.conftest import Done, Run

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
FILE, BACK, COUNTS = "api_tokens.json", "back.json", "api_tokens.usage.db"


def place(location: str) -> str:
    """Return a location as messages show it."""
    return re.sub(r":[^:@]*@", "@", location) if "://" in location else str(Path(location).absolute())


def facts(location: str) -> list[tuple[bytes, Token]]:
    """Return the digests and tokens in a store, oldest first."""
    fields = Token.__struct_fields__  # a token of a file has more
    tokens = open_store(location).tokens()
    return [(digest, Token(**{name: getattr(each, name) for name in fields})) for digest, each in tokens.items()]


def names(location: str) -> list[str]:
    """Return the names of the tokens in a store, oldest first."""
    return [each.name for _, each in facts(location)]


def usage_at(location: str) -> dict[str, Usage]:
    """Return the usage at a location."""
    with closing(open_usage(location)) as store:
        return dict(store.read())


def put_usage(location: str, usage: dict[str, Usage]) -> None:
    """Merge usage into a location."""
    with closing(open_usage(location)) as store:
        store.merge(usage)


def put(location: str, *tokens: Token) -> None:
    """Add tokens to a store; the digest of each is derived from its name."""
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
USED = {"id-plain": Usage(3, LATER), "id-revoked": Usage(2**40, NOW), "id-of-no-token": Usage(1, NOW)}


# --- commands on a database


def test_life_of_a_token(run: Run, database: str) -> None:
    """Each command works on a database as on a file, and shows no password."""
    done = run("--store", database, "create", "ci", "--expires-in", "30d")
    assert done.status == 0
    secret = done.out.strip()
    assert has_valid_checksum(secret)
    assert re.fullmatch(rf"Created token \S+ for ci until \S+ in {re.escape(place(database))}\.\nSave .+\n", done.err)
    [record] = json.loads(run("--store", database, "list", "--json").out)
    assert (record["status"], record["use_count"], record["last_used_at"]) == ("active", 0, None)
    for text in ("Revoked token", "was already revoked at"):
        done = run("--store", database, "revoke", f"{secret[:14]}...")
        assert (done.status, done.out) == (0, "")
        assert text in done.err
    assert run("--store", database, "revoke", "nobody").failed_in_one_line(f"no token of {place(database)} matches")
    done = run("--store", database, "delete", record["id"])
    assert done == Done(0, "", f"Deleted token {secret[:14]}... (ci). It is refused from now on.\n")
    assert run("--store", database, "list").out == "No tokens found.\n"


def test_unconfirmed_servers_are_reported(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a server process has not confirmed a change, the command says in how many seconds it is in force."""
    for family in FAMILIES:
        monkeypatch.setattr(family, "open_store", lambda store: PostgresTokenStore(store.text, confirmation=0.1))
    put(database, token("first"), token("second"))
    with closing(Address(database).connect()) as connection:
        Presence(900.0).register(connection)  # a server that never confirms
    for line, *arguments in (
        (r"Revoked token \S+ \(first\)\.", "--store", database, "revoke", "first"),
        (r"Token \S+ \(first\) was already revoked at \S+\.", "--store", database, "revoke", "first"),
        (r"Deleted token \S+ \(second\)\.", "--store", database, "delete", "second"),
        (r"Copied 1 token\(s\) .* 1 there already\.", "copy", database, database),
    ):
        done = run(*arguments)
        late = r" In force everywhere within \d{3} s: 1 server process\(es\) have not confirmed it\.\n"
        assert re.fullmatch(line + late, done.err), done


@pytest.mark.parametrize("ahead", [300, -300])
def test_instants_are_by_the_clock_of_the_database(
    run: Run, database: str, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """On a host whose clock is 5 minutes off, creation, expiry, revocation and the list follow the database's clock."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)
    monkeypatch.setenv("FREEGPT_AUTH_STORE", database)
    secret = run("create", "ci", "--expires-in", "200s").out.strip()
    assert json.loads(run("list", "--json").out)[0]["status"] == "active"
    assert run("revoke", secret).status == 0
    [(_, known)] = facts(database)
    for name, seconds in (("created_at", 0), ("expires_at", 200), ("revoked_at", 0)):
        assert abs(getattr(known, name).timestamp() - right() - seconds) < 60, name


def test_names_are_text_in_any_database(cluster: Any, run: Run) -> None:
    """In a database without an encoding, the default for the locale C, names stay as typed."""
    cluster.sql("CREATE DATABASE plain ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        url = cluster.url("plain")
        assert run("--store", url, "migrate").status == 0
        assert run("--store", url, "create", "bürö 日本").status == 0
        assert "   Name: bürö 日本\n" in run("--store", url, "list").out
    finally:
        cluster.sql("DROP DATABASE plain WITH (FORCE)")


def test_broken_connection_is_one_line(database: str) -> None:
    """If the connection breaks in a transaction, the driver's logger adds no line to ours."""
    program = (
        "import sys; from freegpt_auth.stores.postgres import writes;"
        "writes.DURABLE = 'SELECT pg_terminate_backend(pg_backend_pid())';"
        "from freegpt_auth.cli import main; sys.exit(main())"
    )
    start = [sys.executable, "-c", program, "--store", database, "create", "ci"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert Done(done.returncode, done.stdout, done.stderr).failed_in_one_line("try again once it runs")


def test_unreachable_database_is_one_line(run: Run, cluster: Any) -> None:
    """If no database answers, or the login fails, a command reports it in one line without the password."""
    put(FILE, token("a"))
    for url, reason in (
        ("postgresql://u:hunter2@127.0.0.1:1/d", "does not answer: "),
        ("postgresql://u:hunter2@a..b/d", "does not answer: the name of the host is none that can be looked up"),
        ("postgresql://u:hunter2@127.0.0.1:1/d?connect_timeout=x", "check that the database runs"),
        (cluster.url("missing", password="hunter2"), "password authentication failed"),
        (cluster.url("missing"), 'database "missing" does not exist'),
    ):
        for arguments in (["list"], ["create", "ci"], ["migrate"], ["copy", FILE, url], ["copy", url, BACK]):
            store = [] if arguments[0] == "copy" else ["--store", url]
            done = run(*store, *arguments)
            assert done.failed_in_one_line(reason), done
            assert "hunter2" not in done.err
    assert not Path(BACK).exists()


# --- copy


@pytest.mark.parametrize("usage", [None, "counts.db"])
def test_copy_to_a_database_and_back(
    run: Run, cluster: Any, database: str, monkeypatch: pytest.MonkeyPatch, usage: str | None
) -> None:
    """A copy to a database and back keeps every field, the order and the usage; a second copy changes nothing."""
    put(FILE, *SAMPLE)
    before, revisions = facts(FILE), []
    put_usage(usage or COUNTS, USED)
    if usage:
        monkeypatch.setenv("FREEGPT_AUTH_USAGE", usage)
    for new, there in ((7, 0), (0, 7)):
        counts = f"{new} new, 0 revoked now, {there} there already"
        line = f"Copied 7 token(s) from {place(FILE)} to {place(database)}: {counts}.\n"
        assert run("copy", FILE, database) == Done(0, "", line)
        assert facts(database) == before
        assert usage_at(database) == {token_id: used for token_id, used in USED.items() if token_id != "id-of-no-token"}
        revisions += cluster.sql("SELECT revision FROM freegpt_auth.state", database.rpartition("/")[2])
    assert revisions == [(1,)] * 2
    if usage:
        Path(usage).rename("of-the-file.db")
    content = None
    for _ in range(2):
        assert run("copy", database, BACK).status == 0
        assert facts(BACK) == before
        assert usage_at(usage or "back.usage.db") == usage_at(database)
        assert content in (None, Path(BACK).read_bytes())
        content = Path(BACK).read_bytes()


def test_copy_carries_revocations(run: Run, database: str) -> None:
    """A token that is revoked in FROM is revoked in TO, with that instant; copying does not un-revoke."""
    put(FILE, token("here", revoked_at=NOW), token("there"))
    put(database, token("here"), token("there", revoked_at=LATER))
    assert run("copy", FILE, database).err.endswith(": 0 new, 1 revoked now, 1 there already.\n")
    assert {each.name: each.revoked_at for _, each in facts(database)} == {"here": NOW, "there": LATER}


@pytest.mark.parametrize("to_database", [True, False])
def test_copy_names_and_deletes_other_tokens(run: Run, database: str, *, to_database: bool) -> None:
    """A token that only TO holds and accepts is named; with --delete all that FROM does not hold are deleted."""
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


def test_copied_token_keeps_its_id_in_each_store(run: Run, database: str) -> None:
    """A secret that was imported twice keeps its id in each store, and its usage is merged under that id."""
    put(FILE, token("a", id="in-the-file"), token("b", id="x"))
    put(database, token("a", id="in-the-database"), token("b", id="y"))
    put_usage(COUNTS, {"in-the-file": Usage(5, LATER), "x": Usage(1, NOW)})
    put_usage(database, {"in-the-database": Usage(2, NOW), "y": Usage(9, LATER)})
    for origin, target, usage, ids in (
        (FILE, database, database, ("in-the-database", "y")),
        (database, FILE, COUNTS, ("in-the-file", "x")),
    ):
        assert run("copy", origin, target).status == 0
        assert tuple(each.id for _, each in facts(target)) == ids
        assert usage_at(usage) == {ids[0]: Usage(5, LATER), ids[1]: Usage(9, LATER)}


def test_dash_is_the_store_of_the_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL of a database need not be an argument: every user of a host can read arguments."""
    put(FILE, token("a"))
    assert run("copy", FILE, "-").failed_in_one_line("FREEGPT_AUTH_STORE, which is not set")
    monkeypatch.setenv("FREEGPT_AUTH_STORE", BACK)
    assert run("copy", "-", "-").failed_in_one_line("FROM and TO are both -")
    for origin, target in ((FILE, "-"), ("-", "third.json")):
        assert run("copy", origin, target).status == 0
    assert names(BACK) == names("third.json") == ["a"]


@pytest.mark.parametrize("origin", ["missing.json", "empty.json"])
def test_empty_origin_changes_nothing(run: Run, origin: str) -> None:
    """A mistyped FROM without tokens is an error: --delete must not empty TO."""
    Path("empty.json").write_text('{"version": 1, "tokens": []}')
    put(FILE, token("kept"))
    for more in ([], ["--delete"]):
        done = run("copy", origin, FILE, *more)
        assert done.failed_in_one_line("holds no tokens, so nothing was copied; is it the right one?")
    assert names(FILE) == ["kept"]
    assert not Path("missing.json").exists()


def test_store_copied_to_itself_is_unchanged(run: Run, database: str) -> None:
    """If FROM and TO are the same store, nothing is changed, counted twice or deleted."""
    put(database, *SAMPLE)
    put_usage(database, USED)
    before = facts(database), usage_at(database)
    assert run("copy", database, database, "--delete").status == 0
    assert (facts(database), usage_at(database)) == before


@pytest.mark.parametrize("variable", [None, "off", COUNTS])
def test_usage_of_copied_files(run: Run, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    """Usage is copied with its tokens, unless it is off or both files share one usage database."""
    put(FILE, token("plain"))
    put_usage(COUNTS, USED)
    if variable:
        monkeypatch.setenv("FREEGPT_AUTH_USAGE", variable)
    assert run("copy", FILE, BACK).status == 0
    assert names(BACK) == ["plain"]
    assert usage_at(COUNTS) == USED
    assert Path("back.usage.db").exists() is (variable is None)
    assert variable or usage_at("back.usage.db") == {"id-plain": USED["id-plain"]}


def test_copy_deletes_usage_with_the_tokens(run: Run) -> None:
    """``copy --delete`` removes the usage of the deleted tokens from the usage database of TO."""
    put(FILE, token("plain"))
    put(BACK, token("revoked"))
    put_usage("back.usage.db", USED)
    assert run("copy", FILE, BACK, "--delete").status == 0
    assert set(usage_at("back.usage.db")) == {"id-plain", "id-of-no-token"}


@pytest.mark.parametrize("wrong", ["", "postgresql://h/d"])
def test_wrong_usage_setting_copies_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """A wrong usage setting is one line, before any token is copied."""
    put(FILE, token("plain"))
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", wrong)
    assert run("copy", FILE, BACK).failed_in_one_line("FREEGPT_AUTH_USAGE is ")
    assert not Path(BACK).exists()


def test_unreadable_usage_is_copied_later(run: Run, database: str) -> None:
    """If usage cannot be read the tokens are copied, and one line asks for a second run."""
    put(FILE, token("plain"))
    Path(COUNTS).write_bytes(b"not a database at all" * 100)
    line = f"the tokens were copied; their usage could not be copied: {place(COUNTS)}: it is no usage"
    assert run("copy", FILE, database).failed_in_one_line(line)
    assert names(database) == ["plain"]
    Path(COUNTS).unlink()
    put_usage(COUNTS, USED)
    assert run("copy", FILE, database).status == 0
    assert usage_at(database) == {"id-plain": USED["id-plain"]}


def test_token_deleted_during_the_copy(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a copied token is deleted by another command its usage is left out, and the rest is copied."""
    put(FILE, token("plain"), token("revoked"))
    put_usage(COUNTS, USED)
    merge = PostgresTokenStore.merge

    def overtaken(store: PostgresTokenStore, tokens: Any) -> Any:
        merged = merge(store, tokens)
        PostgresTokenStore(database).delete("id-plain")
        return merged

    monkeypatch.setattr(PostgresTokenStore, "merge", overtaken)
    assert run("copy", FILE, database).status == 0
    assert names(database) == ["revoked"]
    assert usage_at(database) == {"id-revoked": USED["id-revoked"]}


def test_text_with_nul_copies_nothing(run: Run, database: str) -> None:
    """A name that PostgreSQL cannot store stops the whole copy, in one line."""
    put(FILE, token("fine"), token("name-with-nul"))
    Path(FILE).write_text(Path(FILE).read_text().replace('"name-with-nul"', r'"nul\u0000"'))
    assert run("copy", FILE, database).failed_in_one_line("text must be UTF-8 without the character NUL")
    assert names(database) == []


def test_copy_has_a_longer_time_limit(cluster: Any, run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a million tokens may take the database longer than the time limit of other changes."""
    monkeypatch.setattr("freegpt_auth.stores.postgres.store.COMMAND_TIME_LIMIT", 0.5)
    body = "BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END"
    slow = f"CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS '{body}'"
    trigger = "CREATE TRIGGER slow BEFORE INSERT ON freegpt_auth.tokens FOR EACH ROW EXECUTE FUNCTION public.slow()"
    cluster.sql(f"{slow}; {trigger}", database.rpartition("/")[2])
    put(FILE, token("a"))
    assert run("copy", FILE, database).status == 0
    assert names(database) == ["a"]
