"""Sessions of a database: hostile defaults of a role or a database change no value, and each wait has a limit."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.cli import main
from freegpt_auth.exceptions import StoreError, StoreUnavailableError
from freegpt_auth.stores.postgres import PostgresTokenStore, blockers, session_settings
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.pool import Pool
from freegpt_auth.stores.postgres.usage import PostgresUsage
from freegpt_auth.tokens import Token, digest_of
from freegpt_auth.usage.base import Batch, Usage
from tests.helpers.pooler import smallest
from tests.helpers.postgresql import PASSWORD, running
from tests.helpers.proxy import PLAIN
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import execute, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
FULL = Token(
    id="full",
    name="NULL \\ ünï",
    prefix="sk-a1b2c3d4e5f",
    created_at=datetime(1, 1, 1, tzinfo=UTC),
    expires_at=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    scopes=("NULL", '\\"{}'),
    models=(),
    last_used_at=datetime(2025, 6, 1, 12, 0, 0, 123456, UTC),
)
HOSTILE = """
DateStyle = German; IntervalStyle = iso_8601; TimeZone = 'America/New_York'; extra_float_digits = -11;
bytea_output = escape; xmlbinary = hex; search_path = public, pg_catalog; standard_conforming_strings = off;
backslash_quote = on; array_nulls = off; transform_null_equals = on; quote_all_identifiers = on;
default_transaction_isolation = serializable; default_transaction_deferrable = on; client_encoding = LATIN1;
client_min_messages = debug5; exit_on_error = on; lock_timeout = '31s'; statement_timeout = '31s';
transaction_timeout = '31s'; idle_in_transaction_session_timeout = '31s'; idle_session_timeout = '31s';
synchronous_commit = off; session_replication_role = replica; row_security = off; plan_cache_mode = force_generic_plan
"""
"""Every default that may change a value, a statement or a wait, at a value that does."""

# Functions and an operator in the schema of everybody, before PostgreSQL's own, that return something else.
FUNCTIONS = """
CREATE FUNCTION public.length(text) RETURNS integer LANGUAGE sql AS 'SELECT 0';
CREATE FUNCTION public.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS 'SELECT NULL::text';
CREATE FUNCTION public.mod(bigint, integer) RETURNS bigint LANGUAGE sql AS 'SELECT 7::bigint';
CREATE FUNCTION public.times(numeric, integer) RETURNS numeric LANGUAGE sql AS 'SELECT 0::numeric';
CREATE OPERATOR public.* (LEFTARG = numeric, RIGHTARG = integer, FUNCTION = public.times);
"""


@pytest.fixture
def hostile(request: pytest.FixtureRequest, cluster: Any, database: str) -> Iterator[str]:
    """Return the URL of a database for a superuser whose defaults are all hostile."""
    name, role = name_of(database), f"hostile_{time.monotonic_ns()}"
    whose = f"DATABASE {name}" if request.param == "database" else f"ROLE {role}"
    cluster.sql(FUNCTIONS, name)
    cluster.sql(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
    for setting in HOSTILE.split(";"):
        cluster.sql(f"ALTER {whose} SET {setting}")
    with contextlib.ExitStack() as stack:
        port = cluster.port
        if request.param == "role, through a pooler":
            cluster.sql(f"ALTER {whose} RESET idle_session_timeout")  # between transactions a session is the pooler's
            port = stack.enter_context(smallest(cluster, name, role))
        yield cluster.url(name, role, port=port) + PLAIN
    cluster.sql(f"REASSIGN OWNED BY {role} TO postgres", name)
    cluster.sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("hostile", ["role", "database"], indirect=True)
def test_hostile_defaults_change_no_command(
    hostile: str, database: str, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Create, list, revoke, delete, copy and migrate work with any defaults of role and database."""

    def run(*arguments: str) -> Any:
        assert main(["--store", hostile, *arguments] if arguments[0] != "copy" else arguments) == 0, capsys.readouterr()
        return capsys.readouterr().out

    execute(database, "DROP SCHEMA freegpt_auth CASCADE")
    run("migrate")
    FileTokenStore("api_tokens.json").add(digest_of("full"), FULL)
    run("copy", "api_tokens.json", hostile)
    secret = run("create", "brief", "--expires-in", "100").strip()
    run("create", "gone")
    revision = "SELECT revision FROM freegpt_auth.state"
    [(before,)] = cluster.sql(revision, name_of(database))
    run("revoke", secret)
    assert cluster.sql(revision, name_of(database)) == [(before + 1,)]  # the triggers fire
    full, brief, gone = json.loads(run("list", "--json"))
    run("delete", gone["id"])
    assert (full["created_at"], full["expires_at"]) == ("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00")
    expires, created = (datetime.fromisoformat(brief[each]) for each in ("expires_at", "created_at"))
    assert (expires - created, brief["status"]) == (timedelta(seconds=100), "revoked")
    assert abs((created - datetime.now(UTC)).total_seconds()) < 60
    run("copy", hostile, "back.json")
    back = FileTokenStore("back.json").tokens()[digest_of("full")]
    assert {name: getattr(back, name) for name in FULL.__struct_fields__} == msgspec.structs.asdict(FULL)
    assert PostgresTokenStore(database).tokens()[digest_of("full")] == FULL


