"""The backlog: first in, first out; on disk whatever is accepted, and in memory what is written next."""

import errno
import fcntl
import os
import threading

import pytest

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged
from astrocyte_otel_audit.pipeline.backlog import Backlog
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.directory import SpoolError
from astrocyte_otel_audit.pipeline.gap import GAP_ACTION
from astrocyte_otel_audit.pipeline.segment import RECORD, FileSegment, captured_frame, frames, parse_captured
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.records import full_captured, full_record, full_records


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def make(root):
    """Makes backlogs on one spool directory, as processes with the same destination do."""
    made = []

    def make(spool=True, tailed=(), destination="there", **arguments):
        arguments = {"max_bytes": 10**9, "max_in_memory": 1_000, "fsync": "never", **arguments}
        where = Spool(root if spool else None, destination, **arguments)
        made.append(Backlog(where, lock=threading.RLock(), tailed=tailed))
        return made[-1]

    yield make
    for backlog in made:
        backlog.after_fork()  # closes


def accept(backlog, captured):
    return backlog.append(captured, captured_frame(RECORD, captured))


def fill(backlog, count, *, first=0):
    return [accept(backlog, full_captured(number)) for number in range(first, first + count)]


def take(backlog, limit):
    backlog.refill(limit)
    return backlog.take(limit)


def drain(backlog, limit=7):
    """Take all there is, as the writer does, and settle it; return the records."""
    records = []
    for _ in range(1_000):
        if not len(backlog) and not backlog.has_found():
            return records
        taken = take(backlog, limit)
        assert len(taken) <= limit
        assert all(entry.record is not None for entry in taken)
        records += [entry.record for entry in taken]
        backlog.settle(taken)
    raise AssertionError("it comes to no end")


def on_disk(root):
    found = [each for path in sorted(root.glob("*/*.segment")) for each in frames(path.read_bytes())]
    return [to_record(parse_captured(each.content)) for each in found if each.kind == RECORD]


def part_of(outer, number=500):
    """Return what an inner operation has said, as what is known so far of the row of the one around it."""
    return full_captured(number)._replace(id=outer.id)


def die(backlog):
    """Leave the files as a killed process does."""
    backlog.after_fork()


def no_reading(monkeypatch, *, of=lambda descriptor: True):
    """Let files not be read, as a disk does that has trouble, until `monkeypatch.undo`."""
    real = os.pread

    def pread(descriptor, length, offset):
        if of(descriptor):
            raise OSError(errno.EIO, "secret path")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)


def no_writing(monkeypatch):
    def fail(descriptor, line):
        raise OSError(errno.ENOSPC, "secret path")

    monkeypatch.setattr(os, "write", fail)


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
    assert [entry.number for entry in take(backlog, 3)] == [0, 1, 2]
    assert [entry.number for entry in take(backlog, 3)] == [3, 4]


def test_without_a_disk_the_newest_are_refused_past_the_limit(make):
    backlog = make(max_in_memory=3, spool=False)
    assert fill(backlog, 5) == [True, True, True, False, False]
    assert (backlog.accepted, backlog.refused, backlog.has_room()) == (3, 2, False)
    taken = take(backlog, 3)
    assert not accept(backlog, full_captured(9))  # what was taken is in memory still
    backlog.settle(taken)
    assert accept(backlog, full_captured(9))


def test_what_is_accepted_is_on_disk_only_until_it_is_to_be_written(make, root):
    backlog = make()
    fill(backlog, 100)
    assert on_disk(root) == full_records(100)
    assert (len(backlog), backlog.unread, backlog.take(10)) == (100, 100, [])
    backlog.refill(10)
    assert (len(backlog), backlog.unread) == (100, 90)
    assert len(backlog.take(100)) == 10


@pytest.mark.parametrize("spool", [True, False])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_records_come_back_in_order_however_few_are_read_at_once(make, spool, limit):
    backlog = make(spool=spool, segment_bytes=4_000)
    assert all(fill(backlog, 100))
    assert drain(backlog, limit) == full_records(100)
    assert (backlog.unread, backlog.spool.in_memory, backlog.damaged) == (0, 0, 0)


@pytest.mark.parametrize("spool", [True, False])
def test_records_that_come_while_others_are_read_back_keep_their_place(make, spool):
    backlog = make(spool=spool, segment_bytes=4_000)
    records, number = [], 0
    for count in (30, 5, 0, 40, 1, 0, 0, 25, 3):
        fill(backlog, count, first=number)
        number += count
        backlog.refill(12)
        assert len(backlog) - backlog.unread <= 12
        taken = backlog.take(12)
        records += [entry.record for entry in taken]
        backlog.settle(taken)
    assert records + drain(backlog) == full_records(number)


@pytest.mark.parametrize("spool", [True, False])
def test_after_the_last_was_read_new_ones_are_read_where_they_are(make, spool):
    backlog = make(spool=spool)
    fill(backlog, 30)
    drain(backlog)
    fill(backlog, 5, first=30)
    assert drain(backlog) == full_records(35)[30:]


