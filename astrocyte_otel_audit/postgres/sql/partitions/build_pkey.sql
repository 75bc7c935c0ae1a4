CREATE UNIQUE INDEX CONCURRENTLY {index} ON {log} (started_at, id)
