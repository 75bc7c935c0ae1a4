"""Migration makes the table, upgrades the one that Astrocyte made, and does no damage."""

import subprocess
import sys
import uuid
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit.postgres import AuditTable, FaultClass, OwnConnection, PooledConnections
from astrocyte_otel_audit.postgres.faults import classify
from astrocyte_otel_audit.postgres.migrate import _lock_key
from tests.records import BASE, full_record
from tests.servers import emptied, role

MIGRATIONS = ["001_log", "002_trace", "003_set_aside", "004_holds"]
#: What Astrocyte's migration 023 creates.
UPSTREAM = """
    CREATE TABLE {log} (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        action text NOT NULL,
        transport text NOT NULL,
        bank_id text,
        started_at timestamptz NOT NULL DEFAULT now(),
        ended_at timestamptz,
        request jsonb,
        response jsonb,
        metadata jsonb NOT NULL DEFAULT '{{}}'::jsonb
    );
    CREATE INDEX astrocyte_audit_log_bank_started_idx ON {log} (bank_id, started_at DESC);
    CREATE INDEX astrocyte_audit_log_action_started_idx ON {log} (action, started_at DESC);
    CREATE INDEX astrocyte_audit_log_started_idx ON {log} (started_at);
"""
INDEXES = {
    "astrocyte_audit_log_pkey": "UNIQUE btree (id)",
    "astrocyte_audit_log_bank_started_idx": "btree (bank_id, started_at DESC)",
    "astrocyte_audit_log_action_started_idx": "btree (action, started_at DESC)",
    "astrocyte_audit_log_started_idx": "btree (started_at)",
    "astrocyte_audit_log_trace_idx": "btree (trace_id)",
    "astrocyte_audit_log_recorded_idx": "brin (recorded_at)",
}
#: Name, type, whether null is allowed, and default.
COLUMNS = [
    ("id", "uuid", False, "gen_random_uuid()"),
    ("action", "text", False, None),
    ("transport", "text", False, None),
    ("bank_id", "text", True, None),
    ("started_at", "timestamp with time zone", False, "now()"),
    ("ended_at", "timestamp with time zone", True, None),
    ("request", "jsonb", True, None),
    ("response", "jsonb", True, None),
    ("metadata", "jsonb", False, "'{}'::jsonb"),
    ("outcome", "text", True, None),
    ("error_type", "text", True, None),
    ("actor_id", "text", True, None),
    ("actor_type", "text", True, None),
    ("trace_id", "text", True, None),
    ("span_id", "text", True, None),
    ("parent_span_id", "text", True, None),
    ("sampled", "boolean", True, None),
    ("service_name", "text", True, None),
    ("recorded_at", "timestamp with time zone", True, "now()"),
]


@pytest.fixture
def empty_database(module_database):
    """DSN of the module's database, without any table."""
    return emptied(module_database)


@pytest.fixture
def connection(empty_database):
    """A superuser's connection, for looking on."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def new_table(empty_database):
    """A table that isn't there yet."""
    table = AuditTable(OwnConnection(empty_database))
    yield table
    table.close()


def columns(connection, name):
    return connection.execute(
        """
        SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull, pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
        """,
        [name],
    ).fetchall()


def indexes(connection, schema="public", table="astrocyte_audit_log"):
    """Return name and kind of a table's indexes; two that say the same are two entries."""
    found = connection.execute(
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = %s AND tablename = %s", [schema, table]
    )
    return {
        name: ("UNIQUE " if "UNIQUE" in definition else "") + definition.partition(" USING ")[2]
        for name, definition in found
    }


def ledger(connection, schema="public", table="astrocyte_audit_log"):
    name = sql.Identifier(schema, f"{table}_migrations")
    return connection.execute(sql.SQL("SELECT version, name FROM {} ORDER BY version").format(name)).fetchall()


def relations(connection):
    return [row[0] for row in connection.execute("SELECT relname FROM pg_stat_user_tables ORDER BY relname")]


def create_upstream_table(connection, schema="public"):
    connection.execute(sql.SQL(UPSTREAM).format(log=sql.Identifier(schema, "astrocyte_audit_log")))


def write_as_astrocyte_does(connection, action="retain"):
    """Insert a row with the nine columns that Astrocyte's own logger knows."""
    row_id = uuid.uuid4()
    connection.execute(
        """
        INSERT INTO public.astrocyte_audit_log
            (id, action, transport, bank_id, started_at, ended_at, request, response, metadata)
        VALUES (%s, %s, 'system', 'bank', %s, %s, %s, %s, %s)
        """,
        [row_id, action, BASE, BASE, Jsonb({"n": 1}), None, Jsonb({})],
    )
    return str(row_id)


def test_migrate_creates_the_table_as_it_was_designed(new_table, connection):
    assert new_table.migrate() == MIGRATIONS

    assert columns(connection, "astrocyte_audit_log") == COLUMNS
    assert indexes(connection) == INDEXES
    assert ledger(connection) == list(enumerate(MIGRATIONS, start=1))


