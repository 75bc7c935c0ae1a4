INSERT INTO {migrations} (version, name) VALUES (%s, %s)
ON CONFLICT (version) DO UPDATE SET name = excluded.name, applied_at = excluded.applied_at
