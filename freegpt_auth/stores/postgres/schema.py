"""The tables, and how they came to be: each migration brings a database from one version to the next.

Whatever changes a token, a command or an operator with ``psql``, a trigger raises the one revision in the same transaction
and notes whose token it was. The row of the revision stays locked until the end of the transaction, so revisions are
committed in their order: who has seen one has seen all before it. (With a sequence or a time of change, rows that are
committed late are missed.) Each revision has a mark of its own by which a database that has lost changes, and gone on
counting from there, is told from the one that was known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...exceptions import StoreError
from .schema_v2 import SECOND

if TYPE_CHECKING:
    from .connection import Connection

CHANNEL = "freegpt_auth"
"""Where each new revision is announced."""

_FIRST = """
CREATE SCHEMA freegpt_auth;

CREATE TABLE freegpt_auth.state (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    version integer NOT NULL,
    revision bigint NOT NULL,
    mark uuid NOT NULL
);

-- What every language can read. Never is no value: it is null.
CREATE DOMAIN freegpt_auth.instant AS timestamptz
    CHECK (VALUE >= '0001-01-01 00:00:00+00' AND VALUE < '10000-01-01 00:00:00+00');

CREATE TABLE freegpt_auth.tokens (
    digest bytea PRIMARY KEY CHECK (length(digest) = 32),
    id text NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 64),
    name text NOT NULL,
    prefix text NOT NULL,
    created_at freegpt_auth.instant NOT NULL,
    expires_at freegpt_auth.instant,
    revoked_at freegpt_auth.instant,
    scopes text[] NOT NULL DEFAULT '{}',
    models text[],
    last_used_at freegpt_auth.instant,
    number bigint GENERATED ALWAYS AS IDENTITY
);
CREATE INDEX tokens_prefix ON freegpt_auth.tokens (prefix text_pattern_ops);

CREATE TABLE freegpt_auth.changes (
    revision bigint NOT NULL,
    mark uuid NOT NULL,
    digest bytea  -- null: so many that memory is to be read afresh
);
CREATE INDEX changes_revision ON freegpt_auth.changes (revision);

-- Apart from the tokens: written all the time, and no write here can touch a token. Half of each page is left free, so
-- that a count is updated in place.
CREATE TABLE freegpt_auth.usage (
    token_id text PRIMARY KEY,
    use_count bigint NOT NULL,
    last_used_at freegpt_auth.instant NOT NULL
) WITH (fillfactor = 50);

-- The last batch of uses that each process has written, by which one that is sent again is known.
CREATE TABLE freegpt_auth.usage_batches (
    process text PRIMARY KEY,
    sequence bigint NOT NULL,
    written_at timestamptz NOT NULL
) WITH (fillfactor = 50);

WITH first AS (INSERT INTO freegpt_auth.state VALUES (true, 1, 0, gen_random_uuid()) RETURNING mark)
INSERT INTO freegpt_auth.changes SELECT 0, mark, NULL FROM first;

