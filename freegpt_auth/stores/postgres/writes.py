"""The changes that commands make in the tables. Triggers in the schema notify every server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base import Merged
from .instants import count_of, instant
from .reads import COLUMNS, INSTANTS, RECORD, token_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ...tokens import Token
    from .connection import Connection
    from .timed_connection import Row

DURABLE = """
    SELECT pg_logical_emit_message(true, 'freegpt_auth', ''),
        CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
            THEN set_config('synchronous_commit', 'on', true) END,
        CASE WHEN current_setting('session_replication_role') <> 'origin'
            THEN set_config('session_replication_role', 'origin', true) END
"""
"""Forces synchronous commit for this transaction, whatever the defaults of the database are.

Emits a WAL message: even a no-op commit then waits for the standbys, and so for any earlier change whose own wait was
interrupted. Enables the triggers: with ``session_replication_role`` set to ``replica``, a change would reach no server.
"""

_NAMES = ", ".join(COLUMNS)
_VALUES = ", ".join(instant(f"%({name})s::bigint") if name in INSTANTS else f"%({name})s" for name in COLUMNS)
_INSERT = f"INSERT INTO freegpt_auth.tokens ({_NAMES}) VALUES ({_VALUES})"
_REVOKE = f"""
    UPDATE freegpt_auth.tokens SET revoked_at = {instant("%(at)s::bigint")} WHERE id = %(id)s AND revoked_at IS NULL
"""
_BY_ID = f"SELECT {RECORD} FROM freegpt_auth.tokens t WHERE t.id = %s"
_DELETE = f"DELETE FROM freegpt_auth.tokens t WHERE t.id = %s RETURNING {RECORD}"
_FORGET_USAGE = "DELETE FROM freegpt_auth.usage WHERE token_id = %s"

_INCOMING = f"""
    CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS
        SELECT 0::bigint AS place, {", ".join(f"0::bigint AS {name}" if name in INSTANTS else name for name in COLUMNS)}
            FROM freegpt_auth.tokens WITH NO DATA
"""
_COPY = f"COPY incoming (place, {_NAMES}) FROM STDIN"
_ADD_NEW = f"""
    WITH added AS (
        INSERT INTO freegpt_auth.tokens ({_NAMES})
            SELECT {", ".join(instant(f"t.{name}") if name in INSTANTS else f"t.{name}" for name in COLUMNS)}
            FROM incoming t
            WHERE NOT EXISTS (SELECT FROM freegpt_auth.tokens known WHERE known.digest = t.digest) ORDER BY t.place
        RETURNING 1
    ) SELECT count(*) FROM added
"""
_REVOKE_SAME = f"""
    WITH revoked AS (
        UPDATE freegpt_auth.tokens t SET revoked_at = {instant("i.revoked_at")} FROM incoming i
            WHERE i.digest = t.digest AND t.revoked_at IS NULL AND i.revoked_at IS NOT NULL
        RETURNING 1
    ) SELECT count(*) FROM revoked
"""


def insert(connection: Connection, digest: bytes, token: Token) -> None:
    """Insert the row of a token."""
    connection.run(_INSERT, dict(zip(COLUMNS, _row(digest, token), strict=True)))


def revoke(connection: Connection, token_id: str, at: datetime) -> Token | None:
    """Set the instant of revocation unless the token is revoked already; return its record."""
    connection.run(_REVOKE, {"at": count_of(at), "id": token_id})
    return _only(connection.run(_BY_ID, (token_id,)))


def delete(connection: Connection, token_id: str) -> Token | None:
    """Delete a token and its usage; return its record."""
    rows = connection.run(_DELETE, (token_id,))
    connection.run(_FORGET_USAGE, (token_id,))
    return _only(rows)


def merge(connection: Connection, tokens: Mapping[bytes, Token]) -> Merged:
    """Add missing tokens, apply revocations, and return the number of each."""
    connection.allow_long_statements()
    connection.run(_INCOMING)
    connection.copy(_COPY, ((place, *_row(digest, token)) for place, (digest, token) in enumerate(tokens.items())))
    connection.run("ANALYZE incoming")
    # Otherwise another command could add one of these tokens between the check and the insert. Readers do not wait.
    connection.run("LOCK TABLE freegpt_auth.tokens IN SHARE ROW EXCLUSIVE MODE")
    return Merged(connection.one(_ADD_NEW)[0], connection.one(_REVOKE_SAME)[0])


def _row(digest: bytes, token: Token) -> Row:
    scopes, models = list(token.scopes), None if token.models is None else list(token.models)
    counts = (
        None if each is None else count_of(each)
        for each in (token.created_at, token.expires_at, token.revoked_at, token.last_used_at)
    )
    created_at, expires_at, revoked_at, last_used_at = counts
    named = (digest, token.id, token.name, token.prefix)
    return (*named, created_at, expires_at, revoked_at, scopes, models, last_used_at)


def _only(rows: list[Row]) -> Token | None:
    return token_of(rows[0]) if rows else None
