-- The comment tells it from what a person detaches: whoever finds it may drop it.
ALTER TABLE {log} DETACH PARTITION {schema}.{partition};
COMMENT ON TABLE {schema}.{partition} IS {mark_name};
