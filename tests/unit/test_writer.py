"""The writer: takes what is accepted, and doesn't rest until it is in the table. No clock is waited for in here."""

import errno
import gc
import logging
import os
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from astrocyte_otel_audit import AuditRecord, AuditSpanExporter
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline import intake as intake_module
from astrocyte_otel_audit.pipeline import writer as writer_module
from astrocyte_otel_audit.pipeline.acknowledgement import read_acknowledged
from astrocyte_otel_audit.pipeline.backlog import Backlog, Entry
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.pipeline.gap import GAP_ACTION
from astrocyte_otel_audit.pipeline.parking import Backoff
from astrocyte_otel_audit.pipeline.segment import RECORD, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool
from astrocyte_otel_audit.pipeline.writer import Writer
from astrocyte_otel_audit.postgres import Appended, Fault, FaultClass
from tests.records import bare_record, captured_of
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
    """Lets the first appends fail, each with the next error, then lets all pass; so does each None before that."""

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
            if error is not None:
                raise error


def away():
    return DatabaseUnavailableError("nothing listens there")


@pytest.fixture
def make(storage):
    """Makes writers onto the storage; by default none writes before it is asked to, and none has a disk."""
    made = []

    def make(storage=storage, root=None, spool=None, **arguments):
        defaults = {"capacity": 1000, "batch_size": 100, "delay_seconds": NEVER, "backoff": AT_ONCE}
        arguments = {**defaults, **arguments}
        options = {"max_bytes": 10**9, "max_in_memory": arguments["capacity"], "fsync": "never", **(spool or {})}
        spool = Spool(root, "there", **options)
        writer = Writer(AuditSpanExporter(storage=storage, actions="*"), spool=spool, **arguments)
        made.append((writer, storage))
        return writer

    yield make
    for writer, used in made:
        used.before_append = lambda records: None
        used.parked.clear()
        writer.stop(PATIENCE)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


def numbered(number, **changes):
    return captured_of(bare_record(number, trace_id=f"{number:032x}", **changes))


def submit(writer, count, *, first=0, schema=None):
    """Submit numbered operations; say which were accepted."""
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


def die(writer):
    """Leave the files as a killed process does."""
    writer._backlog.after_fork()


def no_reading(monkeypatch, *, of=lambda descriptor: True):
    """Let files not be read, as a disk does that has trouble, until `monkeypatch.undo`."""
    real = os.pread

    def pread(descriptor, length, offset):
        if of(descriptor):
            raise OSError(errno.EIO, "secret path")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)


def adopt(writer, count):
    """Let a writer write what others have left, and stop it."""
    writer.start()
    wait_until(lambda: writer.stats()["adopted"] == count)
    assert writer.flush(PATIENCE)
    assert writer.stop(PATIENCE) == 0


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
    assert gap.metadata == {"missing": 2, "reason": "3 wait (max_queue_size)"}
    assert (gap.started_at, gap.ended_at) == (bare_record(3).started_at, bare_record(4).started_at)


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

        def append(self, captured, line, **options):
            if not self.interrupted:
                self.interrupted = True
                submit(writer, 1, first=1)
            return super().append(captured, line, **options)

    monkeypatch.setattr(intake_module, "Backlog", Interrupted)
    writer = make()
    with in_background(submit, writer, 1):
        pass
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1]


@pytest.fixture
def interrupted(monkeypatch):
    """Calls a function on the thread that writes next to a file, when the line is there and nothing else is done."""

    def interrupt(function):
        def write(descriptor, line):
            written = real(descriptor, line)
            monkeypatch.undo()
            answers.append(function())
            return written

        answers, real = [], os.write
        monkeypatch.setattr(os, "write", write)
        return answers

    return interrupt


@pytest.mark.parametrize("count", [1, 3])
def test_an_operation_that_ends_while_another_is_being_written_comes_after_it(make, storage, root, interrupted, count):
    writer = make(root=root, batch_size=2)
    submit(writer, 1)
    assert writer.flush(PATIENCE)  # there is a file, and it was read
    answers = interrupted(lambda: submit(writer, count, first=2))
    assert submit(writer, 1, first=1) == [True]
    assert answers == [[True] * count]
    assert writer.flush(PATIENCE)
    submit(writer, 3, first=2 + count)
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(5 + count))
    assert (writer.stats()["accepted"], writer.stats()["damaged"]) == (5 + count, 0)
    assert writer.stop(PATIENCE) == 0
    assert list(root.iterdir()) == []


