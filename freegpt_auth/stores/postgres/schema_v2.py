"""Version 2 of the schema: a row for each server process, and a log of changes that holds large changes in full."""

from __future__ import annotations

SECOND = """
-- One row for each server process, with the end of its reliance on its cache, by this database's clock. A process
-- extends the row before it relies on it, so a process that lost its connection is still counted. Half of each page
-- stays free for updates in place.
CREATE TABLE freegpt_auth.processes (
    process text PRIMARY KEY CHECK (length(process) BETWEEN 1 AND 64),  -- random: unguessable for other processes
    pid integer NOT NULL,  -- session that wrote the row last
    role name NOT NULL,
    client_addr inet,
    since timestamptz NOT NULL,
    lease interval NOT NULL,
    revision bigint NOT NULL,  -- -1: nothing was read yet
    relies_until timestamptz NOT NULL,
    server timestamptz NOT NULL  -- start of the PostgreSQL server that wrote the row
) WITH (fillfactor = 50);

-- After a restart or a failover the rows may lack their last extension: an asynchronous standby had not received it, or
-- the clock of another host is ahead. A process that relies on the previous server stops at most one lease after that
-- server ended, so a lease from now covers it.
CREATE FUNCTION freegpt_auth.adopt_processes() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    UPDATE freegpt_auth.processes
        SET server = pg_postmaster_start_time(), revision = -1, relies_until = clock_timestamp() + lease
        WHERE process IN (
            SELECT process FROM freegpt_auth.processes WHERE server <> pg_postmaster_start_time() FOR UPDATE SKIP LOCKED
        )
$$;

-- An extension must survive a crash, so its commit waits for the disk. It does not wait for a standby: the absence of a
-- standby must not close a server. A lost revision is harmless: the process then counts as behind.
CREATE FUNCTION freegpt_auth.show_process(of_process text, seconds double precision, seen bigint, extend boolean)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT extend THEN
        UPDATE freegpt_auth.processes SET revision = seen
            WHERE process = of_process AND server = pg_postmaster_start_time();
        IF FOUND THEN
            PERFORM set_config('synchronous_commit', 'off', true);
            RETURN;
        END IF;
    END IF;
    PERFORM set_config('synchronous_commit', 'local', true);
    INSERT INTO freegpt_auth.processes AS known
        SELECT of_process, pg_backend_pid(), session_user, inet_client_addr(), now(), term, seen,
            clock_timestamp() + term, pg_postmaster_start_time()
        FROM (SELECT least(greatest(seconds, 0), 1e9) * interval '1 second') AS given (term)
        ON CONFLICT (process) DO UPDATE SET
            pid = excluded.pid, client_addr = excluded.client_addr, lease = excluded.lease,
            revision = excluded.revision, relies_until = excluded.relies_until, server = excluded.server;
    IF seen < 0 THEN
        PERFORM freegpt_auth.adopt_processes();
        DELETE FROM freegpt_auth.processes WHERE process IN (
            SELECT process FROM freegpt_auth.processes
                WHERE relies_until < clock_timestamp() AND server = pg_postmaster_start_time() FOR UPDATE SKIP LOCKED
        );
    END IF;
END
$$;

CREATE FUNCTION freegpt_auth.withdraw_process(of_process text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT set_config('synchronous_commit', 'off', true);
    DELETE FROM freegpt_auth.processes WHERE process = of_process
$$;

-- For commands: the processes that rely on a state before a revision, and the seconds until the last of them ends.
CREATE FUNCTION freegpt_auth.processes_behind(of_revision bigint, OUT processes bigint, OUT seconds bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM freegpt_auth.adopt_processes();
    SELECT count(*), greatest(1, ceil(extract(epoch FROM max(relies_until) - clock_timestamp())))
        INTO processes, seconds
        FROM (
            -- A row that another command is adopting is still visible in its old state.
            SELECT CASE WHEN server = pg_postmaster_start_time() THEN revision ELSE -1 END AS revision,
                CASE WHEN server = pg_postmaster_start_time() THEN relies_until ELSE clock_timestamp() + lease END
                    AS relies_until
            FROM freegpt_auth.processes
        ) AS known
        WHERE revision < of_revision AND relies_until > clock_timestamp();
END
$$;

CREATE OR REPLACE VIEW freegpt_auth.servers AS
    SELECT p.pid, p.role, p.client_addr, p.since, p.revision, s.revision - p.revision AS behind, p.lease, p.relies_until
    FROM freegpt_auth.processes p CROSS JOIN freegpt_auth.state s WHERE p.relies_until > clock_timestamp();

-- A statement that changes up to 100,000 tokens is logged in full; servers apply the log in steps. Above that they read
-- the whole table. After a large change fewer earlier revisions are kept, to bound the log.
DROP INDEX freegpt_auth.changes_revision;
CREATE INDEX changes_revision ON freegpt_auth.changes (revision, digest);
CREATE OR REPLACE FUNCTION freegpt_auth.note_changes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_at freegpt_auth.state;
    digests bytea[];
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        digests := ARRAY[NULL];
    ELSIF TG_OP = 'INSERT' THEN
        digests := ARRAY(SELECT digest FROM new_rows LIMIT 100001);
    ELSIF TG_OP = 'DELETE' THEN
        digests := ARRAY(SELECT digest FROM old_rows LIMIT 100001);
    ELSE
        digests := ARRAY(SELECT digest FROM old_rows UNION SELECT digest FROM new_rows LIMIT 100001);
    END IF;
    IF cardinality(digests) = 0 THEN
        RETURN NULL;
    ELSIF cardinality(digests) > 100000 THEN
        digests := ARRAY[NULL];
    END IF;
    UPDATE freegpt_auth.state SET revision = revision + 1, mark = gen_random_uuid() RETURNING * INTO now_at;
    INSERT INTO freegpt_auth.changes SELECT now_at.revision, now_at.mark, unnest(digests);
    DELETE FROM freegpt_auth.changes
        WHERE revision < now_at.revision - CASE WHEN cardinality(digests) > 1000 THEN 10 ELSE 10000 END;
    PERFORM pg_notify('freegpt_auth', now_at.revision::text);
    RETURN NULL;
END
$$;

REVOKE ALL ON freegpt_auth.processes FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA freegpt_auth FROM PUBLIC;

-- Roles of version 1: a role that may add usage may also write a process row; a role that may list servers may wait.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT 'show_process, freegpt_auth.withdraw_process' AS functions, a.grantee::regrole AS role
            FROM pg_proc p, aclexplode(p.proacl) a
            WHERE p.oid = 'freegpt_auth.add_usage'::regproc AND a.grantee NOT IN (0, p.proowner)
        UNION SELECT 'processes_behind', a.grantee::regrole
            FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.oid = 'freegpt_auth.servers'::regclass AND a.grantee NOT IN (0, c.relowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION freegpt_auth.%s TO %s', granted.functions, granted.role);
    END LOOP;
END
$$;
"""
"""The statements that bring version 1 to version 2."""
