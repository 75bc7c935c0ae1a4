-- Periods of the records in the DEFAULT partition.
SELECT DISTINCT date_trunc({unit_name}, started_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
FROM {schema}.{default}
WHERE started_at >= %s AND started_at < %s
ORDER BY 1
