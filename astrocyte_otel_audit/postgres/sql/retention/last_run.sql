SELECT max(started_at) FROM {log} WHERE action = %(action)s
