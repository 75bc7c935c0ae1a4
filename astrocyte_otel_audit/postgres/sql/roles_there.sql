SELECT rolname::text, rolcanlogin FROM pg_roles WHERE rolname IN ({writer_name}, {reader_name}, {sweeper_name})