def test_a_record_that_is_larger_than_what_is_read_at_once_is_read(make):
    backlog = make(segment_bytes=10**8)
    large = full_captured(1, request={"query": "x" * 3_000_000})
    for captured in (full_captured(0), large, full_captured(2)):
        assert accept(backlog, captured)
    assert drain(backlog) == [full_record(0), to_record(large), full_record(2)]


def test_a_record_that_is_damaged_on_disk_costs_itself_only(make, root):
    backlog = make()
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
    taken = take(backlog, 5)
    assert all(backlog.drop(entry) for entry in taken)
    assert [entry.record for entry in taken] == [None] * 5
    backlog.load(taken)
    assert [entry.record for entry in taken] == full_records(5)


def test_an_entry_that_is_in_memory_only_cant_be_dropped(make):
    backlog = make(spool=False)
    fill(backlog, 1)
    (entry,) = take(backlog, 1)
    assert not backlog.drop(entry)
    assert entry.record == full_record()


def test_a_dropped_entry_that_is_damaged_is_counted(make, root):
    backlog = make()
    fill(backlog, 3)
    taken = take(backlog, 3)
    backlog.drop(taken[1])
    os.truncate(next(root.glob("*/0*.segment")), taken[1].offset + 5)
    backlog.load(taken)
    assert ([entry.record is None for entry in taken], backlog.damaged) == ([False, True, False], 1)


def test_a_dropped_entry_that_cant_be_read_for_a_while_costs_nothing(make, monkeypatch):
    backlog = make()
    fill(backlog, 3)
    taken = take(backlog, 3)
    for entry in taken:
        backlog.drop(entry)
    no_reading(monkeypatch)
    with pytest.raises(SpoolError, match=r"^it can't be read: Input/output error$"):
        backlog.load(taken)
    monkeypatch.undo()
    backlog.load(taken)
    assert [entry.record for entry in taken] == full_records(3)
    assert backlog.damaged == 0


def test_without_a_disk_what_is_settled_is_forgotten_whatever_waits_beside_it(make):
    backlog = make(spool=False)
    fill(backlog, 3)
    taken = take(backlog, 3)
    backlog.settle(taken[1:])
    (segment,) = backlog.spool.segments
    assert [bool(segment.read(entry.offset, 1)) for entry in taken] == [True, False, False]
    assert backlog.spool.in_memory == 1
    backlog.settle(taken[:1])
    fill(backlog, 2, first=3)
    assert drain(backlog) == full_records(5)[3:]


@pytest.mark.parametrize("what", ["a header", "a part"])
def test_a_damaged_line_that_is_no_record_costs_no_record(make, root, what):
    backlog = make(segment_bytes=1_500)
    fill(backlog, 3)
    backlog.hold(part_of(full_captured(90)))
    fill(backlog, 7, first=3)
    word = {"a header": b"destination", "a part": b"bank-500"}[what]
    path = next(path for path in sorted(root.glob("*/0*.segment"))[1:] if word in path.read_bytes())
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(word))
        file.write(b"?")
    assert drain(backlog) == full_records(10)
    assert (backlog.damaged, backlog.accepted, backlog.settled, len(backlog)) == (0, 10, 10, 0)


# What dead processes left.


def test_what_a_dead_process_left_is_taken_after_ones_own(make, root):
    dead = make()
    fill(dead, 20)
    die(dead)
    backlog = make()
    accept(backlog, full_captured(99))
    (name,) = backlog.adopt()
    assert backlog.has_found()
    assert (root / name).is_dir()
    assert drain(backlog) == [full_record(99), *full_records(20)]
    assert not backlog.has_found()
    assert (backlog.adopted, backlog.accepted, backlog.settled) == (20, 21, 21)
    assert (backlog.adopt(), backlog._readers) == ([], [])
    backlog.close()
    assert list(root.iterdir()) == []


def test_ones_own_are_all_taken_first_however_many_files_they_are_in(make):
    dead = make()
    fill(dead, 5)
    die(dead)
    backlog = make(segment_bytes=1_500)
    fill(backlog, 20, first=5)
    backlog.adopt()
    assert drain(backlog, limit=10) == [*full_records(25)[5:], *full_records(5)]


def test_what_was_adopted_and_not_settled_is_there_for_the_next(make):
    dead = make()
    fill(dead, 20)
    die(dead)
    second = make()
    second.adopt()
    take(second, 5)
    second.close()
    third = make()
    assert len(third.adopt()) == 1
    assert drain(third) == full_records(20)


def test_an_adopted_entry_can_be_dropped_and_read_again(make):
    dead = make()
    fill(dead, 3)
    dead.begin(full_captured(9, outcome=None, ended_at=None))
    die(dead)
    backlog = make()
    backlog.adopt()
    taken = take(backlog, 10)
    assert all(backlog.drop(entry) for entry in taken)
    backlog.load(taken)
    assert [entry.record for entry in taken] == [*full_records(3), full_record(9, outcome="unknown", ended_at=None)]


def test_without_a_directory_there_is_nothing_to_adopt(make):
    assert make(spool=False).adopt() == []


