ALTER TABLE {schema}.{partition} ADD CONSTRAINT {index} PRIMARY KEY USING INDEX {index}
