"""A batch goes into the table as it is, once; what can't go waits or is set aside, and holds up nobody else."""

import itertools
import json
import time
import traceback
import uuid
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, FaultClass, OwnConnection, PooledConnections
from tests.records import BASE, bare_record, full_record, full_records
from tests.servers import role

SECRET = "hunter2-secret"
TEXT_FIELDS = [
    "action", "transport", "bank_id", "outcome", "error_type", "actor_id", "actor_type", "trace_id", "span_id",
    "parent_span_id", "service_name",
]  # fmt: skip
WRITES_LOG = ("USAGE ON SCHEMA public", "INSERT ON astrocyte_audit_log")
WRITES = (*WRITES_LOG, "INSERT ON astrocyte_audit_log_set_aside")

#: What a hostile or careless caller may give as a tenant's schema.
NO_SCHEMAS = [
    'public"; DROP TABLE astrocyte_audit_log; --',
    "public'; DROP TABLE astrocyte_audit_log; --",
    "public; DROP TABLE astrocyte_audit_log",
    'public"."astrocyte_audit_log',
    "public.astrocyte_audit_log",
    "pg_catalog",
    "PG_TEMP",
    "information_schema",
    "a b",
    "a\x00b",
    "\ud800",
    "%s",
    "{log}",
    "t" * 64,
    "ü",
    "1st",
]


@pytest.fixture
def migrating_table(database):
    """A table that may make what a record needs."""
    table = AuditTable(OwnConnection(database), migrate=True)
    yield table
    table.close()


def stored(table, schema=None):
    """Return all records of a schema by id, without the server's clock."""
    records = table.search(limit=10_000, schema=schema).records
    return {record.id: record._replace(recorded_at=None) for record in records}


def ids(records):
    return {record.id for record in records}


def schemas(connection):
    query = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
    return {row[0] for row in connection.execute(query)}


def refuse_action(connection, action, sqlstate="P0001"):
    """Add a trigger that refuses an action, with a detail that quotes the payload."""
    connection.execute(
        f"""
        CREATE OR REPLACE FUNCTION refuse_{action}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.action = '{action}' THEN
                RAISE EXCEPTION 'no: %', NEW.request USING ERRCODE = '{sqlstate}', DETAIL = NEW.request::text;
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse_{action} BEFORE INSERT ON astrocyte_audit_log
        FOR EACH ROW EXECUTE FUNCTION refuse_{action}();
        """
    )


