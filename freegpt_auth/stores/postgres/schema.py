"""Version of the schema, and the migrations between versions.

Each change of a token, by a command or with ``psql``, fires a trigger that raises the one revision and logs the token's
digest, in the same transaction. The row of the revision stays locked until the transaction ends, so revisions are
committed in order: a server that has read one has read all before it. (A sequence or a timestamp would miss rows that
are committed late.) Each revision has a random mark, which reveals a database that lost changes and
then reached the same number again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...exceptions import StoreError
from .schema_v1 import FIRST
from .schema_v2 import SECOND

if TYPE_CHECKING:
    from .connection import Connection

CHANNEL = "freegpt_auth"
"""Channel of the notifications of new revisions."""

MIGRATIONS = (FIRST, SECOND)
"""The statements that bring a database from each version to the next."""

VERSION = len(MIGRATIONS)
"""Version of the schema that this release requires."""

_MIGRATING = 0x66726565  # key of an advisory lock: concurrent migrations run one after the other


def version_of(connection: Connection) -> int:
    """Return the version of the database's schema; 0 without one."""
    if connection.one("SELECT to_regclass('freegpt_auth.state')")[0] is None:
        return 0
    return int(connection.one("SELECT version FROM freegpt_auth.state")[0])


def check(version: int, place: str) -> None:
    """Check that *version* is the one that this release requires.

    Raises:
        StoreError: it is not. The message names the remedy.
    """
    if version == VERSION:
        return
    found = f"has version {version} of the schema" if version else "has no schema"
    if version > VERSION:
        raise StoreError(f"{place} {found}, and this release knows {VERSION}: upgrade freegpt_auth")
    raise StoreError(f"{place} {found}, and this release needs {VERSION}: run python -m freegpt_auth migrate")


def migrate(connection: Connection, place: str) -> tuple[int, int]:
    """Bring a database to this release's version of the schema. Safe to run concurrently.

    Returns:
        The version before, and the version now.

    Raises:
        StoreError: the version is that of a later release.
    """
    with connection.transaction():
        connection.run("SELECT pg_advisory_xact_lock(%s)", (_MIGRATING,))
        before = version_of(connection)
        if before > VERSION:
            check(before, place)
        for number, migration in enumerate(MIGRATIONS[before:], start=before + 1):
            connection.script(migration)
            connection.run("UPDATE freegpt_auth.state SET version = %s", (number,))
    return before, VERSION
