"""Changes by commands: atomic, made once, and durable."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from freegpt_auth.stores.postgres import reads, writes
from freegpt_auth.tokens import Token, digest_of

if TYPE_CHECKING:
    from freegpt_auth.stores.postgres.connection import Connection

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


def _token(token_id: str, **others: Any) -> Token:
    return Token(**{"id": token_id, "name": "ci", "prefix": "sk-a1b2c3d4e5f", "created_at": NOW, **others})


def _tokens(*ids: str, **others: Any) -> dict[bytes, Token]:
    return {digest_of(each): _token(each, **others) for each in ids}


def _rows(connection: Connection) -> dict[bytes, Token]:
    with connection.transaction():
        return reads.in_order(connection)


def _merge(connection: Connection, tokens: dict[bytes, Token]) -> None:
    with connection.transaction():
        writes.merge(connection, tokens)


def test_a_token_is_revoked_once(connection: Connection) -> None:
    """The first instant of revocation stays, and a change of nothing raises no revision."""
    [(digest, token)] = _tokens("one").items()
    writes.insert(connection, digest, token)
    revoked = msgspec.structs.replace(token, revoked_at=NOW)
    assert writes.revoke(connection, "one", NOW) == writes.revoke(connection, "one", LATER) == revoked
    assert reads.head(connection).revision == 2
    assert writes.revoke(connection, "two", NOW) is None


def test_merge_adds_and_revokes(connection: Connection) -> None:
    """A known token keeps all but its revocation, and a merge is at most two changes: one adds, one revokes."""
    _merge(connection, _tokens("known", "bystander"))
    given = {**_tokens("new"), **_tokens("known", revoked_at=LATER, name="another name")}
    for _ in range(2):
        _merge(connection, given)
        assert _rows(connection) == {**_tokens("known", revoked_at=LATER), **_tokens("bystander", "new")}
        assert reads.head(connection).revision == 3


EARLY, LATE = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (EARLY, EARLY),
        (LATE, LATE),
        (EARLY.replace(tzinfo=timezone(timedelta(hours=5))), EARLY),
        (LATE.replace(tzinfo=timezone(timedelta(hours=-5))), LATE),
        (NOW.astimezone(timezone(timedelta(hours=5))), NOW),
    ],
)
def test_every_instant_has_a_place(connection: Connection, given: datetime, kept: datetime) -> None:
    """An instant that a token file may hold is kept; at the ends of the calendar, as near as there is one."""
    instants = dict.fromkeys(("created_at", "expires_at", "revoked_at", "last_used_at"), given)
    one, two = _tokens("one", "two", **instants).items()
    writes.insert(connection, *one)
    _merge(connection, dict([two]))
    for token in _rows(connection).values():
        assert {token.created_at, token.expires_at, token.revoked_at, token.last_used_at} == {kept}


@pytest.mark.parametrize(
    ("before", "within"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_a_change_is_as_durable_as_was_promised(connection: Connection, before: str, within: str) -> None:
    """With any defaults of a database, a command's change is on disk and on its standbys when it returns."""
    show = "SELECT current_setting('synchronous_commit')"
    connection.run(f"SET synchronous_commit TO {before}")
    with connection.transaction():
        connection.run(writes.DURABLE)
        assert connection.one(show) == (within,)
    assert connection.one(show) == (before,)


def test_unchanged_command_waits_for_the_standby(connection: Connection) -> None:
    """A second revocation writes a message, so that it waits for the standbys, and with it for the first one."""
    _merge(connection, _tokens("one", revoked_at=NOW))
    written = "SELECT pg_current_wal_insert_lsn()"
    with connection.transaction():
        writes.revoke(connection, "one", NOW)
        assert connection.one("SELECT pg_current_xact_id_if_assigned()") == (None,)
        before = connection.one(written)
        connection.run(writes.DURABLE)
        assert connection.one(written) != before
        assert connection.one("SELECT pg_current_xact_id_if_assigned()") != (None,)
