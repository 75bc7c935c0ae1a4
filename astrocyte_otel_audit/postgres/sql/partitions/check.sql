ALTER TABLE {log} ADD CONSTRAINT {check} CHECK (started_at < {boundary_name}) NOT VALID
