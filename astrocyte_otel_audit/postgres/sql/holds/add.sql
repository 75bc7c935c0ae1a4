-- By the clock and not by the start of the transaction, which may have waited for a sweep.
INSERT INTO {holds} (bank_id, actor_id, trace_id, reason, held_at)
VALUES (%(bank_id)s, %(actor_id)s, %(trace_id)s, %(reason)s, clock_timestamp())
RETURNING id, bank_id, actor_id, trace_id, reason, held_by, held_at, released_by, released_at
