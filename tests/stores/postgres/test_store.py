"""The PostgreSQL store beyond the contract: its answers while the cache is partial, late or without a lease."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth import UNRESOLVED, AuthMode, StoreError, StoreUnavailableError, Token
from freegpt_auth.clock import elapsed
from freegpt_auth.environment_key import EnvironmentKey
from freegpt_auth.guard.authenticator import Authenticator
from freegpt_auth.guard.callers import Caller
from freegpt_auth.guard.credentials import Presented
from freegpt_auth.guard.refusal import Refusal
from freegpt_auth.stores.postgres import PostgresTokenStore, reads, schema
from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.ports import free_port
from tests.helpers.postgresql import PASSWORD
from tests.stores.postgres.common import Clock, execute, name_of, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from freegpt_auth.stores.postgres.connection import Connection

    Opener = Callable[..., PostgresTokenStore]
    Keep = Callable[..., tuple[Token, str]]

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = digest_of("sk-nobody-has-this")
KEY = EnvironmentKey(digest_of("the-environment-key"), "FREEGPT_API_KEY")
NEWER = "UPDATE freegpt_auth.state SET version = 99"
LONG = 10_000.0


@pytest.fixture
def opener(database: str) -> Iterator[Opener]:
    """Return a function that opens a store as another process does, by default of the same database."""
    with contextlib.ExitStack() as stack:

        def open_another(url: str = database, **limits: Any) -> PostgresTokenStore:
            store = PostgresTokenStore(url, **limits)
            stack.callback(store.close)
            return store

        yield open_another


@pytest.fixture
def nowhere() -> str:
    """Return the URL of a port without a server."""
    return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/tokens"


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="freegpt_auth")


def _errors(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == "ERROR"]


def _issued() -> tuple[bytes, Token]:
    token, secret = issue("ci", now=NOW)
    return digest_of(secret), token


# --- before and after its use


def test_constructor_does_not_connect(nowhere: str) -> None:
    """A server that preloads its application opens no connection and starts no thread before it forks."""
    threads = threading.active_count()
    store = PostgresTokenStore(nowhere)
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert threading.active_count() == threads
    assert store.source == nowhere.replace(f":{PASSWORD}", "")
    assert PASSWORD not in repr(vars(store))
    store.close()


def test_closed_store_reopens(opener: Opener, keep: Keep, cluster: Any) -> None:
    """After a shutdown no connection is left and the cache is not used; the next request connects and reads again."""
    store = opener(cache_limit=1)
    (token, secret), _ = keep(store), keep(store)
    store.resolve(digest_of(secret))
    store.close()
    name = name_of(store.source)
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    until(lambda: cluster.sql(ours) == [(0,)])
    assert store.peek(digest_of(secret)) is UNRESOLVED
    opener().revoke(token.id, NOW)
    assert getattr(store.resolve(digest_of(secret)), "revoked_at", None) == NOW


# --- how far the cache may be relied on


def test_certainty_and_lease_end_without_an_error(opener: Opener, keep: Keep) -> None:
    """After 3 s without a query unknown tokens are looked up again; after the lease known ones too, as after a sleep."""
    clock = Clock()
    store = opener(lease=6.0, clock=clock, heartbeat=LONG)
    _, secret = keep(store)
    known = store.resolve(digest_of(secret))
    before = store.now()
    expected = (
        (CERTAINTY - 0.01, None, known),
        (0.01, UNRESOLVED, known),
        (2.9, UNRESOLVED, known),
        (0.1, UNRESOLVED, UNRESOLVED),
    )
    for slept, unknown, answer in expected:
        clock.instant += slept
        assert (store.peek(UNKNOWN), store.peek(digest_of(secret))) == (unknown, answer)
    assert store.now() - before == pytest.approx(6.0, abs=1e-3)
    clock.instant += LONG
    until(lambda: store.peek(digest_of(secret)) == known)


def test_peek_unresolved_if_cache_completes(opener: Opener, keep: Keep, database: str) -> None:
    """A token missing from a partial cache is not reported as unknown because the cache becomes complete meanwhile."""
    interruptions: list[Callable[[], None]] = []
    main = threading.current_thread()

    def clock() -> float:
        if interruptions and threading.current_thread() is main:
            interruptions.pop()()
        return elapsed()

    store = opener(cache_limit=1, clock=clock)
    for _ in range(2):
        keep(store)
    assert store.resolve(UNKNOWN) is None
    assert store.peek(UNKNOWN) is UNRESOLVED

    def complete() -> None:
        execute(database, "TRUNCATE freegpt_auth.tokens")
        until(lambda: store.peek(UNKNOWN) is None)

    interruptions.append(complete)
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert store.peek(UNKNOWN) is None


# --- look-ups


@pytest.fixture
def partial(opener: Opener, keep: Keep) -> tuple[PostgresTokenStore, list[tuple[Token, bytes]]]:
    """Return a store that caches two tokens of four, and each token with its digest."""
    store = opener(cache_limit=2)
    issued = [(token, digest_of(secret)) for token, secret in (keep(store) for _ in range(4))]
    assert store.resolve(UNKNOWN) is None
    return store, issued


@pytest.fixture
def after_look_up(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Return a list of functions: each look-up calls the last one after the row was read, and removes it."""
    actions: list[Callable[[], None]] = []
    look_up = reads.look_up

    def look_up_slowly(connection: Connection, digest: bytes) -> tuple[int, Token | None]:
        found = look_up(connection, digest)
        if actions:
            actions.pop()()
        return found

    monkeypatch.setattr(reads, "look_up", look_up_slowly)
    return actions


