"""The table in memory answers as the one in Postgres does."""

import random
from datetime import UTC, datetime, timedelta, timezone

import pytest

from astrocyte_otel_audit import ConfigurationError
from astrocyte_otel_audit.postgres import AuditTable, Cursor
from astrocyte_otel_audit.testing import InMemoryAuditTable
from tests.records import BASE, bare_record, full_record

EAST = timezone(timedelta(hours=2))
#: What Postgres can't hold, what is too long for it, and what it keeps otherwise than it was given.
HOSTILE = [
    full_record(50, bank_id="a\x00b\ud800", actor_id="x" * 600),
    full_record(51, request={"text": "a\x00b\ud800"}, response={}, metadata={"deep": {"a.b": [float("nan")]}}),
    full_record(52, request={"giant": "x" * 300_000}),
    full_record(53, started_at=datetime(2026, 3, 4, 5), ended_at=datetime(2026, 3, 4, 7, tzinfo=EAST)),
    full_record(54, schema="public", action="größe"),
]
TIES = [full_record(number, started_at=BASE) for number in range(60, 66)]
RECORDS = [full_record(number, outcome=("success", "failure")[number % 2]) for number in range(8)]
RECORDS += [bare_record(number) for number in range(20, 23)] + HOSTILE + TIES


@pytest.fixture
def tables(table: AuditTable):
    memory = InMemoryAuditTable()
    for one in (table, memory):
        shuffled = random.Random(1).sample(RECORDS, len(RECORDS))
        one.append(shuffled[:9])
        appended = one.append(shuffled)  # some are there already
        assert (appended.stored, appended.schemas) == (len(RECORDS), {"public"})
        assert one.append([full_record(0, action="another")]).stored == 1
        assert one.check() is None
    return table, memory


def rows(records):
    assert all(record.recorded_at.tzinfo is not None for record in records)
    return [record._replace(recorded_at=None) for record in records]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"bank_id": "bank-3"},
        {"bank_id": "a\x00b\ud800"},
        {"actor_id": "x" * 600},
        {"action": "größe"},
        {"transport": "mcp"},
        {"outcome": "failure", "limit": 2},
        {"trace_id": f"{5:032X}"},
        {"since": BASE + timedelta(seconds=2), "until": BASE + timedelta(seconds=5)},
        {"since": BASE.astimezone(timezone(timedelta(hours=-7)))},
        {"schema": "public", "limit": 3},
    ],
    ids=lambda asked: ",".join(asked) or "all",
)
def test_a_search_finds_the_same_rows(tables, asked):
    real, memory = (one.search(**asked) for one in tables)
    assert rows(memory.records) == rows(real.records)
    assert memory.next == real.next


def test_pages_follow_one_another_as_they_do_there(tables):
    pages = []
    for one in tables:
        pages.append([])
        after = None
        while True:
            page = one.search(limit=4, after=after)
            pages[-1] += rows(page.records)
            if page.next is None:
                break
            after = Cursor.parse(str(page.next))
    assert len(pages[0]) == len(RECORDS)
    assert pages[0] == pages[1]


def test_a_record_is_found_by_its_id_however_it_is_written(tables):
    record = RECORDS[3]
    for written in (record.id, record.id.upper(), record.id.replace("-", "")):
        real, memory = (one.get(written) for one in tables)
        assert rows([memory]) == rows([real])
    assert [one.get("0" * 32) for one in tables] == [None, None]
    assert [one.set_aside() for one in tables] == [[], []]


@pytest.mark.parametrize(
    "asked",
    [{"limit": 0}, {"limit": 10_001}, {"limit": True}, {"since": datetime(2026, 1, 1)}, {"schema": "pg_catalog"}],
    ids=str,
)
def test_what_is_refused_there_is_refused_here(tables, asked):
    problems = []
    for one in tables:
        with pytest.raises(ConfigurationError) as refused:
            one.search(**asked)
        problems.append(str(refused.value))
    assert problems[0] == problems[1]


def test_each_tenant_has_rows_of_its_own():
    memory = InMemoryAuditTable(schema="tenant_a")
    memory.append([full_record(1), full_record(1, schema="Tenant_B"), full_record(2, schema="Tenant_B")])
    assert [record.schema for record in memory.records] == ["tenant_a", "Tenant_B", "Tenant_B"]
    assert [len(memory.search(schema=schema).records) for schema in (None, "tenant_a", "Tenant_B", "c")] == [1, 1, 2, 0]
    memory.clear()
    assert memory.records == []


def test_a_table_that_is_closed_can_still_be_read():
    memory = InMemoryAuditTable()
    memory.append([full_record(1)])
    memory.close()
    assert memory.search().records[0].recorded_at <= datetime.now(UTC)


def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent():
    memory = InMemoryAuditTable()
    with memory._lock:
        memory.after_fork()
        memory.append([full_record(1)])
    assert len(memory.records) == 1


def test_a_schema_must_be_a_name():
    with pytest.raises(ConfigurationError, match="schema"):
        InMemoryAuditTable(schema="pg_toast")
