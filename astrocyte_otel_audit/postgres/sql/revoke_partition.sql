-- What default privileges, or somebody, gave with a partition. It is written and read by way of the table.
REVOKE ALL ON {log} FROM PUBLIC, {writer}, {reader}, {sweeper} CASCADE
