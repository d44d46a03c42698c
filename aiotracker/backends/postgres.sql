-- Statements of the PostgreSQL tracker. Each has a name and a line of purpose. {schema} stands for the quoted name.

-- schema: what a new database holds
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE {schema}.store (
    format integer NOT NULL -- which release may use this
);
INSERT INTO {schema}.store VALUES (1);
CREATE TABLE {schema}.task (
    namespace text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    status text NOT NULL,
    attempts bigint NOT NULL,
    priority bigint NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    start_time timestamptz,
    finish_time timestamptz,
    not_before timestamptz,
    lease_expires_at timestamptz,
    worker text COLLATE "C", -- who holds it or, if nobody does, whose attempt failed last
    error_type text COLLATE "C", -- of the latest error
    fingerprint text COLLATE "C", -- of the latest error
    last_outcome text COLLATE "C",
    step text COLLATE "C", -- at which it stands
    write_id text COLLATE "C" NOT NULL, -- the version
    expected text COLLATE "C", -- the version that a write replaces; NULL in every row, since only new rows take it
    record json NOT NULL, -- alone counts
    PRIMARY KEY (namespace, id)
);
CREATE INDEX task_status ON {schema}.task (namespace, status, id);
CREATE INDEX task_ready ON {schema}.task (namespace, priority DESC, create_time, id)
    WHERE not_before IS NULL AND status IN ('pending', 'failed');
CREATE INDEX task_not_before ON {schema}.task (namespace, not_before)
    WHERE not_before IS NOT NULL AND status IN ('pending', 'failed');
CREATE INDEX task_lease_expires_at ON {schema}.task (namespace, lease_expires_at) WHERE lease_expires_at IS NOT NULL;
CREATE INDEX task_create_time ON {schema}.task (namespace, create_time);
CREATE INDEX task_update_time ON {schema}.task (namespace, update_time);
CREATE INDEX task_finish_time ON {schema}.task (namespace, finish_time) WHERE finish_time IS NOT NULL;
CREATE INDEX task_attempts ON {schema}.task (namespace, attempts) WHERE attempts > 1;
CREATE INDEX task_worker ON {schema}.task (namespace, worker, id) INCLUDE (status) WHERE worker IS NOT NULL;
CREATE INDEX task_error_type ON {schema}.task (namespace, error_type, id) INCLUDE (status)
    WHERE error_type IS NOT NULL;
CREATE INDEX task_fingerprint ON {schema}.task (namespace, fingerprint, id) INCLUDE (status)
    WHERE fingerprint IS NOT NULL;
CREATE INDEX task_last_outcome ON {schema}.task (namespace, last_outcome, id) INCLUDE (status)
    WHERE last_outcome IS NOT NULL;
CREATE INDEX task_step ON {schema}.task (namespace, step, id) INCLUDE (status) WHERE step IS NOT NULL;
-- The second source makes the view read-only, and costs nothing.
CREATE VIEW {schema}.tasks AS
SELECT
    namespace, id, status, attempts, priority,
    create_time, update_time, start_time, finish_time, not_before, lease_expires_at,
    worker, error_type, record -> 'errors' -> -1 ->> 'message' AS error_message, fingerprint, last_outcome, step,
    record -> 'data' AS data, record -> 'result' AS result, record
FROM {schema}.task, (VALUES (1)) AS read_only;

-- facts: what a connection must know of the server
SELECT
    pg_backend_pid() AS pid,
    current_setting('server_version_num')::int AS version,
    current_setting('server_encoding') AS encoding,
    pg_is_in_recovery() AS is_replica,
    current_setting('transaction_read_only') = 'on' AS is_read_only,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('fsync') AS fsync,
    current_database() AS database;

-- format: which release may use this
SELECT format FROM {schema}.store;

-- time: the server's clock
SELECT clock_timestamp();

-- read: the records of these ids
SELECT id, write_id, record FROM {schema}.task WHERE namespace = $1 AND id = ANY($2::text[]);

-- versions: which of these ids are stored, and in which version
SELECT id, write_id FROM {schema}.task WHERE namespace = $1 AND id = ANY($2::text[]);

-- status: how a transaction ended
SELECT pg_xact_status($1::text::xid8);

