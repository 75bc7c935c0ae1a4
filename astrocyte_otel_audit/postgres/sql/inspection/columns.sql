-- Columns of the log and of the tables beside it. Catalogs may be read without a right on the schema.
SELECT
    c.relname::text, c.relkind::text, a.attname::text, format_type(a.atttypid, NULL),
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = %(schema)s AND c.relname = ANY(%(relations)s) AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
ORDER BY c.relname, a.attnum