class TestRoundTrip:
    def test_a_batch_comes_back_field_by_field(self, table):
        records = full_records(50) + [bare_record(number) for number in range(50, 100)]

        result = table.append(records)

        assert (result.stored, result.schemas) == (100, {"public"})
        assert stored(table) == {record.id: record._replace(schema="public") for record in records}

    def test_payloads_come_back_as_they_were(self, table):
        payloads = [
            {},
            {"text": "Zürich 東京 🧠", "quotes": "\"'\\{}[],NULL", "control": "\b\f\n\r\t\x7f"},
            {"numbers": [0, -1, 2**63, 0.1, 1e-300, 2.0**52 + 0.5], "flags": [True, False, None]},
            {"nested": {"list": [{"a": [[], {}]}]}, "": "empty key", 'k"{': 1},
            {"the escape of a NUL": "\\u0000 and \\\\u0000"},
            {"big": "x" * 200_000},
        ]
        records = [full_record(n, request=p, response=p, metadata=p) for n, p in enumerate(payloads)]

        table.append(records)

        rows = [table.get(record.id) for record in records]
        assert [row.request for row in rows] == payloads
        assert [row.response for row in rows] == payloads
        assert [row.metadata for row in rows] == payloads

    def test_texts_come_back_as_they_were(self, table):
        texts = [
            "", " ", "NULL", "null", "{}", '{"a"}', "Zürich 東京 🧠", "a,b", 'a"b', "a\\b", "\\", "a'b; --", "%s",
            "\b\n\t", "x" * 512,
        ]  # fmt: skip
        pairs = list(itertools.product(TEXT_FIELDS, texts))
        records = [full_record(number, **{field: text}) for number, (field, text) in enumerate(pairs)]

        table.append(records)

        rows = stored(table)
        assert [(field, getattr(rows[r.id], field)) for r, (field, _) in zip(records, pairs, strict=True)] == pairs

    def test_instants_come_back_to_the_microsecond(self, table):
        instants = [
            datetime(1, 1, 1, tzinfo=UTC),
            datetime(1582, 10, 4, 23, 59, 59, 999_999, UTC),
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(2026, 6, 1, 12, 0, 0, 1, UTC),
            datetime(2026, 6, 1, 12, 0, tzinfo=timezone(timedelta(hours=-9, minutes=-30))),
            datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC),
        ]
        records = [full_record(n, started_at=instant, ended_at=instant) for n, instant in enumerate(instants)]

        table.append(records)

        utc = [instant.astimezone(UTC) for instant in instants]
        assert [table.get(record.id).started_at for record in records] == utc
        assert [table.get(record.id).ended_at for record in records] == utc

    def test_an_instant_without_a_time_zone_is_utc_wherever_the_process_runs(self, table, monkeypatch):
        monkeypatch.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        try:
            table.append([full_record(started_at=datetime(2026, 6, 1, 12))])
        finally:
            monkeypatch.undo()
            time.tzset()

        assert table.get(full_record().id).started_at == datetime(2026, 6, 1, 12, tzinfo=UTC)

    def test_instants_are_read_as_utc_whatever_the_time_zone_of_the_session(self, database):
        table = AuditTable(OwnConnection(make_conninfo(database, options="-c TimeZone=Asia/Kathmandu")))
        last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # a day on there, and no datetime any more

        table.append([full_record(0), full_record(1, started_at=last, ended_at=last)])

        read = [record.started_at for record in table.search().records]
        assert [instant.isoformat() for instant in read] == [last.isoformat(), BASE.isoformat()]
        table.close()

    def test_outcomes_and_samplings_come_back_as_they_were(self, table):
        pairs = list(itertools.product(["success", "failure", "unknown", None], [True, False, None]))
        records = [full_record(n, outcome=outcome, sampled=sampled) for n, (outcome, sampled) in enumerate(pairs)]

        table.append(records)

        rows = [table.get(record.id) for record in records]
        assert [(row.outcome, row.sampled) for row in rows] == pairs

    def test_the_server_says_when_a_row_was_recorded(self, table, connection):
        before = connection.execute("SELECT now()").fetchone()[0]
        table.append([full_record(recorded_at=datetime(2000, 1, 1, tzinfo=UTC))])
        after = connection.execute("SELECT now()").fetchone()[0]

        assert before <= table.get(full_record().id).recorded_at <= after

    def test_an_empty_batch_stores_nothing(self, table):
        result = table.append([])

        assert (result.stored, result.parked, result.set_aside) == (0, {}, [])

    def test_thousands_of_records_are_one_batch(self, table, connection):
        records = full_records(3_000)

        assert table.append(records).stored == 3_000

        count, transactions = connection.execute(
            "SELECT count(*), count(DISTINCT xmin::text) FROM astrocyte_audit_log"
        ).fetchone()
        assert (count, transactions) == (3_000, 1)


class TestReplay:
    def test_a_batch_given_again_makes_no_row_and_counts_as_stored(self, table):
        table.append(full_records(10))

        result = table.append(full_records(20))

        assert result.stored == 20
        assert len(stored(table)) == 20

    def test_a_row_that_is_there_keeps_what_it_says(self, table):
        table.append([full_record(action="recall")])

        table.append([full_record(action="retain")])

        assert table.get(full_record().id).action == "recall"

    def test_a_record_twice_in_a_batch_is_one_row(self, table):
        result = table.append([full_record(), full_record()])

        assert result.stored == 2
        assert len(stored(table)) == 1


