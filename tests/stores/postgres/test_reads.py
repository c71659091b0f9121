"""Queries of the tables: each result is of one instant, and a row becomes the token that was written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth.stores.postgres import reads, schema, writes
from freegpt_auth.tokens import SECRET_LENGTH, Token, digest_of, find, issue

if TYPE_CHECKING:
    from freegpt_auth.stores.postgres.connection import Connection

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
PLACE = "postgresql://db/tokens"


def _add(connection: Connection, *tokens: Token) -> list[bytes]:
    """Add tokens, whose digests are made of their ids."""
    digests = [digest_of(token.id) for token in tokens]
    for digest, token in zip(digests, tokens, strict=True):
        writes.insert(connection, digest, token)
    return digests


def _token(token_id: str, prefix: str = "sk-a1b2c3d4e5f", **others: Any) -> Token:
    return Token(**{"id": token_id, "name": "ci", "prefix": prefix, "created_at": NOW, **others})


FULL = _token("full", expires_at=NOW, revoked_at=NOW, scopes=("a", "b"), models=("gpt-4", ""), last_used_at=NOW)
NONE = _token("none", scopes=(), models=())
FAR = _token("far", created_at=datetime(1, 1, 1, tzinfo=UTC), expires_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
MANY = {digest_of(str(number)): _token(str(number)) for number in range(4_100)}
ODD = _token("ö", name="\N{GRINNING FACE}", prefix='{"', scopes=("{a,b}", 'c"', "NULL"), models=("\\", ""))


@pytest.mark.parametrize("token", [FULL, NONE, FAR, ODD], ids=lambda token: token.id)
def test_row_becomes_the_token_that_was_added(connection: Connection, token: Token) -> None:
    """Each way to read a token returns each field as it was added, and each instant in UTC."""
    [digest] = _add(connection, token)
    with connection.transaction():
        every = dict(reads.in_order(connection))
    read = [reads.look_up(connection, digest)[1], every[digest], reads.referred(connection, token.id)[digest]]
    read.append(next(reads.changes_since(connection, 1))[0].token)
    assert read == [token] * 4
    assert {getattr(read[0], name).tzinfo for name in reads.INSTANTS if getattr(read[0], name)} == {UTC}


def test_a_look_up_is_of_one_revision(connection: Connection) -> None:
    """A look-up returns the revision of its snapshot, for known and unknown tokens."""
    assert reads.look_up(connection, bytes(32)) == (0, None)
    [digest] = _add(connection, _token("one"))
    assert reads.look_up(connection, digest) == (1, _token("one"))
    writes.revoke(connection, "one", NOW)
    assert reads.look_up(connection, digest) == (2, _token("one", revoked_at=NOW))
    assert reads.look_up(connection, bytes(32)) == (2, None)
    assert reads.look_up(connection, b"") == (2, None)


def test_the_head_identifies_one_state(connection: Connection) -> None:
    """Each change has its own number and mark; the time is the database's; without tables the version is 0."""
    heads = [reads.head(connection)]
    for number in range(3):
        _add(connection, _token(str(number)))
        heads.append(reads.head(connection))
    assert [head.revision for head in heads] == [0, 1, 2, 3]
    assert len({head.mark for head in heads}) == 4
    assert {head.version for head in heads} == {schema.VERSION}
    assert heads[0].now <= heads[-1].now == pytest.approx(heads[0].now, abs=60)
    connection.run("DROP SCHEMA freegpt_auth CASCADE")
    assert reads.head(connection).version == 0


