"""Version 1 of the schema: tokens with their revision and its log of changes, usage, and a view of the servers."""

from __future__ import annotations

FIRST = """
CREATE SCHEMA freegpt_auth;

CREATE TABLE freegpt_auth.state (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    version integer NOT NULL,
    revision bigint NOT NULL,
    mark uuid NOT NULL
);

-- Dates that every client can represent. 'Never' is NULL, not infinity.
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
    digest bytea  -- null: too many tokens to log each; servers read the whole table
);
CREATE INDEX changes_revision ON freegpt_auth.changes (revision);

-- Separate from the tokens: this table is written all the time, and no such write can change a token. Half of each page
-- stays free for updates in place.
CREATE TABLE freegpt_auth.usage (
    token_id text PRIMARY KEY,
    use_count bigint NOT NULL,
    last_used_at freegpt_auth.instant NOT NULL
) WITH (fillfactor = 50);

-- The last batch of each process: a batch that is sent again is recognised by its number.
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

-- The connected server processes and the revision that each has read.
CREATE VIEW freegpt_auth.servers AS
    SELECT pid, a.usename AS role, a.client_addr, a.backend_start AS since, l.objid::bigint AS revision,
        s.revision - l.objid::bigint AS behind
    FROM pg_locks l JOIN pg_stat_activity a USING (pid) CROSS JOIN freegpt_auth.state s
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.classid = 1718773093 AND a.datname = current_database();

-- The only way for a server to write usage. It runs with the rights of the owner: the role of servers needs no rights
-- on the tables. Every argument is clamped: no server can damage the counts of another.
CREATE FUNCTION freegpt_auth.add_usage(
    by_process text, batch bigint, ids text[], counts bigint[], seconds_ago double precision[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO freegpt_auth.usage_batches AS known VALUES (by_process, batch, now())
        ON CONFLICT (process) DO UPDATE SET sequence = excluded.sequence, written_at = excluded.written_at
        WHERE known.sequence < excluded.sequence;
    IF NOT FOUND THEN  -- written before; its reply was lost
        RETURN;
    END IF;
    -- In order of ids: otherwise two processes could deadlock. Uses of deleted tokens are dropped.
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

-- Each role is granted the rights it needs (docs/guide/fleet.md); no right comes from a default. Trigger functions are
-- included: a role could attach one to its own table, and run its own code as the owner through a cast.
REVOKE ALL ON SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA freegpt_auth FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA freegpt_auth FROM PUBLIC;
"""
"""The statements that make version 1."""
