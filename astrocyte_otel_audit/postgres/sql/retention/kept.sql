-- Whether a row l outlives the policy's default: by an override of its action or its bank, the longer of both, or by a
-- hold that is not released.
(
    EXISTS (
        SELECT 1 FROM unnest(%(actions)s::text[], %(action_cutoffs)s::timestamptz[]) AS kept (name, cutoff)
        WHERE kept.name = l.action AND (kept.cutoff IS NULL OR l.started_at >= kept.cutoff)
    )
    OR EXISTS (
        SELECT 1 FROM unnest(%(banks)s::text[], %(bank_cutoffs)s::timestamptz[]) AS kept (name, cutoff)
        WHERE kept.name = l.bank_id AND (kept.cutoff IS NULL OR l.started_at >= kept.cutoff)
    )
    OR EXISTS (
        SELECT 1 FROM {holds} AS held
        WHERE held.released_at IS NULL
            AND (held.bank_id IS NULL OR held.bank_id = l.bank_id)
            AND (held.actor_id IS NULL OR held.actor_id = l.actor_id)
            AND (held.trace_id IS NULL OR held.trace_id = l.trace_id)
    )
)