def test_what_a_dead_process_left_and_cant_be_read_costs_nothing_and_is_left_for_later(make, monkeypatch):
    dead = make()
    fill(dead, 3)
    die(dead)
    backlog = make()
    fill(backlog, 2, first=10)
    (name,) = backlog.adopt()
    # Only what is adopted is not open for writing.
    no_reading(monkeypatch, of=lambda file: fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY)
    assert drain(backlog) == [full_record(10), full_record(11)]
    assert not backlog.has_found()
    said = f"the spool has trouble: what process {name} has in it can't be read: Input/output error"
    assert list(backlog.tend(adopting=False)) == [said]
    assert backlog.has_found()  # it is tried again
    assert drain(backlog) == []
    monkeypatch.undo()
    assert list(backlog.tend(adopting=False)) == [said]
    assert list(backlog.tend(adopting=False)) == []
    assert drain(backlog) == full_records(3)
    assert backlog.damaged == 0


def test_what_was_taken_of_a_process_before_it_could_not_be_read_is_settled_all_the_same(make, root, monkeypatch):
    dead = make(segment_bytes=1_500)
    fill(dead, 10)
    die(dead)
    backlog = make()
    backlog.adopt()
    taken = take(backlog, 4)
    no_reading(monkeypatch)
    backlog.refill(8)
    monkeypatch.undo()
    backlog.settle(taken)
    list(backlog.tend(adopting=True))
    assert [entry.record for entry in taken] + drain(backlog) == full_records(10)
    assert (backlog.adopted, backlog.settled) == (10, 10)
    assert list(root.iterdir()) == []


# What living processes leave to this one.


def other(make):
    """A process that leaves writing to another one."""
    return make(cleared_by_others=True, segment_bytes=1_500)


def test_what_living_processes_go_on_writing_is_taken_and_cleared_away(make, root):
    first, second = other(make), other(make)
    backlog = make(tailed=["there"])
    fill(first, 10)
    fill(second, 10, first=10)
    assert len(backlog.adopt()) == 2
    assert sorted(drain(backlog), key=lambda record: record.started_at) == full_records(20)
    assert not backlog.has_found()
    fill(first, 10, first=20)
    assert backlog.has_found()
    assert drain(backlog) == full_records(30)[20:]
    assert (backlog.adopted, backlog.accepted, backlog.settled) == (30, 30, 30)
    for process in (first, second):
        assert list(process.tend(adopting=False)) == []
        assert len(list(process.spool.path.glob("0*.segment"))) == len(process.spool.segments) == 1
    assert backlog.adopt() == []


def test_a_living_process_is_told_how_far_its_operations_are_settled_and_how(make):
    process = other(make)
    backlog = make(tailed=["there"])
    fill(process, 5)
    backlog.adopt()
    taken = take(backlog, 10)
    assert read_acknowledged(process.spool.path) is None
    backlog.settle(taken[1:3])
    said = read_acknowledged(process.spool.path)
    assert said == Acknowledged(taken[0].segment.number, taken[0].offset, stored=2, refused=0)
    assert said[:2] < process.spool.end()
    backlog.settle(taken[:1], stored=False)
    backlog.settle(taken[3:])
    assert read_acknowledged(process.spool.path) == (*process.spool.end(), 4, 1)


def test_a_living_process_that_cant_be_told_is_told_the_next_time(make, monkeypatch):
    process = other(make)
    backlog = make(tailed=["there"])
    fill(process, 2)
    backlog.adopt()
    taken = take(backlog, 10)

    def fail(descriptor, line, offset):
        raise OSError(errno.ENOSPC, "secret path")

    monkeypatch.setattr(os, "pwrite", fail)
    backlog.settle(taken)
    monkeypatch.undo()
    fill(process, 1, first=2)
    assert drain(backlog) == [full_record(2)]
    assert read_acknowledged(process.spool.path) == (*process.spool.end(), 3, 0)


def test_what_is_known_so_far_of_a_living_processs_row_becomes_one_when_it_dies(make, root):
    process = other(make)
    backlog = make(tailed=["there"])
    begun = full_captured(9, outcome="unknown", ended_at=None)
    process.begin(begun)
    fill(process, 2)
    backlog.adopt()
    assert drain(backlog) == full_records(2)
    die(process)
    assert backlog.adopt() == []
    assert backlog.has_found()
    assert drain(backlog) == [to_record(begun)]
    assert list(root.iterdir()) == []


def test_a_tailed_process_that_dies_is_taken_over_from_where_it_was_read(make, root):
    process = other(make)
    backlog = make(tailed=["there"])
    fill(process, 7)
    backlog.adopt()
    taken = take(backlog, 5)
    fill(process, 5, first=7)
    die(process)
    backlog.adopt()
    assert [entry.record for entry in taken] + drain(backlog) == full_records(12)
    backlog.settle(taken)
    assert list(root.iterdir()) == []
    assert not backlog.has_found()


def test_a_gap_of_a_living_process_is_its_own_until_it_has_died(make):
    process = make(cleared_by_others=True, max_bytes=8_000)
    accepted = sum(fill(process, 100))
    backlog = make(tailed=["there"])
    backlog.adopt()
    assert drain(backlog) == full_records(accepted)
    die(process)
    backlog.adopt()
    (gap,) = drain(backlog)
    assert gap.metadata["missing"] == 100 - accepted