CREATE FUNCTION freegpt_auth.note_changes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_at freegpt_auth.state;
    digests bytea[];
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        digests := ARRAY[NULL];
    ELSIF TG_OP = 'INSERT' THEN
        digests := ARRAY(SELECT digest FROM new_rows LIMIT 1001);
    ELSIF TG_OP = 'DELETE' THEN
        digests := ARRAY(SELECT digest FROM old_rows LIMIT 1001);
    ELSE
        digests := ARRAY(SELECT digest FROM old_rows UNION SELECT digest FROM new_rows LIMIT 1001);
    END IF;
    IF cardinality(digests) = 0 THEN
        RETURN NULL;
    ELSIF cardinality(digests) > 1000 THEN
        digests := ARRAY[NULL];
    END IF;
    UPDATE freegpt_auth.state SET revision = revision + 1, mark = gen_random_uuid() RETURNING * INTO now_at;
    INSERT INTO freegpt_auth.changes SELECT now_at.revision, now_at.mark, unnest(digests);
    DELETE FROM freegpt_auth.changes WHERE revision < now_at.revision - 10000;
    PERFORM pg_notify('freegpt_auth', now_at.revision::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER note_insert AFTER INSERT ON freegpt_auth.tokens
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes();
CREATE TRIGGER note_update AFTER UPDATE ON freegpt_auth.tokens
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes();
CREATE TRIGGER note_delete AFTER DELETE ON freegpt_auth.tokens
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON freegpt_auth.tokens
    FOR EACH STATEMENT EXECUTE FUNCTION freegpt_auth.note_changes();

CREATE FUNCTION freegpt_auth.keep_revoked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'revoking cannot be undone: token % stays revoked', OLD.id;
END
$$;
CREATE TRIGGER keep_revoked BEFORE UPDATE ON freegpt_auth.tokens FOR EACH ROW
    WHEN (OLD.revoked_at IS DISTINCT FROM NEW.revoked_at AND OLD.revoked_at IS NOT NULL)
    EXECUTE FUNCTION freegpt_auth.keep_revoked();

-- The server processes that are connected, and what each has seen.
CREATE VIEW freegpt_auth.servers AS
    SELECT pid, a.usename AS role, a.client_addr, a.backend_start AS since, l.objid::bigint AS revision,
        s.revision - l.objid::bigint AS behind
    FROM pg_locks l JOIN pg_stat_activity a USING (pid) CROSS JOIN freegpt_auth.state s
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.classid = 1718773093 AND a.datname = current_database();

-- All that a server may write: with the rights of the owner, so that its own role needs none on the tables. Whatever
-- it is given can be read and added to: no server can spoil the counts of another.
CREATE FUNCTION freegpt_auth.add_usage(
    by_process text, batch bigint, ids text[], counts bigint[], seconds_ago double precision[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO freegpt_auth.usage_batches AS known VALUES (by_process, batch, now())
        ON CONFLICT (process) DO UPDATE SET sequence = excluded.sequence, written_at = excluded.written_at
        WHERE known.sequence < excluded.sequence;
    IF NOT FOUND THEN  -- it was written, and the answer did not arrive
        RETURN;
    END IF;
    -- In one order, or two processes could wait for each other. Of a token that was deleted meanwhile nothing is kept.
    INSERT INTO freegpt_auth.usage AS known
        SELECT token.id, use.count, now() - least(greatest(use.ago, 0), 1e9) * interval '1 second'
        FROM unnest(ids, counts, seconds_ago) AS use (token_id, count, ago)
        JOIN freegpt_auth.tokens AS token ON token.id = use.token_id
        WHERE use.count > 0
        ORDER BY token.id
        ON CONFLICT (token_id) DO UPDATE SET
            use_count = least(known.use_count::numeric + excluded.use_count, 9223372036854775807)::bigint,
            last_used_at = greatest(known.last_used_at, excluded.last_used_at);
    IF batch = 1 THEN
        DELETE FROM freegpt_auth.usage_batches WHERE written_at < now() - interval '30 days';
    END IF;
END
$$;

-- Each role is given what it needs (docs/postgresql.md), and nobody anything by a default. The functions of triggers are
-- not harmless: in a trigger on a table of its own, with a type and a cast of its own, a role could run its code as ours.
REVOKE ALL ON SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA freegpt_auth FROM PUBLIC;
"""

_MIGRATIONS = (_FIRST, SECOND)

VERSION = len(_MIGRATIONS)
"""The version of the schema that this release works with."""

_MIGRATING = 0x66726565  # one advisory lock, so that several that migrate do so in turn


def version_of(connection: Connection) -> int:
    """Return the version of the schema that is there; 0 if there is none."""
    if connection.one("SELECT to_regclass('freegpt_auth.state')")[0] is None:
        return 0
    return int(connection.one("SELECT version FROM freegpt_auth.state")[0])


def check(version: int, place: str) -> None:
    """Do nothing if this release works with that version.

    Raises:
        StoreError: it does not; the message says what to do.
    """
    if version == VERSION:
        return
    found = f"has version {version} of the schema" if version else "has no schema"
    if version > VERSION:
        raise StoreError(f"{place} {found}, and this release knows {VERSION}: upgrade freegpt_auth")
    raise StoreError(f"{place} {found}, and this release needs {VERSION}: run python -m freegpt_auth migrate")


def migrate(connection: Connection, place: str) -> tuple[int, int]:
    """Bring a database to this release's version of the schema; several may do so at once.

    Returns:
        The version it had, and the version it has.

    Raises:
        StoreError: its version is a later release's.
    """
    with connection.transaction():
        connection.run("SELECT pg_advisory_xact_lock(%s)", (_MIGRATING,))
        before = version_of(connection)
        if before > VERSION:
            check(before, place)
        for number, migration in enumerate(_MIGRATIONS[before:], start=before + 1):
            connection.script(migration)
            connection.run("UPDATE freegpt_auth.state SET version = %s", (number,))
    return before, VERSION
