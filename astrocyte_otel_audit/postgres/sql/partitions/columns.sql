-- A table that was detached before a migration has fewer columns than the log.
SELECT a.attname::text
FROM pg_attribute AS a
JOIN pg_class AS c ON c.oid = a.attrelid
JOIN pg_attribute AS b ON b.attrelid = to_regclass({log_name}) AND b.attname = a.attname AND NOT b.attisdropped
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = {schema_name})
  AND c.relname = {partition_name} AND a.attnum > 0 AND NOT a.attisdropped AND b.attgenerated = ''
ORDER BY a.attnum
