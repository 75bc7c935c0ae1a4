SELECT id, bank_id, actor_id, trace_id, reason, held_by, held_at, released_by, released_at
FROM {holds}
WHERE released_at IS NULL OR %(include_released)s
ORDER BY id
