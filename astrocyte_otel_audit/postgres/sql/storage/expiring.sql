-- Rows that are expired at an instant and held by nobody, up to one more than the cap. The holds are given, as not
-- everybody who may read the log may see them.
SELECT count(*)
FROM (
    SELECT
    FROM {log} AS l
    WHERE l.started_at < %(newest)s::timestamptz
      AND l.started_at < coalesce({override}, %(default)s::timestamptz)
      AND NOT EXISTS (
          SELECT
          FROM unnest(%(held_banks)s::text[], %(held_actors)s::text[], %(held_traces)s::text[])
              AS held (bank_id, actor_id, trace_id)
          WHERE {fits}
      )
    LIMIT %(cap)s + 1
) AS expired
