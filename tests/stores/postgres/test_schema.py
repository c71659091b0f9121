"""The schema: migrations are atomic, and each role has exactly the rights that docs/guide/fleet.md lists."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from freegpt_auth import FileTokenStore, StoreError
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.stores.postgres import PostgresTokenStore, schema
from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.usage.base import Batch
from tests.helpers.pages import blocks
from tests.helpers.postgresql import BINARIES, PASSWORD

Command = Callable[..., subprocess.CompletedProcess[str]]

KEY = "the-environment-key"
THIS, NEXT = schema.VERSION, schema.VERSION + 1
NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)

APPLICATION = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from freegpt_auth import BearerTokenMiddleware
app = BearerTokenMiddleware(Starlette(routes=[Route("/v1/models", lambda request: JSONResponse([]))]))
"""
NEXT_RELEASE = """
import sys
from freegpt_auth.cli import main
from freegpt_auth.stores.postgres import schema
schema._MIGRATIONS += ({migration!r},)
schema.VERSION += 1
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def at(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a command of the next release, which has one migration more."""

    def start(migration: str, *arguments: str) -> subprocess.Popen[str]:
        program = tmp_path / "next_release.py"
        program.write_text(NEXT_RELEASE.format(migration=migration))
        start = [sys.executable, str(program), *arguments]
        return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def name_of(url: str) -> str:
    """Return the database that a URL names."""
    return url.rpartition("/")[2]


def one_line(done: subprocess.CompletedProcess[str], about: str) -> bool:
    """Return whether a command failed with one line that contains the text."""
    said = done.stderr.startswith("freegpt-auth: ") and done.stderr.count("\n") == 1
    return done.returncode == 1 and not done.stdout and said and about in done.stderr


def tables_of(cluster: Any, database: str) -> list[Any]:
    """Return all that the schema holds."""
    query = "SELECT relkind, relname FROM pg_class WHERE relnamespace = to_regnamespace('freegpt_auth') ORDER BY 1, 2"
    rows: list[Any] = cluster.sql(query, database)
    return rows


def wait_until(is_so: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)


# --- migrating


def test_any_number_of_processes_may_migrate_at_once(cluster: Any, empty: str) -> None:
    """A deployment that starts everywhere at the same moment makes the schema once, and none of it fails."""
    cluster.sql(f"ALTER DATABASE {name_of(empty)} SET default_transaction_isolation = 'serializable'")
    start = [sys.executable, "-m", "freegpt_auth", "--store", empty, "migrate"]
    processes = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    place = f"postgresql://postgres@127.0.0.1:{cluster.port}/{name_of(empty)}"
    made = ("", f"{place} was brought from version 0 to version {THIS} of the schema.\n")
    assert sorted(said) == [("", f"{place} has version {THIS} of the schema.\n")] * 7 + [made]
    assert tables_of(cluster, name_of(empty)) == tables_of(cluster, "migrated")
    assert cluster.sql("SELECT version, revision FROM freegpt_auth.state", name_of(empty)) == [(THIS, 0)]


def test_concurrent_migrations_run_in_turn(cluster: Any, empty: str) -> None:
    """However closely they meet, one of them makes the schema, and the others find it made."""
    name = name_of(empty)
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(8) as pool:
        with psycopg.connect(empty) as gate:
            gate.execute("LOCK TABLE pg_namespace IN SHARE MODE")  # none can make a schema till then
            migrating = [pool.submit(PostgresTokenStore(empty).migrate) for _ in range(8)]
            wait_until(lambda: len(cluster.sql(waiting)) == 8)
        assert sorted(each.result(timeout=30) for each in migrating) == [(0, THIS)] + [(THIS, THIS)] * 7


def test_to_migrate_again_changes_nothing(cluster: Any, database: str, keep: Any) -> None:
    """It may stand in every deployment: a database that is up to date stays as it is, with its tokens."""
    store = PostgresTokenStore(database)
    keep(store)
    before = cluster.sql("SELECT * FROM freegpt_auth.state", name_of(database)), dict(store.tokens())
    assert store.migrate() == (schema.VERSION, schema.VERSION)
    assert (cluster.sql("SELECT * FROM freegpt_auth.state", name_of(database)), dict(store.tokens())) == before


