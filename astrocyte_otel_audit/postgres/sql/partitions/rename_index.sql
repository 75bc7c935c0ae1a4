ALTER INDEX {schema}.{index} RENAME TO {renamed}
