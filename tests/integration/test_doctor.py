"""What `doctor` finds in a real Postgres: each of its checks made to fail once, and never a row left behind."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit.doctor import Examination, Finding, examine, exit_status
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import reader
from astrocyte_otel_audit.postgres.inspection import INDEXES, LOG_COLUMNS, SIDE_COLUMNS, AuditInspector
from tests.servers import role

LOG, SIDE = "astrocyte_audit_log", "astrocyte_audit_log_set_aside"
INSERT_ONLY = ("USAGE ON SCHEMA public", f"INSERT ON {LOG}, {SIDE}")
DATABASE_CHECKS = {
    "dsn", "host", "connection", "tls", "server", "clock", "table", "set-aside", "indexes", "migrations", "rights",
    "canary",
}  # fmt: skip


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def count(dsn: str) -> int:
    """Rows in both tables."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(f"SELECT (SELECT count(*) FROM {LOG}) + (SELECT count(*) FROM {SIDE})").fetchall()
        return rows[0][0]


def look(dsn: str, **arguments) -> dict[str, Finding]:
    """What the checks say of a database, by check; the worst of each."""
    found: dict[str, Finding] = {}
    for finding in examine(Examination(dsn, actions="*", **{"timeout_seconds": 5.0, **arguments})):
        if finding.check not in found or finding.status == "failed":
            found[finding.check] = finding
    return {check: finding for check, finding in found.items() if check in DATABASE_CHECKS}


def not_ok(found: dict[str, Finding]) -> dict[str, str]:
    return {check: finding.status for check, finding in found.items() if finding.status != "ok"}


@pytest.fixture
def writer(database):
    """DSN of a role that may insert and nothing else."""
    with role(database, *INSERT_ONLY) as dsn:
        yield dsn


def test_a_role_that_may_insert_only_is_as_it_should_be(database, writer):
    found = look(writer)
    assert set(found) == DATABASE_CHECKS
    assert not_ok(found) == {"migrations": "skipped"}
    assert found["canary"].what.startswith("a row was written and rolled back; reading it back is not proved")
    assert count(database) == 0
    assert exit_status(found.values()) == 0


def test_a_role_that_may_read_too_sees_its_canary(database):
    with role(database, *INSERT_ONLY, f"SELECT ON {LOG}, {SIDE}") as dsn:
        found = look(dsn)
    assert not_ok(found) == {"migrations": "skipped"}
    assert found["canary"].what == "a row was written, read back and rolled back"
    assert found["rights"].what == "the role may SELECT and INSERT, and change nothing"
    assert count(database) == 0


def test_a_superuser_is_a_warning_and_removes_its_canary(database):
    found = look(database)
    assert not_ok(found) == {"rights": "warning"}
    assert found["rights"].what.startswith("the role is a superuser")
    assert found["canary"].what == "a row was written, read back and removed"
    assert count(database) == 0


def test_an_owner_is_a_warning(empty_database):
    with role(empty_database, "CREATE, USAGE ON SCHEMA public") as dsn:
        inspector = AuditInspector(dsn, schema="public", table=LOG, timeout_seconds=5)
        inspector.migrate()
        inspector.close()
        found = look(dsn)
    assert not_ok(found) == {"rights": "warning"}
    assert found["rights"].what.startswith("the role owns the table")
    assert "migrate --roles" in found["rights"].advice


@pytest.mark.parametrize("verb", ["UPDATE", "DELETE", "TRUNCATE", "UPDATE (outcome)"])
def test_more_rights_than_needed_are_a_warning(database, verb):
    for relation in (LOG, SIDE):
        if "(" in verb and relation == SIDE:
            continue
        with role(database, *INSERT_ONLY, f"{verb} ON {relation}") as dsn:
            found = look(dsn)
        assert found["rights"].status == "warning"
        assert found["rights"].what.startswith(f"the role may also {verb.split(' ')[0]}:")
        assert found["canary"].status == "ok"
    assert count(database) == 0


