-- Other schemas that have a table of that name.
SELECT n.nspname::text
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = %(table)s AND c.relkind IN ('r', 'p') AND n.nspname <> %(schema)s
ORDER BY n.nspname
LIMIT 3
