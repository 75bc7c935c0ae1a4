-- What `delete.sql` would delete, in all its batches.
SELECT count(*), min(l.started_at), max(l.started_at) FROM {log} AS l WHERE {due}