def test_row_of_an_earlier_connection_is_read_again(
    partial: Any, database: str, after_look_up: list[Callable[[], None]]
) -> None:
    """A row is not used if the follower reconnected meanwhile, perhaps to another server; after five attempts: 503."""
    store, _ = partial

    def pid() -> Any:
        with psycopg.connect(database) as connection:
            return connection.execute("SELECT pid FROM freegpt_auth.servers").fetchone()

    def reconnect() -> None:
        before = pid()
        execute(database, f"SELECT pg_terminate_backend({before[0]})")
        until(lambda: pid() != before)

    after_look_up.append(reconnect)
    assert store.resolve(UNKNOWN) is None
    assert after_look_up == []
    generations = itertools.count(100)
    after_look_up += [lambda: store._follower._publish(generation=next(generations))] * 6
    with pytest.raises(StoreUnavailableError, match="changes faster than it can be read"):
        store.resolve(UNKNOWN)
    assert len(after_look_up) == 1


def test_row_from_before_a_change_is_read_again(
    partial: Any, opener: Opener, after_look_up: list[Callable[[], None]]
) -> None:
    """A token that is revoked while a request reads it is refused to that request."""
    store, issued = partial
    token, digest = next((token, digest) for token, digest in issued if store.peek(digest) is UNRESOLVED)
    operator = opener()
    after_look_up.append(lambda: operator.revoke(token.id, NOW))  # type: ignore[arg-type]
    assert getattr(store.resolve(digest), "revoked_at", None) == NOW
    assert getattr(store.peek(digest), "revoked_at", None) == NOW
    assert after_look_up == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (psycopg.errors.InsufficientPrivilege("denied\n\ta hint"), "does not answer: denied; use a role"),
        (StoreUnavailableError("all connections are in use"), "all connections are in use"),
    ],
)
def test_failed_look_up_pauses_look_ups(
    partial: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """A failed look-up is a 503 with one line, and for a second further requests do not wait for the database."""
    store, _ = partial

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(reads, "look_up", fail)
    for expected in (reason, "did not answer a moment ago"):
        with pytest.raises(StoreUnavailableError) as caught:
            store.resolve(UNKNOWN)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_look_up_in_another_schema(partial: Any, database: str, caplog: pytest.LogCaptureFixture) -> None:
    """A table whose schema was migrated meanwhile is not read: the answer is 503, never a 401 by chance."""
    store, _ = partial
    execute(database, NEWER)
    until(lambda: _errors(caplog))
    with pytest.raises(StoreUnavailableError, match="upgrade freegpt_auth"):
        store.resolve(UNKNOWN)


# --- the survey


@pytest.mark.parametrize("kind", ["away", "no schema", "newer schema"])
def test_server_with_a_database_is_never_open(
    opener: Opener, database: str, nowhere: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A server that cannot read its tokens at its start refuses them, logs one line, and accepts the environment key."""
    if kind == "newer schema":
        execute(database, NEWER)
    elif kind == "no schema":
        execute(database, "DROP SCHEMA freegpt_auth CASCADE")
    store = opener(nowhere if kind == "away" else database)
    server = Authenticator(store, KEY)
    assert store.survey()[:3] == (True, 0, store.source)
    assert server.mode is AuthMode.DATABASE
    [line] = _errors(caplog)
    expected = {
        "away": "does not answer: ",
        "no schema": f"has no schema, and this release needs {schema.VERSION}: run python -m freegpt_auth migrate. ",
        "newer schema": f"has version 99 of the schema, and this release knows {schema.VERSION}: upgrade freegpt_auth. ",
    }[kind]
    assert line.startswith(f"{store.source} {expected}")
    assert "\n" not in line
    assert PASSWORD not in caplog.text
    refused = server.resolve(Presented([UNKNOWN]))
    assert isinstance(refused, Refusal)
    assert refused.reason == "unavailable"
    assert isinstance(server.resolve(Presented([KEY.digest])), Caller)


def test_survey_counts_the_whole_table(partial: Any, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count in the log is that of the table; if the table cannot be counted, that of the cache."""
    store, issued = partial
    store.revoke(issued[0][0].id, NOW)
    for each in (store, opener(cache_limit=2), opener()):
        assert each.survey()[:2] == (True, 3)

    def fail(_: object) -> None:
        raise psycopg.OperationalError("gone")

    monkeypatch.setattr(reads, "count_active", fail)
    assert store.survey().active in (0, 1, 2)


# --- commands


COMMANDS: tuple[Callable[[PostgresTokenStore], object], ...] = (
    lambda store: store.tokens(),
    lambda store: store.find("sk-"),
    lambda store: store.add(*_issued()),
    lambda store: store.revoke("nobody", NOW),
    lambda store: store.delete("nobody"),
    lambda store: store.merge(dict([_issued()])),
    lambda store: store.migrate(),
)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_unreachable_database_is_one_line(nowhere: str, command: Callable[[PostgresTokenStore], object]) -> None:
    """The error has no traceback, no hint of the driver and no password."""
    store = PostgresTokenStore(nowhere)
    with pytest.raises(StoreUnavailableError) as caught:
        command(store)
    assert str(caught.value).startswith(f"{store.source} does not answer: ")
    assert "\n" not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__suppress_context__


def test_commands_require_the_schema(opener: Opener, database: str) -> None:
    """Without a schema each command but ``migrate`` names the command to run."""
    execute(database, "DROP SCHEMA freegpt_auth CASCADE")
    for command in COMMANDS[:-1]:
        with pytest.raises(
            StoreError, match=r"has no schema, and this release needs .*: run python -m freegpt_auth migr"
        ):
            command(opener())


def test_interrupted_command_warns_of_unknown_result(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the connection is lost after a commit, the operator is asked to check the result, which is in force."""
    store = opener()

    def fail(*_: object) -> None:
        raise psycopg.OperationalError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(reads, "head", fail)  # called after the commit
        digest, token = _issued()
        with pytest.raises(StoreUnavailableError, match="may still be accepted: run revoke again"):
            store.add(digest, token)
    assert list(store.tokens()) == [digest]


def test_command_waits_for_a_slow_reader(opener: Opener, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command returns after a slow process has read the change: nothing revoked is accepted afterwards."""
    server, commands = opener(), opener()
    token, secret = keep(commands)
    server.resolve(digest_of(secret))
    changes_since = reads.changes_since

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return changes_since(*arguments)

    monkeypatch.setattr(reads, "changes_since", slowly)
    commands.revoke(token.id, NOW)
    assert getattr(server.peek(digest_of(secret)), "revoked_at", None) == NOW
