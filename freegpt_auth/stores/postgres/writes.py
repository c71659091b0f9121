"""What commands change in the tables. The triggers of :mod:`.schema` see to it that every server learns of it."""

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
"""Makes this transaction as durable as a promise needs, however fast and loose the server's others are.

It writes something even if nothing is left to change: only then its commit waits for the standbys to have that, and with it
what was changed before by a command whose own wait was broken off. The triggers must fire: a role whose default for
``session_replication_role`` is ``replica`` would change tokens without any server noticing.
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
            SELECT {", ".join(instant(f"t.{name}") if name in INSTANTS else f"t.{name}" for name in COLUMNS)} FROM incoming t
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
    """Add a row."""
    connection.run(_INSERT, dict(zip(COLUMNS, _row(digest, token), strict=True)))


def revoke(connection: Connection, token_id: str, at: datetime) -> Token | None:
    """Enter when a token was revoked, unless it was before; return its record."""
    connection.run(_REVOKE, {"at": count_of(at), "id": token_id})
    return _only(connection.run(_BY_ID, (token_id,)))


def delete(connection: Connection, token_id: str) -> Token | None:
    """Remove a row and its usage; return the record."""
    rows = connection.run(_DELETE, (token_id,))
    connection.run(_FORGET_USAGE, (token_id,))
    return _only(rows)


def merge(connection: Connection, tokens: Mapping[bytes, Token]) -> Merged:
    """Add what is missing, revoke what is revoked in *tokens*, and return how many of each."""
    connection.allow_long_statements()
    connection.run(_INCOMING)
    connection.copy(_COPY, ((place, *_row(digest, token)) for place, (digest, token) in enumerate(tokens.items())))
    connection.run("ANALYZE incoming")
    # What another command adds after it was seen to be missing could not be added here; who only reads is not held up.
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
