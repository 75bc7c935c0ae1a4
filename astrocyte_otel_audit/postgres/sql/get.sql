SELECT
    id::text, action, transport, bank_id, started_at, ended_at, request, response, metadata,
    outcome, error_type, actor_id, actor_type, trace_id, span_id, parent_span_id, sampled, service_name, recorded_at
FROM {log}
WHERE id = %(id)s::uuid
