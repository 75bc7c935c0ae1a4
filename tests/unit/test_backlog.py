"""The backlog: first in, first out; in memory up to a limit, and on disk whatever is accepted."""

import errno
import os
import threading

import pytest

from astrocyte_otel_audit.pipeline.backlog import GAP_ACTION, Backlog
from astrocyte_otel_audit.pipeline.segment import RECORD, frames, parse_record
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.records import full_record, full_records


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def make(root):
    """Makes backlogs on one spool directory, as processes with the same destination do."""
    made = []

    def make(memory_limit=1_000, spool=True, **arguments):
        arguments = {"max_bytes": 10**9, "fsync": "never", **arguments}
        made.append(
            Backlog(
                Spool(root, "there", **arguments) if spool else None, memory_limit=memory_limit, lock=threading.RLock()
            )
        )
        return made[-1]

    yield make
    for backlog in made:
        backlog.after_fork()  # closes


def fill(backlog, count):
    return [backlog.append(record) for record in full_records(count)]


def drain(backlog, limit=7):
    """Take all there is, as the writer does, and settle it; return the records."""
    records = []
    while True:
        backlog.refill(limit)
        if not (taken := backlog.take(limit)):
            return records
        assert len(taken) <= limit
        assert all(entry.record is not None for entry in taken)
        records += [entry.record for entry in taken]
        backlog.settle(taken)


def on_disk(root):
    found = [each for path in sorted(root.glob("*/*.segment")) for each in frames(path.read_bytes())]
    return [parse_record(each.content) for each in found if each.kind == RECORD]


def die(backlog):
    """Leave the files as a killed process does."""
    backlog.after_fork()


@pytest.mark.parametrize("spool", [True, False])
def test_what_went_in_comes_out_in_order(make, spool):
    backlog = make(spool=spool)
    assert all(fill(backlog, 50))
    assert len(backlog) == 50
    assert drain(backlog) == full_records(50)
    assert (backlog.accepted, backlog.taken, backlog.settled, len(backlog)) == (50, 50, 50, 0)


def test_entries_are_numbered_in_the_order_of_their_taking(make):
    backlog = make()
    fill(backlog, 5)
    assert [entry.number for entry in backlog.take(3)] == [0, 1, 2]
    assert [entry.number for entry in backlog.take(3)] == [3, 4]


def test_without_a_spool_the_newest_are_refused_past_the_limit(make):
    backlog = make(memory_limit=3, spool=False)
    assert fill(backlog, 5) == [True, True, True, False, False]
    assert (backlog.accepted, backlog.refused, backlog.has_room()) == (3, 2, False)
    taken = backlog.take(3)
    assert not backlog.append(full_record(9))  # what was taken is in memory still
    backlog.settle(taken)
    assert backlog.append(full_record(9))


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_past_the_limit_records_are_on_disk_only_and_come_back_in_order(make, limit):
    backlog = make(memory_limit=10, segment_bytes=4_000)
    assert all(fill(backlog, 100))
    assert (len(backlog), backlog._in_memory, backlog._spilled) == (100, 10, 90)
    assert drain(backlog, limit) == full_records(100)
    assert (backlog._in_memory, backlog._spilled) == (0, 0)


def test_records_that_come_while_others_are_read_back_keep_their_place(make):
    backlog = make(memory_limit=10, segment_bytes=4_000)
    records, number = [], 0
    for count in (30, 5, 0, 40, 1, 0, 0, 25, 3):
        for _ in range(count):
            backlog.append(full_record(number))
            number += 1
        backlog.refill(12)
        taken = backlog.take(12)
        assert backlog._in_memory <= 10 + 12
        records += [entry.record for entry in taken]
        backlog.settle(taken)
    assert records + drain(backlog) == full_records(number)


def test_after_the_last_was_read_back_new_ones_are_in_memory_again(make):
    backlog = make(memory_limit=10)
    fill(backlog, 30)
    drain(backlog)
    fill(backlog, 5)
    assert (backlog._in_memory, backlog._spilled) == (5, 0)


