SELECT count(*) FROM (SELECT FROM {set_aside} LIMIT %(cap)s + 1) AS counted
