-- Where the roles may do less or more than they should. Less: of a grantor without the right to grant, Postgres only
-- warns. More: what another role has granted, what they have as members, and all that an owner and a superuser may.
WITH wanted (role, privileges) AS (
    VALUES
        ({writer_name}::name, ARRAY['INSERT']),
        ({reader_name}::name, ARRAY['SELECT']),
        ({sweeper_name}::name, ARRAY['SELECT', 'DELETE'])
), relations (relation, is_used) AS (
    VALUES
        ({log_name}::regclass, true),
        ({set_aside_name}::regclass, true),
        ({migrations_name}::regclass, false)
)
SELECT role::text, privilege, relation::text, NOT is_wanted AS is_more
FROM wanted
CROSS JOIN relations
CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
CROSS JOIN LATERAL (SELECT is_used AND privilege = ANY (privileges)) AS compared (is_wanted)
WHERE CASE
    WHEN is_wanted THEN NOT has_table_privilege(role, relation, privilege)
    WHEN privilege IN ('DELETE', 'TRUNCATE', 'TRIGGER') THEN has_table_privilege(role, relation, privilege)
    ELSE has_any_column_privilege(role, relation, privilege)
END
UNION ALL
SELECT role::text, 'USAGE', 'schema ' || quote_ident({schema_name}), false
FROM wanted
WHERE NOT has_schema_privilege(role, {schema_name}, 'USAGE')
UNION ALL
SELECT role::text, 'ALTER', relation::text, true
FROM wanted
CROSS JOIN relations
JOIN pg_class ON pg_class.oid = relation
WHERE pg_has_role(role, relowner, 'MEMBER')
ORDER BY is_more, role, relation, privilege
