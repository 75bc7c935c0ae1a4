-- Each role gets exactly this, whatever it had before. What PUBLIC has, every role has, so PUBLIC has nothing.
-- The sweeper deletes what was set aside too: it is as old, and says as much. It has to know what is held; holding
-- and releasing are the owner's, so that nobody who sweeps can release first.
REVOKE ALL ON {log}, {set_aside}, {migrations}, {holds} FROM PUBLIC, {writer}, {reader}, {sweeper} CASCADE;
GRANT USAGE ON SCHEMA {schema} TO {writer}, {reader}, {sweeper};
GRANT INSERT ON {log}, {set_aside} TO {writer};
GRANT SELECT ON {log}, {set_aside}, {holds} TO {reader};
GRANT SELECT, DELETE ON {log}, {set_aside} TO {sweeper};
GRANT SELECT ON {holds} TO {sweeper};