class TestTenants:
    def test_several_schemas_are_written_in_one_transaction(self, table, connection):
        table.migrate("Tenant_A", create_schema=True)
        table.migrate("tenant-b", create_schema=True)
        batch = [full_record(n, schema=schema) for n, schema in enumerate([None, "Tenant_A", "tenant-b", "Tenant_A"])]

        result = table.append(batch)

        assert (result.stored, result.schemas) == (4, {"public", "Tenant_A", "tenant-b"})
        assert ids(stored(table, "Tenant_A").values()) == ids([batch[1], batch[3]])
        transactions = connection.execute(
            """
            SELECT DISTINCT xmin::text FROM astrocyte_audit_log UNION
            SELECT xmin::text FROM "Tenant_A".astrocyte_audit_log UNION
            SELECT xmin::text FROM "tenant-b".astrocyte_audit_log
            """
        ).fetchall()
        assert len(transactions) == 1

    def test_a_record_that_names_no_schema_goes_to_the_tables_own(self, database):
        table = AuditTable(OwnConnection(database), schema="Tenant_A")
        table.migrate(create_schema=True)

        table.append([full_record(0), full_record(1, schema="public")])

        assert ids(stored(table, "Tenant_A").values()) == {full_record(0).id}
        assert ids(stored(table, "public").values()) == {full_record(1).id}
        table.close()

    @pytest.mark.parametrize("missing", ["schema", "table"])
    def test_what_is_missing_parks_its_tenant_only(self, table, connection, missing):
        if missing == "table":
            connection.execute("CREATE SCHEMA tenant_b")
        waiting = [full_record(n, schema="tenant_b") for n in range(2)]

        result = table.append([waiting[0], full_record(2), waiting[1]])

        assert result.stored == 1
        fault, records = result.parked.pop("tenant_b")
        assert (fault.kind, records) == (FaultClass.PARK, waiting)
        assert "run `astrocyte-otel-audit migrate`" in fault.reason
        assert (result.parked, result.set_aside) == ({}, [])

    def test_names_that_are_no_schemas_are_set_aside_and_never_reach_the_server(self, migrating_table, connection):
        records = [full_record(number, schema=name) for number, name in enumerate(NO_SCHEMAS)]

        result = migrating_table.append([*records, full_record(100)])

        assert result.stored == 1
        assert [record for record, _ in result.set_aside] == records
        assert {fault.kind for _, fault in result.set_aside} == {FaultClass.SET_ASIDE}
        assert schemas(connection) == {"public"}
        assert connection.execute("SELECT id::text FROM astrocyte_audit_log").fetchall() == [(full_record(100).id,)]
        assert ids(migrating_table.set_aside()) == ids(records)


