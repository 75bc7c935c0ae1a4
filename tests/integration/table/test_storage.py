"""What is known of a log's storage is so: on a plain table and on a partitioned one, to whoever may read."""

from datetime import UTC, datetime, timedelta

import pytest

from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, storage
from astrocyte_otel_audit.postgres.holds import AuditHolds
from astrocyte_otel_audit.postgres.storage import AuditStorage, Count
from astrocyte_otel_audit.retention import RetentionPolicy
from tests.records import full_record, full_records
from tests.servers import role, role_prefix

LOG = "astrocyte_audit_log"
NOW = datetime.now(UTC)


@pytest.fixture
def opened(opened):
    """The same, and by default what measures the log."""
    return lambda kind=AuditStorage, *arguments, **named: opened(kind, *arguments, **named)


@pytest.fixture
def partitions(connection):
    """Put a partitioned table in place of the log, with a part that is itself partitioned."""
    connection.execute(f"""
        ALTER TABLE {LOG} RENAME TO before;
        CREATE TABLE {LOG} (LIKE before INCLUDING DEFAULTS, PRIMARY KEY (started_at, id, action))
            PARTITION BY RANGE (started_at);
        CREATE TABLE {LOG}_2026 PARTITION OF {LOG} FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
        CREATE TABLE {LOG}_2027 PARTITION OF {LOG} FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')
            PARTITION BY LIST (action);
        CREATE TABLE {LOG}_2027_recall PARTITION OF {LOG}_2027 FOR VALUES IN ('recall');
        CREATE TABLE {LOG}_default PARTITION OF {LOG} DEFAULT;
        DROP TABLE before
    """)


def aged(*days, **changes):
    """Records that began so many days ago."""
    return [
        full_record(number, started_at=NOW - timedelta(days=ago), ended_at=None, **changes)
        for number, ago in enumerate(days, int(days[0] * 1000))
    ]


def test_an_empty_log_has_nothing_and_takes_room_all_the_same(opened):
    found = opened().storage(RetentionPolicy(days=30))

    assert found.rows == Count(0, "exact")
    assert (found.oldest, found.newest, found.dead_rows, found.partitions) == (None, None, 0, [])
    assert (found.set_aside, found.holds) == (Count(0), 0)
    assert found.expired == dict.fromkeys((0, 1, 7, 30), Count(0))
    assert found.index_bytes > 0


def test_sizes_are_those_that_the_server_says(opened, connection):
    opened(AuditTable).append(full_records(500, request={"hits": [f"{n:032x}" for n in range(2000)]}))

    found = opened().storage()

    [(whole, heap, indexes)] = connection.execute(
        f"SELECT pg_total_relation_size('{LOG}'), pg_relation_size('{LOG}'), pg_indexes_size('{LOG}')"
    )
    assert found.table_bytes + found.index_bytes + found.toast_bytes == whole
    assert heap <= found.table_bytes < heap + 100_000
    assert found.index_bytes == indexes
    assert found.toast_bytes > 100_000


def test_a_small_log_is_counted_to_the_row(opened):
    opened(AuditTable).append(full_records(123))
    found = opened().storage()
    assert found.rows == Count(123, "exact")
    assert (found.oldest, found.newest) == (full_record(0).started_at, full_record(122).started_at)


@pytest.mark.parametrize("is_analyzed", [True, False])
def test_a_large_log_is_estimated_and_said_to_be(opened, connection, monkeypatch, is_analyzed):
    monkeypatch.setattr(storage, "CAP", 100)
    opened(AuditTable).append(full_records(400))
    if is_analyzed:
        connection.execute(f"ANALYZE {LOG}")
        opened(AuditTable).append([full_record(n, bank_id="later") for n in range(400, 800)])

    found = opened().storage(RetentionPolicy(days=1))

    assert found.rows.how == "estimate"
    if is_analyzed:  # reckoned by the pages that have come since
        assert 600 <= found.rows.rows <= 1000
    assert found.expired[0] == Count(100, "at least")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RetentionPolicy(days=40), [1, 1, 2, 4]),
        (RetentionPolicy(days=40, actions={"recall": None}), [0, 0, 0, 0]),
        (RetentionPolicy(actions={"recall": 40}), [1, 1, 2, 4]),
        (RetentionPolicy(actions={"retain": 1}), [0, 0, 0, 0]),
        (RetentionPolicy(days=1, banks={"bank-39500": 400, "x": None}), [4, 5, 5, 5]),
        (RetentionPolicy(days=1, actions={"recall": 40}, banks={"bank-39501": 20}), [1, 1, 2, 4]),
        (RetentionPolicy(days=400, actions={"recall": 40}, banks={"bank-39500": None}), [0, 0, 1, 3]),
    ],
)
def test_what_expires_by_when_is_by_the_policy(opened, policy, expected):
    table = opened(AuditTable)
    table.append([
        full_record(39500 + number, started_at=NOW - timedelta(days=ago), ended_at=None)
        for number, ago in enumerate((41, 35, 20, 12, 1.5, 0.5))
    ])  # fmt: skip
    found = opened().storage(policy)
    assert found.expired == dict(zip((0, 1, 7, 30), map(Count, expected), strict=True))


