-- What is there already for the conversion: indexes, each with whether it can be used, and constraints, each with
-- whether it was validated. An index that is being made shows as one that somebody is at.
SELECT x.relname::text, 'index', i.indisvalid, EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = i.indrelid)
FROM pg_index AS i
JOIN pg_class AS x ON x.oid = i.indexrelid
WHERE i.indrelid = to_regclass({log_name}) AND starts_with(x.relname, {before_name} || '_')
UNION ALL
SELECT conname::text, 'constraint', convalidated, false
FROM pg_constraint
WHERE conrelid = to_regclass({log_name}) AND contype = 'c' AND starts_with(conname, {before_name} || '_')
