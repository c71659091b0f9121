"""``create``, ``list``, ``revoke`` and ``delete`` on a token file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import MemoryTokenStore, StoreError, Token
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, generate_secret, has_valid_checksum, issue, prefix_of
from freegpt_auth.usage.base import Batch
from tests.commands.conftest import TOKEN_FILE, USAGE_FILE, Done, Run, kept, put, row

if TYPE_CHECKING:
    from collections.abc import Mapping

REVOKED_AT = "2025-11-30T08:00:00Z"
SECRET, OTHER = generate_secret(), generate_secret()
WAYS = pytest.mark.parametrize(("way", "done_to"), [("revoke", "Revoked"), ("delete", "Deleted")])


def count(uses: Mapping[str, int]) -> UsageDatabase:
    """Write usage beside the token file, by token id, and return the database."""
    usage = UsageDatabase(str(USAGE_FILE))
    usage.write(Batch("p", 1, {token_id: (number, 1764153923.0) for token_id, number in uses.items()}), 1.0)
    return usage


# --- create


def test_create_prints_the_secret_alone(run: Run) -> None:
    """``TOKEN=$(... create ci)`` holds the secret and nothing else; the note to save it goes to stderr."""
    done = run("create", "ci")
    assert done.status == 0
    assert re.fullmatch(r"sk-[0-9A-Za-z]{49}\n", done.out)
    created = f"Created token {done.out[:14]}... for ci in {TOKEN_FILE.absolute()}.\n"
    assert done.err == f"{created}Save this token now: it is not shown again.\n"
    assert done.out[14:].strip() not in TOKEN_FILE.read_text() + run("list").out


@pytest.mark.parametrize("name", ["""it's "quoted" `twice` $HOME {} %s back\\slash""", " büro-日本-🔑 "])
def test_name_is_kept_as_typed(run: Run, name: str) -> None:
    """A name with any printable character is the same in the list, in JSON and as a reference."""
    assert run("create", name).status == 0
    assert f"   Name: {name}\n" in run("list").out
    assert json.loads(run("list", "--json").out)[0]["name"] == name
    assert f"({name})" in run("revoke", name).err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90d", 7_776_000), ("12h", 43_200), ("30m", 1800), ("2w", 1_209_600), ("45s", 45), ("36", 36)],
)
def test_expiring_token_as_json(run: Run, text: str, seconds: int) -> None:
    """A token expires exactly this long after its creation, in both outputs; only the JSON holds the secret."""
    done = run("create", "ci", "--expires-in", text, "--json")
    record = json.loads(done.out)
    secret = record.pop("token")
    expires_at = datetime.fromisoformat(record["expires_at"])
    assert expires_at - datetime.fromisoformat(record["created_at"]) == timedelta(seconds=seconds)
    assert f" until {expires_at.astimezone().replace(tzinfo=None).isoformat()} in " in done.err
    assert has_valid_checksum(secret)
    assert secret not in done.err
    assert [record] == json.loads(run("list", "--json").out)
    assert "." not in kept()[0]["created_at"]  # whole seconds


