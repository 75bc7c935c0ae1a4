"""Records become the arrays of a statement, and the rows of the side table."""

import json
import uuid
from datetime import datetime

import pytest

from astrocyte_otel_audit.postgres.encoding import columns, side_row
from astrocyte_otel_audit.postgres.statements import statement
from tests.payloads import Hostile, cycle, nested
from tests.records import bare_record, full_record


def test_there_is_a_column_for_every_placeholder():
    placeholders = statement("append", "public", "log").as_string(None).count("%s")

    assert len(columns([])) == len(columns([bare_record(), full_record()])) == placeholders


def test_the_side_tables_row_names_every_field_of_a_record():
    record = full_record(7, schema="tenant")

    row = side_row(record, "it is bad", "P0001")

    assert row[:4] == (record.id, record.action, "it is bad", "P0001")
    stored = json.loads(row[4])
    assert list(stored) == list(record._fields)
    assert stored["schema"] == "tenant"
    assert stored["request"] == record.request
    assert datetime.fromisoformat(stored["started_at"]) == record.started_at


@pytest.mark.parametrize("changes", [
    {"action": "a\x00\ud800"},
    {"action": 7},
    {"id": None},
    {"id": "no UUID"},
    {"bank_id": "\u20ac\U0001f9e0"},
    {"request": {"n": 10**5000, "s": "\ud800", "k": {Hostile(): Hostile()}}},
    {"request": cycle(2)},
    {"metadata": nested(5_000)},
    {"started_at": "no datetime"},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_the_side_tables_row_of_a_broken_record_is_what_any_database_takes(changes):
    broken = full_record(1)._replace(**changes)

    row = side_row(broken, "it is bad", None)

    uuid.UUID(row[0])
    assert row == side_row(broken, "it is bad", None)  # the same id each time
    assert row[1].isascii()
    assert row[4].isascii()
    assert "\x00" not in row[4]
    assert json.loads(row[4])["id"] == broken.id
