ALTER TABLE {log} ATTACH PARTITION {schema}.{partition} FOR VALUES FROM (MINVALUE) TO ({boundary_name});
ALTER TABLE {schema}.{partition} DROP CONSTRAINT IF EXISTS {check};
