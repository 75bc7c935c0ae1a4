-- How many rows each partition has, up to one more than the cap altogether: then nobody waits for more to be counted.
SELECT relation, count(*)
FROM (SELECT tableoid::bigint FROM {log} LIMIT %(cap)s + 1) AS counted (relation)
GROUP BY relation