@pytest.mark.parametrize("hostile", ["role", "database", "role, through a pooler"], indirect=True)
def test_hostile_defaults_change_no_server(hostile: str, keep: Callable[..., Any]) -> None:
    """A server accepts, expires, revokes and counts alike with any defaults of role and database."""
    operator, server = PostgresTokenStore(hostile), PostgresTokenStore(hostile, cache_limit=1)
    usage = PostgresUsage(hostile)
    ends = datetime.now(UTC) + timedelta(seconds=1.5)
    token, secret = keep(operator, expires_at=ends)
    for _ in range(3):
        keep(operator)
    digest = digest_of(secret)
    try:
        assert server.resolve(digest) == token
        assert abs(server.now() - time.time()) < 60
        wait_until(lambda: server.now() >= ends.timestamp())
        found = server.resolve(digest)
        assert isinstance(found, Token)
        assert found.status(server.now()) == "expired"
        operator.revoke(token.id, NOW)
        wait_until(lambda: getattr(server.resolve(digest), "revoked_at", None) == NOW)
        usage.write(Batch("p", 1, {token.id: (3, time.time())}), 1.0)
        usage.merge({token.id: Usage(2, FULL.last_used_at or NOW)})
        assert usage.read()[token.id].use_count == 3
        assert abs(usage.read()[token.id].last_used_at.timestamp() - time.time()) < 60
    finally:
        usage.close()
        server.close()


def test_client_limits_bound_those_of_a_session() -> None:
    """The database waits for less time than its client, and for a lock not longer than a minute."""
    assert session_settings.limits(2.0) == {"lock_timeout": "1500ms", "statement_timeout": "1800ms"}
    assert session_settings.limits(600.0) == {"lock_timeout": "60000ms", "statement_timeout": "540000ms"}


@pytest.mark.parametrize("hostile", ["role", "role, through a pooler"], indirect=True)
def test_time_limits_are_ours(hostile: str) -> None:
    """The time limits of a role are replaced, for a session or, behind a pooler, for each transaction."""
    with contextlib.closing(Address(hostile).connect()) as connection:
        names = ("lock", "statement", "transaction", "idle_in_transaction_session")
        limits = [connection.one("SELECT current_setting(%s)", (f"{name}_timeout",))[0] for name in names]
    assert limits == ["1500ms", "1800ms", "0", "1min"]


# --- time limits


