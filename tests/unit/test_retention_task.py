"""`RetentionTask`: when a run is due, whose turn it is, how it ends, and the rows that it leaves."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from astrocyte_otel_audit import AuditSpanExporter, AuditSpanProcessor, RetentionPolicy, audit_scope
from astrocyte_otel_audit.attributes import SCOPE_NAME
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline.retention import RetentionTask
from astrocyte_otel_audit.pipeline.sampler import AuditSampler
from astrocyte_otel_audit.pipeline.selection import is_suppressed
from astrocyte_otel_audit.postgres import Fault, FaultClass
from astrocyte_otel_audit.postgres.sweep import Swept, Tenant
from astrocyte_otel_audit.record import UNKNOWN_TRANSPORT
from tests.support import MemoryStorage

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NO_RIGHT = Fault(FaultClass.PARK, "the role may not sweep it", "42501")
LOCKED = Fault(FaultClass.PARK, "the table is locked by somebody else", "55P03")
NO_TABLE = Fault(FaultClass.PARK, "there is no audit log in it", "42P01")
AWAY = DatabaseUnavailableError("the connection broke", "08006")


class Sweeper:
    """Stands in for the database: what it holds is a number of expired rows by schema, deleted in batches."""

    schema = "public"

    def __init__(self, **expired):
        self.expired = expired or {"public": 0}
        self.faults = {}
        #: What a sweep of a schema finds in its way: a fault, or an error to raise after its first batch.
        self.trouble = {}
        self.server_now = NOW
        self.last = None
        self.asked, self.swept, self.cutoffs, self.suppressed = [], [], [], []
        self.runs = 0
        self.before_batch = lambda schema: None
        self.unavailable = None
        self.closed = self.forked = 0

    def now(self):
        self.suppressed.append(is_suppressed())
        return self.server_now

    def tenants(self, schemas=None):
        self.asked.append(schemas)
        self.suppressed.append(is_suppressed())
        if self.unavailable is not None:
            raise self.unavailable
        self.runs += 1
        return [Tenant(schema, self.faults.get(schema)) for schema in self.expired]

    def last_run(self):
        self.suppressed.append(is_suppressed())
        if isinstance(self.last, Exception):
            raise self.last
        return self.last

    def sweep(self, schema, cutoffs, *, batch_size, should_stop, pause, progress):
        self.suppressed.append(is_suppressed())
        self.swept.append(schema)
        self.cutoffs.append(cutoffs)
        swept, trouble = Swept(schema), self.trouble.get(schema)
        if isinstance(trouble, Fault):
            swept.faults, swept.is_finished = [trouble], False
            return swept
        while self.expired[schema]:
            if should_stop():
                swept.is_finished = False
                break
            self.before_batch(schema)
            rows = min(batch_size, self.expired[schema])
            self.expired[schema] -= rows
            progress(rows)
            if trouble is not None:
                raise trouble
            swept.add(rows, cutoffs.default - timedelta(days=2), cutoffs.default - timedelta(days=1))
            pause(0.01)
        return swept

    def close(self):
        self.closed += 1

    def after_fork(self):
        self.forked += 1


@pytest.fixture
def make_task(provider):
    """A task on the test's own provider, due at once and then after an hour; stopped at the test's end."""
    tasks = []

    def make(sweeper, *, clock=lambda: NOW, days=30, draw=lambda: 0.0, policy=None, **arguments):
        policy = policy or RetentionPolicy(days=days, batch_size=10)
        arguments.setdefault("tracer", lambda: provider.get_tracer(SCOPE_NAME))
        tasks.append(RetentionTask(sweeper, policy, clock=clock, draw=draw, **arguments))
        return tasks[-1]

    yield make
    for task in tasks:
        task.stop(5.0)


@pytest.fixture
def rows(audit, storage):
    """The rows so far, of a pipeline that allows nothing."""
    processor = audit(storage=storage, actions=[])

    def found():
        assert processor.force_flush(10_000)
        return storage.records

    return found


@pytest.fixture
def said(caplog):
    """The warnings so far, without that of a run that nobody writes down."""

    def found():
        messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        return [message for message in messages if "may leave no row" not in message and "Nothing is" not in message]

    return found


def wait_until(condition, seconds=20):
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "astrocyte-audit-retention"]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class TestARun:
    def test_deletes_what_is_expired_in_every_tenant_s_schema(self, make_task):
        sweeper = Sweeper(public=5, tenant_a=25, Tenant_B=0)
        run = make_task(sweeper).run()
        assert sweeper.expired == {"public": 0, "tenant_a": 0, "Tenant_B": 0}
        assert {each.schema: each.rows for each in run.swept} == {"public": 5, "tenant_a": 25, "Tenant_B": 0}
        assert (run.total.rows, run.total.is_finished) == (30, True)
        assert (run.total.oldest, run.total.newest) == (NOW - timedelta(days=32), NOW - timedelta(days=31))

    def test_asks_for_the_tenants_that_were_named(self, make_task):
        sweeper = Sweeper()
        make_task(sweeper, schemas=["tenant_a"]).run()
        assert sweeper.asked == [["tenant_a"]]

    def test_tells_of_each_batch(self, make_task):
        told = []
        make_task(Sweeper(public=25)).run(progress=told.append)
        assert told == [10, 10, 5]

    def test_does_not_ask_whether_another_process_has_done_one(self, make_task):
        sweeper = Sweeper(public=5)
        sweeper.last = NOW
        assert make_task(sweeper).run().total.rows == 5

    def test_reckons_from_its_clock(self, make_task):
        sweeper = Sweeper(public=5)
        make_task(sweeper, clock=lambda: NOW + timedelta(days=7)).run()
        assert sweeper.cutoffs[0].default == NOW - timedelta(days=23)

    def test_reckons_from_the_server_s_clock_where_that_is_behind(self, make_task):
        sweeper = Sweeper(public=5)
        make_task(sweeper, clock=None).run()
        assert sweeper.cutoffs[0].default == NOW - timedelta(days=30)

    def test_reckons_from_its_own_machine_s_clock_where_the_server_s_runs_ahead(self, make_task):
        sweeper = Sweeper(public=5)
        sweeper.server_now = datetime(2999, 1, 1, tzinfo=UTC)
        make_task(sweeper, clock=None).run()
        assert sweeper.cutoffs[0].default < datetime.now(UTC) - timedelta(days=29)

    def test_that_expires_nothing_still_looks_after_every_schema(self, make_task):
        sweeper = Sweeper(public=0, tenant_a=0)
        run = make_task(sweeper, policy=RetentionPolicy()).run()
        assert sweeper.swept == ["public", "tenant_a"]
        assert sweeper.cutoffs[0].newest is None
        assert run.total.is_finished

    def test_causes_no_spans_by_its_own_statements(self, make_task):
        sweeper = Sweeper(public=5)
        make_task(sweeper, clock=None).run()
        assert sweeper.suppressed
        assert all(sweeper.suppressed)
        assert not is_suppressed()

    def test_leaves_no_connection_open(self, make_task):
        sweeper = Sweeper()
        make_task(sweeper).run()
        assert sweeper.closed == 1

    def test_is_counted(self, make_task):
        task = make_task(Sweeper(public=25))
        task.run()
        task.run()
        assert task.stats() == {"runs": 2, "failed_runs": 0, "rows_deleted": 25, "partitions_dropped": 0}

    def test_that_is_stopped_by_another_thread_ends_after_its_batch(self, make_task):
        sweeper = Sweeper(public=1_000)
        task = make_task(sweeper)
        stopped = threading.Event()
        stopper = threading.Thread(target=lambda: (stopped.set(), task.stop(20.0)))
        sweeper.before_batch = lambda schema: (stopper.is_alive() or stopper.start(), stopped.wait(20))
        run = task.run()
        stopper.join(20)
        assert not run.total.is_finished
        assert 0 < run.total.rows < 1_000
        assert run.total.rows == 1_000 - sweeper.expired["public"]

    def test_may_be_done_after_a_stop_and_while_it_is_paused(self, make_task):
        sweeper = Sweeper(public=5)
        task = make_task(sweeper)
        task.start()
        task.pause()
        task.stop()
        assert task.run().total.is_finished

    def test_that_calls_stop_itself_does_not_wait_for_itself(self, make_task):
        task = make_task(Sweeper(public=100))
        began = time.monotonic()
        run = task.run(progress=lambda rows: task.stop(30.0))
        assert time.monotonic() - began < 10
        assert not run.total.is_finished


class TestTheBudget:
    def test_ends_a_run_between_batches(self, make_task):
        monotonic = Clock()
        sweeper = Sweeper(public=1_000)
        sweeper.before_batch = lambda schema: setattr(monotonic, "now", monotonic.now + 100)
        run = make_task(sweeper, monotonic=monotonic).run()
        assert (run.total.rows, run.total.is_finished) == (60, False)

    def test_leaves_the_tenants_that_a_run_did_not_come_to_for_the_start_of_the_next(self, make_task):
        monotonic = Clock()
        sweeper = Sweeper(a=1_000, b=1_000, c=1_000)
        sweeper.before_batch = lambda schema: setattr(monotonic, "now", monotonic.now + 100)
        task = make_task(sweeper, monotonic=monotonic)
        for _ in range(4):
            assert not task.run().total.is_finished
        assert sweeper.swept == ["a", "b", "c", "a"]

    def test_is_each_run_s_own(self, make_task):
        monotonic = Clock()
        task = make_task(Sweeper(public=5), monotonic=monotonic)
        task.run()
        monotonic.now += 10_000
        assert task.run().total.is_finished


class TestFaults:
    def test_of_one_tenant_leave_the_others_alone(self, make_task):
        sweeper = Sweeper(a=5, b=5, c=5)
        sweeper.faults["a"], sweeper.trouble["b"] = NO_RIGHT, LOCKED
        run = make_task(sweeper).run()
        assert sweeper.expired == {"a": 5, "b": 5, "c": 0}
        assert list(map(str, run.total.faults)) == [
            "a: the role may not sweep it [SQLSTATE 42501]",
            "b: the table is locked by somebody else [SQLSTATE 55P03]",
        ]
        assert not run.total.is_finished

    def test_that_nobody_expected_leave_the_others_alone_and_count_what_is_gone(self, make_task):
        sweeper = Sweeper(a=25, b=5)
        sweeper.trouble["a"] = LookupError("its own words")
        run = make_task(sweeper).run()
        assert {each.schema: each.rows for each in run.swept} == {"a": 10, "b": 5}
        assert [str(fault) for fault in run.total.faults] == ["a: an unexpected LookupError"]

    def test_are_said_once_until_they_change(self, make_task, said):
        sweeper = Sweeper(a=5, b=5)
        sweeper.trouble["a"] = LOCKED
        task = make_task(sweeper)
        task.run()
        task.run()
        sweeper.trouble["a"] = Fault(FaultClass.PARK, "it is a view")
        task.run()
        del sweeper.trouble["a"]
        task.run()
        task.run()
        assert said() == [
            "expired records of schema 'a' are not all deleted: the table is locked by somebody else [SQLSTATE 55P03].",
            "expired records of schema 'a' are not all deleted: it is a view.",
            "expired records of schema 'a' are being deleted again.",
        ]

    def test_that_look_like_an_absent_server_are_one_tenant_s_if_the_next_can_be_swept(self, make_task):
        sweeper = Sweeper(a=25, b=5)
        sweeper.trouble["a"] = DatabaseUnavailableError("rolled back by a concurrent one", "40P01")
        run = make_task(sweeper).run()
        assert {each.schema: each.rows for each in run.swept} == {"a": 10, "b": 5}
        assert "a: rolled back by a concurrent one [SQLSTATE 40P01]" in map(str, run.total.faults)

    def test_of_an_absent_server_end_the_run(self, make_task):
        sweeper = Sweeper(a=25, b=25, c=25)
        sweeper.trouble = dict.fromkeys("abc", AWAY)
        task = make_task(sweeper)
        with pytest.raises(DatabaseUnavailableError):
            task.run()
        assert sweeper.swept == ["a", "b"]
        assert task.stats() == {"runs": 1, "failed_runs": 1, "rows_deleted": 20, "partitions_dropped": 0}

    def test_of_a_server_that_is_away_already_are_a_failed_run_that_has_not_begun(self, make_task):
        sweeper = Sweeper()
        sweeper.unavailable = AWAY
        task = make_task(sweeper)
        with pytest.raises(DatabaseUnavailableError):
            task.run()
        assert task.stats() == {"runs": 0, "failed_runs": 1, "rows_deleted": 0, "partitions_dropped": 0}

    def test_of_the_tracer_keep_nobody_from_deleting(self, make_task, caplog):
        def tracer():
            raise RuntimeError("its own words")

        sweeper = Sweeper(public=5)
        assert make_task(sweeper, tracer=tracer).run().total.rows == 5
        assert "a run of the retention may leave no row" in caplog.text
        assert "its own words" not in caplog.text


def busy_policy(**changes):
    return RetentionPolicy(
        **{"days": 30, "interval_seconds": 0.02, "jitter_seconds": 10.0, "batch_size": 10, **changes}
    )


class TestTheThread:
    def test_does_one_run_after_another(self, make_task):
        sweeper = Sweeper(public=25)
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: task.stats()["runs"] >= 3)
        assert task.stop()
        assert threads() == []
        assert task.stats()["rows_deleted"] == 25

    def test_waits_for_its_part_of_the_jitter_first(self, make_task):
        sweeper = Sweeper()
        task = make_task(sweeper, draw=lambda: 0.5, policy=busy_policy(jitter_seconds=60.0))
        task.start()
        time.sleep(0.1)
        assert sweeper.runs == 0
        began = time.monotonic()
        assert task.stop()
        assert time.monotonic() - began < 5
        assert (sweeper.runs, threads()) == (0, [])

    def test_does_the_first_run_when_its_part_of_the_jitter_is_over(self, make_task):
        sweeper = Sweeper()
        task = make_task(sweeper, draw=lambda: 0.001, policy=busy_policy(jitter_seconds=60.0))
        began = time.monotonic()
        task.start()
        assert wait_until(lambda: sweeper.runs)
        assert time.monotonic() - began >= 0.06

    def test_may_be_started_and_stopped_twice(self, make_task):
        task = make_task(Sweeper())
        assert task.stop()
        task.start()
        task.start()
        assert len(threads()) == 1
        assert task.stop()
        assert task.stop()
        assert threads() == []

    def test_may_be_started_again(self, make_task):
        sweeper = Sweeper()
        task = make_task(sweeper)
        for number in (1, 2):
            task.start()
            assert wait_until(lambda number=number: task.stats()["runs"] == number)
            assert task.stop()
            assert not task.is_started

    def test_may_be_started_and_stopped_by_many_at_once(self, make_task):
        task = make_task(Sweeper(public=100), policy=busy_policy())

        def both():
            for _ in range(20):
                task.start()
                task.stop()

        many = [threading.Thread(target=both) for _ in range(8)]
        for each in many:
            each.start()
        for each in many:
            each.join(30)
        assert task.stop()
        assert wait_until(lambda: threads() == [])

    def test_is_stopped_between_batches(self, make_task):
        sweeper = Sweeper(public=10**9)
        task = make_task(sweeper)
        task.start()
        assert wait_until(lambda: sweeper.expired["public"] < 10**9)
        assert task.stop()
        left = sweeper.expired["public"]
        assert threads() == []
        time.sleep(0.05)
        assert sweeper.expired["public"] == left > 0

    def test_is_stopped_in_a_long_pause(self, make_task):
        sweeper = Sweeper(public=100)
        paused = threading.Event()
        sweep = sweeper.sweep

        def with_long_pauses(schema, cutoffs, *, pause, **rest):
            return sweep(schema, cutoffs, pause=lambda seconds: (paused.set(), pause(60.0)), **rest)

        sweeper.sweep = with_long_pauses
        task = make_task(sweeper)
        task.start()
        assert paused.wait(20)
        began = time.monotonic()
        assert task.stop()
        assert time.monotonic() - began < 5
        assert sweeper.expired["public"] == 90

    def test_is_not_waited_for_past_the_deadline_where_a_batch_hangs(self, make_task):
        sweeper = Sweeper(public=100)
        hangs, goes_on = threading.Event(), threading.Event()
        sweeper.before_batch = lambda schema: (hangs.set(), goes_on.wait(20))
        task = make_task(sweeper)
        task.start()
        assert hangs.wait(20)
        began = time.monotonic()
        assert not task.stop(0.1)
        assert time.monotonic() - began < 5
        goes_on.set()
        assert task.stop()
        assert sweeper.expired["public"] == 90

    def test_begins_no_run_while_it_is_paused(self, make_task):
        sweeper = Sweeper()
        task = make_task(sweeper, policy=busy_policy())
        task.pause()
        task.start()
        time.sleep(0.1)
        assert sweeper.runs == 0
        task.resume()
        assert wait_until(lambda: sweeper.runs)

    def test_is_stopped_while_it_is_paused(self, make_task):
        task = make_task(Sweeper())
        task.pause()
        task.start()
        assert task.stop()
        assert threads() == []

    def test_ends_a_run_after_its_batch_when_it_is_paused(self, make_task):
        sweeper = Sweeper(public=10**9)
        task = make_task(sweeper)
        task.start()
        assert wait_until(lambda: sweeper.expired["public"] < 10**9)
        task.pause()
        assert wait_until(lambda: sweeper.closed == 1)
        assert task.is_started

    def test_goes_on_after_a_run_that_has_failed(self, make_task, said):
        sweeper = Sweeper(public=5)
        sweeper.unavailable = AWAY
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: task.stats()["failed_runs"] >= 3)
        sweeper.unavailable = None
        assert wait_until(lambda: task.stats()["rows_deleted"] == 5)
        task.stop()
        assert said() == [
            "expired audit records are not deleted, until a later run: the connection broke [SQLSTATE 08006].",
            "expired audit records are being deleted again.",
        ]

    @pytest.mark.parametrize("fault", [LookupError("its own words"), SystemExit("its own words")], ids=repr)
    def test_goes_on_after_anything_at_all(self, make_task, said, fault):
        sweeper = Sweeper(public=5)
        sweeper.unavailable = fault
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: task.stats()["failed_runs"] >= 2)
        assert [f"an unexpected {type(fault).__name__}" in message for message in said()] == [True]
        assert "its own words" not in said()[0]

    def test_leaves_no_connection_open_between_runs(self, make_task):
        sweeper = Sweeper()
        task = make_task(sweeper)
        task.start()
        assert wait_until(lambda: sweeper.closed == 1)

    def test_late_in_interpreter_shutdown_is_none(self, make_task, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        task = make_task(Sweeper())
        task.start()
        assert not task.is_started
        assert task.stop()


class TestStandingDown:
    def test_where_no_tenant_may_be_swept_one_warning_says_what_to_do(self, make_task, said):
        sweeper = Sweeper(public=5, tenant_a=5)
        sweeper.faults = dict.fromkeys(sweeper.expired, NO_RIGHT)
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: threads() == [])
        assert not task.is_started
        assert sweeper.swept == []
        [warning] = said()
        assert "GRANT it what `astrocyte-otel-audit migrate --roles` gives" in warning
        assert "OTEL_ASTROCYTE_AUDIT_RETENTION_DSN" in warning
        assert task.stop()

    def test_leaves_no_row_that_would_keep_other_processes_from_their_turn(self, make_task, rows):
        sweeper = Sweeper(public=5)
        sweeper.faults["public"] = NO_RIGHT
        make_task(sweeper).start()
        assert wait_until(lambda: threads() == [])
        assert rows() == []

    def test_may_be_started_again_once_it_has_the_right(self, make_task):
        sweeper = Sweeper(public=5)
        sweeper.faults["public"] = NO_RIGHT
        task = make_task(sweeper)
        task.start()
        assert wait_until(lambda: not task.is_started)
        sweeper.faults.clear()
        task.start()
        assert wait_until(lambda: task.stats()["rows_deleted"] == 5)

    @pytest.mark.parametrize("fault", [LOCKED, NO_TABLE, None])
    def test_is_not_for_a_reason_that_may_pass(self, make_task, fault):
        sweeper = Sweeper(public=0, tenant_a=0)
        sweeper.faults = {"public": NO_RIGHT, "tenant_a": fault}
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: task.stats()["runs"] >= 2)

    def test_is_not_for_want_of_tenants(self, make_task):
        sweeper = Sweeper()
        sweeper.expired = {}
        task = make_task(sweeper, policy=busy_policy())
        task.start()
        assert wait_until(lambda: task.stats()["runs"] >= 2)


class TestTheElection:
    def seconds_until_due(self, make_task, last, draw=0.0, clock=lambda: NOW):
        """How long a task with an interval of 1,000 s and a jitter of 100 s waits after its turn came."""
        sweeper = Sweeper(public=5)
        sweeper.last = last
        policy = RetentionPolicy(days=30, interval_seconds=1_000, jitter_seconds=100)
        task = make_task(sweeper, policy=policy, draw=lambda: draw, clock=clock, monotonic=lambda: 0.0)
        waits, was_run = [], threading.Event()

        def wait(errand, seconds):
            waits.append(seconds)
            if len(waits) == 1:
                return True
            was_run.set()
            return False

        task._wait = wait
        task.start()
        assert was_run.wait(20)
        task.stop()
        return waits[1], task.stats()["runs"] == 1

    def test_a_run_that_nobody_has_done_is_this_process_s(self, make_task):
        assert self.seconds_until_due(make_task, None) == (1_000.0, True)

    def test_a_run_of_the_last_interval_is_enough(self, make_task):
        assert self.seconds_until_due(make_task, NOW - timedelta(seconds=300)) == (700.0, False)

    def test_a_run_of_nearly_an_interval_ago_is_not(self, make_task):
        assert self.seconds_until_due(make_task, NOW - timedelta(seconds=900)) == (1_000.0, True)
        assert self.seconds_until_due(make_task, NOW - timedelta(seconds=899)) == (101.0, False)

    def test_those_that_wait_do_not_come_back_all_at_once(self, make_task):
        assert self.seconds_until_due(make_task, NOW - timedelta(seconds=300), draw=0.25) == (725.0, False)

    def test_a_run_that_began_by_a_clock_ahead_is_enough(self, make_task):
        assert self.seconds_until_due(make_task, NOW + timedelta(seconds=60)) == (1_000.0, False)

    def test_a_run_that_is_to_come_in_years_is_not_waited_for(self, make_task):
        assert self.seconds_until_due(make_task, NOW + timedelta(days=365)) == (1_000.0, True)

    def test_where_it_can_not_be_seen_this_process_does_its_own(self, make_task, said):
        unreadable = DatabaseUnavailableError("the table does not exist", "42P01")
        assert self.seconds_until_due(make_task, unreadable) == (1_000.0, True)
        assert said() == [
            "whether another process deletes audit records can't be seen: the table does not exist [SQLSTATE 42P01]."
        ]

    def test_of_many_processes_one_deletes(self, make_task):
        sweeper = Sweeper(public=50)
        began = threading.Event()

        def before_batch(schema):
            sweeper.last = NOW
            began.set()

        sweeper.before_batch = before_batch
        first = make_task(sweeper)
        first.start()
        assert began.wait(20)
        others = [make_task(sweeper) for _ in range(5)]
        for each in others:
            each.start()
        assert wait_until(lambda: sweeper.runs == 6)
        assert [task.stats()["runs"] for task in (first, *others)] == [1, 0, 0, 0, 0, 0]


class TestEvidence:
    def test_every_run_is_a_row_that_says_what_was_done_by_which_policy(self, make_task, rows):
        policy = RetentionPolicy(days=30, actions={"recall": 40, "forget": None}, banks={"a.b": 35})
        make_task(Sweeper(public=5), policy=policy).run()
        [row] = rows()
        assert (row.action, row.transport, row.outcome, row.error_type) == (
            "audit.retention",
            "system",
            "success",
            None,
        )
        assert (row.actor_id, row.actor_type) == ("astrocyte-otel-audit", "system")
        assert (row.schema, row.parent_span_id, row.bank_id) == ("public", None, None)
        assert row.ended_at >= row.started_at
        assert (row.request, row.response) == (None, None)
        assert row.metadata == {
            "policy": {"days": 30, "actions": ["recall=40", "forget=forever"], "banks": ["a.b=35"]},
            "cutoff": {"oldest": "2026-01-20T12:00:00+00:00", "newest": "2026-01-30T12:00:00+00:00"},
            "schemas": ["public"],
            "schemas_swept": 1,
            "rows": 5,
            "oldest": "2026-01-28T12:00:00+00:00",
            "newest": "2026-01-29T12:00:00+00:00",
            "finished": True,
        }

    def test_a_run_that_finds_nothing_is_a_row_too(self, make_task, rows):
        make_task(Sweeper(public=0, tenant_a=0)).run()
        [row] = rows()
        assert (row.schema, row.outcome, row.metadata["rows"]) == ("public", "success", 0)
        assert "oldest" not in row.metadata

    def test_a_tenant_of_which_rows_are_gone_has_a_row_of_its_own(self, make_task, rows):
        make_task(Sweeper(public=0, tenant_a=15, Tenant_B=0, tenant_c=7)).run()
        run = next(row for row in rows() if row.parent_span_id is None)
        parts = {row.schema: row for row in rows() if row.parent_span_id is not None}
        assert (run.schema, run.metadata["rows"]) == ("public", 22)
        assert {schema: row.metadata["rows"] for schema, row in parts.items()} == {"tenant_a": 15, "tenant_c": 7}
        for row in parts.values():
            assert (row.action, row.trace_id, row.parent_span_id) == (run.action, run.trace_id, run.span_id)
            assert run.started_at <= row.started_at <= row.ended_at <= run.ended_at
            assert (row.transport, row.actor_id, row.outcome) == ("system", "astrocyte-otel-audit", "success")

    def test_so_has_the_default_schema_beside_others(self, make_task, rows):
        make_task(Sweeper(public=5, tenant_a=0)).run()
        assert sorted((row.schema, row.parent_span_id is None) for row in rows()) == [
            ("public", False),
            ("public", True),
        ]

    def test_a_fault_makes_a_failure_of_the_run_and_of_the_tenant_s_part(self, make_task, rows):
        sweeper = Sweeper(public=0, tenant_a=5)
        sweeper.trouble["tenant_a"] = LOCKED
        make_task(sweeper).run()
        run, part = sorted(rows(), key=lambda row: row.schema)
        assert (run.outcome, run.error_type, part.outcome, part.error_type) == ("failure", "55P03") * 2
        assert run.metadata["faults"] == ["tenant_a: the table is locked by somebody else [SQLSTATE 55P03]"]
        assert part.metadata["faults"] == ["the table is locked by somebody else [SQLSTATE 55P03]"]
        assert (run.metadata["finished"], part.metadata["finished"]) == (False, False)

    def test_a_schema_without_the_table_gets_no_row_that_would_wait_for_one(self, make_task, rows):
        sweeper = Sweeper(public=0, gone=5)
        sweeper.faults["gone"] = NO_TABLE
        make_task(sweeper).run()
        [row] = rows()
        assert (row.schema, row.outcome) == ("public", "failure")
        assert row.metadata["faults"] == ["gone: there is no audit log in it [SQLSTATE 42P01]"]

    def test_a_run_that_is_broken_off_says_how_far_it_came(self, make_task, rows):
        sweeper = Sweeper(public=25)
        sweeper.trouble["public"] = AWAY
        with pytest.raises(DatabaseUnavailableError):
            make_task(sweeper).run()
        [row] = rows()
        assert (row.outcome, row.error_type, row.metadata["rows"]) == ("failure", "08006", 10)

    def test_so_does_one_that_a_person_has_interrupted(self, make_task, rows):
        sweeper = Sweeper(public=25)
        sweeper.trouble["public"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            make_task(sweeper).run()
        [row] = rows()
        assert (row.outcome, row.error_type, row.metadata["rows"]) == ("failure", "KeyboardInterrupt", 10)

    def test_partitions_are_named(self, make_task, rows):
        sweeper = Sweeper(public=0, tenant_a=0)

        def sweep(schema, cutoffs, **rest):
            if schema == "public":
                return Swept(schema, made=["log_2026_04"])
            return Swept(schema, rows=9, set_aside=2, dropped=["log_2025_01"], made=["log_2026_04"], moved=3)

        sweeper.sweep = sweep
        task = make_task(sweeper)
        task.run()
        run, part = sorted(rows(), key=lambda row: row.schema)
        assert part.metadata["partitions_dropped"] == ["log_2025_01"]
        assert (part.metadata["set_aside"], part.metadata["moved"]) == (2, 3)
        assert run.metadata["partitions_dropped"] == ["tenant_a.log_2025_01"]
        assert run.metadata["partitions_made"] == ["public.log_2026_04", "tenant_a.log_2026_04"]
        assert task.stats()["partitions_dropped"] == 1

    def test_it_is_there_at_a_sampling_of_nothing(self, storage, make_task):
        exporter = AuditSpanExporter(storage=storage, actions=["recall"])
        provider = TracerProvider(sampler=AuditSampler(ALWAYS_OFF, actions=["recall"]), shutdown_on_exit=False)
        processor = AuditSpanProcessor(exporter, schedule_delay_millis=5.0)
        provider.add_span_processor(processor)
        make_task(Sweeper(public=0, tenant_a=5), tracer=lambda: provider.get_tracer(SCOPE_NAME)).run()
        assert processor.force_flush(10_000)
        assert [(row.schema, row.sampled) for row in storage.records] == [("tenant_a", False), ("public", False)]
        provider.shutdown()

    def test_it_is_on_the_disk_before_anything_is_deleted(self, audit, storage, provider, make_task):
        begun = []
        processor = audit(storage=storage, actions=[])
        sweeper = Sweeper(public=5)
        sweeper.before_batch = lambda schema: begun.extend(processor._operations._open.values())
        make_task(sweeper).run()
        [operation] = begun
        assert operation.begun.outcome == "unknown"
        assert operation.begun.payload["astrocyte.audit.metadata.policy.days"] == 30
        assert operation.begun.payload["astrocyte.audit.metadata.cutoff.newest"] == "2026-01-30T12:00:00+00:00"

    def test_a_scheduled_run_is_part_of_nothing(self, make_task, rows, provider):
        sweeper = Sweeper(public=5)
        with provider.get_tracer("web").start_as_current_span("GET /"):
            task = make_task(sweeper)
            task.start()
            assert wait_until(lambda: task.stats()["runs"] == 1)
            assert task.stop()
        assert [row.parent_span_id for row in rows()] == [None]

    def test_somebody_s_own_run_is_part_of_what_they_do_but_not_of_their_tenant(self, make_task, rows, provider):
        with (
            audit_scope(schema="tenant_a", actor_id="alice", transport="http", bank_id="bank-1"),
            provider.get_tracer("web").start_as_current_span("POST /purge") as span,
        ):
            make_task(Sweeper(public=5)).run()
            assert trace.get_current_span() is span
            assert not is_suppressed(otel_context.get_current())
        [row] = rows()
        assert row.parent_span_id == f"{span.get_span_context().span_id:016x}"
        assert (row.schema, row.actor_id, row.bank_id) == ("public", "astrocyte-otel-audit", None)
        assert row.transport != UNKNOWN_TRANSPORT

    def test_a_policy_of_many_banks_and_a_run_over_many_tenants_fit_in_a_span(self, make_task, rows):
        policy = RetentionPolicy(days=30, banks={f"bank-{number}": 30 + number for number in range(500)})
        sweeper = Sweeper(**{f"tenant_{number:03}": 0 for number in range(500)})
        sweeper.trouble = dict.fromkeys(sweeper.expired, NO_TABLE)
        make_task(sweeper, policy=policy).run()
        [row] = rows()
        assert len(row.metadata["policy"]["banks"]) == 500
        assert (row.metadata["schemas_swept"], len(row.metadata["schemas"]), len(row.metadata["faults"])) == (
            500,
            100,
            100,
        )
        assert "dropped_attributes" not in row.metadata

    def test_where_no_pipeline_takes_it_a_warning_says_so_once(self, make_task, caplog):
        task = make_task(Sweeper(public=5))
        task.run()
        task.run()
        assert [message for message in caplog.messages if "no row" in message] == [
            "a run of the retention may leave no row: no pipeline has promised one."
        ]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestAForkedChild:
    def in_child(self, work):
        """Whether it is true in a forked child."""
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if work() else 1)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_has_a_thread_and_counts_of_its_own(self, make_task):
        sweeper = Sweeper(public=5)
        task = make_task(sweeper)
        task.start()
        assert wait_until(lambda: task.stats()["runs"] == 1)

        def work():
            task.after_fork()
            fresh = task.stats()["rows_deleted"] == 0 and sweeper.forked == 1
            return fresh and wait_until(lambda: task.stats()["runs"] == 1) and task.stop() and threads() == []

        assert self.in_child(work)
        assert task.is_started

    def test_has_none_where_its_parent_had_none(self, make_task):
        task = make_task(Sweeper())

        def work():
            task.after_fork()
            return threads() == [] and not task.is_started and task.run().total.is_finished

        assert self.in_child(work)

    def test_is_not_held_up_by_a_lock_that_its_parent_had(self, make_task):
        sweeper = Sweeper(public=100)
        hangs, goes_on = threading.Event(), threading.Event()
        sweeper.before_batch = lambda schema: (hangs.set(), goes_on.wait(20))
        task = make_task(sweeper)
        task.start()
        assert hangs.wait(20)

        def work():
            sweeper.before_batch = lambda schema: None
            task.after_fork()
            return wait_until(lambda: task.stats()["rows_deleted"] == 100) and task.stop()

        assert self.in_child(work)
        goes_on.set()

    def test_has_the_task_of_the_processor_it_has_inherited(self, storage, monkeypatch):
        sweeper = Sweeper(public=5)
        exporter = AuditSpanExporter(storage=storage, actions=[])
        monkeypatch.setattr(AuditSpanExporter, "sweeper", lambda self, dsn=None: sweeper)
        processor = AuditSpanProcessor(exporter, retention=RetentionPolicy(days=30, jitter_seconds=0))
        assert wait_until(lambda: processor.stats()["retention_runs"] == 1)
        assert self.in_child(lambda: wait_until(lambda: processor.stats()["retention_runs"] == 1) and sweeper.forked)
        processor.shutdown()
        assert threads() == []


class TestTheProcessor:
    @pytest.fixture
    def sweeper(self, monkeypatch):
        """What every exporter deletes by."""
        sweeper = Sweeper(public=5)
        monkeypatch.setattr(AuditSpanExporter, "sweeper", lambda self, dsn=None: sweeper)
        return sweeper

    def test_stops_the_retention_before_it_drains(self, audit, sweeper):
        storage = MemoryStorage()
        sweeper.expired["public"] = 10**9
        processor = audit(storage=storage, actions=[], retention=RetentionPolicy(days=30, jitter_seconds=0))
        assert wait_until(lambda: sweeper.expired["public"] < 10**9)
        processor.shutdown()
        assert threads() == []
        [row] = storage.records
        assert (row.action, row.outcome, row.metadata["finished"]) == ("audit.retention", "success", False)
        assert row.metadata["rows"] == 10**9 - sweeper.expired["public"] == processor.stats()["retention_rows"]

    def test_that_is_shut_down_while_a_batch_hangs_drains_all_the_same(self, audit, provider, sweeper):
        storage = MemoryStorage()
        hangs, goes_on = threading.Event(), threading.Event()
        sweeper.before_batch = lambda schema: (hangs.set(), goes_on.wait(20))
        policy = RetentionPolicy(days=30, jitter_seconds=0)
        processor = audit(storage=storage, retention=policy, export_timeout_millis=400.0)
        assert hangs.wait(20)
        provider.get_tracer("test").start_span("audit recall", attributes={"audit.action": "recall"}).end()
        began = time.monotonic()
        processor.shutdown()
        assert time.monotonic() - began < 5
        assert [row.action for row in storage.records] == ["recall"]
        goes_on.set()
        assert wait_until(lambda: threads() == [])

    def test_may_be_given_a_policy_later_in_place_of_the_one_before(self, audit, provider, storage, sweeper):
        processor = audit(storage=storage)
        first = processor.start_retention(RetentionPolicy(days=30), tracer_provider=provider)
        second = processor.start_retention(RetentionPolicy(days=60), tracer_provider=provider)
        assert (first.is_started, second.is_started) == (False, True)
        assert processor.retention is second
        assert len(threads()) == 1
