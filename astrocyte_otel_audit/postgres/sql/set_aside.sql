INSERT INTO {set_aside} (id, action, reason, sqlstate, record)
VALUES (%s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING
