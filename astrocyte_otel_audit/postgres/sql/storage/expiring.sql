-- Rows that are expired at an instant and held by nobody, up to one more than the cap. Of a cutoff for the action and
-- one for the bank the older holds, as least() ignores what is null; what is kept for ever has the cutoff -infinity.
SELECT count(*)
FROM (
    SELECT
    FROM {log} AS log
    WHERE log.started_at < %(newest)s::timestamptz
      AND log.started_at < coalesce(
          least(
              (%(action_cutoffs)s::timestamptz[])[array_position(%(actions)s::text[], log.action)],
              (%(bank_cutoffs)s::timestamptz[])[array_position(%(banks)s::text[], log.bank_id)]
          ),
          %(default)s::timestamptz
      )
      AND NOT EXISTS (
          SELECT
          FROM unnest(%(held_banks)s::text[], %(held_actors)s::text[], %(held_traces)s::text[])
              AS hold (bank_id, actor_id, trace_id)
          WHERE (hold.bank_id IS NULL OR hold.bank_id = log.bank_id)
            AND (hold.actor_id IS NULL OR hold.actor_id = log.actor_id)
            AND (hold.trace_id IS NULL OR hold.trace_id = log.trace_id)
      )
    LIMIT %(cap)s + 1
) AS expired
