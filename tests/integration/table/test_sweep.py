"""What is expired is deleted, once, whatever else is going on; and what is not, or is held, stays."""

import itertools
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.postgres import sweep as sweep_module
from astrocyte_otel_audit.postgres.conversion import convert
from astrocyte_otel_audit.postgres.dropping import drop_expired
from astrocyte_otel_audit.postgres.sweep import AuditSweeper, Tenant, sweep_key
from astrocyte_otel_audit.record import record_id
from astrocyte_otel_audit.retention import RetentionPolicy
from tests.records import full_record
from tests.servers import role

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
SWEEPS = (
    "USAGE ON SCHEMA public",
    "SELECT, DELETE ON astrocyte_audit_log",
    "SELECT, DELETE ON astrocyte_audit_log_set_aside",
)
_numbers = itertools.count(1)


@pytest.fixture
def table(database):
    table = AuditTable(OwnConnection(database), migrate=True)
    yield table
    table.close()


@pytest.fixture
def sweeper(database):
    sweeper = AuditSweeper(OwnConnection(database))
    yield sweeper
    sweeper.close()


def aged(days, *, action="recall", bank_id="bank", actor_id="user", schema=None):
    """Return a record that began so many days before now."""
    number, started = next(_numbers), NOW - timedelta(days=days)
    return full_record(0)._replace(
        id=record_id(number, number, int(started.timestamp() * 1e9)), action=action, bank_id=bank_id,
        actor_id=actor_id, started_at=started, ended_at=started, trace_id=f"{number:032x}", schema=schema,
    )  # fmt: skip


def left(connection, schema="public"):
    query = sql.SQL("SELECT id::text FROM {}").format(sql.Identifier(schema, "astrocyte_audit_log"))
    return {row[0] for row in connection.execute(query)}


def ids(records):
    return {record.id for record in records}


def hold(connection, *, bank_id=None, actor_id=None, trace_id=None, released=False):
    connection.execute(
        "INSERT INTO astrocyte_audit_log_holds (bank_id, actor_id, trace_id, reason, released_at)"
        " VALUES (%s, %s, %s, 'a case', CASE WHEN %s THEN now() END)",
        [bank_id, actor_id, trace_id, released],
    )


def sweep(sweeper, policy, schema="public", now=NOW, **options):
    return sweeper.sweep(schema, policy.cutoffs(now), **{"batch_size": 1_000, "pause": lambda seconds: None, **options})


