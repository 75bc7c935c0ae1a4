SELECT n.nspname::text, c.relname::text
FROM pg_partition_tree({log_name}::regclass) AS p
JOIN pg_class AS c ON c.oid = p.relid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE p.level > 0
ORDER BY n.nspname, c.relname
