-- The log's partitions and their bounds; null is MINVALUE or MAXVALUE. Without the relation's oid, pg_get_expr() waits
-- for nobody who has locked it.
SELECT
    c.relname::text,
    substring(bound FROM $$FROM \('([^']+)'\)$$)::timestamptz,
    substring(bound FROM $$TO \('([^']+)'\)$$)::timestamptz,
    bound = 'DEFAULT'
FROM pg_inherits AS i
JOIN pg_class AS c ON c.oid = i.inhrelid
CROSS JOIN LATERAL pg_get_expr(c.relpartbound, 0) AS bound
WHERE i.inhparent = to_regclass({log_name})
ORDER BY bound = 'DEFAULT', 2 NULLS FIRST, c.relname
