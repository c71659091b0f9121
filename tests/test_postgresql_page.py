"""What docs/postgresql.md and the README say of a database is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import FileTokenStore
from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.stores.postgres.usage import PostgresUsage
from freegpt_auth.usage.base import Batch
from tests.helpers.pages import blocks
from tests.helpers.postgresql import BINARIES, PASSWORD

BLOCKS = blocks("docs/postgresql.md")
URL, WITHOUT_PASSWORD = "postgresql://user:password@host/database", "postgresql://user@host/database"


def code(heading: str, language: str = "sh") -> list[str]:
    """Return the blocks of a language under a heading."""
    found = [block.code for block in BLOCKS if (block.heading, block.language) == (heading, language)]
    assert found
    return found


def run(script: str, database: str) -> subprocess.CompletedProcess[str]:
    """Run shell code with the URL that stands in it replaced, and this Python's and PostgreSQL's programs on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(BINARIES), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "FREEGPT_AUTH_STORE": database, "PGPASSWORD": PASSWORD}
    pasted = script.replace(URL, database).replace(WITHOUT_PASSWORD, database.replace(f":{PASSWORD}", ""))
    return subprocess.run(
        ["sh", "-ec", pasted],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def test_the_first_commands_make_a_token(cluster: Any) -> None:
    """Pasted in their order, with an empty database, the first commands end with a token."""
    cluster.sql("CREATE DATABASE pasted")
    first = code("Tokens in PostgreSQL")[0]
    assert first.startswith("pip install '.[postgres]'\n")
    done = run(first.partition("\n")[2], cluster.url("pasted"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"sk-\w{49}\n", done.stdout)
    assert not FileTokenStore("api_tokens.json").tokens()


def test_tokens_are_taken_along(database: str, keep: Any) -> None:
    """The command that grows a file into a database takes every token; so do the README's."""
    token, _ = keep(FileTokenStore("api_tokens.json"))
    readme = [block.code for block in blocks("README.md") if block.heading == "More than one host"]
    for script in (code("Tokens in PostgreSQL")[1], *readme):
        done = run(script, database)
        assert done.returncode == 0, done.stderr
        assert [each.id for each in PostgresTokenStore(database).tokens().values()] == [token.id]


@pytest.mark.parametrize("statement", code("What to monitor", "sql"))
def test_what_to_monitor_can_be_asked(cluster: Any, database: str, statement: str) -> None:
    """Each query of the page is one that PostgreSQL answers."""
    cluster.sql(statement, database.rpartition("/")[2])


def test_usage_may_be_partitioned(cluster: Any, database: str, keep: Any) -> None:
    """After the statements of the page a server goes on to count where it was, and once for each batch."""
    token, _ = keep(PostgresTokenStore(database))
    usage = PostgresUsage(database)
    usage.add(Batch("a process", 1, {token.id: (2, 0.0)}), 1.0)
    cluster.sql(code("How far one database carries", "sql")[0], database.rpartition("/")[2])
    for sequence in (1, 2, 2):
        usage.add(Batch("a process", sequence, {token.id: (2, 0.0)}), 1.0)
    assert usage.read()[token.id].use_count == 4
    usage.close()


def test_a_running_server_is_among_those_that_are_connected(cluster: Any, database: str) -> None:
    """The view shows a server that follows the database, and that it is not behind."""
    store = PostgresTokenStore(database)
    store.resolve(bytes(32))
    try:
        [row] = cluster.sql("SELECT role, behind FROM freegpt_auth.servers", database.rpartition("/")[2])
        assert row == ("postgres", 0)
    finally:
        store.close()


def test_a_backup_brings_back_what_was_there(cluster: Any, database: str, keep: Any, caplog: Any) -> None:
    """What the page says of backups works, and a running server notices it and refuses what it knew as revoked."""
    store = PostgresTokenStore(database)
    token, secret = keep(store)
    dump, restore = "\n".join(code("Backup and restore")).splitlines()
    assert run(dump, database).returncode == 0
    digest = next(iter(store.tokens()))
    assert store.resolve(digest) == token
    store.revoke(token.id, token.created_at)
    try:
        done = run(restore, database)
        assert done.returncode == 0, done.stderr
        assert PostgresTokenStore(database).tokens()[digest].revoked_at is None
        assert cluster.sql("SELECT 1 FROM freegpt_auth.state WHERE revision = 1", database.rpartition("/")[2])
        wait_for(caplog, "has lost changes that were in force")
        assert getattr(store.resolve(digest), "revoked_at", None) is not None
        assert secret not in caplog.text
    finally:
        store.close()


def wait_for(caplog: Any, words: str) -> None:
    """Wait until something is logged."""
    deadline = time.monotonic() + 60
    while words not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.05)