def test_a_thousand_operations_may_end_while_another_is_being_written(make, storage, root, interrupted):
    writer = make(root=root, capacity=10_000)
    interrupted(lambda: submit(writer, 1000, first=1))
    assert submit(writer, 1) == [True]
    assert writer.flush(PATIENCE)
    assert len(stored(storage)) == 1001


@pytest.mark.parametrize("what", ["begin", "hold", "flush", "tend"])
def test_an_operation_may_end_while_something_else_is_being_written(make, storage, root, interrupted, what):
    writer = make(root=root)
    submit(writer, 1, first=5)
    if what in ("flush", "tend"):  # there is a gap to be written
        writer._spool._max_bytes = writer._spool.bytes
        submit(writer, 1, first=6)
        writer._spool._max_bytes = 10**9
    interrupted(lambda: writer.submit(numbered(1, action="x" * 333)))
    if what == "begin":
        writer.begin(numbered(9))
    elif what == "hold":
        writer.hold(numbered(9))
    elif what == "flush":
        writer.flush(0.0)
    else:
        list(writer._backlog.tend(adopting=False))
    writer.flush(PATIENCE)
    for number in range(10, 15):
        submit(writer, 1, first=number)
        writer.flush(PATIENCE)
    assert writer.stats()["damaged"] == 0
    assert sorted(stored(storage)) == [1, 5, 10, 11, 12, 13, 14]


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_first", [True, False])
def test_an_interrupt_while_an_operation_is_being_written_costs_no_other(make, storage, root, interrupted, is_first):
    writer = make(root=root)
    submit(writer, 0 if is_first else 1)
    interrupted(raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.submit(numbered(1, action="x" * 333))
    assert submit(writer, 5, first=10) == [True] * 5
    assert writer.flush(PATIENCE)
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [0, 10, 11, 12, 13, 14][is_first:]


def test_what_was_put_off_is_written_where_the_call_that_it_came_into_is_interrupted(make, storage, root, monkeypatch):
    def write(descriptor, line):
        monkeypatch.undo()
        assert submit(writer, 1, first=1) == [True]
        raise KeyboardInterrupt

    writer = make(root=root)
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(KeyboardInterrupt):
        submit(writer, 1)
    assert writer.flush(PATIENCE)
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [1]


def test_while_one_caller_waits_for_room_others_wait_too(make, storage):
    storage.before_append = gate = Gate()
    writer = make(capacity=2, batch_size=2, block_seconds=0.2)
    submit(writer, 2)
    assert gate.reached.wait(PATIENCE)
    with in_background(submit, writer, 1):
        wait_until(lambda: writer._changed._waiters)
        answers = submit(writer, 3, first=10)
    gate.open()
    assert (writer.stats()["accepted"], answers) == (2, [False] * 3)


def test_nothing_begins_while_an_operation_is_being_written_and_what_is_to_be_held_is_afterwards(
    make, storage, root, interrupted
):
    writer = make(root=root)
    answers = interrupted(lambda: (writer.begin(numbered(8)), writer.hold(numbered(9)), writer.release("unknown")))
    assert submit(writer, 1) == [True]
    assert answers == [(False, True, None)]
    assert [writer._backlog.has_begun(numbered(number).id) for number in (8, 9)] == [False, True]
    writer.release(numbered(9).id)
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == [0]
    assert list(root.iterdir()) == []


def test_what_ends_while_another_is_refused_is_refused_too(make, storage, root, monkeypatch):
    """As a handler of a signal does that comes while the gap is being noted."""

    def pwrite(descriptor, line, offset):
        written = real(descriptor, line, offset)
        monkeypatch.setattr(os, "pwrite", real)
        answers.append(submit(writer, 1, first=101))
        return written

    answers, real = [], os.pwrite
    storage.before_append = gate = Gate()
    writer = make(root=root, spool={"max_bytes": 4_000})
    accepted = sum(submit(writer, 100))
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert submit(writer, 1, first=100) == [False]
    assert answers == [[True]]  # nobody could know
    assert writer.stats()["refused_full"] == 102 - accepted
    gate.open()
    assert writer.flush(PATIENCE)
    assert writer.flush(PATIENCE)
    (gap,) = gaps(storage)
    assert gap.metadata["missing"] == 102 - accepted


def test_a_caller_waits_for_room_where_it_is_told_to(make, storage):
    storage.before_append = gate = Gate()
    writer = make(capacity=2, batch_size=2, block_seconds=PATIENCE)
    submit(writer, 2)
    assert gate.reached.wait(PATIENCE)
    assert writer.has_room()
    with in_background(submit, writer, 1) as answer:
        wait_until(lambda: writer._changed._waiters)
        assert answer == []
        gate.open()
    assert answer == [[True]]


def test_a_caller_waits_for_room_no_longer_than_it_is_told_to(make, storage):
    storage.before_append = gate = Gate()
    writer = make(capacity=2, batch_size=2, block_seconds=0.05)
    submit(writer, 2)
    started = time.monotonic()
    assert submit(writer, 1) == [False]
    assert time.monotonic() - started >= 0.05
    assert writer.stats()["refused_full"] == 1
    gate.open()


def test_the_logs_handler_may_audit(make, storage):
    class Auditing(logging.Handler):
        def emit(self, record):
            answers.append(submit(writer, 1, first=9))

    answers = []
    writer = make(capacity=1)
    handler = Auditing()
    logging.getLogger("astrocyte_otel_audit").addHandler(handler)
    try:
        with in_background(submit, writer, 2) as result:
            pass
    finally:
        logging.getLogger("astrocyte_otel_audit").removeHandler(handler)
    assert (result, answers) == ([[True, False]], [[False]])
    assert writer.stats()["refused_full"] == 2


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


def test_after_each_attempt_it_is_told_how_long_it_took_and_what_went_wrong(make, storage):
    storage.before_append = Failing(DatabaseUnavailableError("no", "57P01"), away(), RuntimeError("its own words"))
    told = []
    writer = make(attempted=lambda seconds, error: told.append((seconds, error)))
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    assert [error for _, error in told] == ["57P01", "DatabaseUnavailableError", "RuntimeError", None]
    assert all(0 <= seconds < PATIENCE for seconds, _ in told)


def test_whoever_is_told_of_an_attempt_may_raise(make, storage):
    def attempted(seconds, error):
        raise RuntimeError("its own words")

    storage.before_append = Failing(away())
    writer = make(attempted=attempted)
    submit(writer, 3)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2]


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
            time.sleep(0.0001)  # in which, unlike here, other threads have theirs

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


