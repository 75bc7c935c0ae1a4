-- The first release of a hold is the one that counts.
UPDATE {holds}
SET released_by = coalesce(released_by, session_user), released_at = coalesce(released_at, clock_timestamp())
WHERE id = %(id)s::bigint
RETURNING id, bank_id, actor_id, trace_id, reason, held_by, held_at, released_by, released_at
