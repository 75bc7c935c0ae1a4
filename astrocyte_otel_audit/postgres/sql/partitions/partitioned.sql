-- A new log beside the old table. Constraints come along, also the one that is for the old table alone.
ALTER TABLE {log} RENAME TO {partition};
CREATE TABLE {log} (
    LIKE {schema}.{partition} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING GENERATED INCLUDING STORAGE
    INCLUDING COMPRESSION INCLUDING COMMENTS
) PARTITION BY RANGE (started_at);
ALTER TABLE {log} OWNER TO {owner};
ALTER TABLE {log} DROP CONSTRAINT IF EXISTS {check};
