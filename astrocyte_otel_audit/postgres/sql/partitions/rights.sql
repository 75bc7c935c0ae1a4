-- Rights on the log and on its columns, and its comment, as statements that say the same of a new table.
WITH log AS (
    SELECT oid, relowner, relacl, obj_description(oid, 'pg_class') AS comment
    FROM pg_class WHERE oid = to_regclass({log_name})
), granted (columns, acl) AS (
    SELECT '', relacl FROM log
    UNION ALL
    SELECT format(' (%I)', attname), attacl FROM pg_attribute JOIN log ON attrelid = oid WHERE NOT attisdropped
)
SELECT format('REVOKE ALL ON %s FROM %I', {log_name}, pg_get_userbyid(relowner)) FROM log WHERE relacl IS NOT NULL
UNION ALL
SELECT format(
    'GRANT %s%s ON %s TO %s%s', privilege_type, columns, {log_name},
    CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
    CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
)
FROM granted
CROSS JOIN LATERAL aclexplode(acl)
UNION ALL
SELECT format('COMMENT ON TABLE %s IS %L', {log_name}, comment) FROM log WHERE comment IS NOT NULL
