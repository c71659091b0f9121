"""The schema: migrations are atomic, and each role has exactly the rights that docs/guide/fleet.md lists."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from freegpt_auth import FileTokenStore, StoreError
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.stores.postgres import PostgresTokenStore, schema
from freegpt_auth.usage.base import Batch
from tests.helpers.applications import HELLO
from tests.helpers.pages import blocks
from tests.helpers.postgresql import BINARIES, PASSWORD
from tests.helpers.watch import wait_until
from tests.stores.postgres.common import execute, name_of

KEY = "the-environment-key"
THIS, NEXT = schema.VERSION, schema.VERSION + 1
NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
NEW_ROLES = ("stranger", "a server", "a command")

APPLICATION = f"{HELLO}\nfrom freegpt_auth import BearerTokenMiddleware\napp = BearerTokenMiddleware(hello)"
RUNS_AS = "CREATE FUNCTION {} LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'runs as %', current_user; END $$"
NEXT_RELEASE = """
import sys
from freegpt_auth.cli import main
from freegpt_auth.stores.postgres import schema
schema.MIGRATIONS += ({migration!r},)
schema.VERSION += 1
if __name__ == "__main__":
    sys.exit(main())
"""

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


def start_next_release(migration: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a command of the next release, which has one migration more."""
    Path("next_release.py").write_text(NEXT_RELEASE.format(migration=migration))
    start = [sys.executable, "next_release.py", *arguments]
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_release(migration: str, *arguments: str) -> Done:
    """Run a command of the next release."""
    process = start_next_release(migration, *arguments)
    out, err = process.communicate(timeout=60)
    return Done(process.args, process.returncode, out, err)


@contextlib.contextmanager
def release(*migrations: str) -> Iterator[None]:
    """Be a release with these migrations."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(schema, "MIGRATIONS", migrations)
        context.setattr(schema, "VERSION", len(migrations))
        yield


def one_line(done: Done, about: str) -> bool:
    """Return whether a command failed with one line that contains the text."""
    said = done.stderr.startswith("freegpt-auth: ") and done.stderr.count("\n") == 1
    return done.returncode == 1 and not done.stdout and said and about in done.stderr


def tables_of(cluster: Any, database: str) -> list[Any]:
    """Return all that the schema holds."""
    query = "SELECT relkind, relname FROM pg_class WHERE relnamespace = to_regnamespace('freegpt_auth') ORDER BY 1, 2"
    rows: list[Any] = cluster.sql(query, database)
    return rows


# --- migrating


def test_concurrent_migrations_run_in_turn(cluster: Any, empty: str) -> None:
    """Of several migrations at once, one makes the schema, and the others find it complete."""
    name = name_of(empty)
    cluster.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(8) as pool:
        with psycopg.connect(empty) as gate:
            gate.execute("LOCK TABLE pg_namespace IN SHARE MODE")  # none can make a schema until its end
            migrating = [pool.submit(PostgresTokenStore(empty).migrate) for _ in range(8)]
            wait_until(lambda: len(cluster.sql(waiting)) == 8)
        assert sorted(each.result(timeout=30) for each in migrating) == [(0, THIS)] + [(THIS, THIS)] * 7
    assert tables_of(cluster, name) == tables_of(cluster, "migrated")
    assert cluster.sql("SELECT version, revision FROM freegpt_auth.state", name) == [(THIS, 0)]


def test_a_file_needs_no_schema(command: Command) -> None:
    """``migrate`` changes nothing if the tokens are in a file."""
    done = command("migrate")
    assert (done.returncode, done.stdout) == (0, "")
    file = Path("api_tokens.json").absolute()
    assert done.stderr == f"{file} is a token file, which needs no schema: there is nothing to do.\n"


def test_each_migration_is_done_once_and_in_turn(cluster: Any, database: str, keep: Any) -> None:
    """A database of an earlier release gets this release's version and keeps its tokens; a later one is refused."""
    store = PostgresTokenStore(database)
    token, _ = keep(store)
    more = ("CREATE TABLE freegpt_auth.second (x int)", "ALTER TABLE freegpt_auth.second RENAME TO third")
    for version, migrations in ((NEXT, more[:1]), (NEXT + 1, more)):
        with release(*schema.MIGRATIONS, *migrations):
            assert store.migrate() == (version - 1, version)
            assert store.migrate() == (version, version)
            assert [each.id for each in store.tokens().values()] == [token.id]
    assert cluster.sql("SELECT revision FROM freegpt_auth.state", name_of(database)) == [(1,)]
    assert ("r", "third") in tables_of(cluster, name_of(database))
    too_old = f"has version {NEXT + 1} of the schema, and this release knows {THIS}: upgrade freegpt_auth"
    for call in (store.migrate, store.tokens):
        with pytest.raises(StoreError, match=too_old):
            call()


