-- Locked first: what came into the DEFAULT partition after it was read would keep the new partition from being made.
LOCK TABLE {log} IN ACCESS EXCLUSIVE MODE;
CREATE TEMP TABLE astrocyte_audit_moved ON COMMIT DROP AS
    SELECT * FROM {log} WHERE started_at >= {lower_name} AND started_at < {upper_name};
DELETE FROM {log} WHERE started_at >= {lower_name} AND started_at < {upper_name};
