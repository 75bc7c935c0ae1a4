"""The writer: takes what is accepted, and doesn't rest until it is in the table. No clock is waited for in here."""

import logging
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from astrocyte_otel_audit import AuditSpanExporter
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline import writer as writer_module
from astrocyte_otel_audit.pipeline.backlog import GAP_ACTION, Backlog
from astrocyte_otel_audit.pipeline.parking import Backoff
from astrocyte_otel_audit.pipeline.writer import Writer
from astrocyte_otel_audit.postgres import Appended, Fault, FaultClass
from tests.records import bare_record
from tests.support import MemoryStorage, unavailable

#: Longer than any test: what would wait for this is woken, or the test fails.
NEVER = 3600.0
PATIENCE = 20.0
AT_ONCE = Backoff(0.0, 0.0)
NOT_BY_ITSELF = Backoff(NEVER * 2, NEVER * 2)
NO_TABLE = Fault(FaultClass.PARK, "the table does not exist; run `astrocyte-otel-audit migrate`", "42P01")


class Gate:
    """Holds every append until it is opened, and tells when the first one has come."""

    def __init__(self):
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, records):
        self.reached.set()
        assert self._open.wait(PATIENCE), "nobody opened the gate"

    def open(self):
        self._open.set()


class Failing:
    """Lets the first appends fail, each with the next error, then lets all pass."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.attempts = []
        self.failed = threading.Event()

    def __call__(self, records):
        self.attempts.append([record.id for record in records])
        if self.errors:
            error = self.errors.pop(0)
            if not self.errors:
                self.failed.set()
            raise error


def away():
    return DatabaseUnavailableError("nothing listens there")


@pytest.fixture
def make(storage):
    """Makes writers onto the storage; by default none writes before it is asked to."""
    made = []

    def make(storage=storage, **arguments):
        defaults = {"capacity": 1000, "batch_size": 100, "delay_seconds": NEVER, "backoff": AT_ONCE}
        writer = Writer(AuditSpanExporter(storage=storage, actions="*"), **{**defaults, **arguments})
        made.append((writer, storage))
        return writer

    yield make
    for writer, used in made:
        used.before_append = lambda records: None
        used.parked.clear()
        writer.stop(PATIENCE)


def numbered(number, **changes):
    return bare_record(number, trace_id=f"{number:032x}", **changes)


def submit(writer, count, *, first=0, schema=None):
    """Submit numbered records; say which were accepted."""
    return [writer.submit(numbered(number, schema=schema)) for number in range(first, first + count)]


def stored(storage):
    """The numbers of the stored records, in the order in which they were stored."""
    return [int(each.trace_id, 16) for each in storage.records if each.action != GAP_ACTION]


def gaps(storage):
    return [record for record in storage.records if record.action == GAP_ACTION]


def wait_until(condition):
    """Wait for another thread to come to a point that it doesn't announce."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