class TestMigratingOnDemand:
    def test_without_leave_nothing_is_created(self, table, connection):
        table.append([full_record(schema="tenant_b")])

        assert schemas(connection) == {"public"}

    def test_with_leave_a_tenants_schema_and_table_are_created_for_its_first_record(self, migrating_table, connection):
        result = migrating_table.append([full_record(0, schema="Tenant-B"), full_record(1)])

        assert (result.stored, result.schemas) == (2, {"public", "Tenant-B"})
        assert ids(stored(migrating_table, "Tenant-B").values()) == {full_record(0).id}
        assert schemas(connection) == {"public", "Tenant-B"}

    def test_with_leave_an_older_table_is_upgraded_for_its_first_record(self, migrating_table, connection):
        connection.execute("DROP TABLE astrocyte_audit_log, astrocyte_audit_log_migrations")
        connection.execute(
            """
            CREATE TABLE astrocyte_audit_log (
                id uuid PRIMARY KEY, action text NOT NULL, transport text NOT NULL, bank_id text,
                started_at timestamptz NOT NULL, ended_at timestamptz, request jsonb, response jsonb, metadata jsonb
            )
            """
        )

        assert migrating_table.append([full_record()]).stored == 1

    def test_with_leave_a_sound_table_is_not_touched(self, migrating_table, connection):
        query = "SELECT max(xmin::text::bigint) FROM pg_class"
        before = connection.execute(query).fetchone()

        migrating_table.append(full_records(3))

        assert connection.execute(query).fetchone() == before

    def test_with_leave_but_without_the_right_the_tenant_waits(self, database, connection):
        with role(database, *WRITES) as dsn:
            table = AuditTable(OwnConnection(dsn), migrate=True)
            result = table.append([full_record(0, schema="tenant_b"), full_record(1)])
            table.close()

        fault, records = result.parked["tenant_b"]
        assert (fault.sqlstate, records) == ("42501", [full_record(0, schema="tenant_b")])
        assert result.stored == 1
        assert schemas(connection) == {"public"}

    def test_a_lent_pool_with_rows_as_dicts_will_do(self, database):
        with ConnectionPool(database, min_size=1, max_size=1, kwargs={"row_factory": dict_row}) as pool:
            table = AuditTable(PooledConnections(pool), migrate=True)

            assert table.append([full_record(schema="tenant_b")]).stored == 1
            assert ids(stored(table, "tenant_b").values()) == {full_record().id}

    def test_a_lent_connection_is_given_back_as_it_was(self, database):
        with ConnectionPool(database, min_size=1, max_size=1, open=True) as pool:
            AuditTable(PooledConnections(pool)).append(full_records(3))

            with pool.connection() as lent:
                assert lent.autocommit is False


