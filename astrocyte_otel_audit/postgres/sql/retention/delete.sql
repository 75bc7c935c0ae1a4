-- One batch, the oldest first. By key and range, which a distributed table takes too; the range is said twice, so that
-- it is known which partitions the outer scan needs.
DELETE FROM {log}
WHERE started_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND started_at < %(cutoff)s::timestamptz
    AND (started_at, id) IN (
        SELECT l.started_at, l.id
        FROM {log} AS l
        WHERE l.started_at >= coalesce(%(since)s::timestamptz, '-infinity')
            AND l.started_at < %(cutoff)s::timestamptz
            AND (%(action)s::text IS NULL OR l.action = %(action)s::text)
            AND (%(bank)s::text IS NULL OR (l.bank_id = %(bank)s::text AND l.action <> ALL (%(seen)s::text[])))
            AND NOT {kept}
        ORDER BY l.started_at
        LIMIT %(limit)s
    )
RETURNING started_at