@pytest.mark.parametrize(
    ("text", "expires_at"),
    [
        ("2999-01-31", "2999-01-30T23:00:00+00:00"),
        ("2999-01-31T18:00", "2999-01-31T17:00:00+00:00"),
        ("2999-01-31T18:00:30Z", "2999-01-31T18:00:30+00:00"),
        ("2999-01-31T18:00-05:00", "2999-01-31T23:00:00+00:00"),
        ("2996-02-29", "2996-02-28T23:00:00+00:00"),
        ("2027-10-31T02:30", "2027-10-31T00:30:00+00:00"),  # twice that night: the first
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59+00:00"),
    ],
)
def test_expiry_at_a_date(run: Run, monkeypatch: pytest.MonkeyPatch, text: str, expires_at: str) -> None:
    """A date is its local midnight; a time is local unless it has an offset."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert json.loads(run("create", "ci", "--expires-at", text, "--json").out)["expires_at"] == expires_at
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["--expires-at", "2027-02-29"], 2, "'2027-02-29' is not a date; write 2027-01-31"),
        (["--expires-at", "tomorrow"], 2, "'tomorrow' is not a date"),
        (["--expires-at", "9999-12-31T23:59-12:00"], 2, "too far away; give a nearer date"),
        (["--expires-at", "2020-01-31T00:00Z"], 1, "is over, so the token would have expired; give a later time"),
        (["--expires-at", "2999-01-31", "--expires-in", "1d"], 2, "not allowed with argument"),
    ],
)
def test_unusable_expiry_creates_no_token(run: Run, arguments: list[str], status: int, problem: str) -> None:
    """A date that does not exist, is over or out of range is named in one line, and no token is created."""
    done = run("create", "ci", *arguments)
    assert (done.status, done.out, done.err.count("\n")) == (status, "", 1)
    assert problem in done.err
    assert not TOKEN_FILE.exists()


# --- list


def test_list_chooses_tokens(run: Run) -> None:
    """``--active`` leaves out revoked and expired tokens, ``--expiring`` those that outlive the time, too."""
    days = {"soon": 6, "later": 8, "expired": -1, "gone": 6}
    expiries = {name: (datetime.now(UTC) + timedelta(days=number)).isoformat() for name, number in days.items()}
    rows = {name: row(name, name=name, expires_at=expiry) for name, expiry in expiries.items()}
    rows["gone"]["revoked_at"] = REVOKED_AT
    put(*rows.values(), row("ever", name="ever"))

    def names(*arguments: str) -> list[str]:
        return re.findall("Name: (.*)", run("list", *arguments).out)

    assert names("--active") == ["soon", "later", "ever"]
    assert names("--expiring", "7d") == names("--expiring", "7d", "--active") == ["soon"]
    assert run("list", "--expiring", "1d") == Done(0, "No tokens found.\n", "")
    assert json.loads(run("list", "--expiring", "1d", "--json").out) == []


def test_list_has_status_and_usage(run: Run) -> None:
    """The list shows every token with its status, its last use and, in JSON, the number of uses."""
    put(row(SECRET, name="ünï", expires_at="2125-11-26T10:30:00+02:00"), row(OTHER, revoked_at=REVOKED_AT))
    count({kept()[0]["id"]: 2})
    used, revoked = json.loads(run("list", "--json").out)
    assert (used["status"], used["use_count"], used["last_used_at"]) == ("active", 2, "2025-11-26T10:45:23+00:00")
    assert (revoked["status"], revoked["use_count"], revoked["last_used_at"]) == ("revoked", 0, None)
    assert f"\n\n2. {OTHER[:14]}...\n   Name: a-token\n   Status: ✗ Revoked\n" in run("list").out


@pytest.mark.parametrize("location", ["api_tokens.json", "missing/t.json"])
def test_empty_list(run: Run, location: str) -> None:
    """Without tokens, or without the folder, the list names the file, explains ``create``, and makes no file."""
    done = run("list", "--store", location)
    assert (done.status, done.out) == (0, "No tokens found.\n")
    assert f"Is {Path(location).absolute()} where your server's tokens are?" in done.err
    assert run("list", "--json") == Done(0, "[]\n", "")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("values", [None, ("x", 1, None), ("x", 1, 1e20)], ids=["corrupt", "no-instant", "far-away"])
def test_list_survives_unreadable_usage(run: Run, monkeypatch: pytest.MonkeyPatch, values: Any) -> None:
    """A broken usage database costs the last uses and one line, not the list; with usage off it is not opened."""
    put(row(SECRET))
    if values is None:
        USAGE_FILE.write_bytes(b"not a database at all" * 100)
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


@WAYS
def test_several_tokens_at_once(run: Run, way: str, done_to: str) -> None:
    """Each token has one line, in the order of the references, however many name it."""
    put(*(row(f"sk-{name}", id=f"id-{name}", name=name) for name in ("a", "b", "c", "d")))
    done = run(way, "c", "id-a", "id-c", "b", "sk-c")
    lines = [f"{done_to} token {prefix_of(f'sk-{name}')}... ({name}). It is refused from now on.\n" for name in "cab"]
    assert done == Done(0, "", "".join(lines))
    assert [each["name"] for each in kept() if not each.get("revoked_at")] == ["d"]
    assert len(kept()) == (4 if way == "revoke" else 1)


@WAYS
def test_failure_in_the_middle(run: Run, monkeypatch: pytest.MonkeyPatch, way: str, done_to: str) -> None:
    """If a store changes tokens one by one and the third fails, the first two have their lines, then the reason."""
    store, issued = MemoryTokenStore(), [issue(name, now=datetime.now(UTC)) for name in ("a", "b", "c")]
    for token, secret in issued:
        store.add(digest_of(secret), token)
    (first, _), (last, _), (third, _) = issued
    change = getattr(store, way)

    def failing(token_id: str, *at: datetime) -> Token:
        if token_id == last.id:
            raise StoreError("the database has gone")
        changed: Token = change(token_id, *at)
        return changed

    monkeypatch.setattr(store, way, failing)
    monkeypatch.setattr("freegpt_auth.commands.tokens.open_store", lambda _: store)
    usage = count({token.id: 1 for token, _ in issued})
    lines = [f"{done_to} token {each.prefix}... ({each.name}). It is refused from now on.\n" for each in (third, first)]
    failed = "".join([*lines, "freegpt-auth: the database has gone\n"])
    assert run(way, "c", "a", "b") == Done(1, "", failed)
    assert [token.name for token in store.tokens().values() if token.revoked_at is None] == ["b"]
    assert len(usage.read()) == (1 if way == "delete" else 3)


def test_revoking_twice_is_no_failure(run: Run) -> None:
    """A script may revoke again: the answer has the first instant, which stays."""
    content = put(row(SECRET, revoked_at=REVOKED_AT))
    done = run("revoke", SECRET)
    assert (done.status, done.out) == (0, "")
    assert re.fullmatch(rf"Token {SECRET[:14]}\.\.\. \(a-token\) was already revoked at \S+\.\n", done.err)
    assert TOKEN_FILE.read_bytes() == content


@pytest.mark.parametrize(("number", "last"), [(1, "It was the last one"), (2, "They were the last ones")])
def test_deleting_the_last_tokens(run: Run, number: int, last: str) -> None:
    """The last tokens can be deleted: authentication stays on, and the way to turn it off is printed."""
    put(*(row(secret) for secret in (SECRET, OTHER)[:number]), row("sk-third"))
    assert "last one" not in run("delete", "sk-third").err
    assert run("delete", *(SECRET, OTHER)[:number]).err.endswith(
        f"{last}. Authentication stays on; to turn it off, move {TOKEN_FILE.absolute()} away and restart the server.\n"
    )
    assert kept() == []


def test_delete_removes_usage(run: Run) -> None:
    """The usage of a deleted token is removed; the usage of a revoked token stays for the list."""
    put(row(SECRET), row(OTHER), row("sk-third"))
    usage = count({each["id"]: number for number, each in enumerate(kept(), start=2)})
    first = kept()[0]["id"]
    assert run("revoke", SECRET).status == 0
    assert run("delete", OTHER, "sk-third").err.count("\n") == 2
    assert {token_id: used.use_count for token_id, used in usage.read().items()} == {first: 2}


PROBLEMS = {
    "": "",
    "off": "",
    " ": "FREEGPT_AUTH_USAGE is set but empty",
    "fifo": "it is a FIFO, not a file",
    "notes.txt": "it is no usage database",
}


@pytest.mark.parametrize("usage", PROBLEMS)
def test_delete_is_independent_of_usage(run: Run, monkeypatch: pytest.MonkeyPatch, usage: str) -> None:
    """A token is deleted although its usage cannot be removed: one line has the reason."""
    os.mkfifo("fifo")
    Path("notes.txt").write_text("my notes")
    put(row(SECRET), row(OTHER))
    if usage:
        monkeypatch.setenv("FREEGPT_AUTH_USAGE", usage)
    done = run("delete", SECRET)
    first, *others = done.err.splitlines()
    assert (done.status, first) == (0, f"Deleted token {SECRET[:14]}... (a-token). It is refused from now on.")
    assert [each["digest"] for each in kept()] == [f"sha256${digest_of(OTHER).hex()}"]
    assert len(others) == bool(PROBLEMS[usage])
    assert "the usage of the deleted token(s) could not be removed: " in done.err or not PROBLEMS[usage]
    assert PROBLEMS[usage] in done.err


def test_delete_in_a_deleted_directory(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token is deleted although the working directory, to which usage is relative, was removed."""
    put(row(SECRET), row(OTHER))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "usage.db")
    (tmp_path / "gone").rmdir()
    done = run("--store", str(tmp_path / TOKEN_FILE), "delete", SECRET)
    assert (done.status, done.err.count("\n")) == (0, 2)
    assert "could not be removed: no such file or directory" in done.err
