-- Whether a row l fits all the criteria that a hold named held has.
(held.bank_id IS NULL OR held.bank_id = l.bank_id)
AND (held.actor_id IS NULL OR held.actor_id = l.actor_id)
AND (held.trace_id IS NULL OR held.trace_id = l.trace_id)
