"""What a store in PostgreSQL adds to the contract: what it answers while the database does not, and what it says then."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth import UNRESOLVED, AuthMode, ConfigurationError, StoreError, StoreUnavailableError, Token
from freegpt_auth.clock import elapsed
from freegpt_auth.environment_key import EnvironmentKey
from freegpt_auth.exceptions import StoreBusyError, TokenNotFoundError
from freegpt_auth.guard.authenticator import Authenticator, Refusal
from freegpt_auth.guard.callers import Caller
from freegpt_auth.stores.postgres import PostgresTokenStore, follower, reads, schema
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.postgresql import PASSWORD, free_port, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.postgresql import Cluster

    Opener = Callable[..., PostgresTokenStore]
    Keep = Callable[..., tuple[Token, str]]

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = digest_of("sk-nobody-has-this")
KEY = EnvironmentKey(digest_of("the-environment-key"), "FREEGPT_API_KEY")
PATIENCE = 30.0
NEWER = "UPDATE freegpt_auth.state SET version = 99"

Part = tuple[PostgresTokenStore, list[tuple[Token, bytes]]]
"""A store, and each of its tokens with its digest."""


@dataclass
class Clock:
    """A local clock that moves by hand."""

    instant: float = 1_000.0

    def __call__(self) -> float:
        """Return the instant."""
        return self.instant


@pytest.fixture
def opener(database: str) -> Iterator[Opener]:
    """Return a function that opens the same database once more, as another process does, or another one."""
    with contextlib.ExitStack() as stack:

        def open_another(url: str = database, **limits: Any) -> PostgresTokenStore:
            store = PostgresTokenStore(url, **limits)
            stack.callback(store.close)
            return store

        yield open_another


@pytest.fixture
def nowhere() -> str:
    """Return the URL of a database at which nobody listens."""
    return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/tokens"


@pytest.fixture
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a server that may be killed, with the schema in it."""
    with running(tmp_path_factory.mktemp("mortal") / "data", fsync="off") as cluster:
        PostgresTokenStore(cluster.url("postgres")).migrate()
        yield cluster


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="freegpt_auth")


