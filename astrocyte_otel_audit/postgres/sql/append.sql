-- One statement a batch and schema: an array a column, one row an element. A record that is already there is a
-- replay of itself and is left alone. Without a conflict target the statement needs the INSERT right only, and
-- it means the same on a partitioned or distributed table.
INSERT INTO {log} (
    id, action, transport, bank_id, started_at, ended_at, request, response, metadata,
    outcome, error_type, actor_id, actor_type, trace_id, span_id, parent_span_id, sampled, service_name
)
SELECT * FROM unnest(
    %s::uuid[], %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
    %s::jsonb[], %s::jsonb[], %s::jsonb[],
    %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::boolean[], %s::text[]
)
ON CONFLICT DO NOTHING
