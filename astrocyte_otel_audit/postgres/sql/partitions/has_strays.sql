SELECT EXISTS (SELECT FROM {schema}.{default} WHERE started_at >= %s AND started_at < %s)