class TestPolicies:
    def test_what_is_older_than_the_policy_goes_and_the_rest_stays(self, table, sweeper, connection):
        old, new = [aged(31), aged(30.01), aged(4_000)], [aged(29.99), aged(0), aged(-1)]
        table.append(old + new)

        swept = sweep(sweeper, RetentionPolicy(days=30))

        assert left(connection) == ids(new)
        assert (swept.rows, swept.is_finished, swept.faults) == (3, True, [])
        assert (swept.oldest, swept.newest) == (NOW - timedelta(days=4_000), NOW - timedelta(days=30.01))

    def test_for_ever_is_for_ever(self, table, sweeper, connection):
        records = [aged(40_000), aged(1)]
        table.append(records)
        assert sweep(sweeper, RetentionPolicy()).rows == 0
        assert left(connection) == ids(records)

    def test_of_an_action_and_a_bank_that_both_have_a_time_the_longer_holds(self, table, sweeper, connection):
        policy = RetentionPolicy(days=100, actions={"recall": 10, "forget": None}, banks={"short": 5, "long": 1_000})
        gone = [
            aged(11), aged(101, action="retain"), aged(6, action="retain", bank_id="short"), aged(11, bank_id="short"),
            aged(1_001, action="retain", bank_id="long"),
        ]  # fmt: skip
        kept = [
            aged(9), aged(99, action="retain"), aged(6, bank_id="short"), aged(999, bank_id="long"),
            aged(9_999, action="forget"), aged(9_999, action="forget", bank_id="short"), aged(50, bank_id="long"),
        ]  # fmt: skip
        table.append(gone + kept)

        assert sum(expiring.rows for expiring in sweeper.preview("public", policy.cutoffs(NOW))) == len(gone)
        assert sweep(sweeper, policy).rows == len(gone)
        assert left(connection) == ids(kept)

    def test_what_is_held_outlives_every_policy_until_it_is_released(self, table, sweeper, connection):
        mine, theirs = [aged(50, bank_id="held"), aged(50, actor_id="held")], [aged(50), aged(50)]
        table.append(mine + theirs)
        hold(connection, bank_id="held")
        hold(connection, actor_id="held")
        hold(connection, trace_id=theirs[0].trace_id)
        hold(connection, bank_id="bank", actor_id="nobody")  # of both
        hold(connection, bank_id="bank", released=True)

        assert sweep(sweeper, RetentionPolicy(days=1, banks={"held": 2})).rows == 1
        assert left(connection) == ids([*mine, theirs[0]])
        connection.execute("UPDATE astrocyte_audit_log_holds SET released_at = now()")
        assert sweep(sweeper, RetentionPolicy(days=1)).rows == 3

    def test_what_was_set_aside_goes_when_it_is_as_old(self, sweeper, connection):
        connection.execute(
            "INSERT INTO astrocyte_audit_log_set_aside (id, action, reason, record, set_aside_at)"
            " SELECT gen_random_uuid(), 'recall', 'no', '', %s - n * interval '1 day' FROM generate_series(1, 50) AS n",
            [NOW],
        )
        swept = sweep(sweeper, RetentionPolicy(days=20), batch_size=7)
        assert (swept.set_aside, swept.rows) == (30, 0)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_whatever_the_policy_and_the_holds_exactly_the_expired_rows_go(self, table, sweeper, connection, data):
        names, days = st.sampled_from(["a", "b", "c"]), st.one_of(st.none(), st.integers(1, 40))
        ages = st.integers(0, 49)
        connection.execute("TRUNCATE astrocyte_audit_log, astrocyte_audit_log_holds")
        rows = data.draw(st.lists(st.tuples(ages, names, st.one_of(st.none(), names), names), max_size=25))
        records = [aged(age + 0.5, action=action, bank_id=bank, actor_id=actor) for age, action, bank, actor in rows]
        table.append(records)
        policy = RetentionPolicy(
            days=data.draw(days),
            actions=data.draw(st.dictionaries(names, days, max_size=2)),
            banks=data.draw(st.dictionaries(names, days, max_size=2)),
        )
        holds = data.draw(
            st.lists(st.tuples(st.one_of(st.none(), names), st.one_of(st.none(), names)).filter(any), max_size=2)
        )
        for bank, actor in holds:
            hold(connection, bank_id=bank, actor_id=actor)

        def is_expired(record, age):
            named = [p[n] for p, n in ((policy.actions, record.action), (policy.banks, record.bank_id)) if n in p]
            keeps = None if None in named else max(named) if named else policy.days
            held = any(bank in (None, record.bank_id) and actor in (None, record.actor_id) for bank, actor in holds)
            return keeps is not None and age + 0.5 > keeps and not held

        expired = {record.id for record, row in zip(records, rows, strict=True) if is_expired(record, row[0])}
        counted = sum(found.rows for found in sweeper.preview("public", policy.cutoffs(NOW)))
        swept = sweep(sweeper, policy, batch_size=data.draw(st.integers(1, 9)))
        assert (swept.rows, counted) == (len(expired), len(expired))
        assert left(connection) == ids(records) - expired


class TestBatches:
    def test_no_batch_has_more_rows_than_it_may_and_each_is_told_of(self, table, sweeper):
        table.append([aged(50 + number) for number in range(25)])
        told, paused = [], []
        swept = sweep(sweeper, RetentionPolicy(days=1), batch_size=10, progress=told.append, pause=paused.append)
        assert (told, swept.rows, len(paused)) == ([10, 10, 5], 25, 2)
        assert all(0.01 <= seconds <= 1 for seconds in paused)

    def test_it_stops_between_batches(self, table, sweeper, connection):
        table.append([aged(50) for _ in range(30)])
        asked = iter([False, False, True])
        swept = sweep(sweeper, RetentionPolicy(days=1), batch_size=10, should_stop=lambda: next(asked))
        assert (swept.rows, swept.is_finished, len(left(connection))) == (10, False, 20)

    def test_rows_of_one_moment_are_many_batches(self, table, sweeper):
        one = aged(50)
        table.append([aged(50)._replace(started_at=one.started_at) for _ in range(30)])
        told = []
        assert sweep(sweeper, RetentionPolicy(days=1), batch_size=7, progress=told.append).rows == 30
        assert max(told) == 7