def _until(reached: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _said(log: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == level]


def _issued() -> tuple[bytes, Token]:
    token, secret = issue("ci", now=NOW)
    return digest_of(secret), token


# --- before anything was asked


def test_making_a_store_asks_nothing(nowhere: str) -> None:
    """A server that preloads its application opens no connection and starts no thread before it forks."""
    threads = threading.active_count()
    store = PostgresTokenStore(nowhere)
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert threading.active_count() == threads
    assert store.source == nowhere.replace(f":{PASSWORD}", "")
    assert PASSWORD not in repr(vars(store))
    store.close()


def test_a_url_that_cannot_be_read_is_a_configuration_error() -> None:
    """A server does not start on a URL that leads nowhere it can name."""
    with pytest.raises(ConfigurationError, match="percent-encoding"):
        PostgresTokenStore("postgresql://ann:p@ss@db/tokens")


# --- what may be known


def test_nothing_is_unknown_once_the_database_did_not_answer(opener: Opener, keep: Keep) -> None:
    """A token that was made meanwhile must not be answered 401: unknown counts for seconds, known for the lease."""
    store = opener()
    _, secret = keep(store)
    assert store.resolve(UNKNOWN) is None
    known = store.resolve(digest_of(secret))
    assert store.peek(UNKNOWN) is None
    now = elapsed()
    assert now + follower.CERTAINTY >= store._follower.state.certain_until > now
    store._follower._lose(StoreUnavailableError("it does not answer"))
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert store.peek(digest_of(secret)) is known


def test_a_host_that_slept_relies_on_nothing_from_before(opener: Opener, keep: Keep) -> None:
    """A host sleeps past the lease: known tokens are read again first, and tokens end that expired meanwhile."""
    clock = Clock()
    store = opener(lease=6.0, clock=clock)
    _, secret = keep(store)
    store.resolve(digest_of(secret))
    before = store.now()
    with store._follower._reading:  # nothing is read on waking up
        for slept, unknown, is_known in ((2.99, None, True), (0.01, UNRESOLVED, True), (2.99, UNRESOLVED, True)):
            clock.instant += slept
            assert store.peek(UNKNOWN) is unknown
            assert isinstance(store.peek(digest_of(secret)), Token) is is_known
        clock.instant += 19.01
        assert store.peek(UNKNOWN) is UNRESOLVED
        assert store.peek(digest_of(secret)) is UNRESOLVED
        assert store.now() - before == pytest.approx(25.0, abs=1e-3)
    _until(lambda: isinstance(store.peek(digest_of(secret)), Token))


def test_memory_that_is_completed_while_it_is_looked_at_is_not_believed(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that missed a token in a part of the table does not take it for unknown because the rest comes just then."""
    store = opener()
    store.resolve(UNKNOWN)
    store._follower.state.certain_until = float("-inf")

    def find_just_before(_: bytes) -> None:
        store._follower.state.certain_until = float("inf")

    monkeypatch.setattr(store._cache, "find", find_just_before)
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert store.peek(UNKNOWN) is None
    store._cache.complete = False
    assert store.peek(UNKNOWN) is UNRESOLVED


def test_a_process_that_is_cut_off_accepts_for_the_lease_and_recovers_by_itself(
    mortal: Cluster, opener: Opener, keep: Keep
) -> None:
    """While the database is away: known tokens for the lease, never a 401 for others, the key for ever, then all again."""
    store = opener(mortal.url("postgres"), lease=3.0)
    token, secret = keep(store)
    server = Authenticator(store, KEY)
    good, bad, key = digest_of(secret), UNKNOWN, KEY.digest

    def ask(digest: bytes) -> str:
        decision = server.peek([digest])
        decision = server.resolve([digest]) if decision is UNRESOLVED else decision
        assert isinstance(decision, (Caller, Refusal))
        return decision.reason if isinstance(decision, Refusal) else "accepted"

    assert server.mode is AuthMode.TOKEN_FILE
    assert [ask(each) for each in (good, bad, key)] == ["accepted", "unknown", "accepted"]
    mortal.kill()
    _until(lambda: store._follower.state.trouble)
    answers = []
    while elapsed() < store._follower.state.leased_until:
        answers.append([ask(each) for each in (bad, key, good)])
    assert answers[0] == ["unavailable", "accepted", "accepted"]
    assert all(answer[:2] == answers[0][:2] for answer in answers)
    _until(lambda: elapsed() >= store._follower.state.leased_until)
    for each in (good, bad):
        for call in (store.peek, store.resolve):
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                call(each)
    assert [ask(each) for each in (good, bad, key)] == ["unavailable", "unavailable", "accepted"]
    mortal.start()
    _until(lambda: ask(good) == "accepted")
    assert [ask(each) for each in (bad, key)] == ["unknown", "accepted"]
    opener(mortal.url("postgres")).revoke(token.id, NOW)
    assert [ask(each) for each in (good, bad, key)] == ["revoked", "unknown", "accepted"]


def test_a_store_that_was_closed_goes_on_when_it_is_asked(opener: Opener, keep: Keep, cluster: Any) -> None:
    """After the shutdown of a server no connection of it is left, and nothing is answered from before."""
    store = opener(cache_limit=1)
    (token, secret), _ = keep(store), keep(store)
    store.resolve(digest_of(secret))
    name = store.source.rpartition("/")[2]
    store.close()
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    _until(lambda: cluster.sql(ours) == [(0,)])
    assert store.peek(digest_of(secret)) is UNRESOLVED
    opener().revoke(token.id, NOW)
    assert getattr(store.resolve(digest_of(secret)), "revoked_at", None) == NOW


# --- look-ups in a part of the table


@pytest.fixture
def in_part(opener: Opener, keep: Keep) -> Part:
    """Return a store that holds two tokens of four in memory, which are those."""
    store = opener(cache_limit=2)
    issued = [(token, digest_of(secret)) for token, secret in (keep(store) for _ in range(4))]
    assert store.resolve(UNKNOWN) is None
    return store, issued


def test_every_token_is_found_though_memory_holds_two(
    in_part: Part,
) -> None:
    """Those used of late are answered from memory, the others from the table, and wrong ones from the table each time."""
    store, issued = in_part
    for _ in range(2):
        for token, digest in issued:
            found = store.resolve(digest)
            assert found == token
            assert store.peek(digest) is store.resolve(digest) is found
            assert store.peek(UNKNOWN) is UNRESOLVED
            assert store.resolve(UNKNOWN) is None
    assert len(store._cache) <= 2


def test_what_was_read_over_an_earlier_connection_is_read_again(in_part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that began before the thread found another server is not believed, once; five times it is a 503."""
    store, _ = in_part
    look_up, asked = store._look_up, []

    def look_up_meanwhile(digest: bytes) -> tuple[int, Token | None]:
        asked.append(digest)
        if len(asked) in disturbed:
            store._follower.state.generation += 1
        return look_up(digest)

    monkeypatch.setattr(store, "_look_up", look_up_meanwhile)
    disturbed = {1}
    assert store.resolve(UNKNOWN) is None
    assert len(asked) == 2
    asked.clear()
    disturbed = set(range(1, 10))
    with pytest.raises(StoreUnavailableError, match="changes faster than it can be read"):
        store.resolve(UNKNOWN)
    assert len(asked) == 5


def test_what_was_read_before_a_change_is_read_again(
    in_part: Part, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is revoked while a request reads it is refused to that request: the race that brings tokens back."""
    store, issued = in_part
    token, digest = next((token, digest) for token, digest in issued if store._cache.find(digest) is None)
    look_up, revoke = store._look_up, opener().revoke
    asked: list[int] = []

    def look_up_slowly(digest: bytes) -> tuple[int, Token | None]:
        answer = look_up(digest)
        asked.append(answer[0])
        if len(asked) == 1:
            revoke(token.id, NOW)
        return answer

    monkeypatch.setattr(store, "_look_up", look_up_slowly)
    assert getattr(store.resolve(digest), "revoked_at", None) == NOW
    assert getattr(store.peek(digest), "revoked_at", None) == NOW
    assert len(asked) == 2


def test_a_revocation_that_the_database_lost_is_kept_through_look_ups(
    in_part: Part, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A token that is revoked here is refused on, in memory or looked up, though the table says that it works."""
    store, issued = in_part
    (token, digest), others = issued[0], issued[1:]
    store.revoke(token.id, NOW)
    assert getattr(store.resolve(digest), "revoked_at", None) == NOW
    with psycopg.connect(database) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE freegpt_auth.tokens SET revoked_at = NULL")
        connection.execute("UPDATE freegpt_auth.state SET revision = 1, mark = gen_random_uuid()")
        connection.execute("DELETE FROM freegpt_auth.changes WHERE revision >= 1")
    _until(lambda: _said(caplog, "ERROR"))
    for _ in range(2):
        assert store.tokens()[digest].revoked_at is None
        assert getattr(store.resolve(digest), "revoked_at", None) == NOW
        for other, other_digest in others:
            assert store.resolve(other_digest) == other
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE freegpt_auth.state SET revision = 9")  # newer than memory has heard of
    assert getattr(store.resolve(digest), "revoked_at", None) == NOW


def test_a_look_up_that_fails_is_no_answer(in_part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the database in the middle of a look-up is a 503 in one line, whatever it is."""
    store, _ = in_part
    error = psycopg.errors.InsufficientPrivilege("permission denied\n\tsome advice")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(reads, "look_up", fail)
    with pytest.raises(StoreUnavailableError) as caught:
        store.resolve(UNKNOWN)
    assert str(caught.value).startswith(f"{store.source} does not answer: permission denied; use a role")


def test_nothing_is_looked_up_in_what_cannot_be_followed(in_part: Part, database: str) -> None:
    """A table whose schema has changed since is not asked, though it would answer: 503, and never a 401 by chance."""
    store, _ = in_part
    _sql(database, NEWER)
    _until(lambda: store._follower.state.trouble)
    with pytest.raises(StoreUnavailableError, match="upgrade freegpt_auth"):
        store.resolve(UNKNOWN)
    _sql(database, f"UPDATE freegpt_auth.state SET version = {schema.VERSION}")
    _until(lambda: store._follower.state.trouble is None)
    assert store.resolve(UNKNOWN) is None


# --- the survey


@pytest.mark.parametrize("kind", ["away", "no schema", "newer schema"])
def test_a_server_with_a_database_is_never_open(
    opener: Opener, database: str, nowhere: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A server that cannot read its tokens when it starts is closed, says why in one line, and lets the key through."""
    if kind == "newer schema":
        _sql(database, NEWER)
    elif kind == "no schema":
        _sql(database, "DROP SCHEMA freegpt_auth CASCADE")
    store = opener(nowhere if kind == "away" else database)
    server = Authenticator(store, KEY)
    assert store.survey() == (True, 0, store.source)
    assert server.mode is AuthMode.TOKEN_FILE
    [line] = _said(caplog, "ERROR")
    expected = {
        "away": "does not answer: ",
        "no schema": f"has no schema, and this release needs {schema.VERSION}: run python -m freegpt_auth migrate. ",
        "newer schema": f"has version 99 of the schema, and this release knows {schema.VERSION}: upgrade freegpt_auth. ",
    }[kind]
    assert line.startswith(f"{store.source} {expected}")
    assert "\n" not in line
    assert PASSWORD not in caplog.text
    refused = server.resolve([UNKNOWN])
    assert isinstance(refused, Refusal)
    assert refused.reason == "unavailable"
    assert isinstance(server.resolve([KEY.digest]), Caller)


def test_the_survey_counts_what_memory_does_not_hold(
    in_part: Part, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line in the log tells how many tokens of the whole table work; if they cannot be counted, of those in memory."""
    store, issued = in_part
    store.revoke(issued[0][0].id, NOW)
    for each in (store, opener(cache_limit=2), opener()):
        assert each.survey()[:2] == (True, 3)
    looks: list[object] = []
    monkeypatch.setattr(store._follower, "look", lambda: looks.append(1))
    for error in (psycopg.OperationalError("gone"), StoreUnavailableError("is slow")):

        def fail(_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(store._pool, "run", fail)
            assert store.survey().active in (0, 1, 2)
    assert looks == []  # the thread that runs looks often enough


# --- commands


def _sql(url: str, statement: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(statement.encode())


COMMANDS: dict[str, Callable[[PostgresTokenStore], object]] = {
    "tokens": lambda store: store.tokens(),
    "find": lambda store: store.find("sk-"),
    "add": lambda store: store.add(*_issued()),
    "revoke": lambda store: store.revoke("nobody", NOW),
    "delete": lambda store: store.delete("nobody"),
    "merge": lambda store: store.merge(dict([_issued()])),
    "migrate": lambda store: store.migrate(),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_in_one_line_that_the_database_is_away(nowhere: str, command: str) -> None:
    """No traceback, no advice of the driver, no password."""
    store = PostgresTokenStore(nowhere)
    with pytest.raises(StoreUnavailableError) as caught:
        COMMANDS[command](store)
    assert str(caught.value).startswith(f"{store.source} does not answer: ")
    assert "\n" not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "migrate"])
def test_a_command_says_that_the_schema_is_not_there(opener: Opener, database: str, command: str) -> None:
    """Whoever forgot to migrate is told how to."""
    _sql(database, "DROP SCHEMA freegpt_auth CASCADE")
    with pytest.raises(
        StoreError, match=f"has no schema, and this release needs {schema.VERSION}: run python -m freegpt_auth migrate"
    ):
        COMMANDS[command](opener())


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            psycopg.OperationalError("gone\n\tadvice"),
            StoreUnavailableError,
            "does not answer any more: gone; check that the database runs",
        ),
        (
            psycopg.errors.LockNotAvailable("lock timeout"),
            StoreBusyError,
            "is locked: lock timeout; another session holds",
        ),
        (UnicodeError("utf-8"), StoreError, "text must be UTF-8"),
        (psycopg.errors.DataError("bad\nvalue"), StoreError, "bad value"),
        (psycopg.errors.InsufficientPrivilege("denied"), StoreError, "denied; use a role"),
        (psycopg.errors.UniqueViolation("Key (id)"), StoreError, "a token with the same id or secret is there already"),
    ],
)
def test_a_command_that_is_broken_off_says_what_is_known(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], told: str
) -> None:
    """Where it is not known whether something was changed, the operator is told to look."""
    store = opener()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(reads, "head", fail)  # after the change was committed
    digest, token = _issued()
    with pytest.raises(kind) as caught:
        store.add(digest, token)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("may still be accepted: run revoke again" in str(caught.value)) is (kind is not StoreError)
    assert list(store.tokens()) == [digest]


def test_a_command_that_has_returned_is_in_force_in_a_process_that_reads_slowly(
    opener: Opener, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes its time to read a change is waited for: nobody is accepted after the command has returned."""
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


def test_an_unknown_id_changes_nothing(opener: Opener, keep: Keep) -> None:
    """A wrong id is named, and nothing is left half done."""
    store = opener()
    token, _ = keep(store)
    for command in (store.delete, lambda token_id: store.revoke(token_id, NOW)):
        with pytest.raises(TokenNotFoundError, match="no token with the id nobody"):
            command("nobody")
    assert list(store.tokens().values()) == [token]
    assert store.find(token.id) == [token]


def test_to_migrate_again_changes_nothing(opener: Opener, database: str) -> None:
    """The version before and after is told."""
    store = opener()
    assert store.migrate() == (schema.VERSION, schema.VERSION)
    _sql(database, "DROP SCHEMA freegpt_auth CASCADE")
    assert store.migrate() == (0, schema.VERSION)
    _sql(database, NEWER)
    with pytest.raises(StoreError, match="upgrade freegpt_auth"):
        store.migrate()
