INSERT INTO {set_aside} (id, action, reason, sqlstate, record)
SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[])
ON CONFLICT DO NOTHING