def test_a_file_needs_no_schema(command: Command) -> None:
    """The same line in a deployment does no harm where the tokens are in a file."""
    done = command("migrate")
    assert (done.returncode, done.stdout) == (0, "")
    assert (
        done.stderr
        == f"{Path('api_tokens.json').absolute()} is a token file, which needs no schema: there is nothing to do.\n"
    )


def test_each_migration_is_done_once_and_in_turn(
    cluster: Any, database: str, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of any earlier release is brought to this one's version, with its tokens; one of a later is left alone."""
    store = PostgresTokenStore(database)
    token, _ = keep(store)
    more = ("CREATE TABLE freegpt_auth.second (x int)", "ALTER TABLE freegpt_auth.second RENAME TO third")
    for version, migrations in ((NEXT, more[:1]), (NEXT + 1, more)):
        with monkeypatch.context() as context:
            context.setattr(schema, "_MIGRATIONS", (*schema._MIGRATIONS, *migrations))
            context.setattr(schema, "VERSION", version)
            assert store.migrate() == (version - 1, version)
            assert store.migrate() == (version, version)
            assert [each.id for each in store.tokens().values()] == [token.id]
    assert ("r", "third") in tables_of(cluster, name_of(database))
    for call in (store.migrate, store.tokens):
        with pytest.raises(
            StoreError,
            match=f"has version {NEXT + 1} of the schema, and this release knows {THIS}: upgrade freegpt_auth",
        ):
            call()


def test_version_2_keeps_roles_working(cluster: Any, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roles of a database of version 1 have the rights of version 2 after the migration, without a new grant."""
    name, store = name_of(empty), PostgresTokenStore(empty)
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "_MIGRATIONS", schema._MIGRATIONS[:1])
        earlier.setattr(schema, "VERSION", 1)
        assert store.migrate() == (0, 1)
    for role in ("a server", "a command"):
        cluster.sql(f'CREATE ROLE "{role}"')
    try:
        cluster.sql('GRANT EXECUTE ON FUNCTION freegpt_auth.add_usage TO "a server"', name)
        cluster.sql('GRANT SELECT ON freegpt_auth.servers TO "a command"', name)
        assert store.migrate() == (1, THIS)
        query = (
            "SELECT r.rolname, p.proname FROM pg_proc p, pg_roles r WHERE p.pronamespace = 'freegpt_auth'::regnamespace"
            " AND r.rolname LIKE 'a %' AND has_function_privilege(r.oid, p.oid, 'EXECUTE') ORDER BY 1, 2"
        )
        server = [("a server", each) for each in ("add_usage", "show_process", "withdraw_process")]
        assert cluster.sql(query, name) == [("a command", "processes_behind"), *server]
        assert cluster.sql("SELECT has_table_privilege('a command', 'freegpt_auth.servers', 'SELECT')", name) == [
            (True,)
        ]
    finally:
        for role in ("a server", "a command"):
            cluster.sql(f'DROP OWNED BY "{role}"', name)
            cluster.sql(f'DROP ROLE "{role}"')


@pytest.mark.parametrize("statement", ["SELECT 1 / 0", "no statement at all"])
def test_a_migration_that_fails_leaves_nothing(
    cluster: Any, database: str, at: Callable[..., subprocess.Popen[str]], statement: str
) -> None:
    """Where a migration cannot be done, the database stays at the version it had, and one line says why."""
    process = at(f"CREATE TABLE freegpt_auth.half (); {statement}", "--store", database, "migrate")
    out, err = process.communicate(timeout=60)
    assert one_line(subprocess.CompletedProcess([], process.returncode, out, err), name_of(database))
    assert tables_of(cluster, name_of(database)) == tables_of(cluster, "migrated")
    assert PostgresTokenStore(database).migrate() == (THIS, THIS)


def test_a_migration_that_is_killed_leaves_nothing(
    cluster: Any, database: str, at: Callable[..., subprocess.Popen[str]]
) -> None:
    """A migrating process that dies in the middle leaves no half of a version behind, and nothing locked."""
    name = name_of(database)
    cluster.sql("CREATE TABLE public.gate ()", name)
    waits = "SELECT 1 FROM pg_locks WHERE relation = 'public.gate'::regclass AND NOT granted"
    connected = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'freegpt_auth'"
    with psycopg.connect(database) as gate:
        gate.execute("LOCK TABLE public.gate")
        process = at("CREATE TABLE freegpt_auth.half (); LOCK TABLE public.gate", "--store", database, "migrate")
        wait_until(lambda: cluster.sql(waits, name), process.poll)
        process.kill()
        process.communicate(timeout=30)
    wait_until(lambda: not cluster.sql(connected, name))
    assert cluster.sql("SELECT version FROM freegpt_auth.state", name) == [(THIS,)]
    assert ("r", "half") not in tables_of(cluster, name)
    process = at("CREATE TABLE freegpt_auth.half ()", "--store", database, "migrate")
    assert process.communicate(timeout=60)[1].endswith(
        f" was brought from version {THIS} to version {NEXT} of the schema.\n"
    )
    assert ("r", "half") in tables_of(cluster, name)


# --- a server and its schema


def answers(server: Any, token: str | None, status: int) -> Callable[[], bool]:
    """Return a function that tells whether a server answers so by now."""
    return lambda: server.get(token=token) == status


def test_a_server_waits_for_the_schema(empty: str, command: Command, serve: Callable[..., Any], tmp_path: Path) -> None:
    """A server that is started before the migration logs the remedy once, accepts only the key, and recovers."""
    (tmp_path / "early.py").write_text(APPLICATION)
    server = serve("early:app", FREEGPT_AUTH_STORE=empty, FREEGPT_API_KEY=KEY)
    for _ in range(3):
        assert [server.get(token=token) for token in ("sk-anything", None, KEY)] == [503, 401, 200]
    said = f"has no schema, and this release needs {THIS}: run python -m freegpt_auth migrate"
    assert one_line(command("--store", empty, "create", "early"), said)
    assert command("--store", empty, "migrate").returncode == 0
    secret = command("--store", empty, "create", "ci").stdout.strip()
    wait_until(answers(server, secret, 200), server.log.read_text)
    assert server.get(token="sk-anything") == 401
    assert server.stop().count(said) == 1


def test_server_waits_for_its_migration(
    database: str, command: Command, at: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path
) -> None:
    """On an older schema a new server is closed until it is migrated; then the old one says that it must be upgraded."""
    secret = command("--store", database, "create", "ci").stdout.strip()
    migration = "CREATE TABLE freegpt_auth.second ()"
    (tmp_path / "old.py").write_text(APPLICATION)
    (tmp_path / "new.py").write_text(NEXT_RELEASE.format(migration=migration) + APPLICATION)
    settings = {"FREEGPT_AUTH_STORE": database, "FREEGPT_API_KEY": KEY, "FREEGPT_AUTH_LEASE": "5"}
    new, old = serve("new:app", **settings), serve("old:app", **settings)
    assert [new.get(token=token) for token in (secret, "sk-anything", None, KEY)] == [503, 503, 401, 200]
    assert [old.get(token=token) for token in (secret, "sk-anything", None, KEY)] == [200, 401, 401, 200]
    process = at(migration, "--store", database, "migrate")
    assert process.communicate(timeout=60)[1].endswith(
        f"was brought from version {THIS} to version {NEXT} of the schema.\n"
    )
    wait_until(answers(new, secret, 200), new.log.read_text)
    wait_until(answers(old, secret, 503), old.log.read_text)
    assert [old.get(token=token) for token in ("sk-anything", None, KEY)] == [503, 401, 200]
    too_old = f"has version {NEXT} of the schema, and this release knows {THIS}: upgrade freegpt_auth"
    assert one_line(command("--store", database, "list"), too_old)
    too_early = f"has version {THIS} of the schema, and this release needs {NEXT}: run python -m freegpt_auth migrate"
    assert new.stop().count(too_early) == 1
    assert 1 <= old.stop().count(too_old) <= 2  # when the lease begins to run out, and when it is over


@pytest.mark.parametrize("schema_said", [(0, "has no schema, and"), (99, "has version 99 of the schema, and")])
def test_server_recovers_with_the_right_version(
    cluster: Any, database: str, keep: Any, serve: Callable[..., Any], schema_said: tuple[int, str]
) -> None:
    """A running server whose schema changes under it closes when its lease is over, and opens again without a restart."""
    version, said = schema_said
    Path("app.py").write_text(APPLICATION)
    token, secret = keep(PostgresTokenStore(database))
    server = serve("app:app", FREEGPT_AUTH_STORE=database, FREEGPT_API_KEY=KEY, FREEGPT_AUTH_LEASE="5")
    assert server.get(token=secret) == 200
    cluster.sql(f"UPDATE freegpt_auth.state SET version = {version}", name_of(database))
    wait_until(answers(server, secret, 503), server.log.read_text)
    assert [server.get(token=token) for token in ("sk-anything", None, KEY)] == [503, 401, 200]
    cluster.sql(f"UPDATE freegpt_auth.state SET version = {THIS}", name_of(database))
    wait_until(answers(server, secret, 200), server.log.read_text)
    PostgresTokenStore(database).revoke(token.id, NOW)
    assert server.get(token=secret) == 401
    assert said in server.stop()


# --- roles


@dataclass
class Roles:
    """The database ``tokens`` as docs/guide/fleet.md makes it.

    Attributes:
        owner: its URL with the role that migrates.
        admin: with the role of who runs commands.
        server: with the role of the servers.
    """

    owner: str
    admin: str
    server: str


def _psql(statements: str, url: str) -> None:
    program = [str(BINARIES / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", url]
    done = subprocess.run(program, input=statements, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


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
    roles: Roles, command: Command, serve: Callable[..., Any], tmp_path: Path
) -> None:
    """With a role that may read tokens and add usage only, a server does all it should, and commands wait for it."""
    (tmp_path / "app.py").write_text(APPLICATION)
    secret = command("--store", roles.admin, "create", "ci").stdout.strip()
    server = serve("app:app", FREEGPT_AUTH_STORE=roles.server)
    assert [server.get(token=token) for token in (secret, secret, "sk-wrong", None)] == [200, 200, 401, 401]
    done = command("--store", roles.admin, "revoke", secret)
    assert server.get(token=secret) == 401
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    log = server.stop()
    assert "WARNING" not in log
    assert "ERROR" not in log
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
    assert done.stderr.endswith(
        ": permission denied for table usage; use a role of the database that may do this (docs/guide/fleet.md)\n"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["create", "x"], ["revoke", "{ref}"], ["delete", "{ref}"], ["copy", "{file}", "{server}"]]
)
def test_serving_role_is_refused_by_commands(
    cluster: Any, roles: Roles, command: Command, keep: Any, arguments: list[str]
) -> None:
    """A command with the servers' role fails with one line that names the remedy, and changes nothing."""
    token, _ = keep(PostgresTokenStore(roles.admin))
    Path("t.json").write_text(
        '{"version": 1, "tokens": [{"id": "f", "name": "f", "prefix": "", "digest": "sha256$%s", '
        '"created_at": "2025-01-01T00:00:00Z"}]}' % ("0" * 64)
    )
    before = _contents(cluster)
    values = {"ref": token.id, "file": "t.json", "server": roles.server}
    store = [] if arguments[0] == "copy" else ["--store", roles.server]
    done = command(*store, *(argument.format(**values) for argument in arguments))
    assert one_line(done, "permission denied ")
    assert done.stderr.endswith("; use a role of the database that may do this (docs/guide/fleet.md)\n")
    assert _contents(cluster) == before


READS = ["usage", "usage_batches", "servers", "processes"]
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


@pytest.mark.parametrize(
    "statement",
    [
        *FOR_NOBODY,
        *(f"SELECT * FROM freegpt_auth.{table}" for table in READS),
        *(f"UPDATE freegpt_auth.{table} SET {change}" for table, change in WRITES.items()),
        *(f"DELETE FROM freegpt_auth.{table}" for table in WRITES),
        *(
            f"INSERT INTO freegpt_auth.{table} SELECT * FROM freegpt_auth.{table}"
            for table in WRITES
            if table != "tokens"
        ),
        "INSERT INTO freegpt_auth.tokens (digest) VALUES ('')",
        "UPDATE freegpt_auth.tokens SET revoked_at = NULL",
        "SELECT * FROM freegpt_auth.tokens FOR UPDATE",
        "SELECT freegpt_auth.processes_behind(1)",
        "SELECT freegpt_auth.adopt_processes()",
        "LOCK TABLE freegpt_auth.tokens IN ROW EXCLUSIVE MODE",
        "SET ROLE freegpt_admin",
        "CREATE TEMPORARY TABLE mine ()",
    ],
)
def test_a_servers_password_is_good_for_nothing_else(cluster: Any, roles: Roles, statement: str) -> None:
    """A thief of the servers' password can make, change, un-revoke and delete no token, and take no other role."""
    before = _contents(cluster)
    _denied(roles.server, statement)
    assert _contents(cluster) == before


@pytest.mark.parametrize(
    "statement",
    [
        *FOR_NOBODY,
        *(
            f"UPDATE freegpt_auth.{table} SET {WRITES[table]}"
            for table in ("tokens", "state", "changes", "usage_batches")
        ),
        *(f"DELETE FROM freegpt_auth.{table}" for table in ("state", "changes", "usage_batches", "processes")),
        *(f"UPDATE freegpt_auth.tokens SET {column} = NULL" for column in ("expires_at", "models", "name")),
        "UPDATE freegpt_auth.usage SET token_id = ''",
        "SELECT freegpt_auth.add_usage('', 1, '{}', '{}', '{}')",
        "SELECT freegpt_auth.show_process('', 1, 1, true)",
        "SELECT freegpt_auth.withdraw_process('')",
        "SELECT * FROM freegpt_auth.processes",
        "SET ROLE freegpt_server",
    ],
)
def test_admin_cannot_change_functions(cluster: Any, roles: Roles, statement: str) -> None:
    """The commands' role cannot change tokens without a new revision, and has no further rights."""
    before = _contents(cluster)
    _denied(roles.admin, statement)
    assert _contents(cluster) == before


@pytest.mark.parametrize("instant", ["NULL", "now()", "revoked_at + interval '1 year'"])
@pytest.mark.parametrize("role", ["admin", "owner"])
def test_revoking_cannot_be_undone(roles: Roles, keep: Any, role: str, instant: str) -> None:
    """Not even by hand: the database keeps a revoked token revoked, since the instant at which it was."""
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


def test_only_the_owner_migrates(cluster: Any, roles: Roles, command: Command, at: Callable[..., Any]) -> None:
    """A release that needs a migration is not migrated by the admin's role or the servers', and says so in one line."""
    before = tables_of(cluster, "tokens")
    for role in (roles.admin, roles.server):
        process = at("CREATE TABLE freegpt_auth.second ()", "--store", role, "migrate")
        out, err = process.communicate(timeout=60)
        assert one_line(subprocess.CompletedProcess([], process.returncode, out, err), "permission denied for ")
        assert "; use a role of the database that may do this" in err
    assert tables_of(cluster, "tokens") == before
    assert command("--store", roles.owner, "migrate").returncode == 0


def test_a_role_without_rights_is_told_so(cluster: Any, database: str, command: Command) -> None:
    """Where the grants were forgotten, a command says so and does not ask for a migration."""
    cluster.sql(f"CREATE ROLE stranger LOGIN PASSWORD '{PASSWORD}'")
    try:
        done = command("--store", cluster.url(name_of(database), "stranger"), "list")
        assert one_line(done, "permission denied for schema freegpt_auth; use a role")
    finally:
        cluster.sql("DROP ROLE stranger")


# --- defaults and other roles


@pytest.fixture
def stranger(cluster: Any, empty: str) -> Iterator[str]:
    """Return the URL of a role without any right, in a database in which defaults give everything to everybody."""
    for kind in ("TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS"):
        cluster.sql(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO PUBLIC", name_of(empty))
    cluster.sql("GRANT ALL ON SCHEMA public TO PUBLIC", name_of(empty))
    cluster.sql(f"CREATE ROLE stranger LOGIN PASSWORD '{PASSWORD}'")
    yield cluster.url(name_of(empty), "stranger")
    cluster.sql("DROP OWNED BY stranger", name_of(empty))
    cluster.sql("DROP ROLE stranger")


def test_defaults_open_nothing(cluster: Any, empty: str, stranger: str) -> None:
    """However generous a database is to everybody by default, nobody gets at the tokens without a grant of his own."""
    PostgresTokenStore(empty).migrate()
    query = "SELECT has_schema_privilege('stranger', 'freegpt_auth', 'USAGE, CREATE')"
    assert cluster.sql(query, name_of(empty)) == [(False,)]
    _denied(stranger, "SELECT * FROM freegpt_auth.tokens")
    cluster.sql("GRANT USAGE ON SCHEMA freegpt_auth TO stranger", name_of(empty))
    for _, name in tables_of(cluster, name_of(empty)):
        query = (
            f"SELECT has_table_privilege('stranger', 'freegpt_auth.{name}', 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')"
        )
        if not name.endswith(("_key", "_pkey", "_prefix", "_revision")):
            assert cluster.sql(query, name_of(empty)) == [(False,)], name
    query = (
        "SELECT proname FROM pg_proc WHERE pronamespace = 'freegpt_auth'::regnamespace"
        " AND has_function_privilege('stranger', oid, 'EXECUTE')"
    )
    assert cluster.sql(query, name_of(empty)) == []


def test_nobody_runs_code_as_the_owner_by_a_trigger(cluster: Any, database: str) -> None:
    """A role that may use the schema cannot put its own code, by a cast, into the functions that run as the owner."""
    name = name_of(database)
    cluster.sql(f"CREATE ROLE stranger LOGIN PASSWORD '{PASSWORD}'")
    cluster.sql("GRANT USAGE ON SCHEMA freegpt_auth TO stranger", name)
    try:
        with psycopg.connect(cluster.url(name, "stranger"), autocommit=True) as connection:
            connection.execute("CREATE TYPE pg_temp.bait AS (x int)")
            connection.execute(
                "CREATE FUNCTION pg_temp.go(pg_temp.bait) RETURNS bytea LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'runs as %', current_user; END $$"
            )
            connection.execute("CREATE CAST (pg_temp.bait AS bytea) WITH FUNCTION pg_temp.go AS ASSIGNMENT")
            connection.execute("CREATE TEMPORARY TABLE mine (digest pg_temp.bait)")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(
                    "CREATE TRIGGER mine AFTER INSERT ON mine REFERENCING NEW TABLE AS new_rows"
                    " FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes()"
                )
            connection.execute("INSERT INTO mine VALUES (ROW(1))")
    finally:
        cluster.sql("DROP OWNED BY stranger", name)
        cluster.sql("DROP ROLE stranger")


def test_nobody_runs_code_as_who_migrates(empty: str, stranger: str) -> None:
    """A function that somebody put into a schema of everybody's is never taken for PostgreSQL's own (CVE-2018-1058)."""
    with psycopg.connect(stranger, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION public.pg_advisory_xact_lock(integer) RETURNS void LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'runs as %', current_user; END $$"
        )
    store = PostgresTokenStore(empty)
    assert store.migrate() == (0, THIS)


def test_functions_of_the_owner_look_nowhere_else(cluster: Any) -> None:
    """Each function that runs with the owner's rights names its search path, with temporary objects last."""
    query = "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'freegpt_auth'::regnamespace AND prosecdef ORDER BY 1"
    path = ["search_path=pg_catalog, pg_temp"]
    names = ["add_usage", "adopt_processes", "note_changes", "processes_behind", "show_process", "withdraw_process"]
    assert cluster.sql(query, "migrated") == [(name, path) for name in names]


# --- changes by hand


def test_a_change_by_hand_counts_like_a_commands(cluster: Any, database: str) -> None:
    """Each change of a token raises the revision and is logged, singly or, for very many rows, as one."""
    name = name_of(database)
    store = PostgresTokenStore(database)
    for _ in range(2):
        token, secret = issue("by-hand", now=NOW)
        store.add(digest_of(secret), token)
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
    [(revision, marks)] = cluster.sql(
        "SELECT max(c.revision), count(*) FROM freegpt_auth.changes c JOIN freegpt_auth.state USING (revision, mark)",
        name,
    )
    assert (revision, marks) == (7, 1)


@pytest.mark.parametrize("instant", ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01"])
def test_an_instant_that_nobody_can_read_is_refused(cluster: Any, database: str, keep: Any, instant: str) -> None:
    """No slip of an operator makes the tokens unreadable for every server: never is null, and no other year will do."""
    keep(PostgresTokenStore(database))
    with pytest.raises(psycopg.errors.CheckViolation):
        cluster.sql(f"UPDATE freegpt_auth.tokens SET expires_at = '{instant}'", name_of(database))
