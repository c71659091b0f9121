"""The commands and statements of the pages on PostgreSQL work: docs/guide/fleet.md and docs/operations."""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.stores.postgres.usage import PostgresUsage
from freegpt_auth.usage.base import Batch
from tests.helpers.pages import Shell, blocks, only
from tests.helpers.postgresql import BINARIES, PASSWORD
from tests.helpers.watch import wait_until

FLEET, DATABASE = "docs/guide/fleet.md", "docs/operations/database.md"
MONITORING, BACKUP = "docs/operations/monitoring.md", "docs/operations/backup.md"
URL, WITHOUT_PASSWORD = "postgresql://user:password@host/database", "postgresql://user@host/database"


def run(script: str, database: str) -> str:
    """Run shell code with *database* in the place of the URL that stands in it, and return its output."""
    pasted = script.replace(URL, database).replace(WITHOUT_PASSWORD, database.replace(f":{PASSWORD}", ""))
    shell = Shell(FREEGPT_AUTH_STORE=database, PGPASSWORD=PASSWORD)
    shell.environment["PATH"] = f"{BINARIES}:{shell.environment['PATH']}"
    return shell.run(pasted)


def name_of(database: str) -> str:
    """Return the name of a database at the end of its URL."""
    return database.rpartition("/")[2]


def test_first_commands_make_a_token(cluster: Any) -> None:
    """Pasted in their order, with an empty database, the first commands end with a token."""
    cluster.sql("CREATE DATABASE pasted")
    first = next(block.code for block in blocks(FLEET))
    assert first.startswith("pip install '.[postgres]'\n")
    assert re.search(r"^sk-\w{49}$", run(first.partition("\n")[2], cluster.url("pasted")), re.MULTILINE)
    assert not FileTokenStore("api_tokens.json").tokens()


def test_tokens_are_taken_along(database: str, keep: Any) -> None:
    """The command that grows a file into a database takes every token."""
    token, _ = keep(FileTokenStore("api_tokens.json"))
    run([block.code for block in blocks(FLEET) if block.heading == "Start"][1], database)
    assert [each.id for each in PostgresTokenStore(database).tokens().values()] == [token.id]


@pytest.mark.parametrize("block", [block for block in blocks(MONITORING) if block.language == "sql"], ids=range(3))
def test_monitoring_queries_are_answered(cluster: Any, database: str, block: Any) -> None:
    """PostgreSQL answers each query of the page."""
    cluster.sql(block.code, name_of(database))


def test_second_role_for_the_servers(cluster: Any) -> None:
    """The statement of the page makes a role that replaces the first one."""
    cluster.sql("CREATE ROLE freegpt_server")
    try:
        cluster.sql(only(DATABASE, "Change the password", "sql"))
        cluster.sql("DROP ROLE freegpt_server_2")
    finally:
        cluster.sql("DROP ROLE freegpt_server")


def test_usage_may_be_partitioned(cluster: Any, database: str, keep: Any) -> None:
    """After the statements of the page a server continues the counts, once for each batch."""
    token, _ = keep(PostgresTokenStore(database))
    with closing(PostgresUsage(database)) as usage:
        usage.write(Batch("a process", 1, {token.id: (2, 0.0)}), 1.0)
        cluster.sql(only(DATABASE, "Partition the usage", "sql"), name_of(database))
        for sequence in (1, 2, 2):
            usage.write(Batch("a process", sequence, {token.id: (2, 0.0)}), 1.0)
        assert usage.read()[token.id].use_count == 4


def test_view_shows_a_running_server(cluster: Any, database: str) -> None:
    """The view of docs/operations/monitoring.md shows a server that follows the database and is not behind."""
    with closing(PostgresTokenStore(database)) as store:
        store.resolve(bytes(32))
        [row] = cluster.sql("SELECT role, behind FROM freegpt_auth.servers", name_of(database))
    assert row == ("postgres", 0)


def test_restored_backup(cluster: Any, database: str, keep: Any, caplog: Any) -> None:
    """A restored backup brings a revoked token back, and a running server notices and keeps refusing it."""
    with closing(PostgresTokenStore(database)) as store:
        token, secret = keep(store)
        dump, restore = only(BACKUP, "A database", "sh").splitlines()
        run(dump, database)
        digest = next(iter(store.tokens()))
        assert store.resolve(digest) == token
        store.revoke(token.id, token.created_at)
        run(restore, database)
        assert PostgresTokenStore(database).tokens()[digest].revoked_at is None
        assert cluster.sql("SELECT 1 FROM freegpt_auth.state WHERE revision = 1", name_of(database))
        wait_until(lambda: "has lost changes that were in force" in caplog.text)
        assert getattr(store.resolve(digest), "revoked_at", None) is not None
    assert secret not in caplog.text