def test_a_record_that_is_damaged_on_disk_costs_itself_only(make, root):
    backlog = make(memory_limit=2)
    fill(backlog, 10)
    (path,) = root.glob("*/0*.segment")
    data = bytearray(path.read_bytes())
    position = data.index(b"bank-5")
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"BANK")
    assert drain(backlog) == [record for record in full_records(10) if record.bank_id != "bank-5"]
    assert (backlog.damaged, backlog.accepted, backlog.settled, len(backlog)) == (1, 10, 10, 0)
    backlog.close()
    assert list(root.iterdir()) == []


def test_an_entry_can_be_dropped_from_memory_and_read_again(make):
    backlog = make()
    fill(backlog, 5)
    taken = backlog.take(5)
    assert all(backlog.drop(entry) for entry in taken)
    assert (backlog._in_memory, [entry.record for entry in taken]) == (0, [None] * 5)
    backlog.load(taken)
    assert (backlog._in_memory, [entry.record for entry in taken]) == (5, full_records(5))
    memory = make(spool=False)
    fill(memory, 1)
    assert not memory.drop(memory.take(1)[0])


def test_a_dropped_entry_that_cant_be_read_again_is_counted(make, root):
    backlog = make()
    fill(backlog, 3)
    taken = backlog.take(3)
    backlog.drop(taken[1])
    os.truncate(next(root.glob("*/0*.segment")), taken[1].offset + 5)
    backlog.load(taken)
    assert ([entry.record is None for entry in taken], backlog.damaged) == ([False, True, False], 1)


def test_what_a_dead_process_left_is_taken_after_ones_own(make, root):
    dead = make()
    fill(dead, 20)
    die(dead)
    backlog = make()
    backlog.append(full_record(99))
    (name,) = backlog.adopt()
    assert backlog.has_found()
    assert (root / name).is_dir()
    assert drain(backlog) == [full_record(99), *full_records(20)]
    assert not backlog.has_found()
    assert (backlog.adopted, backlog.accepted, backlog.settled) == (20, 21, 21)
    assert backlog.adopt() == []
    backlog.close()
    assert list(root.iterdir()) == []


def test_what_was_adopted_and_not_settled_is_there_for_the_next(make):
    dead = make()
    fill(dead, 20)
    die(dead)
    second = make()
    second.adopt()
    second.refill(5)
    second.take(5)
    second.close()
    third = make()
    assert len(third.adopt()) == 1
    assert drain(third) == full_records(20)


def test_an_adopted_entry_can_be_dropped_and_read_again(make):
    dead = make()
    fill(dead, 3)
    dead.begin(full_record(9, outcome=None))
    die(dead)
    backlog = make()
    backlog.adopt()
    backlog.refill(10)
    taken = backlog.take(10)
    # What stands for an operation without an end is in no file as it is.
    assert [backlog.drop(entry) for entry in taken] == [True, True, True, False]
    backlog.load(taken)
    assert [entry.record for entry in taken] == [*full_records(3), full_record(9, outcome="unknown", ended_at=None)]


def test_a_spool_that_cant_be_read_costs_nothing_else(make, monkeypatch):
    dead = make()
    fill(dead, 3)
    die(dead)
    backlog = make()
    fill(backlog, 2)
    backlog.adopt()

    def fail(*arguments):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "pread", fail)
    assert drain(backlog) == full_records(2)
    assert "can't be read: Input/output error" in backlog.trouble
    assert not backlog.has_found()


# Operations that must leave a row.


def test_an_operation_that_has_begun_is_promised_a_place(make):
    backlog = make(max_bytes=8_000)
    begun = full_record(500, action="forget")
    assert backlog.begin(begun._replace(outcome=None, ended_at=None))
    assert not all(fill(backlog, 100))
    assert not backlog.append(full_record(200))
    assert backlog.has_begun(begun.id)
    assert backlog.append(begun)
    assert not backlog.has_begun(begun.id)
    assert begun in drain(backlog)


