-- The id alone is what a record is looked up by.
ALTER TABLE {log} ADD CONSTRAINT {pkey} PRIMARY KEY (started_at, id);
CREATE INDEX {id_idx} ON {log} (id);