def test_parked_records_beyond_half_the_capacity_are_on_disk_only_and_loaded_again(make, storage, root):
    storage.parked["a"] = NO_TABLE
    writer = make(root=root, parking=NOT_BY_ITSELF, capacity=10, batch_size=2)
    for number in range(20):
        submit(writer, 1, first=number, schema="a")
        assert not writer.flush(PATIENCE)
    assert (writer.stats()["parked"], writer.stats()["lost"]) == (20, 0)
    in_memory = [entry.record is not None for lane in writer._parking._lanes.values() for entry in lane.waiting]
    assert 0 < sum(in_memory) <= 5
    del storage.parked["a"]
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(20))
    stats = writer.stats()
    assert (stats["stored"], stats["parked"], stats["damaged"]) == (20, 0, 0)


def test_a_batch_that_is_parked_as_a_whole_is_on_disk_only_past_half_the_capacity(make, storage, root):
    storage.parked["a"] = NO_TABLE
    writer = make(root=root, parking=NOT_BY_ITSELF, capacity=10, batch_size=10)
    submit(writer, 10, schema="a")
    assert not writer.flush(PATIENCE)
    assert all(entry.record is None for lane in writer._parking._lanes.values() for entry in lane.waiting)
    del storage.parked["a"]
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(10))


def park_on_disk_only(make, storage, root, **arguments):
    """Make a writer that has parked ten records and has none of them in memory, and let its tenant be mended."""
    storage.parked["a"] = NO_TABLE
    writer = make(root=root, parking=NOT_BY_ITSELF, capacity=10, batch_size=10, **arguments)
    submit(writer, 10, schema="a")
    assert not writer.flush(PATIENCE)
    del storage.parked["a"]
    return writer


def test_parked_records_that_cant_be_read_for_a_while_are_waited_for(make, storage, root, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", 0.001)
    writer = park_on_disk_only(make, storage, root)
    caplog.clear()
    no_reading(monkeypatch)
    assert not writer.flush(0.05)
    assert caplog.messages == ["the spool has trouble: it can't be read: Input/output error."]
    stats = writer.stats()
    assert (stats["damaged"], stats["lost"], stats["waiting"] + stats["parked"]) == (0, 0, 10)
    monkeypatch.undo()
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(10))


def test_a_flush_does_not_wait_for_a_pause_since_parked_records_could_not_be_read(make, storage, root, monkeypatch):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", NEVER)
    writer, tries = park_on_disk_only(make, storage, root), []
    no_reading(monkeypatch, of=lambda file: not tries.append(file))
    assert not writer.flush(0.05)
    assert 1 <= len(tries) <= 2
    monkeypatch.undo()
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(10))


