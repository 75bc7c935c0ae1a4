SELECT to_regclass({migrations_name}) IS NOT NULL