@pytest.fixture
def new_roles(cluster: Any) -> Iterator[None]:
    """Make three roles without any right. A test requests them before its database, which is dropped first."""
    for name in NEW_ROLES:
        cluster.sql(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{PASSWORD}'")
    yield
    for name in NEW_ROLES:
        cluster.sql(f'DROP ROLE "{name}"')


@pytest.mark.usefixtures("new_roles")
def test_version_2_keeps_roles_working(cluster: Any, empty: str) -> None:
    """The roles of a database of version 1 have the rights of version 2 after the migration, without a new grant."""
    name, store = name_of(empty), PostgresTokenStore(empty)
    with release(*schema.MIGRATIONS[:1]):
        assert store.migrate() == (0, 1)
    cluster.sql('GRANT EXECUTE ON FUNCTION freegpt_auth.add_usage TO "a server"', name)
    cluster.sql('GRANT SELECT ON freegpt_auth.servers TO "a command"', name)
    assert store.migrate() == (1, THIS)
    query = (
        "SELECT r.rolname, p.proname FROM pg_proc p, pg_roles r WHERE p.pronamespace = 'freegpt_auth'::regnamespace"
        " AND r.rolname LIKE 'a %' AND has_function_privilege(r.oid, p.oid, 'EXECUTE') ORDER BY 1, 2"
    )
    server = [("a server", each) for each in ("add_usage", "show_process", "withdraw_process")]
    assert cluster.sql(query, name) == [("a command", "processes_behind"), *server]
    query = "SELECT has_table_privilege('a command', 'freegpt_auth.servers', 'SELECT')"
    assert cluster.sql(query, name) == [(True,)]


@pytest.mark.parametrize("statement", ["SELECT 1 / 0", "no statement at all"])
def test_a_migration_that_fails_leaves_nothing(cluster: Any, database: str, statement: str) -> None:
    """After a failed migration the database has the version it had before, and one line gives the reason."""
    done = next_release(f"CREATE TABLE freegpt_auth.half (); {statement}", "--store", database, "migrate")
    assert one_line(done, name_of(database))
    assert tables_of(cluster, name_of(database)) == tables_of(cluster, "migrated")
    assert PostgresTokenStore(database).migrate() == (THIS, THIS)


def test_a_migration_that_is_killed_leaves_nothing(cluster: Any, database: str) -> None:
    """A migration that is killed leaves no part of a version behind, and no lock."""
    name, half = name_of(database), "CREATE TABLE freegpt_auth.half ()"
    cluster.sql("CREATE TABLE public.gate ()", name)
    waits = "SELECT 1 FROM pg_locks WHERE relation = 'public.gate'::regclass AND NOT granted"
    connected = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    with psycopg.connect(database) as gate:
        gate.execute("LOCK TABLE public.gate")
        process = start_next_release(f"{half}; LOCK TABLE public.gate", "--store", database, "migrate")
        wait_until(lambda: cluster.sql(waits, name), process.poll)
        process.kill()
        process.communicate(timeout=30)
    wait_until(lambda: not cluster.sql(connected, name))
    assert cluster.sql("SELECT version FROM freegpt_auth.state", name) == [(THIS,)]
    assert ("r", "half") not in tables_of(cluster, name)
    done = next_release(half, "--store", database, "migrate")
    assert done.stderr.endswith(f" was brought from version {THIS} to version {NEXT} of the schema.\n")
    assert ("r", "half") in tables_of(cluster, name)


# --- a server and its schema


def test_a_server_waits_for_the_schema(empty: str, command: Command, serve: Callable[..., Any]) -> None:
    """A server that is started before the migration logs the remedy once, accepts only the key, and recovers."""
    Path("early.py").write_text(APPLICATION)
    server = serve("early:app", FREEGPT_AUTH_STORE=empty, FREEGPT_API_KEY=KEY)
    for _ in range(3):
        assert [server.get(token=token) for token in ("sk-anything", None, KEY)] == [503, 401, 200]
    said = f"has no schema, and this release needs {THIS}: run python -m freegpt_auth migrate"
    assert one_line(command("--store", empty, "create", "early"), said)
    assert f" was brought from version 0 to version {THIS} of" in command("--store", empty, "migrate").stderr
    secret = command("--store", empty, "create", "ci").stdout.strip()
    wait_until(lambda: server.get(token=secret) == 200, server.log.read_text)
    assert server.get(token="sk-anything") == 401
    assert server.stop().count(said) == 1


def test_server_waits_for_its_migration(database: str, command: Command, serve: Callable[..., Any]) -> None:
    """On an older schema a new server is closed until the migration; the old one then logs that it must be upgraded."""
    secret = command("--store", database, "create", "ci").stdout.strip()
    migration = "CREATE TABLE freegpt_auth.second ()"
    Path("old.py").write_text(APPLICATION)
    Path("new.py").write_text(NEXT_RELEASE.format(migration=migration) + APPLICATION)
    settings = {"FREEGPT_AUTH_STORE": database, "FREEGPT_API_KEY": KEY, "FREEGPT_AUTH_LEASE": "5"}
    new, old = serve("new:app", **settings), serve("old:app", **settings)
    tokens = (secret, "sk-anything", None, KEY)
    assert [new.get(token=token) for token in tokens] == [503, 503, 401, 200]
    assert [old.get(token=token) for token in tokens] == [200, 401, 401, 200]
    done = next_release(migration, "--store", database, "migrate")
    assert done.stderr.endswith(f"was brought from version {THIS} to version {NEXT} of the schema.\n")
    wait_until(lambda: new.get(token=secret) == 200, new.log.read_text)
    wait_until(lambda: old.get(token=secret) == 503, old.log.read_text)
    assert [old.get(token=token) for token in tokens] == [503, 503, 401, 200]
    too_old = f"has version {NEXT} of the schema, and this release knows {THIS}: upgrade freegpt_auth"
    assert one_line(command("--store", database, "list"), too_old)
    too_early = f"has version {THIS} of the schema, and this release needs {NEXT}: run python -m freegpt_auth migrate"
    assert new.stop().count(too_early) == 1
    assert 1 <= old.stop().count(too_old) <= 2  # when the lease begins to run out, and when it is over


# --- roles


class Roles(NamedTuple):
    """The database ``tokens`` as docs/guide/fleet.md makes it.

    Attributes:
        owner: its URL with the role that migrates.
        admin: with the role of operators.
        server: with the role of the servers.
    """

    owner: str
    admin: str
    server: str


def _psql(statements: str, url: str) -> None:
    program = [str(BINARIES / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", url]
    done = subprocess.run(program, input=statements, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def roles(cluster: Any) -> Iterator[Roles]:
    """Paste the two blocks of the page, with ``migrate`` between them, as the page says."""
    names = ("freegpt_owner", "freegpt_admin", "freegpt_server")
    before, after = [block.code for block in blocks("docs/guide/fleet.md") if block.heading == "Roles"]
    _psql(before, cluster.url("postgres"))
    for name in names:
        cluster.sql(f"ALTER ROLE {name} PASSWORD '{PASSWORD}'")
    roles = Roles(*(cluster.url("tokens", name) for name in names))
    assert PostgresTokenStore(roles.owner).migrate() == (0, THIS)
    _psql(after, roles.owner)
    yield roles
    cluster.sql("DROP DATABASE tokens WITH (FORCE)")
    for name in names:
        cluster.sql(f"DROP ROLE {name}")


def _contents(cluster: Any) -> list[Any]:
    names = ("state", "tokens", "changes", "usage", "usage_batches", "processes")
    return [cluster.sql(f"SELECT * FROM freegpt_auth.{name} ORDER BY 1", "tokens") for name in names]


def _denied(url: str, statement: str) -> None:
    with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_a_server_serves_and_counts_with_its_own_role(
    roles: Roles, command: Command, serve: Callable[..., Any]
) -> None:
    """With a role that may read tokens and add usage only, a server does all it should, and commands wait for it."""
    Path("app.py").write_text(APPLICATION)
    secret = command("--store", roles.admin, "create", "ci").stdout.strip()
    server = serve("app:app", FREEGPT_AUTH_STORE=roles.server)
    assert [server.get(token=token) for token in (secret, secret, "sk-wrong", None)] == [200, 200, 401, 401]
    done = command("--store", roles.admin, "revoke", secret)
    assert server.get(token=secret) == 401
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert not re.search("WARNING|ERROR", server.stop())
    listed = command("--store", roles.admin, "list", "--json")
    assert '"use_count": 2' in listed.stdout
    assert listed.stderr == ""


def test_the_servers_role_lists_without_usage(roles: Roles, command: Command) -> None:
    """With the servers' role the list shows the tokens and names the missing part in one line."""
    secret = command("--store", roles.admin, "create", "listed").stdout.strip()
    done = command("--store", roles.server, "list")
    assert done.returncode == 0
    assert f" {secret[:14]}...\n   Name: listed\n" in done.stdout
    assert "usage cannot be read and is left out: " in done.stderr
    assert ": permission denied for table usage; use a role of the database" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("line", ["create x", "revoke {ref}", "delete {ref}", "copy t.json {server}"])
def test_serving_role_is_refused_by_commands(
    cluster: Any, roles: Roles, command: Command, keep: Any, line: str
) -> None:
    """A command with the servers' role fails with one line that names the remedy, and changes nothing."""
    token, _ = keep(PostgresTokenStore(roles.admin))
    keep(FileTokenStore("t.json"))
    before = _contents(cluster)
    store = [] if line.startswith("copy") else ["--store", roles.server]
    done = command(*store, *line.format(ref=token.id, server=roles.server).split())
    assert one_line(done, "permission denied ")
    assert done.stderr.endswith("; use a role of the database that may do this (docs/guide/fleet.md)\n")
    assert _contents(cluster) == before


WRITES = {
    "tokens": "digest = digest",
    "state": "revision = 0",
    "changes": "revision = 0",
    "usage": "use_count = 0",
    "usage_batches": "sequence = 0",
    "processes": "relies_until = now()",
}
FOR_NOBODY = [
    *(f"TRUNCATE freegpt_auth.{table}" for table in WRITES),
    "ALTER TABLE freegpt_auth.tokens DISABLE TRIGGER ALL",
    "DROP SCHEMA freegpt_auth CASCADE",
    "SET session_replication_role = replica",
    "SET ROLE freegpt_owner",
    "SET ROLE postgres",
    "CREATE SCHEMA mine",
    "CREATE TABLE public.mine ()",
    "CREATE FUNCTION freegpt_auth.add_usage() RETURNS void LANGUAGE sql AS ''",
    "CREATE TABLE freegpt_auth.mine ()",
    "SELECT nextval(pg_get_serial_sequence('freegpt_auth.tokens', 'number'))",
    "COPY freegpt_auth.tokens TO PROGRAM 'cat'",
]
FOR_NO_SERVER = [
    *(f"SELECT * FROM freegpt_auth.{table}" for table in ("usage", "usage_batches", "servers", "processes")),
    *(f"UPDATE freegpt_auth.{table} SET {change}" for table, change in WRITES.items()),
    *(f"DELETE FROM freegpt_auth.{table}" for table in WRITES),
    *(f"INSERT INTO freegpt_auth.{table} SELECT * FROM freegpt_auth.{table}" for table in WRITES if table != "tokens"),
    "INSERT INTO freegpt_auth.tokens (digest) VALUES ('')",
    "UPDATE freegpt_auth.tokens SET revoked_at = NULL",
    "SELECT * FROM freegpt_auth.tokens FOR UPDATE",
    "SELECT freegpt_auth.processes_behind(1)",
    "SELECT freegpt_auth.adopt_processes()",
    "LOCK TABLE freegpt_auth.tokens IN ROW EXCLUSIVE MODE",
    "SET ROLE freegpt_admin",
    "CREATE TEMPORARY TABLE mine ()",
]
FOR_NO_ADMIN = [
    *(f"UPDATE freegpt_auth.{name} SET {WRITES[name]}" for name in ("tokens", "state", "changes", "usage_batches")),
    *(f"DELETE FROM freegpt_auth.{table}" for table in ("state", "changes", "usage_batches", "processes")),
    *(f"UPDATE freegpt_auth.tokens SET {column} = NULL" for column in ("expires_at", "models", "name")),
    "UPDATE freegpt_auth.usage SET token_id = ''",
    "SELECT freegpt_auth.add_usage('', 1, '{}', '{}', '{}')",
    "SELECT freegpt_auth.show_process('', 1, 1, true)",
    "SELECT freegpt_auth.withdraw_process('')",
    "SELECT * FROM freegpt_auth.processes",
    "SET ROLE freegpt_server",
]


@pytest.mark.parametrize(
    ("role", "statement"),
    [("server", each) for each in FOR_NOBODY + FOR_NO_SERVER] + [("admin", each) for each in FOR_NOBODY + FOR_NO_ADMIN],
)
def test_role_has_no_further_rights(cluster: Any, roles: Roles, role: str, statement: str) -> None:
    """A thief of a password gets no other role's rights: a server's changes no token, an admin's none silently."""
    before = _contents(cluster)
    _denied(getattr(roles, role), statement)
    assert _contents(cluster) == before


@pytest.mark.parametrize("instant", ["NULL", "now()", "revoked_at + interval '1 year'"])
@pytest.mark.parametrize("role", ["admin", "owner"])
def test_revoking_cannot_be_undone(roles: Roles, keep: Any, role: str, instant: str) -> None:
    """The database refuses to change the instant of a revocation, also to the owner with psql."""
    store = PostgresTokenStore(roles.admin)
    token, _ = keep(store)
    store.revoke(token.id, NOW)
    statement = f"UPDATE freegpt_auth.tokens SET revoked_at = {instant} WHERE id = %s"
    with psycopg.connect(getattr(roles, role)) as connection, pytest.raises(psycopg.errors.RaiseException) as caught:
        connection.execute(statement.encode(), (token.id,))
    assert caught.value.diag.message_primary == f"revoking cannot be undone: token {token.id} stays revoked"
    [kept] = store.find(token.id)
    assert kept.revoked_at == NOW


def test_the_admins_role_does_every_command(roles: Roles, command: Command, keep: Any) -> None:
    """Create, list, revoke, delete and copy, in both directions and with usage, need no more than the admin's role."""
    file = FileTokenStore("t.json")
    token, secret = keep(file)
    revoked, _ = keep(file)
    UsageDatabase("t.usage.db").write(Batch("p", 1, {token.id: (3, 1764153923.0)}), 1.0)
    PostgresTokenStore(roles.admin).merge(file.tokens())
    file.revoke(revoked.id, NOW)
    made = command("--store", roles.admin, "create", "ci").stdout.strip()
    for arguments, said in (
        (["copy", "t.json", roles.admin], "0 new, 1 revoked now, 1 there already."),
        (["copy", roles.admin, "back.json"], " 0 there already."),
        (["copy", "t.json", roles.admin, "--delete"], f"Deleted token {made[:14]}... (ci), which"),
        (["--store", roles.admin, "revoke", secret], "Revoked token"),
        (["--store", roles.admin, "delete", secret], "Deleted token"),
        (["--store", roles.admin, "migrate"], f"has version {THIS} of the schema."),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert said in done.stderr
    listed = command("--store", "back.json", "list", "--json").stdout
    assert '"use_count": 3' in listed
    assert command("--store", roles.admin, "list").stderr == ""


def test_only_the_owner_migrates(cluster: Any, roles: Roles, command: Command) -> None:
    """``migrate`` with the admin's role or the servers' changes nothing, and names the missing right in one line."""
    before = tables_of(cluster, "tokens")
    for role in (roles.admin, roles.server):
        done = next_release("CREATE TABLE freegpt_auth.second ()", "--store", role, "migrate")
        assert one_line(done, "permission denied for ")
        assert "; use a role of the database that may do this" in done.stderr
    assert tables_of(cluster, "tokens") == before
    assert command("--store", roles.owner, "migrate").returncode == 0


@pytest.mark.usefixtures("new_roles")
def test_missing_right_is_reported(cluster: Any, database: str, command: Command) -> None:
    """Without the grants a command reports the missing right, and does not ask for a migration."""
    done = command("--store", cluster.url(name_of(database), "stranger"), "list")
    assert one_line(done, "permission denied for schema freegpt_auth; use a role")


# --- defaults and other roles


@pytest.fixture
def stranger(new_roles: None, cluster: Any, empty: str) -> str:  # noqa: ARG001
    """Return the URL of a role without any right, in a database whose defaults grant every right to every role."""
    for kind in ("TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS"):
        cluster.sql(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO PUBLIC", name_of(empty))
    cluster.sql("GRANT ALL ON SCHEMA public TO PUBLIC", name_of(empty))
    url: str = cluster.url(name_of(empty), "stranger")
    return url


def test_defaults_open_nothing(cluster: Any, stranger: str, empty: str) -> None:
    """A role without a grant of its own reaches no token, even if the defaults of the database grant everything."""
    PostgresTokenStore(empty).migrate()
    name = name_of(empty)
    _denied(stranger, "SELECT * FROM freegpt_auth.tokens")
    cluster.sql("GRANT USAGE ON SCHEMA freegpt_auth TO stranger", name)
    relations = (
        "SELECT relname FROM pg_class WHERE relnamespace = 'freegpt_auth'::regnamespace AND relkind IN ('r', 'v', 'S')"
        " AND CASE relkind WHEN 'S' THEN has_sequence_privilege('stranger', oid, 'SELECT, UPDATE, USAGE')"
        " ELSE has_table_privilege('stranger', oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') END"
    )
    functions = (
        "SELECT proname FROM pg_proc WHERE pronamespace = 'freegpt_auth'::regnamespace"
        " AND has_function_privilege('stranger', oid, 'EXECUTE')"
    )
    creation = "SELECT 1 WHERE has_schema_privilege('stranger', 'freegpt_auth', 'CREATE')"
    assert [cluster.sql(query, name) for query in (relations, functions, creation)] == [[], [], []]


@pytest.mark.usefixtures("new_roles")
def test_no_trigger_runs_code_as_the_owner(cluster: Any, database: str) -> None:
    """A role that may use the schema cannot put its own code, by a cast, into the functions that run as the owner."""
    cluster.sql("GRANT USAGE ON SCHEMA freegpt_auth TO stranger", name_of(database))
    with psycopg.connect(cluster.url(name_of(database), "stranger"), autocommit=True) as connection:
        connection.execute("CREATE TYPE pg_temp.bait AS (x int)")
        connection.execute(RUNS_AS.format("pg_temp.go(pg_temp.bait) RETURNS bytea").encode())
        connection.execute("CREATE CAST (pg_temp.bait AS bytea) WITH FUNCTION pg_temp.go AS ASSIGNMENT")
        connection.execute("CREATE TEMPORARY TABLE mine (digest pg_temp.bait)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                "CREATE TRIGGER mine AFTER INSERT ON mine REFERENCING NEW TABLE AS new_rows"
                " FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes()"
            )
        connection.execute("INSERT INTO mine VALUES (ROW(1))")


def test_migration_runs_no_code_of_others(stranger: str, empty: str) -> None:
    """A migration never calls a function in a public schema in place of PostgreSQL's own (CVE-2018-1058)."""
    execute(stranger, RUNS_AS.format("public.pg_advisory_xact_lock(integer) RETURNS void"))
    assert PostgresTokenStore(empty).migrate() == (0, THIS)


def test_functions_of_the_owner_fix_their_path(cluster: Any) -> None:
    """Each function that runs with the owner's rights names its search path, with temporary objects last."""
    functions = "pg_proc WHERE pronamespace = 'freegpt_auth'::regnamespace AND prosecdef"
    path = ["search_path=pg_catalog, pg_temp"]
    names = ["add_usage", "adopt_processes", "note_changes", "processes_behind", "show_process", "withdraw_process"]
    found = cluster.sql(f"SELECT proname, proconfig FROM {functions} ORDER BY 1", "migrated")
    assert found == [(name, path) for name in names]


# --- changes by hand


def test_a_change_by_hand_counts_like_a_commands(cluster: Any, database: str, keep: Any) -> None:
    """Each change of a token raises the revision and is logged, singly or, for very many rows, as one."""
    name = name_of(database)
    for _ in range(2):
        keep(PostgresTokenStore(database))
    statements = (
        "UPDATE freegpt_auth.tokens SET name = 'renamed'",
        "UPDATE freegpt_auth.tokens SET digest = sha256(digest)",
        "UPDATE freegpt_auth.tokens SET name = 'nobody' WHERE false",
        "DELETE FROM freegpt_auth.tokens WHERE false",
        "DELETE FROM freegpt_auth.tokens",
        (
            "INSERT INTO freegpt_auth.tokens (digest, id, name, prefix, created_at)"
            " SELECT sha256(n::text::bytea), n, '', '', now() FROM generate_series(1, 100001) AS n"
        ),
        "TRUNCATE freegpt_auth.tokens",
    )
    noted = []
    for statement in statements:
        [(before,)] = cluster.sql("SELECT revision FROM freegpt_auth.state", name)
        cluster.sql(statement, name)
        noted.append(cluster.sql(f"SELECT digest IS NULL FROM freegpt_auth.changes WHERE revision > {before}", name))
    assert [len(rows) for rows in noted] == [2, 4, 0, 0, 2, 1, 1]
    assert [rows[0][0] for rows in noted if rows] == [False, False, False, True, True]
    last = "SELECT max(c.revision), count(*) FROM freegpt_auth.changes c JOIN freegpt_auth.state USING (revision, mark)"
    assert cluster.sql(last, name) == [(7, 1)]


@pytest.mark.parametrize("instant", ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01"])
def test_unreadable_instant_is_refused(cluster: Any, database: str, keep: Any, instant: str) -> None:
    """The database refuses an instant that no server could read: infinity, and any year outside 1 to 9999."""
    keep(PostgresTokenStore(database))
    with pytest.raises(psycopg.errors.CheckViolation):
        cluster.sql(f"UPDATE freegpt_auth.tokens SET expires_at = '{instant}'", name_of(database))
