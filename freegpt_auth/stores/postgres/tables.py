"""What is asked of the tables, and how a row becomes a token."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from ...tokens import PREFIX_LENGTH, SECRET_LENGTH, Token, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from .links import Link, Row

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
"""What a row of the tokens says."""

RECORD = ", ".join(f"t.{column}" for column in COLUMNS)
"""The same as the columns of a table called t: what :func:`token_of` takes."""

_ROWS = 500  # a batch of so many takes 2 ms to become tokens

_HEAD = "SELECT version, revision, mark::text, extract(epoch FROM clock_timestamp())::float8 FROM freegpt_auth.state"
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
        version: of the schema.
        revision: raised with every change.
        mark: what tells this revision from another of the same number.
        now: its clock, in seconds since the epoch.
    """

    version: int
    revision: int
    mark: str
    now: float


class Noted(NamedTuple):
    """One row of the log of changes.

    Attributes:
        revision: what it raised the revision to.
        mark: of that revision.
        digest: whose token was changed; ``None`` for so many that all are to be read again.
        token: the token now.
    """

    revision: int
    mark: str
    digest: bytes | None
    token: Token | None


def head(link: Link) -> Head:
    """Return the state of the database; of version 0 if it has no tables."""
    try:
        return Head(*link.one(_HEAD))
    except psycopg.errors.UndefinedTable:
        return Head(0, 0, "", 0.0)


def changes_since(link: Link, known: int) -> Iterator[list[Noted]]:
    """Yield the changes after a revision in batches, oldest first, each behind one row of the known revision.

    Each batch is one statement, and there is at least one. Without a row of the known revision a batch begins with a later
    one, or is empty: the log begins later, or the database has lost that revision.
    """
    revision, digest, is_full = known, None, True
    while is_full:
        rows = link.run(_CHANGES, {"known": known, "revision": revision, "digest": digest})
        yield [Noted(row[0], row[1], row[2], token_of(row[3:])) for row in rows]
        is_full = len(rows) > _ROWS
        if is_full:
            revision, _, digest = rows[-1][:3]


def look_up(link: Link, digest: bytes) -> tuple[int, Token | None]:
    """Return a revision, and the token with this digest as it was then."""
    row = link.one(_LOOK_UP, (digest,))
    return row[0], token_of(row[1:])


def every_token(link: Link, limit: int | None = None, order: str = "") -> Iterator[list[tuple[bytes, Token]]]:
    """Yield the tokens in batches; in a transaction."""
    bound = f" LIMIT {limit}" if limit is not None else ""
    for rows in link.batches(f"{_ALL}{order}{bound}", _ROWS):
        yield [(row[0], token) for row in rows if (token := token_of(row)) is not None]


def in_order(link: Link) -> dict[bytes, Token]:
    """Return every token by its digest, oldest first; in a transaction."""
    return {digest: token for batch in every_token(link, order=" ORDER BY t.number") for digest, token in batch}


def count_active(link: Link) -> int:
    """Count the tokens that work now; of more than a million, a million."""
    return int(link.one(_ACTIVE)[0])


def referred(link: Link, reference: str) -> dict[bytes, Token]:
    """Return the tokens among which :func:`~freegpt_auth.tokens.find` finds what *reference* means."""
    # What PostgreSQL knows no text for is part of no token.
    bare = reference.rstrip(".…").encode(errors="replace").decode().replace("\0", "?")
    where = " WHERE t.digest = %s OR t.id = %s OR t.prefix = %s OR (length(t.prefix) = %s AND t.prefix = %s)"
    start = bare[:PREFIX_LENGTH] if len(bare) < SECRET_LENGTH else ""
    values = (digest_of(reference), bare, bare, PREFIX_LENGTH, start)
    rows = link.run(f"{_ALL}{where} ORDER BY t.number", values)
    return {row[0]: token for row in rows if (token := token_of(row)) is not None}


def end_if_idle(link: Link, seconds: float) -> None:
    """Let the database end this connection when nothing was asked for so long, even if it hears of no disconnection."""
    link.run("SELECT set_config('idle_session_timeout', %s, false)", (f"{seconds * 1000:.0f}ms",))


def processes_behind(link: Link, revision: int) -> Row:
    """Return the number of processes that rely on a state before *revision*, and the seconds until none of them does."""
    return link.one(_BEHIND, (revision,))


def token_of(row: Row) -> Token | None:
    """Return the token that a row tells of; ``None`` if it tells of none."""
    _, token_id, name, prefix, created_at, expires_at, revoked_at, scopes, models, last_used_at = row
    if token_id is None:
        return None
    return Token(
        id=token_id,
        name=name,
        prefix=prefix,
        created_at=created_at.astimezone(UTC),
        expires_at=_utc(expires_at),
        revoked_at=_utc(revoked_at),
        scopes=tuple(scopes),
        models=None if models is None else tuple(models),
        last_used_at=_utc(last_used_at),
    )


def _utc(instant: datetime | None) -> datetime | None:
    return None if instant is None else instant.astimezone(UTC)
