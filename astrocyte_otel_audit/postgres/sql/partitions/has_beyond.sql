SELECT EXISTS (SELECT FROM {log} WHERE started_at >= {boundary_name})
