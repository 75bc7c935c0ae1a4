-- Newest first, one page behind the cursor. A filter that is null is folded away when the statement is planned.
SELECT
    id::text, action, transport, bank_id, started_at, ended_at, request, response, metadata,
    outcome, error_type, actor_id, actor_type, trace_id, span_id, parent_span_id, sampled, service_name, recorded_at
FROM {log}
WHERE (%(bank_id)s::text IS NULL OR bank_id = %(bank_id)s)
  AND (%(action)s::text IS NULL OR action = %(action)s)
  AND (%(transport)s::text IS NULL OR transport = %(transport)s)
  AND (%(outcome)s::text IS NULL OR outcome = %(outcome)s)
  AND (%(actor_id)s::text IS NULL OR actor_id = %(actor_id)s)
  AND (%(trace_id)s::text IS NULL OR trace_id = %(trace_id)s)
  AND (%(since)s::timestamptz IS NULL OR started_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR started_at < %(until)s)
  AND (%(after_started_at)s::timestamptz IS NULL
       OR (started_at, id) < (%(after_started_at)s::timestamptz, %(after_id)s::uuid))
ORDER BY started_at DESC, id DESC
LIMIT %(limit)s