class TestBadRows:
    def test_a_record_against_a_constraint_is_set_aside_and_its_batch_is_stored(self, table, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log ADD CONSTRAINT known CHECK (transport <> 'fax')")
        records = full_records(9)
        records[4] = bad = full_record(4, transport="fax")

        result = table.append(records)

        assert result.stored == 8
        ((record, fault),) = result.set_aside
        assert (record, fault.kind, fault.sqlstate) == (bad, FaultClass.SET_ASIDE, "23514")
        assert ids(stored(table).values()) == ids(records) - {bad.id}
        (kept,) = table.set_aside()
        assert (kept.id, kept.action, kept.reason, kept.sqlstate) == (bad.id, "recall", fault.reason, "23514")

    def test_a_record_against_a_trigger_is_set_aside(self, table, connection):
        refuse_action(connection, "forget")

        result = table.append([full_record(0), full_record(1, action="forget"), full_record(2)])

        assert result.stored == 2
        assert [(record.action, fault.sqlstate) for record, fault in result.set_aside] == [("forget", "P0001")]

    def test_a_record_that_is_refused_when_it_is_committed_is_set_aside(self, table, connection):
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END$$"
        )
        connection.execute(
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON astrocyte_audit_log DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW WHEN (NEW.action = 'refused') EXECUTE FUNCTION refuse()"
        )
        batch = full_records(5)
        batch[2] = batch[2]._replace(action="refused")

        appended = table.append(batch)

        assert (appended.stored, [record.id for record, _ in appended.set_aside]) == (4, [batch[2].id])

    def test_psycopg_logs_nothing_of_a_record_that_is_refused(self, table, caplog):
        batch = full_records(300)
        batch[200] = batch[200]._replace(action=None)

        assert len(table.append(batch).set_aside) == 1
        assert caplog.records == []

    def test_a_record_too_long_for_an_index_is_set_aside(self, table, connection):
        connection.execute("CREATE INDEX ON astrocyte_audit_log ((request ->> 'text'))")
        noise = "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(5_000))  # compresses badly

        result = table.append([full_record(0), full_record(1, request={"text": noise}), full_record(2)])

        assert result.stored == 2
        assert [(record.id, fault.sqlstate) for record, fault in result.set_aside] == [(full_record(1).id, "54000")]

    def test_a_record_without_what_the_table_demands_is_set_aside(self, table):
        result = table.append([full_record(0), full_record(1)._replace(started_at=None), full_record(2)])

        assert result.stored == 2
        assert [fault.sqlstate for _, fault in result.set_aside] == ["23502"]

    def test_records_of_other_types_are_set_aside(self, table):
        bad = [full_record(1, started_at="no instant"), full_record(2, bank_id=7)]

        result = table.append([full_record(0), *bad, full_record(3)])

        assert result.stored == 2
        assert [record for record, _ in result.set_aside] == bad
        assert ids(table.set_aside()) == ids(bad)

    def test_many_bad_records_are_each_found(self, table, connection):
        refuse_action(connection, "forget")
        records = [full_record(n, action="forget" if n % 3 == 0 else "recall") for n in range(60)]

        result = table.append(records)

        assert result.stored == 40
        assert ids(record for record, _ in result.set_aside) == ids(records[::3])
        assert ids(stored(table).values()) == ids(records) - ids(records[::3])
        assert ids(table.set_aside(limit=100)) == ids(records[::3])

    def test_a_batch_of_bad_records_only_is_set_aside_whole(self, table, connection):
        refuse_action(connection, "forget")
        records = full_records(5, action="forget")

        result = table.append(records)

        assert (result.stored, result.schemas) == (0, set())
        assert ids(table.set_aside()) == ids(records)

    def test_a_bad_record_of_one_tenant_costs_the_others_nothing(self, table, connection):
        table.migrate("tenant_b", create_schema=True)
        refuse_action(connection, "forget")

        result = table.append([
            full_record(0, action="forget"), full_record(1, action="forget", schema="tenant_b"), full_record(2)
        ])  # fmt: skip

        assert result.stored == 2
        assert ids(record for record, _ in result.set_aside) == {full_record(0).id}

    def test_no_record_is_lost_where_some_are_set_aside_and_others_wait(self, table, connection):
        refuse_action(connection, "forget", sqlstate="P0001")
        refuse_action(connection, "wait", sqlstate="AU001")
        actions = ["forget", "wait", "recall", "wait", "recall", "recall", "wait", "forget"]
        records = [full_record(number, action=action) for number, action in enumerate(actions)]

        result = table.append(records)

        _, waiting = result.parked["public"]
        assert ids(stored(table).values()) | ids(waiting) | ids(table.set_aside()) == ids(records)
        assert result.stored + len(waiting) + len(result.set_aside) == len(records)

    def test_a_bad_record_given_again_is_set_aside_once(self, table, connection):
        refuse_action(connection, "forget")

        table.append([full_record(action="forget")])
        again = table.append([full_record(action="forget")])

        assert (len(again.set_aside), again.parked) == (1, {})
        assert len(table.set_aside()) == 1

    @pytest.mark.parametrize("changes", [{"id": "no UUID"}, {"id": None}, {"action": 7}, {"action": None}], ids=ascii)
    def test_the_side_table_has_a_place_for_whatever_is_no_record(self, table, changes):
        bad = full_record(1, **changes)

        result = table.append([full_record(0), bad, full_record(2)])
        table.append([bad])

        assert (result.stored, result.parked) == (2, {})
        (kept,) = table.set_aside()
        assert {name: json.loads(kept.record)[name] for name in changes} == changes

    def test_a_record_that_cant_even_be_set_aside_waits(self, table, connection):
        refuse_action(connection, "forget")
        connection.execute("DROP TABLE astrocyte_audit_log_set_aside")
        bad = full_record(1, action="forget")

        result = table.append([full_record(0), bad, full_record(2)])

        assert (result.stored, result.set_aside) == (2, [])
        fault, waiting = result.parked["public"]
        assert (waiting, fault.sqlstate) == ([bad], "42P01")
        assert "P0001" in fault.reason
        assert "can't be set aside: the table does not exist" in fault.reason

    def test_a_record_that_no_partition_takes_waits_for_one(self, empty_database):
        with psycopg.connect(empty_database, autocommit=True) as connection:
            table = AuditTable(OwnConnection(empty_database))
            table.migrate()
            connection.execute("ALTER TABLE astrocyte_audit_log RENAME TO plain")
            connection.execute(
                "CREATE TABLE astrocyte_audit_log (LIKE plain INCLUDING DEFAULTS) PARTITION BY RANGE (started_at)"
            )

            result = table.append([full_record()])
            assert "partition" in result.parked["public"][0].reason

            connection.execute("CREATE TABLE rest PARTITION OF astrocyte_audit_log DEFAULT")
            assert table.append([full_record()]).stored == 1
            table.close()


