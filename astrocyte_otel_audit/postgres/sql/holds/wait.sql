-- A batch of the sweep that is being deleted ends first, and the next one begins after this transaction. The key is a
-- number; whoever waits here keeps nobody waiting but the sweep, so it may take as long as a statement.
SELECT set_config('lock_timeout', current_setting('statement_timeout'), true), pg_advisory_xact_lock(%(key)s::bigint)