def test_a_parked_record_that_is_damaged_on_disk_is_counted_and_holds_up_nothing(make, storage, root):
    writer = park_on_disk_only(make, storage, root)
    (path,) = root.glob("*/0*.segment")
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(numbered(4).id.encode()))
        file.write(b"?")
    assert not writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    stats = writer.stats()
    assert (stats["stored"], stats["damaged"], stats["lost"], stats["waiting"], stats["parked"]) == (9, 1, 0, 0, 0)
    assert writer.stop(PATIENCE) == 0
    assert list(root.iterdir()) == []


def test_a_stop_leaves_parked_records_that_cant_be_read_in_the_spool(make, storage, root, monkeypatch):
    writer = park_on_disk_only(make, storage, root)
    no_reading(monkeypatch)
    assert writer.stop(0.05) == 10
    wait_until(lambda: writer._ended)
    monkeypatch.undo()
    adopt(make(root=root), 10)
    assert stored(storage) == list(range(10))
    assert list(root.iterdir()) == []


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


# The spool.


def test_whatever_waits_only_few_operations_are_in_memory(make, storage, root):
    def alive():
        counts = Counter(map(type, gc.get_objects()))
        return sum(counts[each] for each in (Entry, AuditRecord, Captured))

    storage.before_append = failing = Failing(*(away() for _ in range(3)))
    writer = make(root=root, capacity=1000, batch_size=500, backoff=NOT_BY_ITSELF)
    captured = numbered(0)
    gc.collect()
    before = alive()
    for number in range(50_000):
        assert writer.submit(captured._replace(id=f"{number}", trace_id=f"{number:032x}"))
    wait_until(lambda: failing.attempts)
    assert alive() - before <= 2 * 500  # a batch: the entries, and their records
    assert (writer.stats()["waiting"], writer.stats()["refused_full"]) == (50_000, 0)
    failing.errors.clear()
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(50_000))
    assert max(storage.batches) == 500


def test_own_files_that_cant_be_read_are_said_and_waited_for(make, storage, root, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", 0.001)
    writer = make(root=root, batch_size=3)
    no_reading(monkeypatch)
    submit(writer, 3)
    wait_until(lambda: caplog.messages)
    assert caplog.messages == ["the spool has trouble: it can't be read: Input/output error."]
    assert submit(writer, 3, first=3) == [True] * 3
    assert not writer.flush(0.05)
    stats = writer.stats()
    assert (stats["waiting"], stats["lost"], stats["damaged"], storage.batches) == (6, 0, 0, [])
    monkeypatch.undo()
    wait_until(lambda: stored(storage) == list(range(6)))
    assert writer.flush(PATIENCE)
    assert (writer.stats()["stored"], writer.stats()["waiting"]) == (6, 0)


def test_a_flush_does_not_wait_for_a_pause_since_own_files_could_not_be_read(make, storage, root, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", NEVER)
    writer = make(root=root, batch_size=3)
    no_reading(monkeypatch)
    submit(writer, 3)
    wait_until(lambda: caplog.messages and writer._changed._waiters)
    monkeypatch.undo()
    assert writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 2]


def test_a_stop_leaves_what_cant_be_read_in_the_spool_for_another_process(make, storage, root, monkeypatch, caplog):
    writer = make(root=root)
    no_reading(monkeypatch)
    submit(writer, 3)
    assert writer.stop(0.05) == 3
    wait_until(lambda: writer._ended)
    assert caplog.messages[-1] == (
        "3 audit records were not written by the shutdown's deadline: they are in the spool."
    )
    assert (writer.stats()["lost"], writer.stats()["waiting"]) == (0, 3)
    monkeypatch.undo()
    adopt(make(root=root), 3)
    assert stored(storage) == [0, 1, 2]
    assert list(root.iterdir()) == []


def test_while_the_disk_fails_records_wait_in_memory_in_their_order(make, storage, root, monkeypatch, caplog):
    def fail(descriptor, line):
        raise OSError(errno.ENOSPC, "secret path")

    storage.before_append = gate = Gate()
    now = [100.0]
    writer = make(root=root, batch_size=4, spool={"clock": lambda: now[0]})
    assert submit(writer, 5) == [True] * 5
    assert gate.reached.wait(PATIENCE)
    monkeypatch.setattr(os, "write", fail)
    assert submit(writer, 6, first=5) == [True] * 6
    assert writer._spool.in_memory == 6
    monkeypatch.undo()
    now[0] += 5.0
    assert submit(writer, 6, first=11) == [True] * 6
    assert writer._spool.in_memory == 6
    gate.open()
    assert writer.flush(PATIENCE)
    assert stored(storage) == list(range(17))
    assert writer._spool.in_memory == 0
    assert writer.stop(PATIENCE) == 0
    assert list(root.iterdir()) == []


def test_a_place_that_is_damaged_is_counted_once_and_makes_a_flush_false(make, storage, root):
    storage.before_append = gate = Gate()
    writer = make(root=root, batch_size=1)
    submit(writer, 1)
    assert gate.reached.wait(PATIENCE)  # the next ones are not read yet
    submit(writer, 3, first=1)
    (path,) = root.glob("*/0*.segment")
    position = path.read_bytes().index(numbered(2).id.encode())
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"?")
    gate.open()
    assert not writer.flush(PATIENCE)
    assert stored(storage) == [0, 1, 3]
    stats = writer.stats()
    assert (stats["accepted"], stats["stored"], stats["damaged"], stats["lost"], stats["waiting"]) == (4, 3, 1, 0, 0)
    assert writer.stop(PATIENCE) == 0
    assert list(root.iterdir()) == []


