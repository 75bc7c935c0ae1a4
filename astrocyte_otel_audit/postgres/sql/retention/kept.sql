-- Whether a row l outlives the policy's default: by an override, or by a hold that is not released.
(
    coalesce(l.started_at >= {override}, false)
    OR EXISTS (SELECT FROM {holds} AS held WHERE held.released_at IS NULL AND {fits})
)