def test_a_process_with_another_destination_is_left_alone(make):
    elsewhere = make(destination="elsewhere")
    fill(elsewhere, 3)
    backlog = make(tailed=["there", "here"])
    assert backlog.adopt() == []
    die(elsewhere)
    assert backlog.adopt() == []
    assert len(make(tailed=["elsewhere"]).adopt()) == 1


def test_a_living_process_that_cant_be_read_is_tried_again_and_holds_up_nobody(make, monkeypatch):
    broken, sound = other(make), other(make)
    fill(broken, 3)
    fill(sound, 3, first=3)
    backlog = make(tailed=["there"])
    backlog.adopt()
    inode = os.stat(broken.spool.segments[0].path).st_ino
    no_reading(monkeypatch, of=lambda file: os.fstat(file).st_ino == inode)
    assert drain(backlog) == full_records(6)[3:]
    assert not backlog.has_found()
    monkeypatch.undo()
    (said,) = backlog.tend(adopting=True)
    assert said.startswith(f"the spool has trouble: what process {broken.spool.path.name} has in it can't be read: ")
    assert drain(backlog) == full_records(3)


# Operations that must leave a row.


def test_an_operation_that_has_begun_is_promised_a_place(make):
    backlog = make(max_bytes=8_000)
    begun = full_captured(500, action="forget")
    assert backlog.begin(begun._replace(outcome="unknown", end_ns=None))
    assert not all(fill(backlog, 100))
    assert not accept(backlog, full_captured(200))
    assert backlog.has_begun(begun.id)
    assert accept(backlog, begun)
    assert not backlog.has_begun(begun.id)
    assert to_record(begun) in drain(backlog)


def test_without_a_disk_nothing_can_begin(make):
    backlog = make(spool=False)
    assert not backlog.begin(full_captured())


def test_past_the_cap_nothing_can_begin(make):
    backlog = make(max_bytes=8_000)
    fill(backlog, 100)
    assert not backlog.begin(full_captured(200))
    assert not backlog.has_begun(full_captured(200).id)


def test_nothing_begins_where_there_is_room_for_its_beginning_and_perhaps_not_for_its_end(make):
    backlog = make(max_bytes=1_700)
    fill(backlog, 1)
    begun = full_captured(1)
    assert backlog.spool.bytes + 2 * len(captured_frame(RECORD, begun)) > 1_700
    assert not backlog.begin(begun)
    assert accept(backlog, begun)


def test_where_its_beginning_cant_be_written_nothing_has_begun(make, monkeypatch):
    backlog = make()

    def fail(descriptor):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert not backlog.begin(full_captured())
    assert not backlog.has_begun(full_captured().id)
    assert "Input/output error" in backlog.spool.trouble


def test_a_beginning_is_no_record_while_its_process_lives(make):
    backlog = make()
    fill(backlog, 1)
    backlog.begin(full_captured(9))
    fill(backlog, 1, first=1)
    assert len(backlog) == 2
    assert drain(backlog) == full_records(2)


def test_a_beginning_goes_with_its_record(make, root):
    backlog = make(segment_bytes=500)
    for number in range(20):
        assert backlog.begin(full_captured(number))
        assert accept(backlog, full_captured(number))
    assert len(drain(backlog)) == 20
    backlog.close()
    assert list(root.iterdir()) == []


def test_a_record_that_comes_after_the_end_is_on_disk_for_another_process(make):
    first = make()
    fill(first, 3)
    first.begin(full_captured(7, outcome=None))
    drain(first)
    first.close()
    assert accept(first, full_captured(7))
    die(first)
    second = make()
    second.adopt()
    assert full_record(7) in drain(second)


@pytest.mark.parametrize("fsync", ["never", "interval"])
def test_what_has_begun_is_synced_and_a_part_is_not(make, monkeypatch, fsync):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    backlog = make(fsync=fsync)
    assert backlog.begin(full_captured(0))
    assert len(synced) == 1
    backlog.hold(part_of(full_captured(1)))
    assert len(synced) == 1


# Parts of operations that have not ended.


@pytest.mark.parametrize("spool", [True, False])
def test_a_part_is_no_record_while_the_operation_around_it_is_under_way(make, spool):
    backlog = make(spool=spool)
    backlog.hold(part_of(full_captured(0)))
    assert (len(backlog), drain(backlog)) == (0, [])
    fill(backlog, 3, first=1)
    assert drain(backlog) == full_records(4)[1:]
    assert (backlog.accepted, backlog.settled) == (3, 3)


@pytest.mark.parametrize("spool", [True, False])
@pytest.mark.parametrize("by", ["the operation around it", "its owner"])
def test_a_part_is_released(make, root, spool, by):
    backlog = make(spool=spool)
    outer = full_captured(0)
    backlog.hold(part_of(outer))
    assert backlog.has_begun(outer.id) is spool
    if by == "the operation around it":
        accept(backlog, outer)
    else:
        backlog.release(outer.id)
    assert not backlog.has_begun(outer.id)
    assert drain(backlog) == {"the operation around it": [full_record()], "its owner": []}[by]
    backlog.close()
    assert not root.exists() or list(root.iterdir()) == []


