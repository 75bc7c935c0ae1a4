-- The log as Astrocyte's migration 023 creates it: where that has run, nothing here does anything.

CREATE TABLE IF NOT EXISTS {log} (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    action     text NOT NULL,
    transport  text NOT NULL,
    bank_id    text,
    started_at timestamptz NOT NULL DEFAULT now(),
    ended_at   timestamptz,
    request    jsonb,
    response   jsonb,
    metadata   jsonb NOT NULL DEFAULT '{{}}'::jsonb
);

CREATE INDEX IF NOT EXISTS {bank_started_idx} ON {log} (bank_id, started_at DESC);
CREATE INDEX IF NOT EXISTS {action_started_idx} ON {log} (action, started_at DESC);
CREATE INDEX IF NOT EXISTS {started_idx} ON {log} (started_at);