class TestOthers:
    def test_while_somebody_sweeps_a_schema_nobody_else_does(self, table, sweeper, connection):
        table.append([aged(50)])
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [sweep_key("public", sweeper.table)])
            swept = sweep(sweeper, RetentionPolicy(days=1))
        assert (swept.is_busy, swept.is_finished, swept.rows, swept.faults) == (True, False, 0, [])
        assert sweep(sweeper, RetentionPolicy(days=1)).rows == 1

    def test_a_locked_table_is_a_fault_and_no_long_wait(self, table, sweeper, connection):
        table.append([aged(50)])
        with connection.transaction():
            connection.execute("LOCK TABLE astrocyte_audit_log IN ACCESS EXCLUSIVE MODE")
            swept = sweep(sweeper, RetentionPolicy(days=1))
        assert ([fault.sqlstate for fault in swept.faults], swept.is_finished) == (["55P03"], False)

    def test_a_schema_that_vanished_is_a_fault(self, sweeper):
        assert [fault.sqlstate for fault in sweep(sweeper, RetentionPolicy(days=1), schema="gone").faults] == ["42P01"]

    def test_a_server_that_is_away_is_an_error(self, database):
        sweeper = AuditSweeper(OwnConnection("host=/nowhere"))
        with pytest.raises(DatabaseUnavailableError):
            sweep(sweeper, RetentionPolicy(days=1))

    def test_every_schema_with_the_table_is_found_and_what_keeps_it_from_being_swept(self, table, database, connection):
        table.append([full_record(0, schema="tenant_b"), full_record(1, schema="Tenant-A")])
        connection.execute("CREATE SCHEMA other; CREATE TABLE other.astrocyte_audit_log (id int)")
        holds = "SELECT ON astrocyte_audit_log_holds"
        with role(database, *SWEEPS, holds) as dsn:
            sweeper = AuditSweeper(OwnConnection(dsn))
            found = {tenant.schema: tenant.fault for tenant in sweeper.tenants()}
            sweeper.close()
        assert found["public"] is None
        assert list(found) == ["Tenant-A", "public", "tenant_b"]
        assert all("SELECT and DELETE" in found[name].reason for name in ("Tenant-A", "tenant_b"))

    def test_only_given_schemas_are_looked_at_and_one_without_the_table_is_a_fault(self, sweeper):
        assert sweeper.tenants(["public"]) == [Tenant("public")]
        [missing] = sweeper.tenants(["nowhere"])
        assert "no audit log" in missing.fault.reason
        with pytest.raises(ConfigurationError, match="schemas"):
            sweeper.tenants(["no such; name"])

    def test_without_sight_of_the_holds_nothing_is_swept(self, table, database, connection):
        connection.execute("DROP TABLE astrocyte_audit_log_holds")
        sweeper = AuditSweeper(OwnConnection(database))
        [tenant] = sweeper.tenants()
        assert "migrate" in tenant.fault.reason
        sweeper.close()

    def test_a_role_with_the_sweepers_rights_sweeps(self, table, database):
        table.append([aged(50)])
        with role(database, *SWEEPS, "SELECT ON astrocyte_audit_log_holds") as dsn:
            sweeper = AuditSweeper(OwnConnection(dsn))
            assert sweep(sweeper, RetentionPolicy(days=1)).rows == 1
            sweeper.close()

    def test_the_last_run_is_what_the_log_says(self, table, sweeper):
        assert sweeper.last_run() is None
        table.append([aged(3, action="audit.retention"), aged(2, action="audit.retention"), aged(1)])
        assert sweeper.last_run() == NOW - timedelta(days=2)

    def test_the_time_is_the_servers(self, sweeper):
        assert abs(sweeper.now() - datetime.now(UTC)) < timedelta(seconds=10)


