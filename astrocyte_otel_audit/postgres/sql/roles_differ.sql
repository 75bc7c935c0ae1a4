-- Where the roles may do less or more than they should. Less: of a grantor without the right to grant, Postgres only
-- warns. More: what another role has granted, what they have as members, and all that an owner and a superuser may.
-- A partition is written and read by way of the table, so nobody has a right on one itself.
WITH wanted (role, relation, privileges) AS (
    VALUES
        ({writer_name}::name, {log_name}::regclass, ARRAY['INSERT']),
        ({writer_name}, {set_aside_name}::regclass, ARRAY['INSERT']),
        ({reader_name}, {log_name}::regclass, ARRAY['SELECT']),
        ({reader_name}, {set_aside_name}::regclass, ARRAY['SELECT']),
        ({reader_name}, {holds_name}::regclass, ARRAY['SELECT']),
        ({sweeper_name}, {log_name}::regclass, ARRAY['SELECT', 'DELETE']),
        ({sweeper_name}, {set_aside_name}::regclass, ARRAY['SELECT', 'DELETE']),
        ({sweeper_name}, {holds_name}::regclass, ARRAY['SELECT'])
), roles (role) AS (
    SELECT DISTINCT role FROM wanted
), relations (relation) AS (
    VALUES ({log_name}::regclass), ({set_aside_name}::regclass), ({migrations_name}::regclass), ({holds_name}::regclass)
    UNION
    SELECT relid FROM pg_partition_tree({log_name}::regclass)
)
SELECT role::text, privilege, relation::text, NOT is_wanted AS is_more
FROM roles
CROSS JOIN relations
CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
LEFT JOIN wanted USING (role, relation)
CROSS JOIN LATERAL (SELECT coalesce(privilege = ANY (privileges), false)) AS compared (is_wanted)
WHERE CASE
    WHEN is_wanted THEN NOT has_table_privilege(role, relation, privilege)
    WHEN privilege IN ('DELETE', 'TRUNCATE', 'TRIGGER') THEN has_table_privilege(role, relation, privilege)
    ELSE has_any_column_privilege(role, relation, privilege)
END
UNION ALL
SELECT role::text, 'USAGE', 'schema ' || quote_ident({schema_name}), false
FROM roles
WHERE NOT has_schema_privilege(role, {schema_name}, 'USAGE')
UNION ALL
SELECT role::text, 'ALTER', relation::text, true
FROM roles
CROSS JOIN relations
JOIN pg_class ON pg_class.oid = relation
WHERE pg_has_role(role, relowner, 'MEMBER')
ORDER BY is_more, role, relation, privilege