def test_a_stopped_writer_takes_what_has_begun_before_for_another_process(make, storage, root):
    writer = make(root=root)
    begun = numbered(0)
    assert writer.begin(begun)
    assert writer.stop(PATIENCE) == 0
    assert not writer.begin(numbered(1))
    assert (writer.submit(numbered(1)), writer.submit(begun)) == (False, True)
    assert writer.stats()["refused_shutdown"] == 1
    die(writer)
    adopt(make(root=root), 1)
    assert stored(storage) == [0]


def test_what_has_begun_is_written_where_its_writer_has_died(make, storage, root):
    writer = make(root=root)
    assert writer.begin(numbered(0))
    die(writer)
    adopt(make(root=root), 1)
    assert stored(storage) == [0]


def test_a_part_is_written_by_itself_only_where_its_writer_has_died(make, storage, root):
    writer = make(root=root)
    outer = numbered(0)
    writer.hold(numbered(1)._replace(id=outer.id))
    submit(writer, 1, first=2)
    assert writer.flush(PATIENCE)
    assert stored(storage) == [2]
    assert writer.stop(PATIENCE) == 0
    writer.hold(numbered(3)._replace(id=outer.id))  # too late: it is its operation's to be refused
    die(writer)
    storage.records.clear()
    adopt(make(root=root), 2)
    assert sorted(stored(storage)) == [1, 2]  # the other one shares its file, and was there before


@pytest.mark.parametrize("by", ["the operation around it", "its owner"])
@pytest.mark.parametrize("disk", [True, False])
def test_a_part_that_was_released_leaves_nothing(make, storage, root, by, disk):
    writer = make(root=root if disk else None)
    outer = numbered(0)
    writer.hold(numbered(1)._replace(id=outer.id))
    if by == "its owner":
        writer.release(outer.id)
    else:
        writer.submit(outer)
    assert writer.flush(PATIENCE)
    assert writer.stop(PATIENCE) == 0
    assert stored(storage) == {"the operation around it": [0], "its owner": []}[by]
    assert not root.exists() or list(root.iterdir()) == []


# What is kept after it is in the table.


def kept(**options):
    """Options of a spool that keeps what is settled, each record in a file of its own."""
    return {"keep_seconds": 60.0, "segment_bytes": 1, **options}


def ids(*numbers):
    return [numbered(number).id for number in numbers]


def test_after_a_failure_the_storage_gets_what_is_kept_once_more(make, storage, root):
    storage.before_append = failing = Failing(None, None, away())
    writer = make(root=root, spool=kept())
    for number in range(2):
        submit(writer, 1, first=number)
        assert writer.flush(PATIENCE)
    storage.records.clear()  # who has taken over lacks the last commits
    submit(writer, 1, first=2)
    wait_until(lambda: writer.flush(PATIENCE))
    assert sorted(stored(storage)) == [0, 1, 2]
    assert writer.stats()["stored"] == writer.stats()["accepted"] == 3
    submit(writer, 1, first=3)
    assert writer.flush(PATIENCE)
    assert failing.attempts == [ids(0), ids(1), ids(2), ids(2), ids(0), ids(1), ids(2), ids(3)]  # once was enough
    assert writer.stop(PATIENCE) == 0
    assert list(root.iterdir()) == []


def test_what_the_storage_has_still_is_there_once(make, storage, root):
    storage.before_append = Failing(None, away())
    writer = make(root=root, spool=kept(segment_bytes=10**6))
    for number in range(2):
        submit(writer, 1, first=number)
        wait_until(lambda: writer.flush(PATIENCE))
    assert stored(storage) == [0, 1]
    assert writer.stats()["stored"] == writer.stats()["accepted"] == 2