def test_what_is_known_so_far_is_never_in_memory(make, monkeypatch):
    without, failing = make(spool=False), make()
    no_writing(monkeypatch)
    for backlog in (without, failing):
        backlog.hold(part_of(full_captured(0)))
        assert not backlog.begin(full_captured(1))
        assert (backlog.spool.in_memory, backlog.spool.segments) == (0, [])
        fill(backlog, 3)
        assert drain(backlog) == full_records(3)
        assert backlog.spool.in_memory == 0


def test_without_a_disk_what_is_held_and_released_leaves_no_hole_among_the_records(make):
    backlog = make(spool=False)
    fill(backlog, 1)
    backlog.hold(part_of(full_captured(1)))
    fill(backlog, 2, first=1)
    backlog.hold(part_of(full_captured(9)))
    fill(backlog, 1, first=3)
    backlog.release(full_captured(9).id)
    assert drain(backlog) == full_records(4)


def test_a_segment_that_ends_with_a_part_goes_with_it_and_reading_goes_on(make, root):
    backlog = make(segment_bytes=1_000)
    outer = full_captured(3)
    fill(backlog, 1)
    backlog.hold(part_of(outer))  # the last line of the first segment
    fill(backlog, 2, first=1)
    backlog.settle(take(backlog, 1))
    accept(backlog, outer)  # the first segment holds nothing unsettled any more
    assert list(backlog.tend(adopting=False)) == []
    assert not list(root.glob("*/000001.segment"))
    assert drain(backlog) == full_records(4)[1:]


def test_a_part_may_be_released_while_the_writers_thread_looks_after_its_segment(make, root, monkeypatch):
    def is_in_place(segment):
        backlog.release(full_captured(9).id)
        return real(segment)

    backlog = make(segment_bytes=1_000)
    fill(backlog, 1)
    backlog.hold(part_of(full_captured(9)))
    fill(backlog, 2, first=1)
    backlog.settle(take(backlog, 1))
    real = FileSegment.is_in_place
    monkeypatch.setattr(FileSegment, "is_in_place", is_in_place)
    assert list(backlog.tend(adopting=False)) == []
    assert drain(backlog) == full_records(3)[1:]
    assert list(backlog.tend(adopting=False)) == []
    backlog.close()
    assert list(root.iterdir()) == []


def test_an_operation_that_has_begun_takes_its_beginning_and_its_part_along(make, root):
    backlog = make()
    outer = full_captured(0)
    backlog.begin(outer._replace(outcome="unknown", end_ns=None))
    backlog.hold(part_of(outer))
    accept(backlog, outer)
    assert not backlog.has_begun(outer.id)
    assert drain(backlog) == [full_record()]
    backlog.close()
    assert list(root.iterdir()) == []


def test_an_operation_that_has_begun_and_its_part_are_one_row_when_neither_was_written(make):
    dead = make()
    begun = full_captured(0, outcome="unknown", ended_at=None, response=None, actor_id=None)
    dead.begin(begun)
    dead.hold(part_of(begun)._replace(bank_id=begun.bank_id))
    die(dead)
    backlog = make()
    backlog.adopt()
    rows = drain(backlog)
    inner = full_record(500)
    assert rows == [to_record(begun)._replace(response=inner.response, actor_id=inner.actor_id)] * 2  # with one id
    assert (backlog.accepted, backlog.settled) == (2, 2)


def test_the_own_row_of_a_part_takes_no_promise_of_the_operation_around_it_away(make):
    first = make(max_bytes=8_000)
    outer = full_captured(0)
    begun = outer._replace(outcome="unknown", end_ns=None)
    first.begin(begun)
    first.hold(part_of(outer))
    accept(first, full_captured(500))
    assert first.has_begun(outer.id)
    drain(first)
    die(first)
    second = make()
    second.adopt()
    assert {to_record(begun).id, full_record(500).id} == {record.id for record in drain(second)}


def test_a_part_is_not_released_by_another_operation(make):
    backlog = make()
    backlog.hold(part_of(full_captured(0)))
    fill(backlog, 3, first=1)
    backlog.hold(part_of(full_captured(8), 501))
    accept(backlog, full_captured(8))
    backlog.release(full_captured(9).id)
    drain(backlog)
    die(backlog)
    second = make()
    second.adopt()
    assert to_record(part_of(full_captured(0))) in drain(second)


@pytest.mark.parametrize("unread", [0, 3])
def test_a_part_that_is_held_is_there_for_another_process_when_its_own_dies(make, root, unread):
    dead = make()
    fill(dead, unread)
    part = part_of(full_captured(9))
    dead.hold(part)
    die(dead)
    backlog = make()
    assert len(backlog.adopt()) == 1
    assert drain(backlog) == [*full_records(unread), to_record(part)]
    backlog.close()
    assert list(root.iterdir()) == []


def test_a_part_whose_operation_was_accepted_is_no_row_besides(make):
    dead = make()
    dead.hold(part_of(full_captured(0)))
    fill(dead, 3)
    die(dead)
    backlog = make()
    backlog.adopt()
    assert drain(backlog) == full_records(3)


@pytest.mark.parametrize("dies", [True, False])
def test_what_is_known_of_a_row_replaces_what_was_known_of_the_one_that_it_takes_in(make, dies):
    first = make()
    outer, middle = full_captured(0), full_captured(1)
    first.hold(part_of(middle))
    first.hold(part_of(outer)._replace(replaces=middle.id))
    assert (first.has_begun(middle.id), first.has_begun(outer.id)) == (False, True)
    if not dies:
        accept(first, outer)
    die(first)
    second = make()
    second.adopt()
    assert [record.id for record in drain(second)] == [outer.id]