def test_migrating_by_the_application_is_spoken_of_where_it_needs_the_owner(database, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MIGRATE", "true")
    assert look(database)["rights"].advice.startswith("unset OTEL_ASTROCYTE_AUDIT_MIGRATE")


@pytest.mark.parametrize(
    ("grants", "what"),
    [
        (("USAGE ON SCHEMA public", f"INSERT ON {LOG}"), f"the role may not INSERT rows into public.{SIDE}"),
        (("USAGE ON SCHEMA public", f"INSERT ON {SIDE}"), f"the role may not INSERT rows into public.{LOG}"),
        ((f"SELECT ON {LOG}",), f"the role may not INSERT rows into public.{LOG} and public.{SIDE}"),
    ],
)
def test_a_missing_right_has_failed(database, grants, what):
    with role(database, *grants) as dsn:
        found = look(dsn)
    assert (found["rights"].status, found["rights"].what) == ("failed", what)
    assert found["canary"].advice == "mend `rights` first"


def test_a_schema_that_may_not_be_used_has_failed(database):
    execute(database, "REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    with role(database, f"INSERT ON {LOG}, {SIDE}") as dsn:
        found = look(dsn)
    assert found["table"].status == "ok"
    assert (found["rights"].status, found["rights"].what) == ("failed", "the role may not use the schema public")


def test_a_refused_canary_of_a_role_that_may_insert_is_told_apart(database, writer):
    execute(database, f"ALTER TABLE {LOG} ENABLE ROW LEVEL SECURITY")
    found = look(writer)
    assert found["rights"].status == "ok"
    assert found["canary"].status == "failed"
    assert "row security policies" in found["canary"].advice


def test_a_canary_that_its_writer_may_not_see_is_a_warning(database):
    execute(
        database,
        f"ALTER TABLE {LOG} ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY writing ON {LOG} FOR INSERT WITH CHECK (true)",
    )
    with role(database, *INSERT_ONLY, f"SELECT ON {LOG}, {SIDE}") as dsn:
        found = look(dsn)
    assert (found["canary"].status, "not to be seen" in found["canary"].what) == ("warning", True)


FUNCTION = "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$"
TRIGGER = "CREATE TRIGGER {} BEFORE {} ON astrocyte_audit_log FOR EACH ROW EXECUTE FUNCTION {}()"


@pytest.mark.parametrize(
    ("damage", "check", "status", "said"),
    [
        ([f"DROP TABLE {LOG}"], "table", "failed", "run `astrocyte-otel-audit migrate`"),
        ([f"DROP TABLE {SIDE}"], "set-aside", "failed", "run `astrocyte-otel-audit migrate`"),
        ([f"ALTER TABLE {LOG} DROP COLUMN outcome, DROP COLUMN sampled"], "table", "failed", "lacks outcome, sampled"),
        ([f"ALTER TABLE {SIDE} DROP COLUMN record"], "set-aside", "failed", "lacks record"),
        ([f"ALTER TABLE {LOG} ADD tenant text NOT NULL"], "table", "failed", "a column tenant of its own"),
        ([f"ALTER TABLE {LOG} ADD tenant text NOT NULL DEFAULT 'a'"], "table", "ok", "has all 19 columns"),
        ([f"ALTER TABLE {LOG} ADD n int GENERATED ALWAYS AS IDENTITY"], "table", "ok", "has all 19 columns"),
        (
            [f"ALTER TABLE {LOG} ALTER request TYPE json"],
            "table",
            "warning",
            "request of public.astrocyte_",
        ),
        ([f"ALTER TABLE {LOG} DROP CONSTRAINT {LOG}_pkey"], "table", "failed", "give it a PRIMARY KEY (id)"),
        ([f"ALTER TABLE {LOG} RENAME TO t", f"CREATE VIEW {LOG} AS TABLE t"], "table", "warning", "is a view"),
        ([f"DROP INDEX {LOG}_trace_idx"], "indexes", "warning", f'CONCURRENTLY ON "public"."{LOG}" (trace_id)'),
        ([f"DROP INDEX {LOG}_recorded_idx"], "indexes", "warning", "USING brin (recorded_at)"),
        (
            [f"DROP INDEX {LOG}_started_idx", f"CREATE INDEX ON {LOG} (started_at) WHERE bank_id IS NULL"],
            "indexes",
            "warning",
            "(started_at)",
        ),
        (
            [f"DROP INDEX {LOG}_started_idx", f"CREATE INDEX ON {LOG} (started_at DESC, id)"],
            "indexes",
            "ok",
            "all indexes",
        ),
        ([f"DELETE FROM {LOG}_migrations WHERE version = 2"], "migrations", "failed", "not applied: 002_trace"),
        ([f"DROP TABLE {LOG}_migrations"], "migrations", "failed", "001_log, 002_trace, 003_set_aside"),
        (
            [f"DELETE FROM {LOG}_migrations WHERE version = 4", f"DROP TABLE {LOG}_holds"],
            "migrations",
            "warning",
            "004_holds; records are written, and can't be held or swept",
        ),
        ([f"ALTER TABLE {LOG} ADD CHECK (action <> 'audit.canary')"], "canary", "failed", "a constraint of the table"),
        (
            [FUNCTION.format("f", "RETURN NULL;"), TRIGGER.format("f", "INSERT", "f")],
            "canary",
            "failed",
            "a row was accepted and is not there",
        ),
        (
            [FUNCTION.format("f", "NEW.outcome := 'unknown'; RETURN NEW;"), TRIGGER.format("f", "INSERT", "f")],
            "canary",
            "warning",
            "otherwise than it was written",
        ),
        (
            [FUNCTION.format("f", "RETURN NULL;"), TRIGGER.format("f", "DELETE", "f")],
            "canary",
            "ok",
            "read back and rolled back",
        ),
        (
            [FUNCTION.format("f", "RAISE 'hunter2';"), TRIGGER.format("f", "INSERT", "f")],
            "canary",
            "failed",
            "a trigger of the table refuses the record",
        ),
    ],
)
def test_a_table_that_something_is_wrong_with(database, damage, check, status, said):
    execute(database, *damage)
    found = look(database)
    assert found[check].status == status, found[check]
    assert said in f"{found[check].what} -> {found[check].advice}"
    assert "hunter2" not in str(found)
    if check in ("canary", "indexes"):
        assert count(database) == 0


def test_a_table_elsewhere_is_pointed_to(database):
    execute(database, "CREATE SCHEMA tenant_a", f"ALTER TABLE {LOG} SET SCHEMA tenant_a")
    found = look(database)
    assert found["table"].advice.endswith("or name the schema that has one: --schema tenant_a")
    assert look(database, schema="tenant_a")["table"].status == "ok"


@pytest.mark.parametrize(("bounds", "status"), [("FROM ('2000-01-01') TO ('2001-01-01')", "failed"), ("DEFAULT", "ok")])
def test_a_partitioned_table(database, bounds, status):
    execute(
        database,
        f"ALTER TABLE {LOG} RENAME TO t",
        f"CREATE TABLE {LOG} (LIKE t INCLUDING DEFAULTS, PRIMARY KEY (started_at, id)) PARTITION BY RANGE (started_at)",
        f"CREATE TABLE p PARTITION OF {LOG} " + (bounds if bounds == "DEFAULT" else f"FOR VALUES {bounds}"),
    )
    found = look(database)
    assert found["table"].what.endswith("columns, in partitions")
    assert found["canary"].status == status
    if status == "failed":
        assert found["canary"].advice == "attach one, or a DEFAULT partition"


def test_a_locked_table_is_waited_for_no_longer_than_said(database, monkeypatch):
    with psycopg.connect(database) as connection:
        connection.execute(f"LOCK {LOG}")
        found = look(database, timeout_seconds=0.5)
        assert found["rights"].status == "failed"
        assert "is the table locked" in found["rights"].advice
        monkeypatch.setattr(reader, "LONGEST_LOCK_SECONDS", 0.1)
        found = look(database)
        assert found["rights"].what == "the table is locked by somebody else [SQLSTATE 55P03]"
        assert "pg_locks" in found["rights"].advice


def test_a_database_that_takes_no_rows_has_failed(database):
    with psycopg.connect(database, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(sql.Identifier(name))
        )
    found = look(database)
    assert (found["server"].status, "read-only" in found["server"].what) == ("failed", True)
    assert found["canary"].advice == "mend `server` first"


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"dbname": "nowhere"}, "the database does not exist"), ({"user": "nobody_of_the_kind"}, "the role does not")],
)
def test_a_server_that_lets_nobody_in_has_failed(database, changes, what):
    found = look(make_conninfo(database, password="hunter2", **changes))
    assert found["connection"].status == "failed"
    assert found["connection"].what.startswith(what)
    assert exit_status(found.values()) == 3
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("place", ["the DSN", "the environment"])
@pytest.mark.parametrize(
    ("mode", "proves"),
    [(None, False), ("prefer", False), ("require", False), ("verify-ca", True), ("verify-full", True)],
)
def test_whether_the_server_has_to_prove_itself_is_what_libpq_says(database, monkeypatch, place, mode, proves):
    given = {} if mode is None else {"sslmode": mode}
    if place == "the environment":
        for name in given:
            monkeypatch.setenv("PGSSLMODE", given[name])
        given = {}
    dsn = make_conninfo(database, **given)
    inspector = AuditInspector(dsn, schema="public", table=LOG, timeout_seconds=5)
    try:
        assert inspector.server().verified is proves
    finally:
        inspector.close()