def test_three_sweepers_and_two_writers_over_a_hundred_tenants_account_for_every_row(database, connection):
    schemas = [f"tenant_{number:03}" for number in range(100)]
    table = AuditTable(OwnConnection(database), migrate=True)
    old = {schema: [aged(50, schema=schema) for _ in range(12)] for schema in schemas}
    for schema in schemas:
        table.append(old[schema])
    table.close()
    rows, kept, done, errors = [0, 0, 0], [{}, {}], threading.Event(), []

    def write(writer):
        table = AuditTable(OwnConnection(database))
        for schema in schemas:
            fresh = [aged(1, schema=schema) for _ in range(3)]
            late = [aged(60, schema=schema)]
            kept[writer][schema] = ids(fresh), ids(late)
            assert table.append(fresh + late).stored == 4
        table.close()

    def sweep_all(number):
        sweeper = AuditSweeper(OwnConnection(database))
        is_last_round = False
        while not is_last_round:
            is_last_round = done.is_set()
            for tenant in sweeper.tenants():
                swept = sweep(sweeper, RetentionPolicy(days=30), schema=tenant.schema, batch_size=5)
                rows[number] += swept.rows
                errors.extend(swept.faults)
        sweeper.close()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    sweepers = [threading.Thread(target=sweep_all, args=(number,)) for number in range(3)]
    for thread in writers + sweepers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in sweepers:
        thread.join()
    assert errors == []
    # Whoever found a schema busy left it to another, so one more round has the rest.
    last = AuditSweeper(OwnConnection(database))
    rows.append(sum(sweep(last, RetentionPolicy(days=30), schema=schema).rows for schema in schemas))
    last.close()
    assert sum(rows) == 100 * 12 + 100 * 2
    for schema in schemas:
        assert left(connection, schema) == kept[0][schema][0] | kept[1][schema][0]


class TestPartitions:
    @pytest.fixture
    def partition(self, connection):
        return lambda: convert(connection, "public", "astrocyte_audit_log", "month", lock_timeout_seconds=5)

    def test_those_that_are_expired_go_whole_and_new_ones_are_made(self, table, partition, sweeper, connection):
        now = sweeper.now()
        later = now + timedelta(days=200)
        fresh = [aged(0)._replace(started_at=later - timedelta(days=days)) for days in (1, 20)]
        table.append([aged(900), aged(800)])
        partition()
        sweep(sweeper, RetentionPolicy(), now=later)  # which makes what the fresh ones need
        table.append(fresh)

        swept = sweep(sweeper, RetentionPolicy(days=60), now=later)

        assert (swept.rows, swept.faults, swept.is_finished) == (2, [], True)
        assert "astrocyte_audit_log_before" in swept.dropped
        assert left(connection) == ids(fresh)
        assert sweep(sweeper, RetentionPolicy(days=60), now=later).dropped == []

    def test_one_with_rows_that_are_held_is_thinned(self, table, partition, sweeper, connection):
        later = sweeper.now() + timedelta(days=400)
        held, gone = aged(900, bank_id="held"), [aged(900) for _ in range(9)]
        table.append([held, *gone])
        partition()
        hold(connection, bank_id="held")

        swept = sweep(sweeper, RetentionPolicy(days=60), now=later, batch_size=4)

        assert swept.rows == 9
        assert left(connection) == {held.id}
        assert "astrocyte_audit_log_before" not in swept.dropped
        connection.execute("UPDATE astrocyte_audit_log_holds SET released_at = now()")
        assert "astrocyte_audit_log_before" in sweep(sweeper, RetentionPolicy(days=60), now=later).dropped

    def test_a_role_that_does_not_own_the_table_deletes_all_the_same(self, table, partition, database, connection):
        table.append([aged(900)])
        partition()
        with role(database, *SWEEPS, "SELECT ON astrocyte_audit_log_holds") as dsn:
            sweeper = AuditSweeper(OwnConnection(dsn))
            swept = sweep(sweeper, RetentionPolicy(days=60))
            sweeper.close()
        assert (swept.rows, left(connection)) == (1, set())
        assert ["only the table's owner" in fault.reason for fault in swept.faults] == [True]

    def test_a_hold_that_is_added_before_a_partition_is_dropped_keeps_its_rows(
        self, table, partition, sweeper, connection, monkeypatch
    ):
        later = sweeper.now() + timedelta(days=400)
        held = aged(900, bank_id="held")
        table.append([held, aged(900)])
        partition()

        def drop(*arguments, **keywords):
            hold(connection, bank_id="held")  # when the sweep has begun, and nothing was held
            return drop_expired(*arguments, **keywords)

        monkeypatch.setattr(sweep_module, "drop_expired", drop)
        assert sweep(sweeper, RetentionPolicy(days=60), now=later).rows == 1
        assert left(connection) == {held.id}

    def test_a_record_that_a_conversion_refuses_waits(self, table, connection):
        connection.execute(
            "ALTER TABLE astrocyte_audit_log ADD CONSTRAINT astrocyte_audit_log_before_20260601"
            " CHECK (started_at < '2026-06-01') NOT VALID"
        )
        refused = aged(0)
        appended = table.append([refused, aged(30)])
        assert (appended.stored, appended.set_aside) == (0, [])
        assert "partition" in appended.parked["public"][0].reason