def test_without_a_spool_nothing_can_begin(make):
    backlog = make(spool=False)
    assert not backlog.begin(full_record())


def test_where_the_intent_cant_be_written_nothing_has_begun(make, monkeypatch):
    backlog = make()

    def fail(descriptor):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert not backlog.begin(full_record())
    assert not backlog.has_begun(full_record().id)
    assert "Input/output error" in backlog.trouble


def test_an_intent_goes_with_its_record(make, root):
    backlog = make(segment_bytes=500)
    for number in range(20):
        assert backlog.begin(full_record(number))
        assert backlog.append(full_record(number))
    assert len(drain(backlog)) == 20
    backlog.close()
    assert list(root.iterdir()) == []


def test_a_record_that_comes_after_the_end_is_on_disk_for_another_process(make):
    first = make()
    fill(first, 3)
    first.begin(full_record(7, outcome=None))
    drain(first)
    first.close()
    assert first.append(full_record(7))
    die(first)
    second = make()
    second.adopt()
    assert full_record(7) in drain(second)


# Gaps.


def test_what_was_refused_is_one_record_that_says_how_many_and_of_what_time(make):
    backlog = make(max_bytes=8_000)
    accepted = sum(fill(backlog, 100))
    assert not backlog.close_gap()  # there is no room for it yet
    drained = drain(backlog)
    assert backlog.close_gap()
    assert not backlog.close_gap()
    (gap,) = drain(backlog)
    assert (len(drained), gap.action) == (accepted, GAP_ACTION)
    assert gap.metadata == {"missing": 100 - accepted, "reason": "it is full: 8000 bytes (spool_max_bytes)"}
    assert (gap.started_at, gap.ended_at) == (full_record(accepted).started_at, full_record(99).ended_at)
    assert (gap.transport, gap.outcome, gap.service_name) == ("system", "unknown", "memory")


def test_a_gap_survives_its_process(make):
    dead = make(max_bytes=8_000)
    accepted = sum(fill(dead, 100))
    die(dead)
    backlog = make()
    backlog.adopt()
    *records, gap = drain(backlog)
    assert records == full_records(accepted)
    assert gap.metadata["missing"] == 100 - accepted


def test_a_gap_that_was_closed_is_not_there_twice(make):
    dead = make(max_bytes=8_000)
    fill(dead, 100)
    drain(dead)
    dead.close_gap()
    die(dead)
    backlog = make()
    backlog.adopt()
    assert [record.action for record in drain(backlog)].count(GAP_ACTION) == 1


def test_each_gap_is_a_record_of_its_own(make):
    backlog = make(max_bytes=8_000)
    gaps = []
    for _ in range(2):
        fill(backlog, 100)
        drain(backlog)
        backlog.close_gap()
        gaps += drain(backlog)
    assert len({gap.id for gap in gaps}) == len(gaps) == 2


# Trouble with the disk.


def test_where_the_disk_fails_records_are_kept_in_memory(make, monkeypatch):
    backlog = make(memory_limit=3)

    def fail(descriptor, line):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "write", fail)
    assert fill(backlog, 5) == [True, True, True, False, False]
    assert backlog.trouble == "it can't be written: No space left on device"
    assert drain(backlog) == full_records(3)
    monkeypatch.undo()
    assert backlog.append(full_record(9))
    assert backlog.trouble is None


def test_a_child_has_what_it_accepts_itself(make, root):
    backlog = make()
    fill(backlog, 3)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            backlog.after_fork()
            status = len(on_disk(root))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert make().adopt() == []
    assert drain(backlog) == full_records(3)


def test_a_file_that_somebody_cut_off_costs_what_was_in_it_and_no_more(make, root):
    backlog = make(memory_limit=2, segment_bytes=10**6)
    fill(backlog, 10)
    os.truncate(next(root.glob("*/0*.segment")), 1_500)
    read = drain(backlog)
    assert read == full_records(len(read))
    assert 2 <= len(read) < 8
    assert (backlog.damaged, backlog.accepted, backlog.settled) == (10 - len(read), 10, 10)
