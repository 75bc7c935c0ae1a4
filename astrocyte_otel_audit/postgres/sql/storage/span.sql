SELECT min(started_at), max(started_at), clock_timestamp() FROM {log}