def test_a_part_that_is_held_outlives_the_end_of_its_backlog(make):
    first = make()
    part = part_of(full_captured(0))
    first.hold(part)
    first.close()
    die(first)
    second = make()
    second.adopt()
    assert drain(second) == [to_record(part)]


def test_a_part_for_which_there_is_no_room_costs_nothing(make):
    backlog = make(max_bytes=8_000)
    accepted = sum(fill(backlog, 100))
    refused = backlog.refused
    backlog.hold(part_of(full_captured(0)))
    assert backlog.refused == refused
    backlog.release(full_captured(0).id)
    assert drain(backlog) == full_records(accepted)


# Gaps.


def test_what_was_refused_is_one_record_that_says_how_many_and_of_what_time(make):
    backlog = make(max_bytes=8_000)
    accepted = sum(fill(backlog, 100))
    assert not backlog.close_gap()  # there is no room for it yet
    assert backlog.refusal == "it is full: 8000 bytes (spool_max_bytes)"
    drained = drain(backlog)
    assert backlog.close_gap()
    assert not backlog.close_gap()
    (gap,) = drain(backlog)
    assert (len(drained), gap.action) == (accepted, GAP_ACTION)
    assert gap.metadata == {"missing": 100 - accepted, "reason": backlog.refusal}
    assert (gap.started_at, gap.ended_at) == (full_record(accepted).started_at, full_record(99).ended_at)
    assert (gap.transport, gap.outcome, gap.service_name) == ("system", "unknown", "memory")


def test_without_a_disk_what_was_refused_is_a_record_too(make):
    backlog = make(max_in_memory=3, spool=False)
    fill(backlog, 5)
    assert backlog.has_gap
    assert not backlog.close_gap()
    drain(backlog)
    assert backlog.close_gap()
    assert not backlog.has_gap
    (gap,) = drain(backlog)
    assert gap.metadata == {"missing": 2, "reason": "3 wait (max_queue_size)"}


def test_an_operation_without_an_end_widens_a_gap_to_its_start(make):
    backlog = make(max_in_memory=1, spool=False)
    accept(backlog, full_captured(0))
    for number in (3, 1):
        assert not accept(backlog, full_captured(number, ended_at=None))
    drain(backlog)
    backlog.close_gap()
    (gap,) = drain(backlog)
    assert (gap.started_at, gap.ended_at) == (full_record(1).started_at, full_record(3).started_at)


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
    now = [100.0]
    backlog = make(max_in_memory=3, clock=lambda: now[0])
    no_writing(monkeypatch)
    assert fill(backlog, 5) == [True, True, True, False, False]
    assert backlog.spool.trouble == "it can't be written: No space left on device"
    assert drain(backlog) == full_records(3)
    monkeypatch.undo()
    now[0] += 5.0
    assert accept(backlog, full_captured(9))
    assert backlog.spool.trouble is None
    assert backlog.spool.in_memory == 0


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_while_the_disk_fails_records_keep_their_order(make, root, monkeypatch, limit):
    now, number = [100.0], 0
    backlog = make(clock=lambda: now[0])
    for count in (5, 6, 7):  # on disk, in memory, on disk, …
        for fails in (False, True):
            now[0] += 5.0
            if fails:
                no_writing(monkeypatch)
            assert all(fill(backlog, count, first=number))
            number += count
            monkeypatch.undo()
    assert (len(on_disk(root)), backlog.spool.in_memory) == (18, 18)
    assert drain(backlog, limit) == full_records(36)
    assert (backlog.spool.in_memory, backlog.damaged, backlog.settled) == (0, 0, 36)
    assert fill(backlog, 1, first=36) == [True]
    assert drain(backlog) == [full_record(36)]
    assert len(backlog.spool.segments) == 1  # the one that grows
    backlog.close()
    assert list(root.iterdir()) == []


def test_what_was_refused_while_the_disk_failed_says_so(make, monkeypatch):
    backlog = make(max_in_memory=3)
    no_writing(monkeypatch)
    fill(backlog, 5)
    drain(backlog)
    assert backlog.close_gap()
    (gap,) = drain(backlog)
    assert gap.metadata == {"missing": 2, "reason": "it can't be written: No space left on device"}


def test_while_the_disk_fails_an_entry_cant_be_dropped(make, monkeypatch):
    backlog = make()
    fill(backlog, 1)
    no_writing(monkeypatch)
    fill(backlog, 1, first=1)
    assert [backlog.drop(entry) for entry in [*take(backlog, 1), *take(backlog, 1)]] == [True, False]


