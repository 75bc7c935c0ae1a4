-- Every schema with a table of that name that has a log's columns, and what the role may do there.
SELECT
    pg_namespace.nspname,
    has_schema_privilege(pg_namespace.oid, 'USAGE')
        AND has_table_privilege(pg_class.oid, 'SELECT') AND has_table_privilege(pg_class.oid, 'DELETE'),
    EXISTS (
        SELECT 1 FROM pg_class AS holds
        WHERE holds.relnamespace = pg_namespace.oid AND holds.relname = %(holds)s
            AND has_table_privilege(holds.oid, 'SELECT')
    )
FROM pg_class
JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
WHERE pg_class.relname = %(table)s
    AND pg_class.relkind IN ('r', 'p')
    AND NOT pg_class.relispartition
    AND pg_class.relpersistence <> 't'
    AND (%(schemas)s::text[] IS NULL OR pg_namespace.nspname = ANY (%(schemas)s::text[]))
    AND (
        SELECT count(*) FROM pg_attribute
        WHERE attrelid = pg_class.oid AND attname IN ('id', 'action', 'bank_id', 'started_at') AND NOT attisdropped
    ) = 4
ORDER BY pg_namespace.nspname
