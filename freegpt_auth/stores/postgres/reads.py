"""Queries of the tables, and the decoding of a row into a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import psycopg

from ...exceptions import StoreError
from ...tokens import Reference, Token
from .instants import instant_of, microseconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .connection import Connection
    from .timed_connection import Row

COLUMNS = (
    "digest",
    "id",
    "name",
    "prefix",
    "created_at",
    "expires_at",
    "revoked_at",
    "scopes",
    "models",
    "last_used_at",
)
"""The columns of a token."""

INSTANTS = frozenset({"created_at", "expires_at", "revoked_at", "last_used_at"})
"""The columns that hold an instant."""

RECORD = ", ".join(microseconds(f"t.{column}") if column in INSTANTS else f"t.{column}" for column in COLUMNS)
"""The columns of the table ``t`` for :func:`token_of`: each instant as an integer."""

_ROWS = 500  # rows of a batch: decoding them takes 2 ms

_HEAD = f"SELECT version, revision, mark::text, {microseconds('clock_timestamp()')} FROM freegpt_auth.state"
_CHANGES = f"""
    SELECT c.revision, c.mark::text, c.digest, {RECORD}
    FROM (
        (SELECT revision, mark, digest FROM freegpt_auth.changes WHERE revision = %(known)s LIMIT 1)
        UNION ALL (
            SELECT revision, mark, digest FROM freegpt_auth.changes
            WHERE (revision, digest) > (%(revision)s, %(digest)s::bytea) ORDER BY revision, digest LIMIT {_ROWS}
        )
    ) c LEFT JOIN freegpt_auth.tokens t ON t.digest = c.digest
    ORDER BY c.revision, c.digest
"""
_BEHIND = "SELECT processes, seconds FROM freegpt_auth.processes_behind(%s)"
_LOOK_UP = f"SELECT s.revision, {RECORD} FROM freegpt_auth.state s LEFT JOIN freegpt_auth.tokens t ON t.digest = %s"
_ALL = f"SELECT {RECORD} FROM freegpt_auth.tokens t"
_ACTIVE = """
    SELECT count(*) FROM (
        SELECT FROM freegpt_auth.tokens
            WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()) LIMIT 1000000
    ) AS active
"""


class Head(NamedTuple):
    """The state of a database.

    Attributes:
        version: version of the schema; 0 without tables.
        revision: number that each change raises.
        mark: random id of this revision. After lost changes another revision may have the same number.
        now: the database's time, in seconds since the epoch.
    """

    version: int
    revision: int
    mark: str
    now: float


class Change(NamedTuple):
    """One row of the log of changes, with the present state of its token.

    Attributes:
        revision: revision that the change made.
        digest: digest of the changed token; empty if one statement changed too many tokens to log each.
        token: present record; ``None`` if the token was deleted.
        mark: mark of the revision; see :class:`Head`.
    """

    revision: int
    digest: bytes
    token: Token | None
    mark: str = ""


def head(connection: Connection) -> Head:
    """Return the state of the database."""
    try:
        version, revision, mark, now = connection.one(_HEAD)
    except psycopg.errors.UndefinedTable:
        return Head(0, 0, "", 0.0)
    return Head(version, revision, mark, now / 1_000_000)


def changes_since(connection: Connection, known: int) -> Iterator[list[Change]]:
    """Yield the changes after the revision *known* in batches, oldest first. At least one batch is yielded.

    Each batch is the result of one statement and begins with a row of the known revision. If it begins with a later
    revision, the log was trimmed. If it is empty, or begins with another mark of the known revision, the database has
    lost that revision.
    """
    revision, digest, is_full = known, None, True
    while is_full:
        rows = connection.run(_CHANGES, {"known": known, "revision": revision, "digest": digest})
        yield [Change(row[0], row[2] or b"", token_of(row[3:]), row[1]) for row in rows]
        is_full = len(rows) > _ROWS
        if is_full:
            revision, _, digest = rows[-1][:3]


def look_up(connection: Connection, digest: bytes) -> tuple[int, Token | None]:
    """Return the present revision, and the token with this digest at that revision."""
    row = connection.one(_LOOK_UP, (digest,))
    return row[0], token_of(row[1:])


def every_token(
    connection: Connection, limit: int | None = None, order: str = ""
) -> Iterator[list[tuple[bytes, Token]]]:
    """Yield the tokens in batches. Call it in a transaction."""
    bound = f" LIMIT {limit}" if limit is not None else ""
    for rows in connection.batches(f"{_ALL}{order}{bound}", _ROWS):
        yield [(row[0], token) for row in rows if (token := token_of(row)) is not None]


def in_order(connection: Connection) -> dict[bytes, Token]:
    """Return every token by its digest, oldest first. Call it in a transaction."""
    return {digest: token for batch in every_token(connection, order=" ORDER BY t.number") for digest, token in batch}


def count_active(connection: Connection) -> int:
    """Count the active tokens, up to a million."""
    return int(connection.one(_ACTIVE)[0])


def referred(connection: Connection, reference: str) -> dict[bytes, Token]:
    """Return a superset of the tokens that :func:`~freegpt_auth.tokens.find` matches with *reference*."""
    wanted = Reference.read(reference)
    where = " WHERE t.digest = %s OR %s IN (t.id, t.prefix) OR t.name = %s OR t.prefix = %s"
    values = (wanted.digest, _as_text(wanted.exact), _as_text(wanted.name), _as_text(wanted.start))
    rows = connection.run(f"{_ALL}{where} ORDER BY t.number", values)
    return {row[0]: token for row in rows if (token := token_of(row)) is not None}


def end_if_idle(connection: Connection, seconds: float) -> None:
    """Have the database end this session after *seconds* without a statement: it may never notice a lost network."""
    connection.run("SELECT set_config('idle_session_timeout', %s, false)", (f"{seconds * 1000:.0f}ms",))


def processes_behind(connection: Connection, revision: int) -> Row:
    """Return the number of processes that rely on an earlier state, and the seconds until the last of them ends."""
    return connection.one(_BEHIND, (revision,))


def token_of(row: Row) -> Token | None:
    """Return the token of a row; ``None`` for the empty row of an outer join.

    Raises:
        StoreError: the row is no valid token: the table's checks were removed, or a list holds a null.
    """
    _, token_id, name, prefix, created_at, expires_at, revoked_at, scopes, models, last_used_at = row
    if token_id is None:
        return None
    try:
        return Token(
            id=token_id,
            name=name,
            prefix=prefix,
            created_at=instant_of(created_at),
            expires_at=None if expires_at is None else instant_of(expires_at),
            revoked_at=None if revoked_at is None else instant_of(revoked_at),
            scopes=_texts(scopes),
            models=None if models is None else _texts(models),
            last_used_at=None if last_used_at is None else instant_of(last_used_at),
        )
    except (TypeError, OverflowError):
        raise StoreError(
            f"the row of the token with the id {token_id} cannot be used: no instant may be outside the years 1 to "
            "9999, and scopes and models must be lists of texts without nulls; correct the row with psql"
        ) from None


def _texts(values: list[str]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError
    return tuple(values)


def _as_text(text: str | None) -> str | None:
    """Replace characters that a PostgreSQL text cannot hold. No token has any."""
    return None if text is None else text.encode(errors="replace").decode().replace("\0", "?")
