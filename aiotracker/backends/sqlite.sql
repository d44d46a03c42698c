-- Statements of the SQLite tracker. Each has a name and a line of purpose.
-- Many rows are asked for, and given, as one JSON array: a thread that steps through rows gives up the interpreter with
-- each of them, and gets it back only when the event loop has nothing to do.

-- schema: what a new database holds; its version stands in user_version
CREATE TABLE task (
    seq INTEGER PRIMARY KEY, -- in the order in which tasks were made
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    status TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    create_time TEXT NOT NULL, -- all times are in UTC, as SQLite's date functions write them
    update_time TEXT NOT NULL,
    start_time TEXT,
    finish_time TEXT,
    not_before TEXT,
    lease_expires_at TEXT,
    worker TEXT, -- who holds it or, if nobody does, whose attempt failed last
    error_type TEXT, -- of the latest error
    fingerprint TEXT, -- of the latest error
    last_outcome TEXT,
    step TEXT, -- at which it stands
    write_id TEXT NOT NULL, -- the version
    record TEXT NOT NULL, -- JSON, which alone counts
    UNIQUE (id, namespace)
);
-- Each index costs all writes of what it holds: so most hold only rows that have something to be found by. The namespace
-- comes last, so that people need not name it.
CREATE INDEX task_status ON task (status, namespace);
CREATE INDEX task_ready ON task (namespace, priority DESC)
    WHERE not_before IS NULL AND status IN ('pending', 'failed');
CREATE INDEX task_not_before ON task (namespace, not_before)
    WHERE not_before IS NOT NULL AND status IN ('pending', 'failed');
CREATE INDEX task_lease_expires_at ON task (lease_expires_at, namespace) WHERE lease_expires_at IS NOT NULL;
CREATE INDEX task_create_time ON task (create_time, namespace);
CREATE INDEX task_update_time ON task (update_time, namespace);
CREATE INDEX task_finish_time ON task (finish_time, namespace) WHERE finish_time IS NOT NULL;
CREATE INDEX task_attempts ON task (attempts, namespace) WHERE attempts > 1;
CREATE INDEX task_worker ON task (worker, namespace, status) WHERE worker IS NOT NULL;
CREATE INDEX task_error_type ON task (error_type, namespace, status) WHERE error_type IS NOT NULL;
CREATE INDEX task_fingerprint ON task (fingerprint, namespace, status) WHERE fingerprint IS NOT NULL;
CREATE INDEX task_last_outcome ON task (last_outcome, namespace, status) WHERE last_outcome IS NOT NULL;
CREATE INDEX task_step ON task (step, namespace, status) WHERE step IS NOT NULL;
CREATE VIEW tasks AS
SELECT
    namespace, id, status, attempts, priority,
    create_time, update_time, start_time, finish_time, not_before, lease_expires_at,
    worker, error_type,
    json_extract(record, '$.errors[#-1].message') AS error_message,
    fingerprint, last_outcome, step,
    json_extract(record, '$.data') AS data,
    json_extract(record, '$.result') AS result,
    record
FROM task;

-- versions: which of these ids are stored, and in which version
SELECT json_group_object(id, write_id) FROM task
WHERE namespace = ? AND id IN (SELECT value FROM json_each(?));

-- records: the records of these ids; a separator that is in no JSON is between them
SELECT json_group_array(id), group_concat(record, char(30)) FROM task
WHERE namespace = ? AND id IN (SELECT value FROM json_each(?));

-- records_at: the records of these numbers
SELECT json_group_array(seq), group_concat(record, char(30)) FROM task
WHERE namespace = ? AND seq IN (SELECT value FROM json_each(?));

-- delete: removes these ids
DELETE FROM task WHERE namespace = ? AND id IN (SELECT value FROM json_each(?));

-- claimable: the numbers of tasks that may be worth a claim, best first
-- Of those that have just become due, the first ones are looked at: no index has them by priority.
SELECT json_group_array(seq) FROM (
    SELECT seq FROM (
        SELECT * FROM (
            SELECT seq, priority FROM task
            WHERE namespace = :namespace AND not_before IS NULL AND status IN ('pending', 'failed')
            ORDER BY priority DESC, seq LIMIT :limit
        )
        UNION ALL
        SELECT * FROM (
            SELECT seq, priority FROM task
            WHERE namespace = :namespace AND not_before <= :now AND status IN ('pending', 'failed')
            ORDER BY not_before LIMIT 10 * :limit
        )
        UNION ALL
        SELECT * FROM (
            SELECT seq, priority FROM task
            WHERE namespace = :namespace AND lease_expires_at <= :now
            ORDER BY lease_expires_at LIMIT 10 * :limit
        )
    )
    ORDER BY priority DESC, seq LIMIT :limit
);

-- next_due: when the next task becomes claimable that is not yet
SELECT min(due) FROM (
    SELECT min(not_before) AS due FROM task
    WHERE namespace = :namespace AND not_before > :now AND status IN ('pending', 'failed')
    UNION ALL
    SELECT min(lease_expires_at) FROM task WHERE namespace = :namespace AND lease_expires_at > :now
);
