-- The cutoff of what overrides the default for a row l, null where nothing does: of one for its action and one for its
-- bank the older, as least() ignores what is null. What is kept for ever has the cutoff -infinity.
least(
    (%(action_cutoffs)s::timestamptz[])[array_position(%(actions)s::text[], l.action)],
    (%(bank_cutoffs)s::timestamptz[])[array_position(%(banks)s::text[], l.bank_id)]
)