-- write: guarded writes, in the order of ids, so that no two transactions wait for each other
-- A row that should have been there, but was new (it has been deleted since), is told as revived.
WITH written AS (
    INSERT INTO {schema}.task AS old (
        namespace, id, status, attempts, priority, create_time, update_time, start_time, finish_time,
        lease_expires_at, worker, write_id, record, not_before, error_type, fingerprint, last_outcome, step, expected
    )
    SELECT $1::text, * FROM unnest(
        $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::timestamptz[],
        $9::timestamptz[], $10::timestamptz[], $11::text[], $12::text[], $13::json[], $14::timestamptz[], $15::text[],
        $16::text[], $17::text[], $18::text[], $19::text[]
    ) AS new (id) ORDER BY new.id COLLATE "C"
    ON CONFLICT (namespace, id) DO UPDATE SET
        status = excluded.status,
        attempts = excluded.attempts,
        priority = excluded.priority,
        create_time = excluded.create_time,
        update_time = excluded.update_time,
        start_time = excluded.start_time,
        finish_time = excluded.finish_time,
        not_before = excluded.not_before,
        lease_expires_at = excluded.lease_expires_at,
        worker = excluded.worker,
        error_type = excluded.error_type,
        fingerprint = excluded.fingerprint,
        last_outcome = excluded.last_outcome,
        step = excluded.step,
        write_id = excluded.write_id,
        record = excluded.record
    WHERE old.write_id = excluded.expected
    RETURNING id, expected
)
SELECT
    pg_current_xact_id()::text AS xid,
    coalesce(array_agg(id), '{}') AS ids,
    coalesce(array_agg(id) FILTER (WHERE expected IS NOT NULL), '{}') AS revived
FROM written;

-- delete: guarded, in the order of ids
WITH doomed AS (
    SELECT task.id FROM {schema}.task JOIN unnest($2::text[], $3::text[]) AS wanted (id, expected)
        ON task.id = wanted.id AND task.write_id = wanted.expected
    WHERE task.namespace = $1 ORDER BY task.id FOR UPDATE OF task
), gone AS (
    DELETE FROM {schema}.task USING doomed WHERE task.namespace = $1 AND task.id = doomed.id RETURNING task.id
)
SELECT pg_current_xact_id()::text AS xid, coalesce(array_agg(id), '{}') AS ids, '{}'::text[] AS revived FROM gone;

-- claimable: tasks that may be worth a claim, best first
-- Those on which somebody is writing at this moment are passed over. Of those that have just become due, the first ones
-- are looked at: no index has them by priority.
SELECT id, write_id, record FROM (
    SELECT * FROM (
        SELECT id, write_id, record, priority, create_time FROM {schema}.task
        WHERE namespace = $1 AND not_before IS NULL AND status IN ('pending', 'failed')
        ORDER BY priority DESC, create_time, id LIMIT $3 FOR UPDATE SKIP LOCKED
    ) AS ready
    UNION ALL
    SELECT * FROM (
        SELECT id, write_id, record, priority, create_time FROM {schema}.task
        WHERE namespace = $1 AND not_before <= $2 AND status IN ('pending', 'failed')
        ORDER BY not_before LIMIT $3 FOR UPDATE SKIP LOCKED
    ) AS due
    UNION ALL
    SELECT * FROM (
        SELECT id, write_id, record, priority, create_time FROM {schema}.task
        WHERE namespace = $1 AND lease_expires_at <= $2
        ORDER BY lease_expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
    ) AS expired
) AS found
ORDER BY priority DESC, create_time, id LIMIT $3;

-- next_due: when the next task becomes claimable that is not yet, and whether any task is not final
SELECT
    least(
        (
            SELECT min(not_before) FROM {schema}.task
            WHERE namespace = $1 AND not_before > $2 AND status IN ('pending', 'failed')
        ),
        (SELECT min(lease_expires_at) FROM {schema}.task WHERE namespace = $1 AND lease_expires_at > $2)
    ) AS due,
    EXISTS (
        SELECT FROM {schema}.task WHERE namespace = $1 AND status IN ('pending', 'failed', 'in_progress')
    ) AS is_work_left;