def test_what_the_inspector_knows_of_the_tables_is_what_the_migrations_make(database):
    inspector = AuditInspector(database, schema="public", table=LOG, timeout_seconds=5)
    log, side = inspector.relations()
    assert {name: column.type for name, column in log.columns.items()} == LOG_COLUMNS
    assert {name: column.type for name, column in side.columns.items()} == SIDE_COLUMNS
    assert {tuple(keys) for keys, *_ in inspector._indexes()} == {*INDEXES, ("id",)}
    inspector.close()


def test_names_that_need_quotes(empty_database):
    inspector = AuditInspector(empty_database, schema="Tenant-A", table="My-Log", timeout_seconds=5)
    inspector.migrate(create_schema=True)
    inspector.close()
    assert not_ok(look(empty_database, schema="Tenant-A", table="My-Log")) == {"rights": "warning"}


# What is in between


class Relay:
    """A port before the server: what comes from the server can be held back, cut off, or told otherwise."""

    def __init__(self, dsn: str, *, pools: bool) -> None:
        with psycopg.connect(dsn) as connection:
            info = connection.info
            self._host, self._port = info.host, info.port
        self._pools = pools
        self.passing = threading.Event()
        self.passing.set()
        #: Pieces from the server that still come through; the connection is cut after the last.
        self.pieces: int | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self._listening.getsockname()[1])
        self._ends: list[socket.socket] = [self._listening]
        self._start(self._serve)

    def _start(self, target, *arguments) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX if self._host.startswith("/") else socket.AF_INET)
                path = f"{self._host}/.s.PGSQL.{self._port}"
                server.connect(path if self._host.startswith("/") else (self._host, self._port))
                self._ends += [client, server]
                self._start(self._pump, client, server, False)
                self._start(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if from_server:
                    self.passing.wait()
                    key = piece.find(b"K\0\0\0\x0c")
                    if self._pools and key >= 0:  # the session's process id, as a pooler makes one up
                        piece = piece[: key + 5] + b"\0\0\0\x01" + piece[key + 9 :]
                    if self.pieces is not None:
                        self.pieces -= 1
                        if self.pieces < 0:
                            break
                sink.sendall(piece)
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.passing.set()
        for each in self._ends:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def relay(database) -> Iterator[type[Relay]]:
    relays: list[Relay] = []

    def make(*, pools: bool = False) -> Relay:
        relays.append(Relay(database, pools=pools))
        return relays[-1]

    yield make
    for each in relays:
        each.close()


def test_a_pooler_in_between_is_noticed(relay):
    assert "by a pooler such as pgbouncer" in look(relay(pools=True).dsn)["server"].what
    assert "pooler" not in look(relay().dsn)["server"].what


def test_a_server_that_stops_answering_is_not_waited_for_without_end(relay, database):
    between = relay()
    inspector = AuditInspector(between.dsn, schema="public", table=LOG, timeout_seconds=0.2)
    inspector.server()
    between.passing.clear()
    late = threading.Timer(10, between.passing.set)  # so that this ends, whatever the code does
    late.start()
    with pytest.raises(DatabaseUnavailableError, match="doesn't answer"):
        inspector.clock_skew()
    late.cancel()
    inspector.close()


def test_a_server_that_never_begins_to_answer_has_failed():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        found = look(f"postgresql://writer:hunter2@127.0.0.1:{deaf.getsockname()[1]}/db", timeout_seconds=0.1)
    assert found["connection"][1:] == ("failed", "no answer in time", "is the host reachable?")
    assert exit_status(found.values()) == 3


def test_a_connection_that_breaks_on_the_way_is_said_once_and_the_rest_is_skipped(relay):
    for pieces in (8, 14, 20):
        between = relay()
        between.pieces = pieces
        found = look(between.dsn)
        assert set(found) == DATABASE_CHECKS
        assert found["connection"].status == "failed"
        assert exit_status(found.values()) == 3
        between.close()
