"""A fleet on PostgreSQL: revocation with four workers, and a request whose token is not in memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import results
from revocation import revoke_under_load
from served import application, expect_success, receive_nothing, scope_with

from freegpt_auth import BearerTokenMiddleware
from freegpt_auth.stores.postgres import PostgresTokenStore
from tests.helpers.postgresql import running

if TYPE_CHECKING:
    from tests.helpers.postgresql import Cluster

TABLE = 1_000_000
IN_MEMORY = 100
"""Tokens that the process keeps: so few that practically each look-up goes to the database."""

LOOK_UPS = 10
"""Requests of one round."""

_SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "maintenance_work_mem": "512MB"}

# Without triggers and indexes this takes seconds. No server may run: none would notice these tokens.
_FILL = (
    "ALTER TABLE freegpt_auth.tokens DISABLE TRIGGER USER, DROP CONSTRAINT tokens_pkey, DROP CONSTRAINT tokens_id_key",
    "DROP INDEX freegpt_auth.tokens_prefix",
    """
    INSERT INTO freegpt_auth.tokens (digest, id, name, prefix, created_at)
        SELECT digest, left(encode(digest, 'hex'), 16), 'client ' || number, left(secret, 14), now()
        FROM (
            SELECT number, secret, sha256(secret::bytea) AS digest
            FROM generate_series(0, {last}) AS number,
                LATERAL (SELECT 'sk-' || left(encode(sha256(number::text::bytea), 'hex'), 49) AS secret) AS made
        ) AS issued
    """,
    "ALTER TABLE freegpt_auth.tokens ADD PRIMARY KEY (digest), ADD UNIQUE (id), ENABLE TRIGGER USER",
    "CREATE INDEX tokens_prefix ON freegpt_auth.tokens (prefix text_pattern_ops)",
    "VACUUM ANALYZE freegpt_auth.tokens",
)


def measure(rounds: int) -> list[results.Row]:
    """Revoke *rounds* tokens, and look up as many times :data:`LOOK_UPS` tokens that are not in memory."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # as root, PostgreSQL runs as nobody
        with running(Path(folder, "data"), **_SETTINGS) as server:
            small = _database(server, "small", rounds + 1)
            revocation = revoke_under_load(
                small, {secret_of(number): f"client {number}" for number in range(rounds + 1)}
            )
            return [*revocation, _looked_up(_database(server, "large", TABLE), rounds)]


def secret_of(number: int) -> str:
    """Return the secret of a token that the SQL above makes."""
    return "sk-" + sha256(b"%d" % number).hexdigest()[:49]


def _database(server: Cluster, name: str, size: int) -> str:
    """Create a database with *size* tokens, and return its URL."""
    server.sql(f"CREATE DATABASE {name}")
    PostgresTokenStore(server.url(name)).migrate()
    for statement in _FILL:
        server.sql(statement.format(last=size - 1), name)
    return server.url(name)


def _looked_up(url: str, rounds: int) -> results.Row:
    with contextlib.closing(PostgresTokenStore(url, cache_limit=IN_MEMORY)) as store, asyncio.Runner() as runner:
        guard = BearerTokenMiddleware(application, store=store)
        secrets = map(secret_of, itertools.cycle(random.sample(range(TABLE), 50_000)))

        async def ask() -> float:
            began = time.perf_counter()
            for _ in range(LOOK_UPS):
                await guard(scope_with(next(secrets)), receive_nothing, expect_success)
            return (time.perf_counter() - began) / LOOK_UPS * 1e3

        runner.run(ask())  # the first requests connect to the database
        return results.row("looked up", "ms", [runner.run(ask()) for _ in range(rounds)])


if __name__ == "__main__":
    results.main("fleet", measure, rounds=200)
