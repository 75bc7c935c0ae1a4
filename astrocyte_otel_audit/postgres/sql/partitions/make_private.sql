-- Rights are had on the log. What default privileges, or the time before it was a partition, gave on a part of it would
-- be a way around them.
SELECT format('REVOKE ALL ON %s FROM %s CASCADE', c.oid::regclass, string_agg(DISTINCT g.grantee, ', '))
FROM pg_class AS c
CROSS JOIN LATERAL (
    SELECT grantee FROM aclexplode(c.relacl)
    UNION
    SELECT x.grantee FROM pg_attribute AS a CROSS JOIN aclexplode(a.attacl) AS x WHERE a.attrelid = c.oid
) AS r (role)
CROSS JOIN LATERAL (
    SELECT CASE r.role WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r.role)) END
) AS g (grantee)
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = {schema_name})
  AND c.relname = {partition_name} AND r.role <> c.relowner
GROUP BY c.oid
