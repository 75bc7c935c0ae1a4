-- The log's indexes, as statements that make the same ones anew. An index that can't be used is left behind.
SELECT x.relname::text, i.indisprimary, pg_get_indexdef(i.indexrelid)
FROM pg_index AS i
JOIN pg_class AS x ON x.oid = i.indexrelid
WHERE i.indrelid = to_regclass({log_name}) AND i.indisvalid AND NOT starts_with(x.relname, {before_name} || '_')
ORDER BY x.relname
