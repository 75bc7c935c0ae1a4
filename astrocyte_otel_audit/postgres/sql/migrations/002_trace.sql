-- What ties a row to its outcome, its actor and its trace. Every column is nullable or has a default, so
-- Astrocyte's own writer keeps working, and adding them rewrites no row: rows that are already there read as
-- recorded at the moment of the upgrade.

ALTER TABLE {log}
    ADD COLUMN IF NOT EXISTS outcome        text,
    ADD COLUMN IF NOT EXISTS error_type     text,
    ADD COLUMN IF NOT EXISTS actor_id       text,
    ADD COLUMN IF NOT EXISTS actor_type     text,
    ADD COLUMN IF NOT EXISTS trace_id       text,
    ADD COLUMN IF NOT EXISTS span_id        text,
    ADD COLUMN IF NOT EXISTS parent_span_id text,
    ADD COLUMN IF NOT EXISTS sampled        boolean,
    ADD COLUMN IF NOT EXISTS service_name   text,
    ADD COLUMN IF NOT EXISTS recorded_at    timestamptz DEFAULT now();

CREATE INDEX IF NOT EXISTS {trace_idx} ON {log} (trace_id);
CREATE INDEX IF NOT EXISTS {recorded_idx} ON {log} USING brin (recorded_at);