class TestValuesThatCantBreakARow:
    def test_whatever_payloads_hold_their_rows_are_stored(self, table):
        endless = {}
        endless["self"] = endless
        values = [
            "a\x00b", "\ud800", "\udfff\ud800", float("nan"), float("-inf"), 2**64, 10**400, 10**5000, b"\x00\xff",
            object(), {1, 2}, {("a", 1): {"b\x00": 1}}, "x" * 1_000_000, endless,
            json.loads('{"a":' * 200 + "1" + "}" * 200), json.loads('{"a":' * 900 + "1" + "}" * 900),
        ]  # fmt: skip
        records = [
            full_record(n, request={"v": v}, response={"v": [v]}, metadata={"v": v}) for n, v in enumerate(values)
        ]

        result = table.append([*records, full_record(100)])

        assert (result.stored, result.set_aside) == (len(values) + 1, [])
        assert table.get(full_record(100).id).request == full_record(100).request

    def test_whatever_texts_hold_their_rows_are_stored(self, table):
        mended = {
            "a\x00b": "a\ufffdb", "\udc00": "\ufffd", "x" * 100_000: "x" * 512,
            "🧠" * 100_000: "🧠" * 512, "\x00" * 5_000: "\ufffd" * 512,
        }  # fmt: skip
        pairs = list(itertools.product(TEXT_FIELDS, mended))
        records = [full_record(number, **{field: text}) for number, (field, text) in enumerate(pairs)]

        result = table.append(records)

        assert (result.stored, result.set_aside) == (len(pairs), [])
        rows = stored(table)
        for record, (field, text) in zip(records, pairs, strict=True):
            assert getattr(rows[record.id], field) == mended[text], field


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_a_database_of_another_encoding_loses_nothing(server_dsn, encoding):
    name = f"audit_{encoding.lower()}_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    table = AuditTable(OwnConnection(make_conninfo(server_dsn, dbname=name)))
    table.migrate()
    records = [
        full_record(0),
        full_record(1, bank_id="Käse", request={"v": "Käse"}),
        full_record(2, bank_id="🧠", request={"v": "🧠"}),
    ]

    result = table.append(records)

    assert result.parked == {}
    kept = {row.id: json.loads(row.record) for row in table.set_aside()}
    assert stored(table).keys() | kept.keys() == ids(records)
    assert full_record(0).id in stored(table)
    assert all(kept[row]["bank_id"] in ("Käse", "🧠") for row in kept)
    table.close()
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name}")