def test_own_files_that_cant_be_read_cost_nothing_and_are_read_later(make, monkeypatch):
    backlog = make()
    fill(backlog, 5)
    taken = take(backlog, 2)
    no_reading(monkeypatch)
    fill(backlog, 2, first=5)
    for _ in range(3):
        with pytest.raises(SpoolError, match=r"^it can't be read: Input/output error$"):
            backlog.refill(10)
        assert backlog.take(10) == []
    assert (len(backlog), backlog.damaged) == (5, 0)
    monkeypatch.undo()
    assert [entry.record for entry in taken] + drain(backlog) == full_records(7)
    backlog.settle(taken)
    assert (backlog.accepted, backlog.settled, backlog.damaged) == (7, 7, 0)


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
    backlog = make(segment_bytes=10**6)
    fill(backlog, 10)
    os.truncate(next(root.glob("*/0*.segment")), 2_500)
    read = drain(backlog)
    assert read == full_records(len(read))
    assert 2 <= len(read) < 8
    assert (backlog.damaged, backlog.accepted, backlog.settled) == (10 - len(read), 10, 10)
    fill(backlog, 5, first=10)
    assert drain(backlog) == full_records(15)[10:]


def test_a_file_that_somebody_cut_off_leaves_those_after_it(make, root):
    backlog = make(segment_bytes=4_000)
    fill(backlog, 30)
    first, second, *_ = sorted(root.glob("*/0*.segment"))
    lost = sum(each.kind == RECORD for each in frames(second.read_bytes()))
    before = sum(each.kind == RECORD for each in frames(first.read_bytes()))
    os.truncate(second, 0)
    assert drain(backlog) == [*full_records(before), *full_records(30)[before + lost :]]
    assert (backlog.damaged, backlog.accepted, backlog.settled) == (lost, 30, 30)


# Looking after it.


def test_a_spool_without_trouble_leaves_nothing_to_say(make):
    for backlog in (make(), make(spool=False)):
        fill(backlog, 3)
        assert list(backlog.tend(adopting=True)) == []
        assert drain(backlog) == full_records(3)


def test_tending_closes_a_gap_once_there_is_room(make):
    backlog = make(max_bytes=8_000)
    fill(backlog, 100)
    assert list(backlog.tend(adopting=False)) == ["the spool has trouble: it is full: 8000 bytes (spool_max_bytes)"]
    drain(backlog)
    assert list(backlog.tend(adopting=False)) == []
    assert [record.action for record in drain(backlog)] == [GAP_ACTION]


def test_tending_looks_for_what_dead_processes_left_only_where_it_is_told_to(make, caplog):
    dead = make()
    fill(dead, 3)
    die(dead)
    backlog = make()
    caplog.set_level("INFO")
    assert list(backlog.tend(adopting=False)) == []
    assert not backlog.has_found()
    assert list(backlog.tend(adopting=True)) == []
    assert drain(backlog) == full_records(3)
    (message,) = caplog.messages
    assert message.startswith("Audit records of other processes are written now: ")


def test_tending_puts_back_what_was_deleted(make, root):
    backlog = make()
    fill(backlog, 3)
    next(root.glob("*/0*.segment")).unlink()
    assert list(backlog.tend(adopting=False)) == ["files of the spool were deleted or moved, and were written again"]
    assert list(backlog.tend(adopting=False)) == []
    assert on_disk(root) == drain(backlog) == full_records(3)


def test_tending_says_what_keeps_the_spool_from_being_synced(make, monkeypatch):
    now = [100.0]
    backlog = make(fsync="interval", clock=lambda: now[0])
    fill(backlog, 3)

    def fail(descriptor):
        raise OSError(errno.EIO, "secret path")

    monkeypatch.setattr(os, "fdatasync", fail)
    now[0] += 5.0
    assert list(backlog.tend(adopting=False)) == ["the spool has trouble: it can't be synced: Input/output error"]


# What is kept after it is in the table.


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def before(backlog):
    return [entry.record for piece in backlog.settled_before() for entry in piece]


def test_by_default_nothing_is_kept(make, root):
    backlog = make(segment_bytes=1_000)
    assert not backlog.spool.keeps
    fill(backlog, 30)
    drain(backlog)
    assert len(list(root.glob("*/0*.segment"))) <= 1  # the one that grows
    assert len(before(backlog)) < 5


@pytest.mark.parametrize("segment_bytes", [1_000, 10**6])
def test_what_is_settled_is_kept_and_can_be_read_in_its_order_and_what_waits_can_not(make, segment_bytes):
    backlog = make(keep_seconds=60.0, segment_bytes=segment_bytes)
    assert backlog.spool.keeps
    fill(backlog, 30)
    drain(backlog)
    assert before(backlog) == full_records(30)
    fill(backlog, 30, first=30)
    in_flight = take(backlog, 10)
    assert 0 < len(in_flight) <= 10
    assert before(backlog) == full_records(30 + len(in_flight))
    backlog.settle(in_flight)
    assert before(backlog) == full_records(30 + len(in_flight))
    drain(backlog)
    assert before(backlog) == full_records(60)


def test_what_is_kept_is_read_however_large_it_is(make):
    backlog = make(keep_seconds=60.0, segment_bytes=10**8)
    large = [full_captured(number, request={"query": "x" * 600_000}) for number in range(5)]
    for captured in large:
        accept(backlog, captured)
    drain(backlog)
    assert before(backlog) == [to_record(captured) for captured in large]


