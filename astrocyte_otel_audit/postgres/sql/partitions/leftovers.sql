-- Tables that were partitions of the log, and that a sweep detached to drop them. What a person has detached has no
-- such comment.
SELECT c.relname::text
FROM pg_class AS c
WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass({log_name}))
  AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND obj_description(c.oid, 'pg_class') = {mark_name}
ORDER BY c.relname
