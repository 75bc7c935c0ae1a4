-- One batch, the oldest first. By key and range, which a distributed table takes too; the range is said twice, so that
-- it is known which partitions the outer scan needs.
DELETE FROM {log}
WHERE started_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND started_at < %(cutoff)s::timestamptz
    AND (started_at, id) IN (
        SELECT l.started_at, l.id FROM {log} AS l WHERE {due} ORDER BY l.started_at LIMIT %(limit)s
    )
RETURNING started_at