@pytest.mark.parametrize("segment_bytes", [1, 10**6])
def test_by_default_nothing_is_written_once_more(make, storage, root, segment_bytes):
    storage.before_append = failing = Failing(None, away())
    writer = make(root=root, spool=kept(keep_seconds=0.0, segment_bytes=segment_bytes))
    for number in range(2):
        submit(writer, 1, first=number)
        assert writer.flush(PATIENCE)
    assert failing.attempts == [ids(0), ids(1), ids(1)]


def test_without_a_failure_nothing_is_written_once_more(make, storage, root):
    storage.before_append = failing = Failing()
    writer = make(root=root, spool=kept())
    for number in range(3):
        submit(writer, 1, first=number)
        assert writer.flush(PATIENCE)
    assert failing.attempts == [ids(0), ids(1), ids(2)]


def test_until_what_is_kept_was_written_once_more_a_flush_is_not_true(make, storage, root):
    def before(records):
        failing(records)
        if len(failing.attempts) > 3:
            gate(records)

    gate, failing = Gate(), Failing(None, away())
    storage.before_append = before
    writer = make(root=root, spool=kept())
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    storage.records.clear()
    submit(writer, 1, first=1)
    assert not writer.flush(0.05)
    assert gate.reached.wait(PATIENCE)
    assert not writer.flush(0.05)
    assert writer.stats()["waiting"] == 0
    gate.open()
    wait_until(lambda: writer.flush(PATIENCE))
    assert sorted(stored(storage)) == [0, 1]


def test_what_could_not_be_written_once_more_is_tried_again(make, storage, root, monkeypatch):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", 0.001)
    storage.before_append = failing = Failing(None, away(), None, away(), away())
    writer = make(root=root, batch_size=1, spool=kept())
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    storage.records.clear()
    submit(writer, 1, first=1)
    wait_until(lambda: sorted(stored(storage)) == [0, 1] and writer.flush(PATIENCE))
    assert failing.attempts == [ids(0), ids(1), ids(1), ids(0), ids(0), ids(0), ids(1)]


def test_what_is_kept_is_written_in_batches_of_the_size(make, storage, root):
    storage.before_append = failing = Failing()
    writer = make(root=root, batch_size=3, spool=kept(segment_bytes=10**6))
    submit(writer, 7)
    assert writer.flush(PATIENCE)
    failing.errors.append(away())
    failing.attempts.clear()
    submit(writer, 1, first=7)
    wait_until(lambda: writer.flush(PATIENCE))
    assert failing.attempts == [ids(7), ids(7), ids(0, 1, 2), ids(3, 4, 5), ids(6, 7)]


def test_what_was_kept_for_long_enough_is_not_written_once_more(make, storage, root, monkeypatch):
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", 0.001)
    now = [100.0]
    storage.before_append = failing = Failing()
    writer = make(root=root, spool=kept(clock=lambda: now[0]))
    for number in range(3):
        submit(writer, 1, first=number)
        assert writer.flush(PATIENCE)
        now[0] += 25.0
    wait_until(lambda: not list(root.glob("*/000001.segment")))
    failing.errors.append(away())
    submit(writer, 1, first=3)
    wait_until(lambda: writer.flush(PATIENCE))
    assert failing.attempts[5:] == [ids(1), ids(2), ids(3)]


def test_while_what_is_kept_is_written_once_more_a_parked_tenants_records_wait_as_before(make, storage, root):
    storage.parked["a"] = NO_TABLE
    storage.before_append = failing = Failing()
    writer = make(root=root, parking=NOT_BY_ITSELF, spool=kept(segment_bytes=10**6))
    submit(writer, 2, schema="a")
    submit(writer, 2, first=2)
    assert not writer.flush(PATIENCE)
    failing.errors.append(away())
    submit(writer, 1, first=4)
    assert not writer.flush(PATIENCE)
    stats = writer.stats()
    assert (stats["parked"], stats["waiting"], stats["stored"]) == (2, 0, 3)
    del storage.parked["a"]
    wait_until(lambda: writer.flush(PATIENCE))
    assert sorted(stored(storage)) == [0, 1, 2, 3, 4]
    assert writer.stats()["stored"] == 5


def test_what_is_kept_and_was_set_aside_is_counted_once(make, root):
    class Refuses(MemoryStorage):
        def append(self, records):
            self.before_append(records)
            return Appended(set_aside=[(record, Fault(FaultClass.SET_ASIDE, "no")) for record in records])

    storage = Refuses()
    storage.before_append = failing = Failing(None, away())
    writer = make(storage, root=root, spool=kept())
    for number in range(2):
        submit(writer, 1, first=number)
        assert not writer.flush(PATIENCE)
    wait_until(lambda: len(failing.attempts) == 5)
    assert (writer.stats()["set_aside"], writer.stats()["stored"]) == (2, 0)


