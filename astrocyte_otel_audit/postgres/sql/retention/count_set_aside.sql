SELECT count(*), min(set_aside_at), max(set_aside_at) FROM {set_aside} WHERE set_aside_at < %(cutoff)s::timestamptz