def test_what_is_held_does_not_expire(opened):
    table, holds = opened(AuditTable), opened(AuditHolds)
    table.append(aged(41, 42, 43))
    table.append(aged(44, actor_id="susie"))
    holds.add(bank_id=aged(41)[0].bank_id, actor_id="alice", reason="case")
    holds.add(actor_id="susie", bank_id="another", reason="case")
    released = holds.add(actor_id="susie", reason="case")
    assert opened().storage(RetentionPolicy(days=40)).expired[0] == Count(2)

    holds.release(released.id)

    found = opened().storage(RetentionPolicy(days=40))
    assert (found.expired[0], found.holds) == (Count(3), 2)


@pytest.mark.parametrize("policy", [None, RetentionPolicy(), RetentionPolicy(banks={"b": None})])
def test_without_a_policy_that_lets_anything_expire_nothing_is_said_of_it(opened, policy):
    assert opened().storage(policy).expired == {}


def test_dead_rows_and_their_cleaning_are_told(opened, connection):
    opened(AuditTable).append(full_records(300))
    connection.execute(f"DELETE FROM {LOG} WHERE bank_id < 'bank-2'")
    left = opened().storage().rows.rows
    for _ in range(50):
        connection.execute("SELECT pg_sleep(0.1)")
        connection.execute("SELECT 1")
        if (dead := opened().storage().dead_rows) > 0:
            break
    assert dead == 300 - left


def test_what_was_refused_is_counted(opened, connection):
    connection.execute(f"INSERT INTO {LOG}_set_aside VALUES (gen_random_uuid(), 'recall', '', NULL, '', now())")
    assert opened().storage().set_aside == Count(1)


@pytest.mark.usefixtures("partitions")
def test_of_a_partitioned_log_all_partitions_are_listed_and_counted_together(opened, connection):
    table = opened(AuditTable)
    table.append(full_records(30))
    table.append([full_record(40, started_at=datetime(2027, 5, 1, tzinfo=UTC))])
    table.append([full_record(50, started_at=datetime(2020, 5, 1, tzinfo=UTC))])

    found = opened().storage(RetentionPolicy(days=365))

    assert [
        (each.name.removeprefix(LOG), each.bounds.partition(" (")[0], each.rows.rows) for each in found.partitions
    ] == [
        ("_2026", "FOR VALUES FROM", 30),
        ("_2027_recall", "FOR VALUES IN", 1),
        ("_default", "DEFAULT", 1),
    ]
    assert found.rows == Count(32)
    assert (found.oldest.year, found.newest.year) == (2020, 2027)
    assert found.expired[0] == Count(1)
    [(whole,)] = connection.execute(
        f"SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('{LOG}') WHERE isleaf"
    )
    assert found.table_bytes + found.index_bytes + found.toast_bytes == whole == sum(e.bytes for e in found.partitions)


@pytest.mark.usefixtures("partitions")
def test_of_a_large_partitioned_log_each_partition_is_estimated(opened, connection, monkeypatch):
    monkeypatch.setattr(storage, "CAP", 10)
    opened(AuditTable).append(full_records(50))
    connection.execute(f"ANALYZE {LOG}")
    found = opened().storage()
    assert [each.rows for each in found.partitions] == [
        Count(50, "estimate"),
        Count(0, "estimate"),
        Count(0, "estimate"),
    ]
    assert found.rows == Count(50, "estimate")


@pytest.mark.parametrize("kind", ["reader", "sweeper"])
@pytest.mark.parametrize("is_partitioned", [False, True])
def test_who_may_read_sees_all_of_it(opened, database, request, kind, is_partitioned):
    if is_partitioned:
        request.getfixturevalue("partitions")
    table = opened(AuditTable)
    table.append(full_records(3))
    opened(AuditHolds).add(bank_id="bank-1", reason="case")
    with role_prefix(database) as prefix:
        table.grant_roles(role_prefix=prefix)
        with role(database, f'"{prefix}_{kind}"') as dsn:
            policy = RetentionPolicy(days=1)
            assert opened(AuditStorage, dsn).storage(policy) == opened().storage(policy)


def test_whoever_sees_only_the_log_is_told_what_it_cannot_see(opened, database):
    opened(AuditTable).append(aged(41, 42))
    with role(database, f"SELECT ON {LOG}") as dsn:
        found = opened(AuditStorage, dsn).storage(RetentionPolicy(days=40))
    assert (found.rows, found.set_aside, found.holds, found.expired[0]) == (Count(2), None, None, Count(2))


def test_a_log_of_an_older_release_has_no_holds_to_be_seen(opened, connection):
    connection.execute(f"DROP TABLE {LOG}_holds")
    assert opened().storage().holds is None


def test_without_a_right_or_a_table_it_says_what_to_do(opened, database, connection):
    with role(database) as dsn, pytest.raises(DatabaseUnavailableError, match="a right is missing"):
        opened(AuditStorage, dsn).storage()
    with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate`"):
        opened(AuditStorage, table="nowhere").storage()
    with pytest.raises(DatabaseUnavailableError, match="schema"):
        opened().storage(schema="nowhere")


def test_another_tenants_log_is_measured_by_its_schema(opened):
    opened(AuditTable).migrate("tenant_a", create_schema=True)
    opened(AuditTable).append([full_record(0, schema="tenant_a")])
    found = opened().storage(schema="tenant_a")
    assert (found.schema, found.table, found.rows) == ("tenant_a", LOG, Count(1))
    assert opened().storage().rows == Count(0)