class TestRights:
    def test_a_role_that_may_only_insert_can_write(self, database, table):
        with role(database, *WRITES) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            result = writer.append(full_records(3))
            again = writer.append(full_records(3))
            writer.close()

        assert (result.stored, again.stored) == (3, 3)
        assert len(stored(table)) == 3

    def test_a_role_that_may_only_insert_can_set_aside(self, database, table, connection):
        refuse_action(connection, "forget")

        with role(database, *WRITES) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            writer.append([full_record(0), full_record(1, action="forget")])
            writer.append([full_record(1, action="forget")])
            writer.close()

        assert ids(table.set_aside()) == {full_record(1).id}

    def test_without_the_right_to_set_aside_a_bad_record_waits(self, database, connection):
        refuse_action(connection, "forget")

        with role(database, *WRITES_LOG) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            result = writer.append([full_record(0), full_record(1, action="forget")])
            writer.close()

        assert result.stored == 1
        fault, waiting = result.parked["public"]
        assert (waiting, fault.sqlstate) == ([full_record(1, action="forget")], "42501")

    @pytest.mark.parametrize("grants", [(), ("USAGE ON SCHEMA public", "SELECT ON astrocyte_audit_log")])
    def test_a_role_that_may_not_insert_is_told_what_to_grant(self, database, grants):
        with role(database, *grants) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            result = writer.append(full_records(2))
            writer.close()

        fault, records = result.parked["public"]
        assert (fault.kind, fault.sqlstate, records) == (FaultClass.PARK, "42501", full_records(2))
        assert "GRANT the role USAGE on the schema, and on the table and on its side table" in fault.reason


class TestCheck:
    def test_a_table_that_can_be_written_has_no_fault(self, table):
        assert table.check() is None
        assert stored(table) == {}

    def test_a_role_that_may_only_insert_has_no_fault(self, database):
        with role(database, *WRITES) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            assert writer.check() is None
            writer.close()

    def test_a_schema_that_is_not_there_has_a_fault(self, table):
        fault = table.check("absent")

        assert (fault.kind, fault.sqlstate) == (FaultClass.PARK, "42P01")

    @pytest.mark.parametrize("schema", ["pg_catalog", 'no"name'])
    def test_a_name_that_is_no_schemas_has_a_fault(self, schema):
        assert AuditTable(OwnConnection("host=/nowhere")).check(schema).kind is FaultClass.SET_ASIDE

    def test_a_table_that_refuses_every_statement_has_a_fault(self, table, connection):
        connection.execute(
            """
            CREATE FUNCTION closed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'closed'; END $$;
            CREATE TRIGGER closed BEFORE INSERT ON astrocyte_audit_log EXECUTE FUNCTION closed();
            """
        )

        assert table.check().sqlstate == "P0001"

    def test_checking_creates_what_is_missing_with_leave(self, migrating_table, connection):
        assert migrating_table.check("tenant_b") is None
        assert "tenant_b" in schemas(connection)

    def test_a_missing_side_table_is_a_fault(self, table, connection):
        connection.execute("DROP TABLE astrocyte_audit_log_set_aside")

        assert table.check().sqlstate == "42P01"

    def test_a_missing_right_to_set_aside_is_a_fault(self, database):
        with role(database, *WRITES_LOG) as dsn:
            writer = AuditTable(OwnConnection(dsn))
            assert writer.check().sqlstate == "42501"
            writer.close()


class TestSecrets:
    @pytest.mark.parametrize("sqlstate", ["P0001", "AU001"])
    def test_no_fault_quotes_a_payload(self, table, connection, caplog, sqlstate):
        caplog.set_level(0)
        refuse_action(connection, "forget", sqlstate)

        result = table.append([full_record(0), full_record(1, action="forget", request={"text": SECRET})])

        faults = [fault for _, fault in result.set_aside] + [fault for fault, _ in result.parked.values()]
        assert len(faults) == 1
        assert SECRET not in str(faults)
        assert SECRET not in caplog.text

    @pytest.mark.parametrize("tenant", [None, "tenant_b"], ids=["one tenant", "two tenants"])
    def test_no_error_quotes_a_payload(self, table, connection, caplog, tenant):
        caplog.set_level(0)
        table.migrate("tenant_b", create_schema=True)
        refuse_action(connection, "forget", sqlstate="40001")
        secret = full_record(1, action="forget", request={"text": SECRET})

        with pytest.raises(DatabaseUnavailableError) as refusal:
            table.append([full_record(0, schema=tenant), secret])

        assert SECRET not in refusal.value.reason
        assert SECRET not in "".join(traceback.format_exception(refusal.value))
        assert SECRET not in caplog.text