def test_a_table_with_nothing_to_do_is_left_alone(new_table, connection):
    new_table.migrate()

    assert new_table.migrate() == []

    assert ledger(connection) == list(enumerate(MIGRATIONS, start=1))


def test_a_table_with_nothing_to_do_is_not_locked(empty_database, connection):
    table = AuditTable(OwnConnection(empty_database), statement_timeout_seconds=2)
    table.migrate()

    with connection.transaction():
        connection.execute("LOCK TABLE astrocyte_audit_log, astrocyte_audit_log_set_aside IN ACCESS EXCLUSIVE MODE")
        assert table.migrate() == []

    table.close()


def test_only_a_table_with_something_to_do_waits_for_another_migration(empty_database, connection):
    table = AuditTable(OwnConnection(empty_database), statement_timeout_seconds=0.1)

    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key("public")])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            table.migrate()
    table.migrate()
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key("public")])
        assert table.migrate() == []

    table.close()


def test_migrating_waits_for_no_lock_longer_than_a_statement_may_take(empty_database, connection):
    create_upstream_table(connection)
    table = AuditTable(OwnConnection(empty_database), statement_timeout_seconds=0.1)

    with connection.transaction():
        connection.execute("SELECT count(*) FROM astrocyte_audit_log")  # a reader whose transaction stays open
        with pytest.raises(psycopg.errors.LockNotAvailable):
            table.migrate()

    assert table.migrate() == MIGRATIONS
    table.close()


def test_an_interrupted_migration_leaves_nothing_behind(empty_database, connection):
    create_upstream_table(connection)
    table = AuditTable(OwnConnection(empty_database), statement_timeout_seconds=0.1)

    with connection.transaction():
        connection.execute("SELECT count(*) FROM astrocyte_audit_log")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            table.migrate()

    assert relations(connection) == ["astrocyte_audit_log"]
    assert columns(connection, "astrocyte_audit_log") == COLUMNS[:9]
    table.close()


def test_the_table_that_astrocyte_made_gets_our_columns_and_keeps_its_rows(new_table, connection):
    create_upstream_table(connection)
    before = write_as_astrocyte_does(connection)

    new_table.migrate()

    assert columns(connection, "astrocyte_audit_log") == COLUMNS
    kept = new_table.get(before)
    assert (kept.action, kept.bank_id, kept.started_at, kept.request) == ("retain", "bank", BASE, {"n": 1})
    assert (kept.outcome, kept.trace_id, kept.sampled) == (None, None, None)


def test_the_rows_of_the_table_that_astrocyte_made_are_not_rewritten(new_table, connection):
    create_upstream_table(connection)
    write_as_astrocyte_does(connection)
    file = connection.execute("SELECT pg_relation_filenode('astrocyte_audit_log')").fetchone()

    new_table.migrate()

    assert connection.execute("SELECT pg_relation_filenode('astrocyte_audit_log')").fetchone() == file


def test_the_table_that_astrocyte_made_gets_no_index_twice(new_table, connection):
    create_upstream_table(connection)

    new_table.migrate()

    assert indexes(connection) == INDEXES


def test_astrocytes_own_writer_works_after_the_upgrade(new_table, connection):
    create_upstream_table(connection)
    new_table.migrate()

    written = write_as_astrocyte_does(connection, action="recall")

    row = new_table.get(written)
    assert row.action == "recall"
    assert row.recorded_at is not None


def test_astrocytes_migration_does_nothing_to_our_table(new_table, connection):
    new_table.migrate()
    upstream = UPSTREAM.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")
    upstream = upstream.replace("CREATE INDEX", "CREATE INDEX IF NOT EXISTS")

    connection.execute(sql.SQL(upstream).format(log=sql.Identifier("astrocyte_audit_log")))

    assert columns(connection, "astrocyte_audit_log") == COLUMNS
    assert indexes(connection) == INDEXES


def test_a_table_that_was_made_anew_beside_its_ledger_is_upgraded_again(new_table, connection):
    new_table.migrate()
    connection.execute("DROP TABLE astrocyte_audit_log")
    create_upstream_table(connection)

    assert new_table.migrate() == MIGRATIONS

    assert columns(connection, "astrocyte_audit_log") == COLUMNS
    assert ledger(connection) == list(enumerate(MIGRATIONS, start=1))


@pytest.mark.parametrize("lost", ["astrocyte_audit_log", "astrocyte_audit_log_set_aside"])
def test_a_table_that_was_dropped_is_made_again(new_table, connection, lost):
    new_table.migrate()
    connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(lost)))

    assert new_table.migrate() == MIGRATIONS

    assert lost in relations(connection)
    assert new_table.migrate() == []


