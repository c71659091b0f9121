"""A real PostgreSQL for the suite, and tokens in it: ten million in two minutes.

It is a cluster as ``initdb`` makes it, which waits for the disk at each commit, with more memory than the tests give it.
"""

from __future__ import annotations

import contextlib
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from freegpt_auth.stores.postgres import PostgresTokenStore
from tests.helpers.postgresql import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.postgresql import Cluster

_SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "maintenance_work_mem": "1GB", "work_mem": "64MB"}

# While the triggers and the indexes are away, no server may be running: none would learn of these tokens.
_FILLING = (
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


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a PostgreSQL until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # as root it runs as nobody
        with running(Path(folder, "data"), **_SETTINGS) as server:
            yield server


def make(server: Cluster, name: str, size: int = 0) -> str:
    """Make a database with *size* tokens, and return its URL."""
    server.sql(f"CREATE DATABASE {name}")
    PostgresTokenStore(server.url(name)).migrate()
    if size:
        for statement in _FILLING:
            server.sql(statement.format(last=size - 1), name)
    return server.url(name)


def secret_of(number: int) -> str:
    """Return the secret of one of the tokens that :func:`make` makes."""
    return "sk-" + sha256(b"%d" % number).hexdigest()[:49]