@contextmanager
def in_background(function, *arguments):
    """Run a function on another thread; gives a list that has its result once the block is left."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function(*arguments)), daemon=True)
    thread.start()
    yield result
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it hangs"


# Batches.


def test_a_full_batch_is_written_without_the_delay(make, storage):
    writer = make(batch_size=3)
    submit(writer, 2)
    wait_until(lambda: writer._changed._waiters)  # the thread sleeps
    submit(writer, 1, first=2)
    wait_until(lambda: stored(storage) == [0, 1, 2])
    assert storage.batches == [3]


def test_a_record_alone_is_written_after_the_delay(make, storage):
    writer = make(delay_seconds=0.01)
    submit(writer, 1)
    wait_until(lambda: stored(storage) == [0])


def test_a_record_alone_is_not_written_before_the_delay(make, storage):
    ticks = []

    def clock():
        ticks.append(None)
        return 100.0

    writer = make(delay_seconds=0.01, clock=clock)
    submit(writer, 1)
    wait_until(lambda: len(ticks) > 3)
    assert storage.batches == []


def test_a_backlog_is_written_in_order_and_in_batches_of_the_size(make, storage):
    storage.before_append = gate = Gate()
    writer = make(batch_size=3)
    submit(writer, 8)
    gate.open()
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(8))
    assert max(storage.batches) == 3


# Acceptance.


def test_a_full_writer_refuses_the_newest_and_counts_them(make, storage):
    storage.before_append = gate = Gate()
    writer = make(capacity=3, batch_size=2)
    assert submit(writer, 5) == [True, True, True, False, False]
    assert writer.stats()["refused_full"] == 2
    gate.open()
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2]
    assert writer.flush(PATIENCE)  # for the gap, which has found room since
    (gap,) = gaps(storage)
    assert gap.metadata == {"missing": 2, "reason": "the queue is full"}
    assert (gap.started_at, gap.ended_at) == (numbered(3).started_at, numbered(4).started_at)


def test_what_is_being_written_counts_against_the_capacity(make, storage):
    storage.before_append = gate = Gate()
    writer = make(capacity=2, batch_size=2)
    submit(writer, 2)
    assert gate.reached.wait(PATIENCE)
    assert not writer.has_room()
    assert submit(writer, 1) == [False]
    gate.open()
    assert writer.flush(PATIENCE)
    assert writer.has_room()
    assert submit(writer, 1, first=9) == [True]


def test_a_full_writer_says_once_that_records_are_lost(make, storage, caplog):
    storage.before_append = gate = Gate()
    writer = make(capacity=1)
    submit(writer, 50)
    gate.open()
    assert caplog.messages == ["new audit records are refused and counted in a gap record: 1 wait (max_queue_size)."]


def test_a_stopped_writer_refuses_and_counts(make, storage, caplog):
    writer = make()
    writer.stop(PATIENCE)
    assert submit(writer, 2) == [False, False]
    assert not writer.has_room()
    assert writer.stats()["refused_shutdown"] == 2
    assert caplog.messages == ["new audit records are refused: the pipeline is shut down."]


def test_an_operation_may_end_while_another_is_being_accepted(make, storage, monkeypatch):
    """As when garbage collection closes an abandoned generator on a thread that is in the writer."""

    class Interrupted(Backlog):
        interrupted = False

        def append(self, record):
            if not self.interrupted:
                self.interrupted = True
                submit(writer, 1, first=1)
            return super().append(record)

    monkeypatch.setattr(writer_module, "Backlog", Interrupted)
    writer = make()
    with in_background(submit, writer, 1):
        pass
    assert writer.flush(PATIENCE)
    assert sorted(stored(storage)) == [0, 1]


def test_the_logs_handler_may_ask_for_the_stats(make, storage):
    class Curious(logging.Handler):
        def emit(self, record):
            seen.append(writer.stats())

    seen = []
    writer = make(capacity=1)
    handler = Curious()
    logging.getLogger("astrocyte_otel_audit").addHandler(handler)
    try:
        with in_background(submit, writer, 2):
            pass
    finally:
        logging.getLogger("astrocyte_otel_audit").removeHandler(handler)
    assert [stats["refused_full"] for stats in seen] == [1]


# Postgres away.


def test_a_batch_is_given_again_until_the_storage_is_back_and_each_record_is_there_once(make, storage):
    storage.before_append = failing = Failing(*(away() for _ in range(5)))
    writer = make()
    submit(writer, 3)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2]
    assert len(failing.attempts) == 6
    assert writer.stats()["stored"] == 3


def test_a_batch_whose_answer_was_lost_is_there_once(make):
    class Unanswered(MemoryStorage):
        answers = False

        def append(self, records):
            appended = super().append(records)
            if not self.answers:
                self.answers = True
                raise away()
            return appended

    storage = Unanswered()
    writer = make(storage)
    submit(writer, 3)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2]
    assert writer.stats()["stored"] == 3


@pytest.mark.parametrize(
    "error", [ValueError, MemoryError, RecursionError, KeyboardInterrupt, SystemExit, GeneratorExit]
)
def test_whatever_an_append_raises_the_thread_lives_on(make, storage, error, caplog):
    storage.before_append = Failing(error("its own words"))
    writer = make()
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0]
    assert f"an unexpected {error.__name__}" in caplog.text
    assert "its own words" not in caplog.text


def test_a_storage_that_answers_nonsense_is_asked_again(make):
    class Nonsense(MemoryStorage):
        answers = [None, 7]

        def append(self, records):
            return self.answers.pop() if self.answers else super().append(records)

    storage = Nonsense()
    writer = make(storage)
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0]


@pytest.mark.parametrize("error", [away(), ValueError(), SystemExit()])
def test_a_table_that_cannot_be_looked_at_does_not_end_the_thread(make, storage, error):
    def check():
        raise error

    storage.check = check
    writer = make()
    submit(writer, 1)
    assert writer.flush(PATIENCE)


def test_a_handler_that_raises_does_not_end_the_thread(make):
    class SetsAside(MemoryStorage):
        def append(self, records):
            fault = Fault(FaultClass.SET_ASIDE, "no")
            return Appended(set_aside=[(record, fault) for record in records])

    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("no disk left")

    handler = Broken()
    logging.getLogger("astrocyte_otel_audit").addHandler(handler)
    try:
        writer = make(SetsAside())
        for number in range(2):
            submit(writer, 1, first=number)
            assert not writer.flush(PATIENCE)
    finally:
        logging.getLogger("astrocyte_otel_audit").removeHandler(handler)
    assert writer.stats()["set_aside"] == 2


def test_an_outage_is_said_once_and_its_end_too(make, storage, caplog):
    storage.before_append = Failing(*(away() for _ in range(20)))
    writer = make()
    submit(writer, 3)
    assert writer.flush(PATIENCE)
    submit(writer, 1, first=3)
    assert writer.flush(PATIENCE)
    assert caplog.messages == [
        "audit records wait for Postgres: nothing listens there.",
        "audit records are being written again.",
    ]


def test_an_outage_that_is_seen_at_the_start_is_not_said_again_with_the_first_batch(make, storage, caplog):
    storage.check = lambda: unavailable([])
    storage.before_append = Failing(away())
    writer = make()
    writer.start()
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    assert len(caplog.records) == 2


def test_a_missing_table_that_is_seen_at_the_start_is_not_said_again_with_the_first_batch(make, storage, caplog):
    storage.fault = storage.parked[None] = NO_TABLE
    writer = make()
    submit(writer, 1)
    assert not writer.flush(PATIENCE)
    assert caplog.messages == [f"audit records of schema 'public' wait: {NO_TABLE}."]


def test_without_a_thread_the_stop_writes(make, storage, monkeypatch):
    """Late in interpreter shutdown no thread can be started."""

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = make()
    assert submit(writer, 3) == [True] * 3
    assert writer.stop(PATIENCE) == 0
    assert (stored(storage), storage.closed) == ([0, 1, 2], True)


# Parked tenants.


def test_a_parked_tenant_does_not_hold_up_the_others(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF, batch_size=2)
    submit(writer, 3, schema="a")
    submit(writer, 3, first=3, schema="b")
    submit(writer, 3, first=6)
    assert not writer.flush(PATIENCE)
    assert sorted(stored(storage)) == list(range(3, 9))
    assert (writer.stats()["parked"], writer.stats()["waiting"]) == (3, 0)


def test_a_parked_tenant_is_tried_again_by_itself_and_keeps_its_order(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=Backoff(0.001, 0.01), batch_size=2)
    submit(writer, 5, schema="a")
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    wait_until(lambda: stored(storage) == list(range(5)))


def test_a_tenant_that_is_written_again_is_not_parked_any_more(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF)
    submit(writer, 1, schema="a")
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    assert writer.flush(PATIENCE)
    submit(writer, 1, first=1, schema="a")
    assert writer.flush(PATIENCE)
    assert (stored(storage), writer.stats()["parked"]) == ([0, 1], 0)


def test_many_locked_tenants_leave_the_others_their_time(make, storage):
    seconds = [0.0]

    def wait_for_locks(records):
        if any(record.schema for record in records):
            seconds[0] += 5.0  # as a lock's timeout takes

    storage.before_append = wait_for_locks
    storage.parked = {f"tenant_{number}": NO_TABLE for number in range(20)}
    # Their next attempt is due as soon as the last one has failed: without an end they could take all of the time.
    writer = make(batch_size=1, delay_seconds=0.0, parking=AT_ONCE, clock=lambda: seconds[0])
    for number in range(20):
        submit(writer, 1, schema=f"tenant_{number}")
    wait_until(lambda: len(storage.batches) >= 40)  # each has failed
    submit(writer, 30)
    wait_until(lambda: len(stored(storage)) == 30)


def test_parked_records_beyond_half_the_capacity_are_lost_and_counted(make, storage, caplog):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF, capacity=10, batch_size=2)
    for number in range(10):
        submit(writer, 1, first=number, schema="a")
        assert not writer.flush(PATIENCE)
    stats = writer.stats()
    assert (stats["parked"], stats["lost"], stats["accepted"]) == (5, 5, 10)
    submit(writer, 1, first=10)
    assert not writer.flush(PATIENCE)
    assert stored(storage) == [10]
    assert [message for message in caplog.messages if "lost" in message] == [
        "new audit records of tenants that can't be written are lost: 5 wait (half of max_queue_size)."
    ]


def test_a_parked_tenant_is_said_once_and_so_is_its_end(make, storage, caplog):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=AT_ONCE)
    submit(writer, 3, schema="a")
    assert not writer.flush(PATIENCE)
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    assert writer.flush(PATIENCE)
    assert caplog.messages == [
        f"audit records of schema 'a' wait: {NO_TABLE}.",
        "audit records of schema 'a' are being written again.",
    ]


# Flush.


def test_a_flush_of_nothing_is_true(make):
    assert make().flush(PATIENCE)


def test_a_flush_is_true_only_once_all_accepted_before_it_is_stored(make, storage):
    storage.before_append = gate = Gate()
    writer = make(batch_size=1)
    submit(writer, 5)
    with in_background(writer.flush, PATIENCE) as answer:
        assert gate.reached.wait(PATIENCE)
        assert answer == []
        gate.open()
    assert answer == [True]
    assert stored(storage) == list(range(5))


def test_a_flush_does_not_wait_for_what_is_accepted_after_it(make, storage):
    def first_passes_others_wait(records):
        if records[0] != numbered(0):
            gate(records)

    gate = Gate()
    storage.before_append = first_passes_others_wait
    writer = make()
    with in_background(writer.flush, PATIENCE):
        pass
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    submit(writer, 1, first=1)
    assert not writer.flush(0.05)
    gate.open()


def test_a_flush_is_false_at_its_timeout(make, storage):
    storage.before_append = gate = Gate()
    writer = make()
    submit(writer, 1)
    assert not writer.flush(0.05)
    gate.open()
    assert writer.flush(PATIENCE)


def test_a_flush_is_false_as_soon_as_a_tenant_turns_out_to_be_parked(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF)
    submit(writer, 1, schema="a")
    with in_background(writer.flush, NEVER) as answer:
        pass
    assert answer == [False]


def test_a_flush_tries_a_parked_tenant_again(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF)
    submit(writer, 1, schema="a")
    assert not writer.flush(PATIENCE)
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    assert writer.flush(PATIENCE)


def test_a_flush_is_not_answered_by_an_attempt_that_was_made_before_it(make):
    class SlowAnswer(MemoryStorage):
        """The verdict is from before the gate, its news from after."""

        def append(self, records):
            appended = super().append(records)
            gate(records)
            return appended

    gate, storage = Gate(), SlowAnswer()
    storage.parked["a"] = NO_TABLE
    writer = make(storage, batch_size=1, parking=NOT_BY_ITSELF)
    submit(writer, 1, schema="a")
    assert gate.reached.wait(PATIENCE)
    storage.parked.clear()  # mended
    with in_background(writer.flush, PATIENCE) as answer:
        wait_until(lambda: writer._flushing)
        gate.open()
    assert answer == [True]


def test_a_flush_is_false_for_good_once_a_record_was_set_aside_whenever_that_was(make):
    class Refuses(MemoryStorage):
        refuses = True

        def append(self, records):
            if not self.refuses:
                return super().append(records)
            return Appended(set_aside=[(record, Fault(FaultClass.SET_ASIDE, "no")) for record in records])

    storage = Refuses()
    writer = make(storage, batch_size=1)
    submit(writer, 1)
    wait_until(lambda: writer.stats()["waiting"] == 0)  # refused before the flush was called
    assert not writer.flush(PATIENCE)
    storage.refuses = False
    submit(writer, 1, first=1)
    # Another caller's flush, which has heard of nothing: what it was promised is not in the table either.
    with in_background(writer.flush, NEVER) as answer:
        pass
    assert answer == [False]
    assert (writer.stats()["set_aside"], writer.stats()["stored"]) == (1, 1)


def test_a_flush_cuts_the_backoff(make, storage):
    storage.before_append = failing = Failing(away())
    writer = make(batch_size=1, backoff=NOT_BY_ITSELF)
    submit(writer, 1)
    assert failing.failed.wait(PATIENCE)
    assert writer.flush(PATIENCE)


def test_a_flush_that_is_called_during_a_failing_attempt_cuts_the_backoff_after_it(make, storage):
    def fail_late(records):
        gate(records)
        if not failed:
            failed.append(True)
            raise away()

    gate, failed = Gate(), []
    storage.before_append = fail_late
    writer = make(batch_size=1, backoff=NOT_BY_ITSELF)
    submit(writer, 1)
    assert gate.reached.wait(PATIENCE)
    with in_background(writer.flush, PATIENCE) as answer:
        wait_until(lambda: writer._flushing)
        gate.open()
    assert answer == [True]


# Stop.


def test_a_stop_drains_all_that_waits_and_closes_the_storage(make, storage):
    writer = make(batch_size=2)
    submit(writer, 7)
    assert writer.stop(PATIENCE) == 0
    assert (stored(storage), storage.closed) == (list(range(7)), True)


def test_a_stop_is_harmless_when_repeated_and_when_nothing_was_started(make, storage, caplog):
    writer = make()
    assert [writer.stop(PATIENCE) for _ in range(3)] == [0, 0, 0]
    assert storage.closed
    assert caplog.records == []


def test_a_flush_after_the_stop_is_true_where_all_was_written(make):
    writer = make()
    submit(writer, 3)
    writer.stop(PATIENCE)
    assert writer.flush(PATIENCE)


def test_a_stop_drains_whatever_its_thread_holds(make, storage):
    writer = make()
    submit(writer, 3)
    with writer._changed:  # as a signal's handler that has interrupted `submit`
        assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [0, 1, 2]
    assert storage.closed


def test_a_stop_by_the_writers_own_thread_does_not_wait_for_itself(make, storage):
    left = []
    writer = make(batch_size=1)
    storage.before_append = lambda records: left.append(writer.stop(NEVER))
    submit(writer, 1)
    wait_until(lambda: storage.closed)
    assert left == [1]


def test_a_stop_without_the_database_returns_by_its_deadline_and_says_how_many_are_lost(make, storage, caplog):
    storage.before_append = unavailable
    writer = make(batch_size=2, backoff=Backoff(0.005, 0.01))
    submit(writer, 5)
    started = time.monotonic()
    assert writer.stop(0.1) == 5
    assert time.monotonic() - started < 5.0
    assert writer.stop(0.1) == 5
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "5 audit records could not be written before the shutdown's deadline and are lost."
    ]


def test_after_the_deadline_nothing_more_is_tried(make, storage):
    storage.before_append = failing = Failing(*(away() for _ in range(100_000)))
    writer = make(batch_size=1, backoff=Backoff(0.005, 0.01))
    submit(writer, 5)
    assert writer.stop(0.1) == 5
    wait_until(lambda: storage.closed)
    assert {ids[0] for ids in failing.attempts} == {numbered(0).id}


def test_at_the_deadline_the_thread_ends_however_long_its_backoff(make, storage):
    storage.before_append = unavailable
    writer = make(backoff=NOT_BY_ITSELF)
    submit(writer, 1)
    assert writer.stop(0.05) == 1
    wait_until(lambda: storage.closed)


def test_a_flush_after_a_stop_that_left_records_is_false_at_once(make, storage):
    storage.before_append = unavailable
    writer = make()
    submit(writer, 1)
    writer.stop(0.05)
    with in_background(writer.flush, NEVER) as answer:
        pass
    assert answer == [False]


def test_a_stop_returns_by_its_deadline_where_a_server_does_not_answer(make, storage):
    storage.before_append = gate = Gate()
    writer = make(batch_size=1)
    submit(writer, 1)
    assert gate.reached.wait(PATIENCE)
    started = time.monotonic()
    assert writer.stop(0.05) == 1
    assert time.monotonic() - started < 5.0
    assert not storage.closed  # it is in use
    gate.open()
    wait_until(lambda: storage.closed)


def test_a_stop_does_not_wait_for_a_backoff_that_grew_long(make, storage):
    class Patient:
        def delay(self, attempt):
            return 0.0 if attempt < 3 else NEVER

    storage.before_append = failing = Failing(*(away() for _ in range(3)))
    writer = make(batch_size=1, backoff=Patient())
    submit(writer, 1)
    assert failing.failed.wait(PATIENCE)
    failing.errors = [away()]  # not quite back when the stop makes it look again
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [0]


def test_a_stop_tries_a_parked_tenant_once_more(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF)
    submit(writer, 1, schema="a")
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [0]


def test_a_stop_does_not_wait_for_a_tenant_that_stays_parked(make, storage):
    storage.parked["a"] = NO_TABLE
    writer = make(parking=NOT_BY_ITSELF)
    submit(writer, 2, schema="a")
    submit(writer, 1, first=2)
    with in_background(writer.stop, NEVER) as left:
        pass
    assert left == [2]
    assert stored(storage) == [2]


def test_a_storage_that_cannot_be_closed_is_reported_and_no_more(make, storage, caplog):
    def close():
        raise OSError("its own words")

    storage.close = close
    make().stop(PATIENCE)
    assert caplog.messages == ["the audit table could not be closed (OSError)."]


# All together.


def test_the_stats_add_up(make):
    class Mixed(MemoryStorage):
        def append(self, records):
            appended = super().append([record for record in records if record.action != "bad"])
            fault = Fault(FaultClass.SET_ASIDE, "no")
            appended.set_aside = [(record, fault) for record in records if record.action == "bad"]
            return appended

    storage = Mixed()
    storage.parked["a"] = NO_TABLE
    writer = make(storage, capacity=20, batch_size=3, parking=NOT_BY_ITSELF)
    for number in range(15):
        writer.submit(
            numbered(number, schema="a" if number % 3 == 0 else None, action="bad" if number % 3 == 1 else "recall")
        )
    assert not writer.flush(PATIENCE)
    stats = writer.stats()
    assert stats == {
        "accepted": 15, "stored": 5, "set_aside": 5, "parked": 5, "lost": 0, "waiting": 0,
        "refused_full": 0, "refused_shutdown": 0, "unreadable": 0, "adopted": 0, "damaged": 0,
    }  # fmt: skip


def test_threads_that_submit_and_flush_while_the_database_comes_and_goes_lose_nothing(make, storage):
    def flaky(records):
        if chance.random() < 0.3:
            raise away()

    def work(worker):
        for step in range(200):
            accepted[worker] += submit(writer, 1, first=worker * 1000 + step, schema=f"tenant_{step % 3}")
            if step % 50 == 49:
                assert writer.flush(PATIENCE)
                stats = writer.stats()
                assert stats["accepted"] >= stats["stored"]

    chance = random.Random(1)
    storage.before_append = flaky
    accepted = [[] for _ in range(8)]
    writer = make(capacity=10_000, batch_size=7, delay_seconds=0.001, backoff=Backoff(0.0005, 0.001))
    threads = [threading.Thread(target=work, args=[worker]) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.stop(PATIENCE) == 0
    assert all(all(answers) for answers in accepted)
    assert sorted(stored(storage)) == sorted(worker * 1000 + step for worker in range(8) for step in range(200))


def test_a_stop_amid_submitting_threads_stores_each_accepted_record_and_counts_each_other(make, storage):
    def work(worker):
        for step in range(2000):
            number = worker * 10_000 + step
            if submit(writer, 1, first=number) == [True]:
                accepted.append(number)
            if len(accepted) > 1000:
                enough.set()

    enough, accepted = threading.Event(), []
    writer = make(capacity=100_000, batch_size=50, delay_seconds=0.001)
    threads = [threading.Thread(target=work, args=[worker]) for worker in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(PATIENCE)
    assert writer.stop(PATIENCE) == 0
    for thread in threads:
        thread.join()
    counts = Counter(stored(storage))
    assert counts == Counter(accepted)
    assert writer.stats()["refused_shutdown"] == 8000 - len(accepted)