def test_without_a_disk_there_is_nothing_to_write_once_more(make, storage):
    storage.before_append = failing = Failing(None, away())
    writer = make(spool=kept())
    for number in range(2):
        submit(writer, 1, first=number)
        wait_until(lambda: writer.flush(PATIENCE))
    assert failing.attempts == [ids(0), ids(1), ids(1)]


def test_what_is_kept_and_cant_be_read_is_said_and_keeps_nothing_from_being_written(
    make, storage, root, monkeypatch, caplog
):
    storage.before_append = Failing(None, away())
    writer = make(root=root, batch_size=1, spool=kept())
    submit(writer, 1)
    assert writer.flush(PATIENCE)
    kept_inode = next(root.glob("*/000001.segment")).stat().st_ino
    no_reading(monkeypatch, of=lambda file: os.fstat(file).st_ino == kept_inode)
    submit(writer, 1, first=1)
    wait_until(lambda: "the spool has trouble: it can't be read: Input/output error." in caplog.messages)
    wait_until(lambda: stored(storage) == [0, 1])
    monkeypatch.undo()
    wait_until(lambda: writer.flush(PATIENCE))


# Other processes, which leave writing to this one.


@pytest.fixture
def living(root):
    """Makes processes that put what they accept into the spool, and write nothing themselves."""
    made = []

    def living(destination="there"):
        options = {"max_bytes": 10**9, "max_in_memory": 10, "fsync": "never", "segment_bytes": 1_000}
        spool = Spool(root, destination, cleared_by_others=True, **options)
        made.append(Backlog(spool, lock=threading.RLock()))
        return made[-1]

    yield living
    for process in made:
        process.after_fork()  # closes


@pytest.fixture
def tailing(make, root, monkeypatch):
    """Makes writers for such processes."""
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", 0.005)

    def tailing(*destinations, **arguments):
        writer = make(root=root, tailed=destinations or ["there"], delay_seconds=0.001, **arguments)
        writer.start()
        return writer

    return tailing


def leave(process, count, *, first=0, schema=None):
    """Let a process accept numbered operations, for another one to write."""
    for number in range(first, first + count):
        captured = numbered(number, schema=schema)
        assert process.append(captured, captured_frame(RECORD, captured))


def is_told(process, stored, refused=0):
    """Say whether a process has been told that all of its operations are settled, and how."""
    return read_acknowledged(process.spool.path) == (*process.spool.end(), stored, refused)


def test_a_tailing_writer_writes_what_living_processes_go_on_accepting(tailing, living, storage, root):
    first = living()
    leave(first, 20)
    writer = tailing()
    wait_until(lambda: is_told(first, 20))
    assert stored(storage) == list(range(20))
    second = living()
    leave(second, 20, first=20)
    leave(first, 20, first=40)
    wait_until(lambda: is_told(first, 40) and is_told(second, 20))
    assert sorted(stored(storage)) == list(range(60))
    for process in (first, second):
        assert len(list(process.spool.path.glob("0*.segment"))) == 1  # the one that grows
    stats = writer.stats()
    assert (stats["adopted"], stats["stored"], stats["accepted"], stats["waiting"]) == (60, 60, 0, 0)


def test_a_tailing_writer_ends_though_the_others_go_on_and_the_next_goes_on_where_it_ended(tailing, living, storage):
    def work():
        while not enough.is_set():
            leave(process, 1, first=len(left))
            left.append(None)

    enough, left, process = threading.Event(), [], living()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        writer = tailing()
        wait_until(lambda: len(stored(storage)) > 100)
        assert writer.stop(PATIENCE) == 0
        written = len(stored(storage))
        wait_until(lambda: len(left) > written + 100)
    finally:
        enough.set()
        thread.join()
    assert len(stored(storage)) == written
    first = read_acknowledged(process.spool.path)
    assert first.stored == written
    writer = tailing()
    wait_until(lambda: read_acknowledged(process.spool.path)[:2] == process.spool.end())
    assert stored(storage) == list(range(len(left)))


def test_a_tailing_writer_ends_though_there_is_always_more(tailing, living, storage):
    def before(records):
        leave(process, 1, first=len(written))
        written.append(None)

    written, process = [None], living()
    leave(process, 1)
    storage.before_append = before
    writer = tailing()
    wait_until(lambda: len(written) > 5)
    with in_background(writer.stop, NEVER) as left:
        pass
    assert left == [0]
    assert stored(storage) == list(range(len(stored(storage))))


