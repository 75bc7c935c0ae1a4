-- The table, or each of its partitions, with its size on disk and what the server remembers of its rows. Catalogs and
-- statistics may be read without a right on the table. What was never analyzed has -1 rows in pg_class, and then those
-- that were counted since are as good as it gets; of what has grown since it was analyzed, rows are reckoned by pages.
WITH log (relation) AS (
    SELECT {log_name}::regclass::oid
), storing (relation) AS (
    SELECT relid::oid FROM log, pg_partition_tree(relation::regclass) WHERE isleaf
    UNION
    SELECT relation FROM log
)
SELECT
    c.relname::text,
    bounds,
    CASE
        WHEN c.reltuples < 0 THEN coalesce(s.n_live_tup, 0)
        WHEN c.relpages = 0 THEN c.reltuples
        ELSE c.reltuples * pg_relation_size(c.oid) / (c.relpages * current_setting('block_size')::bigint)
    END::bigint,
    pg_table_size(c.oid) - coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0),
    pg_indexes_size(c.oid),
    coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0),
    coalesce(s.n_dead_tup, 0),
    s.last_autovacuum,
    c.oid::bigint
FROM storing
CROSS JOIN log
JOIN pg_class AS c ON c.oid = storing.relation
LEFT JOIN pg_stat_all_tables AS s ON s.relid = c.oid
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.oid <> log.relation THEN pg_get_expr(c.relpartbound, c.oid) END
) AS bound (bounds)
WHERE c.relkind <> 'p'
ORDER BY bounds = 'DEFAULT', starts_with(bounds, 'FOR VALUES FROM (MINVALUE') DESC, bounds, c.relname
