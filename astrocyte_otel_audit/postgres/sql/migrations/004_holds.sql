-- Legal holds: rows that outlive every retention policy. A hold is released and not deleted, so that it can be told
-- who kept what, from when to when, and why.

CREATE TABLE IF NOT EXISTS {holds} (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    bank_id     text,
    actor_id    text,
    trace_id    text,
    reason      text NOT NULL,
    held_by     text NOT NULL DEFAULT session_user,
    held_at     timestamptz NOT NULL DEFAULT now(),
    released_by text,
    released_at timestamptz,
    CHECK (num_nonnulls(bank_id, actor_id, trace_id) > 0)
);
