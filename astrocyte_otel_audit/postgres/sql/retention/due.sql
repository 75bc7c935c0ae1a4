-- Whether a row l is expired by one part of a policy: the default, or an override that keeps for less time.
l.started_at >= coalesce(%(since)s::timestamptz, '-infinity')
AND l.started_at < %(cutoff)s::timestamptz
AND (%(action)s::text IS NULL OR l.action = %(action)s::text)
AND (%(bank)s::text IS NULL OR (l.bank_id = %(bank)s::text AND l.action <> ALL (%(seen)s::text[])))
AND NOT {kept}