def test_a_tailing_writer_looks_for_more_as_often_as_its_delay_says(tailing, living, monkeypatch):
    process = living()
    leave(process, 1)
    writer = tailing()
    wait_until(lambda: is_told(process, 1))
    monkeypatch.setattr(writer_module, "_TEND_SECONDS", NEVER)
    wait_until(lambda: writer._tend_at > time.monotonic() + PATIENCE)
    leave(process, 1, first=1)
    wait_until(lambda: is_told(process, 2))


def test_what_a_process_leaves_that_dies_is_written_and_cleared_away(tailing, living, storage, root):
    process = living()
    leave(process, 5)
    assert process.begin(numbered(9))
    tailing()
    wait_until(lambda: is_told(process, 5))
    leave(process, 3, first=5)
    process.after_fork()  # as its end does
    wait_until(lambda: list(root.iterdir()) == [])
    assert sorted(stored(storage)) == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_a_process_whose_records_are_set_aside_is_told_so(tailing, living):
    class Refuses(MemoryStorage):
        def append(self, records):
            fault = Fault(FaultClass.SET_ASIDE, "no")
            appended = super().append([record for record in records if record.action != "bad"])
            appended.set_aside = [(record, fault) for record in records if record.action == "bad"]
            return appended

    storage, process = Refuses(), living()
    leave(process, 3)
    bad = numbered(3, action="bad")
    process.append(bad, captured_frame(RECORD, bad))
    writer = tailing(storage=storage)
    wait_until(lambda: is_told(process, 3, refused=1))
    assert (writer.stats()["stored"], writer.stats()["set_aside"]) == (3, 1)


def test_while_postgres_is_away_the_others_are_told_nothing_and_lose_nothing(tailing, living, storage):
    storage.before_append = failing = Failing(*(away() for _ in range(3)))
    process = living()
    leave(process, 20)
    writer = tailing(backoff=NOT_BY_ITSELF)
    wait_until(lambda: failing.attempts)
    leave(process, 20, first=20)
    assert read_acknowledged(process.spool.path) is None
    wait_until(lambda: writer.flush(0.0))
    wait_until(lambda: is_told(process, 40))
    assert stored(storage) == list(range(40))


def test_records_of_others_whose_tenant_is_parked_are_on_disk_until_it_is_not(tailing, living, storage):
    storage.parked["a"] = NO_TABLE
    process = living()
    leave(process, 40, schema="a")
    leave(process, 5, first=40)
    writer = tailing(capacity=10, batch_size=5, parking=NOT_BY_ITSELF)
    wait_until(lambda: stored(storage) == list(range(40, 45)))
    wait_until(lambda: writer.stats()["parked"] == 40)
    in_memory = [entry.record is not None for lane in writer._parking._lanes.values() for entry in lane.waiting]
    assert sum(in_memory) <= 5
    assert not is_told(process, 5)
    del storage.parked["a"]
    assert writer.flush(PATIENCE)
    assert sorted(stored(storage)) == list(range(45))
    wait_until(lambda: is_told(process, 45))


def test_a_tailing_writer_leaves_other_destinations_alone(tailing, living, storage):
    here, there, elsewhere = living("here"), living("there"), living("elsewhere")
    for number, process in enumerate((here, there, elsewhere)):
        leave(process, 1, first=number)
    tailing("here", "there")
    wait_until(lambda: is_told(here, 1) and is_told(there, 1))
    elsewhere.after_fork()
    leave(here, 1, first=3)
    wait_until(lambda: is_told(here, 2))
    assert sorted(stored(storage)) == [0, 1, 3]
    assert len(list(elsewhere.spool.root.glob("*/000001.segment"))) == 3


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
        if records[0].id != numbered(0).id:
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


def test_a_stop_in_a_signals_handler_drains_when_the_call_ends_that_was_interrupted(make, storage, root, interrupted):
    writer = make(root=root)
    submit(writer, 3)
    interrupted(lambda: (writer.flush(PATIENCE), writer.stop(PATIENCE)))
    assert submit(writer, 1, first=3) == [True]
    assert stored(storage) == [0, 1, 2, 3]
    assert storage.closed
    assert list(root.iterdir()) == []


def test_a_flush_in_a_signals_handler_that_interrupts_a_call_knows_nothing(make, root, interrupted):
    writer = make(root=root)
    answers = interrupted(lambda: writer.flush(PATIENCE))
    submit(writer, 1)
    assert answers == [False]
    assert writer.flush(PATIENCE)


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
        "refused_full": 0, "refused_shutdown": 0, "unreadable": 0, "adopted": 0, "damaged": 0, "spool_bytes": 0,
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
