CREATE TABLE {schema}.{partition} PARTITION OF {log} DEFAULT;
ALTER TABLE {schema}.{partition} OWNER TO {owner};
