"""Holds: what they say, what they need, and that no row that is held is deleted once its hold was added."""

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from astrocyte_otel_audit import ConfigurationError
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable
from astrocyte_otel_audit.postgres.holds import AuditHolds
from astrocyte_otel_audit.postgres.sweep import AuditSweeper, sweep_key
from astrocyte_otel_audit.retention import RetentionPolicy
from tests.records import BASE, full_record, full_records
from tests.servers import role

LOG = "astrocyte_audit_log"
ALL_EXPIRED = RetentionPolicy(days=1).cutoffs(BASE + timedelta(days=365))


@pytest.fixture
def holds(opened):
    return opened(AuditHolds)


def test_a_hold_says_what_is_held_why_by_whom_and_since_when(holds, connection):
    before = datetime.now(UTC)

    hold = holds.add(bank_id="user-calvin", actor_id="susie", trace_id="AB" * 16, reason="case 7")

    [(user,)] = connection.execute("SELECT session_user").fetchall()
    assert hold._replace(held_at=None) == (1, "user-calvin", "susie", "ab" * 16, "case 7", user, None, None, None)
    assert before - timedelta(seconds=5) < hold.held_at < datetime.now(UTC) + timedelta(seconds=5)
    assert holds.list() == [hold]


def test_holds_are_listed_as_they_were_added_the_released_ones_if_asked(holds):
    first, second, third = (holds.add(bank_id=bank, reason="case") for bank in ("a", "b", "c"))

    released = holds.release(second.id)

    assert released._replace(released_by=None, released_at=None) == second
    assert released.released_at >= second.held_at
    assert released.released_by == second.held_by
    assert holds.list() == [first, third]
    assert holds.list(include_released=True) == [first, released, third]


def test_a_hold_is_released_once_and_the_first_time_counts(holds):
    hold = holds.add(bank_id="a", reason="case")
    assert holds.release(hold.id) == holds.release(hold.id)


@pytest.mark.parametrize("unknown", [2, 1 << 62, 1 << 63, 1 << 200])
def test_releasing_what_is_not_there_says_so(holds, unknown):
    holds.add(bank_id="a", reason="case")
    assert holds.release(unknown) is None
    assert len(holds.list()) == 1


@pytest.mark.parametrize(
    ("criteria", "kept"),
    [
        ({"bank_id": "bank-1"}, [1]),
        ({"actor_id": "susie"}, [2, 3]),
        ({"trace_id": f"{10:032X}"}, [10]),
        ({"actor_id": "susie", "bank_id": "bank-3"}, [3]),
        ({"actor_id": "susie", "bank_id": "bank-1"}, []),
        ({"actor_id": "susie", "bank_id": "bank-2", "trace_id": f"{2:032x}"}, [2]),
        ({"actor_id": "susie", "bank_id": "bank-2", "trace_id": f"{3:032x}"}, []),
    ],
)
def test_what_fits_all_criteria_of_a_hold_outlives_the_sweep_and_goes_when_it_is_released(
    holds, opened, connection, criteria, kept
):
    table, sweeper = opened(AuditTable), opened(AuditSweeper)
    table.append(full_records(20))
    connection.execute(f"UPDATE {LOG} SET actor_id = 'susie' WHERE bank_id IN ('bank-2', 'bank-3')")
    hold = holds.add(**criteria, reason="case")

    assert sweeper.sweep("public", ALL_EXPIRED, batch_size=7).rows == 20 - len(kept)
    assert sorted(record.bank_id for record in table.search().records) == sorted(f"bank-{number}" for number in kept)

    holds.release(hold.id)
    assert sweeper.sweep("public", ALL_EXPIRED, batch_size=7).rows == len(kept)


def test_one_of_several_holds_is_enough(holds, opened):
    table, sweeper = opened(AuditTable), opened(AuditSweeper)
    table.append(full_records(5))
    holds.add(bank_id="bank-1", reason="case")
    both = holds.add(actor_id="alice", bank_id="bank-1", reason="another case")
    holds.release(both.id)

    sweeper.sweep("public", ALL_EXPIRED, batch_size=10)

    assert [record.bank_id for record in table.search().records] == ["bank-1"]


def test_a_name_is_cut_and_mended_as_the_records_was(holds, opened):
    table, sweeper = opened(AuditTable), opened(AuditSweeper)
    hostile = "b\x00\ud800" * 300
    table.append([full_record(0, bank_id=hostile), full_record(1)])

    hold = holds.add(bank_id=hostile, reason="\x00" + "why" * 1000)

    assert len(hold.bank_id) == len(hold.reason) == 512
    assert hold.reason.startswith("\ufffdwhy")
    sweeper.sweep("public", ALL_EXPIRED, batch_size=10)
    assert [record.bank_id for record in table.search().records] == [hold.bank_id]


