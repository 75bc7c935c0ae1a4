-- What the connecting role may do with the log and its side table.
SELECT
    c.relname::text, r.rolsuper, pg_has_role(c.relowner, 'USAGE'), has_schema_privilege(n.oid, 'USAGE'),
    ARRAY(
        SELECT verb
        FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) WITH ORDINALITY AS v (verb, position)
        WHERE has_table_privilege(c.oid, verb)
           OR CASE WHEN verb IN ('SELECT', 'INSERT', 'UPDATE') THEN has_any_column_privilege(c.oid, verb) END
        ORDER BY position
    )
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_roles AS r ON r.rolname = current_user
WHERE n.nspname = %(schema)s AND c.relname = ANY(%(relations)s)
