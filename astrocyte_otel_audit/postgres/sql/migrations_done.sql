INSERT INTO {migrations} (version, name) VALUES (%s, %s)
