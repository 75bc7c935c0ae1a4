-- The log itself: whether it is partitioned by its records' start and by nothing else, and whose it is.
SELECT
    c.relkind = 'p',
    EXISTS (
        SELECT FROM pg_partitioned_table AS p
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'started_at' AND a.attnum = p.partattrs[0]
        WHERE p.partrelid = c.oid AND p.partstrat = 'r' AND p.partnatts = 1
    ),
    pg_get_userbyid(c.relowner)::text,
    pg_has_role(c.relowner, 'USAGE')
FROM pg_class AS c
WHERE c.oid = to_regclass({log_name})
