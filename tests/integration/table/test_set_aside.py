"""What the table refused is kept beside it, whole, with the reason."""

import json
from datetime import datetime

import pytest

from astrocyte_otel_audit import ConfigurationError
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.records import bare_record, full_record, full_records
from tests.servers import role


@pytest.fixture
def picky_table(table, connection):
    """A table that takes nothing whose transport is ``fax``, in no schema."""
    table.migrate("tenant_b", create_schema=True)
    for schema in ("public", "tenant_b"):
        connection.execute(f"ALTER TABLE {schema}.astrocyte_audit_log ADD CHECK (transport <> 'fax')")
    return table


def fax(number=0, **changes):
    return full_record(number, transport="fax", **changes)


def test_nothing_is_set_aside_at_first(table):
    assert table.set_aside() == []


def test_a_record_set_aside_says_what_it_was_and_why(picky_table, connection):
    before = connection.execute("SELECT now()").fetchone()[0]

    picky_table.append([full_record(0), fax(1)])

    (row,) = picky_table.set_aside()
    assert (row.id, row.action, row.sqlstate) == (fax(1).id, "recall", "23514")
    assert row.reason == "a constraint of the table refuses the record"
    assert row.set_aside_at >= before


def test_a_record_set_aside_is_kept_whole(picky_table):
    record = fax(1, schema="tenant_b", metadata={"note": "Zürich 🧠", "list": [1, None, {}]})

    picky_table.append([record])

    kept = json.loads(picky_table.set_aside(schema="tenant_b")[0].record)
    for name, value in record._asdict().items():
        assert (datetime.fromisoformat(kept[name]) if isinstance(value, datetime) else kept[name]) == value


def test_records_full_of_the_unstorable_can_still_be_set_aside(picky_table):
    records = [
        fax(number, **changes)
        for number, changes in enumerate([
            {"action": "a\x00\ud800b"},
            {"action": "x" * 100_000},
            {"bank_id": "\x00"},
            {"request": {"n": float("nan"), "s": "\ud800", "b": b"\x00", "i": 10**400}},
            {"request": {"text": "x" * 1_000_000}},
            {"error_type": "'; DROP TABLE astrocyte_audit_log; --"},
        ])
    ]  # fmt: skip

    result = picky_table.append([*records, full_record(100)])

    assert (result.stored, result.parked) == (1, {})
    rows = picky_table.set_aside()
    assert {row.id for row in rows} == {record.id for record in records}
    assert {json.loads(row.record)["transport"] for row in rows} == {"fax"}


def test_a_bare_record_can_be_set_aside(picky_table):
    picky_table.append([bare_record(transport="fax")])

    assert json.loads(picky_table.set_aside()[0].record)["bank_id"] is None


def test_a_record_is_set_aside_in_its_tenants_schema(picky_table):
    picky_table.append([fax(0), fax(1, schema="tenant_b"), full_record(2)])

    assert [row.id for row in picky_table.set_aside()] == [fax(0).id]
    assert [row.id for row in picky_table.set_aside(schema="tenant_b")] == [fax(1).id]


def test_a_record_of_an_impossible_schema_is_set_aside_in_the_tables_own(database):
    table = AuditTable(OwnConnection(database), schema="tenant_b")
    table.migrate(create_schema=True)

    table.append([full_record(schema="no schema's name")])

    (row,) = table.set_aside()
    assert json.loads(row.record)["schema"] == "no schema's name"
    assert table.set_aside(schema="public") == []
    table.close()


def test_records_set_aside_are_listed_newest_first(picky_table):
    for number in range(3):
        picky_table.append([fax(number)])

    assert [row.id for row in picky_table.set_aside()] == [fax(number).id for number in (2, 1, 0)]
    assert [row.id for row in picky_table.set_aside(limit=2)] == [fax(number).id for number in (2, 1)]


@pytest.mark.parametrize("limit", [0, -1, 10_001, 1.5, "5", True])
def test_a_limit_out_of_bounds_is_refused(limit):
    with pytest.raises(ConfigurationError, match=r"limit: got .* from 1 to 10,000"):
        AuditTable(OwnConnection("host=/nowhere")).set_aside(limit=limit)


def test_a_name_that_is_no_schemas_is_refused():
    with pytest.raises(ConfigurationError, match="schema: "):
        AuditTable(OwnConnection("host=/nowhere")).set_aside(schema='public"; --')


def test_a_missing_side_table_says_what_to_do(table, connection):
    connection.execute("DROP TABLE astrocyte_audit_log_set_aside")

    with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate`"):
        table.set_aside()


def test_a_role_that_may_not_read_the_side_table_is_told_what_to_grant(database):
    with role(database, "USAGE ON SCHEMA public", "SELECT ON astrocyte_audit_log") as dsn:
        reader = AuditTable(OwnConnection(dsn))
        with pytest.raises(DatabaseUnavailableError, match="SELECT to read"):
            reader.set_aside()
        reader.close()


def test_records_set_aside_are_no_rows_of_the_log(picky_table):
    picky_table.append([fax(number) for number in range(3)] + full_records(5)[3:])

    assert len(picky_table.search().records) == 2
    assert picky_table.get(fax(0).id) is None