def test_tenants_have_holds_of_their_own(holds, opened):
    opened(AuditTable).migrate("tenant_a", create_schema=True)

    hold = holds.add(bank_id="a", reason="case", schema="tenant_a")

    assert holds.list() == []
    assert holds.list(schema="tenant_a") == [hold]
    assert holds.release(hold.id) is None
    assert holds.release(hold.id, "tenant_a").id == hold.id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reason": "case"}, "bank_id: a hold needs a bank_id, an actor_id, a trace_id"),
        ({"bank_id": "a", "reason": ""}, "reason: got ''; accepted is a text that is not empty"),
        ({"bank_id": "a", "reason": " \n"}, "reason: got"),
        ({"bank_id": "a", "reason": None}, "reason: got a NoneType"),
        ({"bank_id": "", "reason": "case"}, "bank_id: got ''"),
        ({"bank_id": "a", "actor_id": " ", "reason": "case"}, "actor_id: got ' '"),
        ({"trace_id": 7, "reason": "case"}, "trace_id: got 7"),
        ({"bank_id": "a", "reason": "case", "schema": "a;b"}, "schema: got 'a;b'"),
    ],
)
def test_a_hold_that_would_hold_nothing_or_says_not_why_is_refused(holds, arguments, message):
    with pytest.raises(ConfigurationError) as refusal:
        holds.add(**arguments)
    assert message in str(refusal.value)
    assert holds.list(include_released=True) == []


@pytest.mark.parametrize("hold_id", [0, -1, "1", 1.0, True, None])
def test_what_can_not_be_an_id_is_refused(holds, hold_id):
    with pytest.raises(ConfigurationError, match="hold_id"):
        holds.release(hold_id)


@pytest.mark.parametrize("dropped", [f"{LOG}_holds", f"{LOG}, {LOG}_holds"])
def test_without_the_migration_it_says_what_to_run(holds, connection, dropped):
    connection.execute(f"DROP TABLE {dropped}")
    for use in (holds.list, lambda: holds.add(bank_id="a", reason="case"), lambda: holds.release(1)):
        with pytest.raises(DatabaseUnavailableError, match="does not exist; run `astrocyte-otel-audit migrate`"):
            use()


def test_in_a_schema_that_is_not_there_it_says_what_to_run(holds):
    with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate` \\(--create-schema"):
        holds.add(bank_id="a", reason="case", schema="nowhere")


def test_who_has_no_right_is_told_who_has(database, opened):
    with role(database) as stranger:
        strange = opened(AuditHolds, stranger)
        for use in (strange.list, lambda: strange.add(bank_id="a", reason="case"), lambda: strange.release(1)):
            with pytest.raises(DatabaseUnavailableError, match="added and released by the table's owner") as refusal:
                use()
            assert refusal.value.sqlstate == "42501"


def test_an_owner_that_is_no_superuser_holds_and_releases(database, connection, opened):
    with role(database, "CREATE ON SCHEMA public") as owner:
        connection.execute(f"DROP TABLE {LOG}, {LOG}_holds, {LOG}_migrations, {LOG}_set_aside")
        opened(AuditTable, owner).migrate()
        owned = opened(AuditHolds, owner)
        assert owned.release(owned.add(bank_id="a", reason="case").id).released_by.startswith("audit_")


def test_without_a_server_it_says_so(opened):
    away = opened(AuditHolds, "postgresql://127.0.0.1:1/nowhere")
    for use in (away.list, lambda: away.add(bank_id="a", reason="case"), lambda: away.release(1)):
        with pytest.raises(DatabaseUnavailableError, match="nothing listens"):
            use()


def test_a_hold_waits_for_the_batch_that_is_being_deleted(holds, connection):
    added = []
    adding = threading.Thread(target=lambda: added.append(holds.add(bank_id="bank-0", reason="case")))
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [sweep_key("public", LOG)])
        adding.start()
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while connection.execute(waits).fetchone() == (0,):
            assert adding.is_alive()
        time.sleep(0.1)
        assert (added, adding.is_alive()) == ([], True)
        [(released_at,)] = connection.execute("SELECT clock_timestamp()").fetchall()
    adding.join(30)
    assert added[0].held_at > released_at  # not when it began to wait


def test_a_hold_of_another_tenant_waits_for_nobody(holds, opened, connection):
    opened(AuditTable).migrate("tenant_a", create_schema=True)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [sweep_key("public", LOG)])
        assert holds.add(bank_id="a", reason="case", schema="tenant_a").id == 1


def test_a_batch_that_takes_too_long_is_told_and_nothing_was_added(opened, connection):
    holds = opened(AuditHolds, statement_timeout_seconds=0.2)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [sweep_key("public", LOG)])
        with pytest.raises(DatabaseUnavailableError, match="the hold was not added, so repeat it"):
            holds.add(bank_id="a", reason="case")
    assert holds.list() == []
    assert holds.add(bank_id="a", reason="case").bank_id == "a"


def test_no_record_that_is_held_is_deleted_once_its_hold_was_added(holds, opened):
    table, sweeper = opened(AuditTable), opened(AuditSweeper)
    table.append(full_records(600))
    seen = {}

    def sweep():
        # The newest rows go last, so that holds come in between.
        while not stopped.is_set():
            sweeper.sweep("public", ALL_EXPIRED, batch_size=5, pause=lambda seconds: time.sleep(0.001))

    stopped = threading.Event()
    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    for number in range(599, 0, -60):
        holds.add(bank_id=f"bank-{number}", reason="case")
        seen[number] = bool(table.search(bank_id=f"bank-{number}").records)
    for number in range(5, 600, 60):
        holds.add(bank_id=f"bank-{number}", reason="case")
        seen[number] = bool(table.search(bank_id=f"bank-{number}").records)
    while len(table.search(limit=1000).records) > len(seen):
        time.sleep(0.01)
    stopped.set()
    sweeping.join(60)
    kept = {int(record.bank_id.removeprefix("bank-")) for record in table.search(limit=1000).records}
    assert kept == {number for number, was_there in seen.items() if was_there}
    assert kept