def test_holder_of_a_lock_is_named(database: str, keep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A revocation behind an open transaction ends in one line with its process, role, program and start."""
    token_id = keep(PostgresTokenStore(database))[0].id
    with psycopg.connect(database, application_name="psql") as operator:
        operator.execute("UPDATE freegpt_auth.state SET revision = revision")
        pid = operator.info.backend_pid
        assert main(["--store", database, "revoke", token_id]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"is locked: process {pid} (role postgres, psql, idle in transaction since 20" in line
    assert f") holds a lock; end its transaction, or run SELECT pg_terminate_backend({pid}); if something" in line
    assert main(["--store", database, "revoke", token_id]) == 0


def test_holder_may_be_hidden_or_prepared() -> None:
    """A role without pg_monitor learns no state of a holder, and a prepared transaction has no process to end."""

    class Answer:
        """A connection with a hidden session and a prepared transaction among the holders."""

        def run(self, _: str) -> list[Any]:
            """Return the holders."""
            return [(0, None, None, None, None), (7, "ada", "", None, None)]

    assert blockers.describe(Answer()) == (  # type: ignore[arg-type]
        "a prepared transaction holds a lock; end it (SELECT gid FROM pg_prepared_xacts; ROLLBACK PREPARED) and "
        "process 7 (role ada) holds a lock; end its transaction, or run SELECT pg_terminate_backend(7)"
    )


def test_database_limits_each_wait(cluster: Any, database: str) -> None:
    """Behind a lock a session ends before its client gives up: nothing is left behind, and nothing is asked twice."""
    pool, name = Pool(Address(database), 2), name_of(database)
    pool.run(lambda connection: connection.one("SELECT 1"))
    waiting = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    with psycopg.connect(database) as operator:
        operator.execute("LOCK TABLE freegpt_auth.tokens")
        began = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            pool.run(lambda connection: connection.run("SELECT FROM freegpt_auth.tokens"))
        assert time.monotonic() - began < 2 * 1.5
        assert cluster.sql(waiting) == []
    with pytest.raises(psycopg.errors.QueryCanceled):
        pool.run(lambda connection: connection.run("SELECT pg_sleep(30)"))
    pool.renew()


def test_commit_that_waits_for_a_standby_is_cancelled(tmp_path: Path) -> None:
    """No statement limit ends a commit that waits for a standby: the client cancels it, and its session ends."""
    with running(tmp_path / "data", fsync="off", synchronous_standby_names="nobody") as own:
        own.sql("SET synchronous_commit = local; CREATE TABLE public.here ()")
        connection = Address(own.url("postgres")).connect(1.0)
        with contextlib.closing(connection), pytest.raises(psycopg.OperationalError, match="no answer within 1 s"):
            connection.run("INSERT INTO public.here DEFAULT VALUES")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: own.sql(waiting) == [])


# --- faults in one line


UPDATE = "UPDATE freegpt_auth.tokens SET"
UNCHECKED = f"ALTER DOMAIN freegpt_auth.instant DROP CONSTRAINT instant_check; {UPDATE}"
FAULTS = {
    "a null among scopes": (f"{UPDATE} scopes = '{{NULL}}'", "the row of the token with the id"),
    "nested models": (f"{UPDATE} models = '{{{{a}},{{b}}}}'", "the row of the token with the id"),
    "a far year": (f"{UNCHECKED} expires_at = '12000-01-01'", "no instant may be outside the years 1 to 9999"),
    "no end of time": (f"{UNCHECKED} expires_at = 'infinity'", "the tables are not as this release made them"),
    "no column": ("ALTER TABLE freegpt_auth.tokens DROP COLUMN models", "run python -m freegpt_auth migrate"),
    "no table": ("DROP TABLE freegpt_auth.tokens", "run python -m freegpt_auth migrate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_tables_are_one_line(database: str, keep: Any, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    """A row that was damaged by hand stops a command in one line that names the row, and no token is served."""
    store = PostgresTokenStore(database)
    digest = digest_of(keep(store)[1])
    statement, said = FAULTS[fault]
    execute(database, statement)
    for command in (["--store", database, "list"], ["copy", database, "back.json"]):
        assert main(command) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("freegpt-auth: ")
        assert said in line
    with contextlib.closing(store), pytest.raises(StoreError):
        store.resolve(digest)


def test_damaged_row_stops_no_other_look_up(database: str, keep: Any) -> None:
    """Of a table that memory does not hold, a damaged row is unavailable, and the others are found."""
    operator = PostgresTokenStore(database)
    kept = [keep(operator) for _ in range(4)]
    execute(database, f"{UPDATE} scopes = '{{NULL}}' WHERE id = '{kept[3][0].id}'")
    with contextlib.closing(PostgresTokenStore(database, cache_limit=1)) as store:
        with pytest.raises(StoreUnavailableError, match="the row of the token with the id"):
            store.resolve(digest_of(kept[3][1]))
        assert [store.resolve(digest_of(secret)) for _, secret in kept[:3]] == [token for token, _ in kept[:3]]