def test_a_tenants_schema_is_created_under_exactly_its_name(new_table, connection):
    names = ["Tenant_A", "tenant_a", "tenant-b", "tenant$c", "select", "_", "t" * 63]

    for name in names:
        new_table.migrate(name, create_schema=True)

    created = connection.execute("SELECT nspname FROM pg_namespace WHERE oid >= 16384").fetchall()
    assert {name for (name,) in created} == {"public", *names}
    assert [ledger(connection, name) for name in names] == [list(enumerate(MIGRATIONS, start=1))] * len(names)
    assert [indexes(connection, name) for name in names] == [INDEXES] * len(names)


def test_tenants_whose_names_differ_in_case_have_a_table_each(new_table, connection):
    new_table.migrate("tenant_a", create_schema=True)
    new_table.migrate("Tenant_A", create_schema=True)

    new_table.append([full_record(0, schema="Tenant_A")])

    assert [record.id for record in new_table.search(schema="Tenant_A").records] == [full_record(0).id]
    assert new_table.search(schema="tenant_a").records == []


def test_a_schema_whose_name_holds_quotes_is_quoted(new_table, connection):
    name = 'te"nant; DROP SCHEMA public CASCADE; --'

    new_table.migrate(name, create_schema=True)

    assert ledger(connection, name) == list(enumerate(MIGRATIONS, start=1))
    assert connection.execute("SELECT to_regnamespace('public') IS NOT NULL").fetchone() == (True,)


def test_a_missing_schema_is_not_created_unasked(new_table, connection):
    with pytest.raises(psycopg.errors.InvalidSchemaName) as refusal:
        new_table.migrate("tenant_a")

    assert "--create-schema" in classify(refusal.value).reason
    assert connection.execute("SELECT to_regnamespace('tenant_a')").fetchone() == (None,)


def test_a_table_may_have_another_name(empty_database, connection):
    table = AuditTable(OwnConnection(empty_database), table="Audit-2026")

    assert table.migrate() == MIGRATIONS

    assert columns(connection, '"Audit-2026"') == COLUMNS
    assert indexes(connection, table="Audit-2026") == {
        name.replace("astrocyte_audit_log", "Audit-2026"): definition for name, definition in INDEXES.items()
    }
    table.close()


def test_two_tables_of_the_longest_names_in_one_schema_have_their_own_indexes(empty_database, connection):
    names = ["t" * 43 + "1", "t" * 43 + "2"]
    with ExitStack() as stack:
        for name in names:
            table = AuditTable(OwnConnection(empty_database), table=name)
            stack.callback(table.close)
            table.migrate()

    assert [len(indexes(connection, table=name)) for name in names] == [len(INDEXES)] * 2


def test_a_lent_pool_with_rows_as_dicts_can_be_migrated_with(empty_database, connection):
    with ConnectionPool(empty_database, min_size=1, max_size=1, kwargs={"row_factory": dict_row}) as pool:
        table = AuditTable(PooledConnections(pool))

        assert table.migrate() == MIGRATIONS
        assert table.migrate() == []


ONE_OF_MANY = """
import sys
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

table = AuditTable(OwnConnection(sys.argv[1]), schema="Tenant_A", table=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(table.migrate(create_schema=True), flush=True)
table.close()
"""


def test_ten_processes_may_migrate_at_once(empty_database, connection):
    tables = ["one", "other"] * 5
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", ONE_OF_MANY, empty_database, table],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))
            for table in tables
        ]  # fmt: skip
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 10
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=30)[0].strip() for process in processes]

    assert [process.returncode for process in processes] == [0] * 10
    assert sorted(said) == [str(MIGRATIONS)] * 2 + ["[]"] * 8
    for table in ("one", "other"):
        assert ledger(connection, "Tenant_A", table) == list(enumerate(MIGRATIONS, start=1))


def test_a_role_without_rights_is_told_what_is_missing(empty_database, connection):
    with role(empty_database) as dsn:
        table = AuditTable(OwnConnection(dsn))
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal:
            table.migrate()
        table.close()

    fault = classify(refusal.value)
    assert fault.kind is FaultClass.PARK
    assert "migrating needs CREATE on the schema" in fault.reason
    assert relations(connection) == []


def test_a_table_of_that_name_that_is_no_audit_log_is_not_touched(new_table, connection):
    connection.execute("CREATE TABLE astrocyte_audit_log (id integer PRIMARY KEY, note text)")
    connection.execute("INSERT INTO astrocyte_audit_log VALUES (1, 'mine')")

    with pytest.raises(psycopg.errors.UndefinedColumn) as refusal:
        new_table.migrate()

    assert "if it is an audit log" in classify(refusal.value).reason
    assert relations(connection) == ["astrocyte_audit_log"]
    assert [name for name, *_ in columns(connection, "astrocyte_audit_log")] == ["id", "note"]
    assert connection.execute("SELECT * FROM astrocyte_audit_log").fetchall() == [(1, "mine")]


def test_a_view_of_that_name_is_not_touched(new_table, connection):
    connection.execute("CREATE VIEW astrocyte_audit_log AS SELECT 1 AS id")

    with pytest.raises(psycopg.Error) as refusal:
        new_table.migrate()

    assert classify(refusal.value).kind is FaultClass.PARK
    assert relations(connection) == []
