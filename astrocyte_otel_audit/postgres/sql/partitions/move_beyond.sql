CREATE TEMP TABLE astrocyte_audit_moved ON COMMIT DROP AS SELECT * FROM {log} WHERE started_at >= {boundary_name};
DELETE FROM {log} WHERE started_at >= {boundary_name};
