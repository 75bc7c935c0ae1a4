-- Records that the log refused, each with its reason: nothing that was accepted is thrown away.
-- The record is text, because what was refused as jsonb or as a timestamp must fit here all the same.

CREATE TABLE IF NOT EXISTS {set_aside} (
    id           uuid PRIMARY KEY,
    action       text NOT NULL,
    reason       text NOT NULL,
    sqlstate     text,
    record       text NOT NULL,
    set_aside_at timestamptz NOT NULL DEFAULT now()
);
