SELECT id::text, action, reason, sqlstate, record, set_aside_at
FROM {set_aside}
ORDER BY set_aside_at DESC, id
LIMIT %(limit)s
