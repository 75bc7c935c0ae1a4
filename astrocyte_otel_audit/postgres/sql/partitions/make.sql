CREATE TABLE {schema}.{partition} PARTITION OF {log} FOR VALUES FROM ({lower_name}) TO ({upper_name});
ALTER TABLE {schema}.{partition} OWNER TO {owner};
