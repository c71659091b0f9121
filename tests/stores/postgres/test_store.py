"""The PostgreSQL store beyond the contract: its answers while the cache is partial, late or without a lease."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth import UNRESOLVED, AuthMode, StoreError, StoreUnavailableError, Token
from freegpt_auth.clock import elapsed
from freegpt_auth.environment_key import EnvironmentKey
from freegpt_auth.guard.authenticator import Authenticator
from freegpt_auth.guard.credentials import Presented
from freegpt_auth.guard.refusal import Refusal
from freegpt_auth.stores.postgres import PostgresTokenStore, schema
from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.postgresql import PASSWORD
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import Clock, cut_off, execute, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.postgresql import Cluster
    from tests.stores.postgres.common import After, Lines

Opener = Callable[..., PostgresTokenStore]
Keep = Callable[..., tuple[Token, str]]
Partial = tuple[PostgresTokenStore, list[tuple[Token, bytes]]]

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = digest_of("sk-nobody-has-this")
TOKEN, SECRET = issue("ci", now=NOW)
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
def partial(opener: Opener, keep: Keep) -> Partial:
    """Return a store that caches two tokens of four, and each token with its digest."""
    store = opener(cache_limit=2)
    issued = [(token, digest_of(secret)) for token, secret in (keep(store) for _ in range(4))]
    assert store.resolve(UNKNOWN) is None
    return store, issued


def _decide(server: Authenticator, *digests: bytes) -> list[str]:
    """Return the decision about each digest, as a request gets it."""
    reasons: list[str] = []
    for digest in digests:
        decision = server.peek(Presented([digest]))
        if decision is UNRESOLVED:
            decision = server.resolve(Presented([digest]))
        reasons.append(decision.reason if isinstance(decision, Refusal) else "accepted")
    return reasons


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


def test_closed_store_reopens(opener: Opener, keep: Keep, cluster: Cluster) -> None:
    """After a shutdown no connection is left and the cache is not used; the next request connects and reads again."""
    store = opener(cache_limit=1)
    (token, secret), _ = keep(store), keep(store)
    store.resolve(digest_of(secret))
    store.close()
    ours = f"SELECT FROM pg_stat_activity WHERE datname = '{name_of(store.source)}' AND usename = 'postgres'"
    wait_until(lambda: cluster.sql(ours) == [])
    assert store.peek(digest_of(secret)) is UNRESOLVED
    opener().revoke(token.id, NOW)
    assert getattr(store.resolve(digest_of(secret)), "revoked_at", None) == NOW


# --- how far the cache may be relied on


def test_certainty_and_lease_end_without_an_error(opener: Opener, keep: Keep) -> None:
    """After 3 s without a query unknown tokens are looked up again; after the lease, or a sleep, known ones too."""
    clock = Clock()
    store = opener(lease=6.0, clock=clock, heartbeat=LONG)
    _, secret = keep(store)
    known = store.resolve(digest_of(secret))
    before = store.now()
    for slept, unknown, answer in (
        (CERTAINTY - 0.01, None, known),
        (0.01, UNRESOLVED, known),
        (2.9, UNRESOLVED, known),
        (0.1, UNRESOLVED, UNRESOLVED),
    ):
        clock.advance(slept)
        assert (store.peek(UNKNOWN), store.peek(digest_of(secret))) == (unknown, answer)
    assert store.now() - before == pytest.approx(6.0, abs=1e-3)
    clock.advance(LONG)
    wait_until(lambda: store.peek(digest_of(secret)) == known)


def test_cut_off_server_accepts_for_the_lease(opener: Opener, keep: Keep, cluster: Cluster, database: str) -> None:
    """Cut off: known tokens for the lease, never a 401 for others, then 503; the key all the time; afterwards all."""
    clock = Clock()
    store = opener(lease=6.0, clock=clock)
    token, secret = keep(store)
    known = digest_of(secret)
    server = Authenticator(store, KEY)
    assert _decide(server, known, UNKNOWN, KEY.digest) == ["accepted", "unknown", "accepted"]
    with cut_off(cluster, database):
        wait_until(lambda: store.peek(UNKNOWN) is UNRESOLVED)
        for seconds in (0, 5.99):
            clock.advance(seconds)
            assert _decide(server, known, UNKNOWN, KEY.digest) == ["accepted", "unavailable", "accepted"]
        clock.advance(0.01)
        for ask in (store.peek, store.resolve):
            for digest in (known, UNKNOWN):
                with pytest.raises(StoreUnavailableError, match="does not answer"):
                    ask(digest)
        assert _decide(server, known, UNKNOWN, KEY.digest) == ["unavailable", "unavailable", "accepted"]
    wait_until(lambda: _decide(server, known) == ["accepted"])
    opener().revoke(token.id, NOW)
    assert _decide(server, known, UNKNOWN, KEY.digest) == ["revoked", "unknown", "accepted"]


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
        wait_until(lambda: store.peek(UNKNOWN) is None)

    interruptions.append(complete)
    assert store.peek(UNKNOWN) is UNRESOLVED
    assert store.peek(UNKNOWN) is None


# --- look-ups


@pytest.mark.parametrize("times", [1, 5])
def test_row_of_an_earlier_connection_is_read_again(partial: Partial, database: str, after: After, times: int) -> None:
    """A row is not used if the follower reconnected meanwhile, perhaps to another server; after five attempts: 503."""
    store, _ = partial
    follower, generations = store._follower, list[int]()

    def reconnect() -> None:
        generations.append(follower.state.generation)
        if len(generations) <= times:
            execute(database, "SELECT pg_terminate_backend(pid) FROM freegpt_auth.servers")
            wait_until(lambda: follower.state.generation > generations[-1] and follower.state.trouble is None)

    after("look_up", reconnect)
    answer = _decide(Authenticator(store, None), UNKNOWN)
    assert (answer, len(generations)) == ((["unknown"], 2) if times == 1 else (["unavailable"], 5))


def test_row_from_before_a_change_is_read_again(partial: Partial, opener: Opener, after: After) -> None:
    """A token that is revoked while a request reads it is refused to that request."""
    store, issued = partial
    token, digest = next((token, digest) for token, digest in issued if store.peek(digest) is UNRESOLVED)
    operator = opener()
    after("look_up", lambda: operator.revoke(token.id, NOW))
    for ask in (store.resolve, store.peek):
        assert getattr(ask(digest), "revoked_at", None) == NOW


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (psycopg.errors.InsufficientPrivilege("denied\n\ta hint"), "does not answer: denied; use a role"),
        (StoreUnavailableError("all connections are in use"), "all connections are in use"),
    ],
)
def test_failed_look_up_pauses_look_ups(partial: Partial, after: After, error: Exception, reason: str) -> None:
    """A failed look-up is a 503 with one line, and for a second further requests do not wait for the database."""
    store, _ = partial
    errors = [error]

    def fail_once() -> None:
        if errors:
            raise errors.pop()

    after("look_up", fail_once)
    for expected in (reason, *9 * ["did not answer a moment ago"]):
        with pytest.raises(StoreUnavailableError, match=expected) as caught:
            store.resolve(UNKNOWN)
        assert "\n" not in str(caught.value)
    wait_until(lambda: _decide(Authenticator(store, None), UNKNOWN) == ["unknown"])


def test_no_look_up_in_another_schema(partial: Partial, database: str, lines: Lines) -> None:
    """A table whose schema was migrated meanwhile is not read: the answer is 503, never a 401 by chance."""
    store, _ = partial
    execute(database, NEWER)
    wait_until(lambda: lines("ERROR"))
    assert "accepted for" in lines("ERROR")[0]
    with pytest.raises(StoreUnavailableError, match="upgrade freegpt_auth"):
        store.resolve(UNKNOWN)


# --- the survey


ALTERED = {
    "no schema": ("ALTER SCHEMA freegpt_auth RENAME TO other", "ALTER SCHEMA other RENAME TO freegpt_auth"),
    "newer schema": (NEWER, f"UPDATE freegpt_auth.state SET version = {schema.VERSION}"),
}
FAULTS = {
    "away": "does not answer: ",
    "no schema": f"has no schema, and this release needs {schema.VERSION}: run python -m freegpt_auth migrate. ",
    "newer schema": f"has version 99 of the schema, and this release knows {schema.VERSION}: upgrade freegpt_auth. ",
}


@contextlib.contextmanager
def _altered(url: str, statement: str, undo: str) -> Iterator[None]:
    execute(url, statement)
    yield
    execute(url, undo)


@pytest.mark.parametrize("kind", FAULTS)
def test_server_with_a_database_is_never_open(
    opener: Opener, cluster: Cluster, database: str, lines: Lines, kind: str
) -> None:
    """A server that cannot read its tokens at its start refuses them, logs one line, accepts the key, and recovers."""
    store = opener()
    with cut_off(cluster, database) if kind == "away" else _altered(database, *ALTERED[kind]):
        server = Authenticator(store, KEY)
        assert store.survey()[:3] == (True, 0, store.source)
        assert server.mode is AuthMode.DATABASE
        assert _decide(server, UNKNOWN, KEY.digest) == ["unavailable", "accepted"]
        [line] = lines("ERROR")
        assert line.startswith(f"{store.source} {FAULTS[kind]}")
        assert line.endswith(". Its tokens are answered 503 until this is mended")
        assert "\n" not in line
        assert PASSWORD not in line
    wait_until(lambda: _decide(server, UNKNOWN) == ["unknown"])


def _gone() -> None:
    raise psycopg.OperationalError("gone")


def test_survey_counts_the_whole_table(partial: Partial, opener: Opener, after: After) -> None:
    """The count in the log is that of the table; if the table cannot be counted, that of the cache."""
    store, issued = partial
    store.revoke(issued[0][0].id, NOW)
    for each in (store, opener(cache_limit=2), opener()):
        assert each.survey()[:2] == (True, 3)
    after("count_active", _gone)
    assert store.survey().active in (0, 1, 2)


# --- commands


COMMANDS: tuple[Callable[[PostgresTokenStore], object], ...] = (
    lambda store: store.now(),
    lambda store: store.tokens(),
    lambda store: store.find("sk-"),
    lambda store: store.add(digest_of(SECRET), TOKEN),
    lambda store: store.revoke("nobody", NOW),
    lambda store: store.delete("nobody"),
    lambda store: store.merge({digest_of(SECRET): TOKEN}),
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
        with pytest.raises(StoreError, match="has no schema, and this release needs"):
            command(opener())


def test_interrupted_command_warns_of_unknown_result(opener: Opener, after: After) -> None:
    """If the connection is lost after a commit, the operator is asked to check the result, which is in force."""
    store = opener()
    after("head", _gone)  # called after the commit
    with pytest.raises(StoreUnavailableError, match="may still be accepted: run revoke again"):
        store.add(digest_of(SECRET), TOKEN)
    assert list(store.tokens()) == [digest_of(SECRET)]
