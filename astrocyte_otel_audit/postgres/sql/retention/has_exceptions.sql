-- Whether any row at all may outlive its default: else nobody has to look for one.
SELECT cardinality(%(actions)s::text[]) + cardinality(%(banks)s::text[]) > 0
    OR EXISTS (SELECT 1 FROM {holds} WHERE released_at IS NULL)
