-- What there is to convert, and what stands in the way. A trigger without a constraint is an extension's own, such as
-- Citus's. A view goes on reading the table that it was made of, whatever that is called.
SELECT
    c.relkind = 'p',
    CASE WHEN c.reltuples < 0 THEN coalesce(pg_stat_get_live_tuples(c.oid), 0) ELSE c.reltuples END::bigint,
    pg_total_relation_size(c.oid),
    now(),
    array_remove(ARRAY[
        CASE WHEN c.relkind NOT IN ('r', 'p') THEN 'it is no table, but has the name of one' END,
        CASE WHEN c.relpersistence <> 'p' THEN 'it is unlogged' END,
        CASE WHEN NOT pg_has_role(c.relowner, 'USAGE')
            THEN 'it belongs to another role: repeat this as its owner' END,
        CASE WHEN 2 > (
            SELECT count(*) FROM pg_attribute
            WHERE attrelid = c.oid AND attname IN ('id', 'started_at') AND attnotnull AND NOT attisdropped
        ) THEN 'its columns id and started_at must be there, and NOT NULL; is it an audit log?' END,
        CASE WHEN EXISTS (
            SELECT FROM pg_trigger WHERE tgrelid = c.oid AND (NOT tgisinternal OR tgconstraint = 0)
        ) THEN 'it has triggers, which a new table would lack: drop them, and create them again afterwards' END,
        CASE WHEN c.relrowsecurity OR EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid)
            THEN 'it has row security, which a new table would lack' END,
        CASE WHEN EXISTS (SELECT FROM pg_constraint WHERE contype = 'f' AND c.oid IN (conrelid, confrelid))
            THEN 'a foreign key leads to it or from it' END,
        CASE WHEN EXISTS (
            SELECT FROM pg_constraint
            WHERE conrelid = c.oid AND NOT convalidated AND NOT starts_with(conname, {before_name} || '_')
        ) THEN 'it has a constraint that is not validated' END,
        CASE WHEN EXISTS (SELECT FROM pg_inherits WHERE c.oid IN (inhrelid, inhparent))
            THEN 'it inherits from a table, or a table from it' END,
        CASE WHEN EXISTS (
            SELECT FROM pg_publication_tables WHERE schemaname = {schema_name} AND tablename = c.relname
        ) THEN 'it is in a publication: take it out, and put it in again afterwards' END,
        CASE WHEN EXISTS (
            SELECT FROM pg_depend
            WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = c.oid
        ) THEN 'a view or rule is made of it: drop it, and create it again afterwards' END,
        CASE WHEN EXISTS (
            SELECT FROM pg_index AS i JOIN pg_class AS x ON x.oid = i.indexrelid
            WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)
              AND NOT i.indisprimary AND x.relname <> {pkey_name}
        ) THEN 'it has a unique index beside its primary key' END,
        CASE WHEN to_regclass(format('%I.%I', {schema_name}, {before_name})) IS NOT NULL
            THEN format('a table %s is in the way', {before_name}) END,
        CASE WHEN to_regclass(format('%I.%I', {schema_name}, {default_name})) IS NOT NULL
            THEN format('a table %s is in the way', {default_name}) END
    ], NULL)
FROM pg_class AS c
WHERE c.oid = to_regclass({log_name})
