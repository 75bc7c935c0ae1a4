-- What `delete.sql` would delete, in all its batches.
SELECT count(*), min(l.started_at), max(l.started_at)
FROM {log} AS l
WHERE l.started_at >= coalesce(%(since)s::timestamptz, '-infinity')
    AND l.started_at < %(cutoff)s::timestamptz
    AND (%(action)s::text IS NULL OR l.action = %(action)s::text)
    AND (%(bank)s::text IS NULL OR (l.bank_id = %(bank)s::text AND l.action <> ALL (%(seen)s::text[])))
    AND NOT {kept}
