-- Whom one talks to, as whom, and whether rows are taken there at all.
SELECT
    current_database()::text, current_user::text, current_setting('server_version'),
    current_setting('server_version_num')::integer, pg_is_in_recovery(),
    current_setting('default_transaction_read_only')::boolean, pg_backend_pid()
