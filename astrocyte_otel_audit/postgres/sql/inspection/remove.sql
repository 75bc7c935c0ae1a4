-- The canary, in the transaction that has put it there.
DELETE FROM {log} WHERE id = %(id)s::uuid
