-- One batch of what the log refused: as old, and as telling.
DELETE FROM {set_aside}
WHERE id IN (
    SELECT id FROM {set_aside} WHERE set_aside_at < %(cutoff)s::timestamptz ORDER BY set_aside_at LIMIT %(limit)s
)
RETURNING set_aside_at
