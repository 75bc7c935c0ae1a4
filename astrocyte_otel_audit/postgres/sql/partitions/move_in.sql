INSERT INTO {log} SELECT * FROM pg_temp.astrocyte_audit_moved
