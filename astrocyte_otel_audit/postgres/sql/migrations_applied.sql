-- What this table has had. A ledger says nothing of a table that was dropped, or that Astrocyte made anew.
SELECT version FROM {migrations}
WHERE to_regclass({set_aside_name}) IS NOT NULL
  AND (version < 4 OR to_regclass({holds_name}) IS NOT NULL)
  AND EXISTS (
      SELECT FROM pg_attribute
      WHERE attrelid = to_regclass({log_name}) AND attname = 'recorded_at' AND NOT attisdropped
  )