def test_what_is_kept_beside_beginnings_and_parts_is_read_without_them(make):
    backlog = make(keep_seconds=60.0, segment_bytes=1_500)
    for number in range(10):
        backlog.begin(full_captured(number, outcome=None))
        backlog.hold(part_of(full_captured(number)))
        fill(backlog, 1, first=number)
    drain(backlog)
    assert before(backlog) == full_records(10)


def test_what_was_kept_for_long_enough_goes(make, root):
    now = [100.0]
    backlog = make(keep_seconds=60.0, segment_bytes=1_000, clock=lambda: now[0])
    fill(backlog, 10)
    drain(backlog)
    now[0] += 30.0
    fill(backlog, 10, first=10)
    drain(backlog)
    list(backlog.tend(adopting=False))
    assert before(backlog) == full_records(20)
    now[0] += 30.0
    list(backlog.tend(adopting=False))
    left = before(backlog)
    assert left == full_records(20)[-len(left) :]
    assert 10 <= len(left) < 15  # a file goes as a whole
    now[0] += 30.0
    list(backlog.tend(adopting=False))
    assert len(list(root.glob("*/0*.segment"))) <= 1
    assert backlog.spool.bytes == sum(path.stat().st_size for path in root.glob("*/0*.segment"))


def test_room_is_made_by_dropping_the_oldest_of_what_is_kept_and_no_more_than_is_needed(make, root):
    backlog = make(keep_seconds=60.0, max_bytes=20_000, segment_bytes=1_000)
    for number in range(100):
        assert backlog.has_room()
        assert fill(backlog, 1, first=number) == [True]
        drain(backlog)
        size = sum(path.stat().st_size for path in root.glob("*/0*.segment"))
        assert size == backlog.spool.bytes <= 20_000
    left = before(backlog)
    assert left == full_records(100)[-len(left) :]
    assert backlog.spool.bytes > 18_000
    assert (backlog.refused, backlog.damaged) == (0, 0)


def test_where_all_that_is_kept_was_dropped_the_newest_is_refused_and_what_waits_stays(make):
    backlog = make(keep_seconds=60.0, max_bytes=20_000, segment_bytes=1_000)
    fill(backlog, 20)
    drain(backlog)
    accepted = sum(fill(backlog, 100, first=20))
    assert 30 < accepted < 100
    assert not backlog.has_room()
    assert backlog.refusal == "it is full: 20000 bytes (spool_max_bytes)"
    assert drain(backlog) == full_records(20 + accepted)[20:]
    assert backlog.close_gap()


def test_what_is_kept_and_cant_be_read_says_so(make, monkeypatch):
    backlog = make(keep_seconds=60.0)
    fill(backlog, 3)
    drain(backlog)
    no_reading(monkeypatch)
    with pytest.raises(SpoolError, match=r"^it can't be read: Input/output error$"):
        before(backlog)
    monkeypatch.undo()
    assert before(backlog) == full_records(3)


def test_what_is_kept_goes_at_the_end(make, root):
    backlog = make(keep_seconds=60.0, segment_bytes=1_000)
    fill(backlog, 10)
    drain(backlog)
    backlog.close()
    assert list(root.iterdir()) == []


def test_a_killed_process_leaves_what_it_kept_and_it_is_written_once_more(make, root):
    dead = make(keep_seconds=60.0, segment_bytes=1_000)
    fill(dead, 10)
    drain(dead)
    die(dead)
    backlog = make()
    backlog.adopt()
    assert drain(backlog) == full_records(10)
    assert list(root.iterdir()) == []


def test_what_is_kept_is_in_no_childs_way(make, root):
    backlog = make(keep_seconds=60.0, segment_bytes=1_000)
    fill(backlog, 10)
    drain(backlog)
    kept = sorted(root.glob("*/0*.segment"))
    descriptors = [segment.descriptor for segment in backlog.spool.settled]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            backlog.after_fork()
            backlog.close()
            status = len(before(backlog)) + sum(is_open(descriptor) for descriptor in descriptors)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(root.glob("*/0*.segment")) == kept
    assert before(backlog) == full_records(10)


def test_what_is_kept_is_read_behind_a_line_that_is_longer_than_a_piece(make):
    backlog = make(keep_seconds=60.0, segment_bytes=10**8)
    accept(backlog, full_captured(0, request={"query": "x" * 2_000_000}))
    fill(backlog, 3, first=1)
    drain(backlog)
    assert [record.bank_id for record in before(backlog)] == ["bank-0", "bank-1", "bank-2", "bank-3"]


def test_what_is_kept_does_not_go_while_it_is_read_and_takes_nobodys_room(make):
    backlog = make(keep_seconds=60.0, max_bytes=20_000, segment_bytes=1_000)
    fill(backlog, 30)
    drain(backlog)
    pieces = backlog.settled_before()
    read = [entry.record for entry in next(pieces)]
    assert all(fill(backlog, 20, first=30))
    read += [entry.record for piece in pieces for entry in piece]
    assert read == full_records(30)[-len(read) :]


def test_a_header_whose_first_byte_is_damaged_costs_no_record(make, root):
    backlog = make()
    fill(backlog, 2)
    [path] = root.glob("*/0*.segment")
    with path.open("r+b") as file:
        file.write(b"x")
    assert drain(backlog) == full_records(2)
    assert backlog.damaged == 0