def test_log_has_changes_and_present_records(connection: Connection) -> None:
    """The log has each change with the token's present record, beginning with the known revision."""
    one, two, three = _add(connection, _token("one"), _token("two"), _token("three"))
    writes.revoke(connection, "one", NOW)
    writes.delete(connection, "two")
    [noted] = reads.changes_since(connection, 2)
    assert [(each.revision, each.digest) for each in noted] == [(2, two), (3, three), (4, one), (5, two)]
    assert [each.token for each in noted] == [None, _token("three"), _token("one", revoked_at=NOW), None]
    assert noted[-1].mark == reads.head(connection).mark
    connection.run("TRUNCATE freegpt_auth.tokens")
    assert list(reads.changes_since(connection, 6)) == [[reads.Change(6, b"", None, reads.head(connection).mark)]]
    assert list(reads.changes_since(connection, 7)) == [[]]


def test_many_changes_are_read_in_batches(connection: Connection) -> None:
    """A statement that changed thousands of tokens is in the log in full, and of the known revision one row is read."""
    with connection.transaction():
        writes.merge(connection, MANY)
    connection.run("UPDATE freegpt_auth.tokens SET name = 'x'")
    batches = list(reads.changes_since(connection, 1))
    assert max(map(len, batches)) <= 2_000
    assert {batch[0].revision for batch in batches} == {1}
    assert [each.revision for batch in batches for each in batch[1:]] == [2] * 4_100
    assert {each.digest for batch in batches for each in batch[1:]} == MANY.keys()
    assert {each.token.name for each in batches[-1] if each.token} == {"x"}


def test_a_large_table_is_read_in_batches(connection: Connection) -> None:
    """Each token is read once, oldest first, or the requested number of tokens."""
    with connection.transaction():
        writes.merge(connection, MANY)
        connection.run("UPDATE freegpt_auth.tokens SET name = name WHERE number = 1")  # moves the row
    with connection.transaction():
        batches = [len(batch) for batch in reads.every_token(connection)]
        assert sum(batches) == 4_100
        assert max(batches) <= 2_000
        assert sum(len(batch) for batch in reads.every_token(connection, limit=2_001)) == 2_001
        assert list(reads.every_token(connection, limit=0)) == []
        assert list(reads.in_order(connection).items()) == list(MANY.items())


def test_active_tokens_are_counted_by_database_time(connection: Connection) -> None:
    """Revoked and expired tokens are not counted, nor those that expire at this moment."""
    now = datetime.fromtimestamp(reads.head(connection).now, UTC)
    _add(connection, _token("for ever"), _token("revoked", revoked_at=NOW), _token("expired", expires_at=now))
    _add(connection, _token("lives", expires_at=now + timedelta(hours=1)))
    assert reads.count_active(connection) == 2


def test_a_reference_means_the_same_as_in_a_file(connection: Connection) -> None:
    """A secret, an id, a prefix, more than that, dots, or nonsense: the database is asked for neither more nor less."""
    issued = [issue(f"token {number}", now=NOW) for number in range(4)]
    tokens = {digest_of(secret): token for token, secret in issued}
    short = _token("short", prefix="sk-ab")
    named = _token(issued[0][0].prefix, prefix=short.id)  # whose id is another's prefix
    none = _token("blank", prefix="")
    tokens |= {digest_of("sk-abcdefghijklmno"): short, digest_of("named"): named, digest_of("x"): none}
    for digest, token in tokens.items():
        writes.insert(connection, digest, token)
    references = ["", "...", "…", "s", "sk-", "sk-abc", "sk-ab", "sk-abcdefghijklmno", "nobody", "x", "%", "\\", "'"]
    references += ["\0", "\udcff", "sk-\0", "a" * SECRET_LENGTH, "short…", "short...", "blank"]
    for digest, token in tokens.items():
        start = token.prefix
        references += [token.id, digest.hex(), start, f"{start}...", f"{start}x", start[:-1]]
    for _, secret in issued:
        start, more = secret[:14], secret[:20]
        references += [secret, secret[:-1], more, f"{more}...", start + "9" * 38, f"{secret[:15]}\0"]
    for reference in references:
        assert find(reference, reads.referred(connection, reference)) == find(reference, tokens), reference
    token, secret = issued[0]
    assert find(secret[:20], reads.referred(connection, secret[:20])) == [token]
