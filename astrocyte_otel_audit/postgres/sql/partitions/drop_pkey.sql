ALTER TABLE {schema}.{partition} DROP CONSTRAINT {pkey}
