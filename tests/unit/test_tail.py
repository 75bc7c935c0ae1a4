"""What a living process leaves to another one to write is read while it grows, and cleared away behind it."""

import errno
import os
import random
import signal

import pytest

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged
from astrocyte_otel_audit.pipeline.adoption import adopt, tail
from astrocyte_otel_audit.pipeline.captured import filled, to_record
from astrocyte_otel_audit.pipeline.directory import ACKNOWLEDGED, GAP, LOCK, directories, try_lock
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, FileSegment, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.records import full_captured, full_record, full_records


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def make(root):
    """Makes the spool of a process that leaves writing to another one."""
    made = []

    def make(destination="there", **arguments):
        options = {"max_bytes": 10**9, "max_in_memory": 0, "fsync": "never", "cleared_by_others": True, **arguments}
        made.append(Spool(root, destination, **options))
        return made[-1]

    yield make
    for spool in made:
        spool.after_fork()  # closes, whatever is left


@pytest.fixture
def tailed(root):
    """Finds what is not known yet, and closes it after the test."""
    made = []

    def tailed(destinations=("there",), known=()):
        found = list(tail(root, destinations, known))
        made.extend(found)
        return found

    yield tailed
    for reader in made:
        reader.close()


def line_of(number):
    return captured_frame(RECORD, full_captured(number))


def begun(number, **changes):
    return captured_frame(PROVISIONAL, full_captured(number, outcome="unknown", ended_at=None, **changes))


def append(spool, *numbers):
    for number in numbers:
        spool.append(line_of(number))


def read_all(reader, limit=7):
    found = []
    while piece := reader.read(limit):
        assert len(piece) <= limit
        found += piece
    return found


def records(found):
    return [each.record for each in found]


def settle(reader, found, **options):
    for each in found:
        reader.settle(each.segment, each.offset, **options)


def names(spool):
    return sorted(path.name for path in spool.path.glob("0*"))


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


def take_away(directory):
    for each in directory.iterdir():
        each.unlink()
    directory.rmdir()


# Finding it.


def test_a_living_process_is_found_once_and_is_left_its_lock(make, tailed):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    assert (reader.path, reader.is_alive) == (spool.path, True)
    assert tailed(known=[reader.path]) == []
    assert try_lock(spool.path / LOCK) is None
    other = make()
    append(other, 1)
    assert [each.path for each in tailed(known={reader.path: reader})] == [other.path]


@pytest.mark.parametrize("destinations", [["elsewhere"], []])
def test_a_living_process_with_another_destination_is_left_alone(make, tailed, destinations):
    append(make(), 0)
    assert tailed(destinations) == []


def test_a_process_of_any_of_the_destinations_is_found(make, tailed):
    spools = [make(), make("elsewhere"), make("nowhere")]
    for number, spool in enumerate(spools):
        append(spool, number)
    found = tailed(["elsewhere", "there"])
    assert [reader.path for reader in found] == sorted(spool.path for spool in spools[:2])


def test_what_an_ended_process_has_left_is_found_and_locked(make, tailed, root):
    spool = make()
    append(spool, *range(3))
    path = spool.path
    spool.close()
    (reader,) = tailed()
    assert not reader.is_alive
    assert try_lock(path / LOCK) is None
    found = read_all(reader)
    assert records(found) == full_records(3)
    settle(reader, found)
    assert reader.settled
    assert list(root.iterdir()) == []


def test_what_a_process_has_before_it_has_written_anything_is_nothing_to_read(make, tailed):
    spool = make()
    spool.note_gap(None)
    assert tailed() == []
    append(spool, 0)
    (reader,) = tailed()
    assert reader.has_more()
    assert records(read_all(reader)) == full_records(1)


def test_a_living_process_that_writes_itself_is_left_alone_until_it_has_ended(make, tailed, root):
    spool = make(cleared_by_others=False, segment_bytes=1)
    append(spool, *range(3))
    before = descriptors()
    assert tailed() == []
    assert descriptors() == before
    assert names(spool) == ["000001.segment", "000002.segment", "000003.segment"]
    spool.after_fork()
    (reader,) = tailed()
    found = read_all(reader)
    assert records(found) == full_records(3)
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_one_whole_header_is_enough_to_know_who_leaves_writing_to_others(make, tailed):
    spool = make(segment_bytes=1)
    append(spool, 0, 1)
    with spool.segments[0].path.open("r+b") as file:
        file.write(b"?")
    (reader,) = tailed()
    assert records(read_all(reader)) == full_records(2)


def test_a_header_that_is_damaged_costs_no_record_and_is_kept_for_a_person(make, tailed, root):
    spool = make(segment_bytes=1_500)
    append(spool, *range(10))
    with spool.segments[1].path.open("r+b") as file:
        file.write(b"?")
    (reader,) = tailed()
    found = read_all(reader)
    settle(reader, found)
    reader.acknowledge()
    assert (records(found), reader.damaged) == (full_records(10), 0)
    assert read_acknowledged(spool.path) == Acknowledged(*spool.end(), 10, 0)
    (kept,) = root.glob("damaged-*")
    assert kept.read_bytes().startswith(b"? ")


def test_a_record_that_has_run_into_the_header_is_counted(make, tailed):
    spool = make(segment_bytes=1_000)
    append(spool, *range(5))
    path = spool.segments[0].path
    whole = path.read_bytes()
    end = whole.index(b"\n")
    path.write_bytes(whole[:end] + b"?" + whole[end + 1 :])
    (reader,) = tailed()
    assert (records(read_all(reader)), reader.damaged) == (full_records(5)[1:], 1)


# Reading it.


@pytest.mark.parametrize("segment_bytes", [1, 2_000, 10**6])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_it_is_read_while_it_grows(make, tailed, segment_bytes, limit):
    spool = make(segment_bytes=segment_bytes)
    append(spool, 0)
    (reader,) = tailed()
    found = read_all(reader, limit)
    for number in range(1, 30, 2):
        assert not reader.has_more()
        assert reader.read(limit) == []
        append(spool, number, number + 1)
        assert reader.has_more()
        found += read_all(reader, limit)
    assert records(found) == full_records(31)
    assert not reader.exhausted


def test_it_reads_no_more_than_it_is_asked_for(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(20))
    (reader,) = tailed()
    assert [len(reader.read(limit)) for limit in (1, 5, 2, 7, 100, 100)] == [1, 5, 2, 7, 5, 0]


@pytest.mark.parametrize("cut", [1, 2, 12, 20, 21, 300, -2, -1])
def test_half_a_line_is_read_once_it_is_whole(make, tailed, cut):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    found = read_all(reader)
    (segment,) = spool.segments
    os.write(segment.descriptor, line_of(1)[:cut])
    for _ in range(3):
        assert reader.read(10) == []
    os.write(segment.descriptor, line_of(1)[cut:] + line_of(2)[:cut])
    found += read_all(reader)
    assert records(found) == full_records(2)
    os.write(segment.descriptor, line_of(2)[cut:])
    found += read_all(reader)
    assert records(found) == full_records(3)
    assert reader.damaged == 0


def test_half_a_header_is_no_damaged_one(make, tailed):
    spool = make()
    append(spool, 0)
    whole = spool.segments[0].path.read_bytes()
    (reader,) = tailed()
    for size in (0, 1, 20, 100):
        os.truncate(spool.segments[0].path, 0)
        os.write(spool.segments[0].descriptor, whole[:size])
        assert reader.read(10) == []
    os.write(spool.segments[0].descriptor, whole[100:])
    assert (records(reader.read(10)), reader.damaged) == (full_records(1), 0)


@pytest.mark.parametrize("damaged", [b"R 00000002 00000000 []\n", b"?\n"])
def test_a_damaged_line_costs_itself_only_and_is_kept_for_a_person(make, tailed, root, damaged):
    spool = make()
    append(spool, 0)
    os.write(spool.segments[0].descriptor, damaged + line_of(1))
    (reader,) = tailed()
    assert records(read_all(reader)) == full_records(2)
    assert reader.damaged == 1
    (kept,) = root.glob("damaged-*")
    assert (kept.name, kept.read_bytes()) == (f"damaged-{spool.path.name}-000001", damaged)


def test_a_torn_line_is_damaged_once_another_file_follows(make, tailed, root):
    spool = make()
    append(spool, 0)
    os.write(spool.segments[0].descriptor, line_of(1)[:100])
    (reader,) = tailed()
    assert (records(read_all(reader)), reader.damaged) == (full_records(1), 0)
    spool.seal()
    append(spool, 2)
    assert (records(read_all(reader)), reader.damaged) == ([full_record(2)], 1)
    (kept,) = root.glob("damaged-*")
    assert kept.read_bytes() == line_of(1)[:100] + b"\n"


def test_what_is_written_while_it_is_read_is_read_although_another_file_follows(make, tailed, monkeypatch):
    spool = make(segment_bytes=2_000)
    append(spool, 0)
    (reader,) = tailed()
    found = read_all(reader)
    real, left = FileSegment.read, [range(1, 6)]

    def read(segment, offset, limit):
        data = real(segment, offset, limit)
        if left:
            append(spool, *left.pop())
        return data

    monkeypatch.setattr(FileSegment, "read", read)
    for _ in range(4):
        found += reader.read(10)
    assert records(found) == full_records(6)
    assert names(spool) == ["000001.segment", "000002.segment"]


def test_the_records_of_what_was_read_are_found_again(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (reader,) = tailed()
    found = read_all(reader)
    assert [each.segment.record_at(each.offset) for each in found] == full_records(10)


def test_a_gap_is_the_processs_own_while_that_lives(make, tailed):
    spool = make()
    spool.note_gap(full_captured(9, action="audit.gap"))
    append(spool, 0)
    (reader,) = tailed()
    assert records(read_all(reader)) == full_records(1)
    assert not reader.has_more()
    spool.close()
    reader.look_after()
    assert records(read_all(reader)) == [full_record(9, action="audit.gap")]


# Clearing it away.


def test_a_file_goes_once_it_is_settled_and_another_follows(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    assert names(spool) == ["000001.segment", "000002.segment", "000003.segment"]
    (reader,) = tailed()
    found = read_all(reader)
    settle(reader, found[1:])
    assert names(spool) == ["000001.segment", "000003.segment"]
    settle(reader, found[:1])
    assert names(spool) == ["000003.segment"]
    assert spool.missing() == []
    assert spool.bytes == (spool.path / "000003.segment").stat().st_size
    append(spool, 10)
    assert records(read_all(reader)) == [full_record(10)]


def test_the_last_file_stays_even_where_nothing_more_comes_into_it(make, tailed):
    spool = make(segment_bytes=1)
    append(spool, 0)
    assert spool.segments[0].sealed
    (reader,) = tailed()
    settle(reader, read_all(reader))
    assert names(spool) == ["000001.segment"]
    append(spool, 1)
    read_all(reader)
    assert names(spool) == ["000002.segment"]


def test_a_file_that_grows_is_never_cleared_away(make, tailed):
    spool = make(segment_bytes=3_000)
    append(spool, 0)
    (reader,) = tailed()
    seen = 0
    for number in range(1, 40):
        growing = spool.segments[-1].path
        found = read_all(reader, 2)
        settle(reader, found)
        seen += len(found)
        assert growing.exists()
        append(spool, number)
        assert spool.missing() == []
    assert seen == 39
    assert len(names(spool)) <= 2


def test_an_unsettled_file_stays_and_what_follows_goes(make, tailed):
    spool = make(segment_bytes=1)
    append(spool, *range(5))
    (reader,) = tailed()
    found = read_all(reader)
    settle(reader, [found[1], found[3]])
    assert names(spool) == ["000001.segment", "000003.segment", "000005.segment"]


def test_a_directory_stays_as_long_as_its_process_lives(make, tailed, root):
    spool = make(segment_bytes=1)
    append(spool, 0, 1)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    assert not reader.settled
    assert sorted(path.name for path in spool.path.iterdir()) == ["000002.segment", GAP, LOCK]
    assert try_lock(spool.path / LOCK) is None


# What is a row only if none follows that says more.


def test_what_has_begun_is_no_row_as_long_as_its_process_lives(make, tailed):
    spool = make()
    spool.append(begun(0))
    append(spool, 1)
    (reader,) = tailed()
    assert records(read_all(reader)) == [full_record(1)]
    assert not reader.has_more()
    reader.look_after()
    assert reader.read(10) == []
    append(spool, 0)
    assert records(read_all(reader)) == full_records(1)


def test_a_file_waits_for_the_records_of_what_has_begun_in_it(make, tailed):
    spool = make(segment_bytes=1)
    spool.append(begun(0))
    spool.append(begun(1))
    append(spool, 2)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    assert names(spool) == ["000001.segment", "000002.segment", "000003.segment"]
    append(spool, 1, 3)
    settle(reader, read_all(reader))
    assert names(spool) == ["000001.segment", "000005.segment"]
    append(spool, 0)
    settle(reader, read_all(reader))
    assert names(spool) == ["000006.segment"]


def test_a_part_that_comes_after_its_record_keeps_no_file(make, tailed):
    spool = make(segment_bytes=1_400)
    append(spool, 0)
    spool.append(begun(0))
    append(spool, 1, 2)
    (reader,) = tailed()
    found = read_all(reader)
    assert records(found) == full_records(3)
    settle(reader, found)
    assert "000001.segment" not in names(spool)


def test_what_has_begun_and_a_part_of_it_are_one_row_when_the_process_has_ended(make, tailed, root):
    spool = make(segment_bytes=1)
    known = [full_captured(0, outcome="unknown", ended_at=None, bank_id=None), full_captured(0, bank_id="part's")]
    for each in known:
        spool.append(captured_frame(PROVISIONAL, each))
    (reader,) = tailed()
    assert reader.read(10) == []
    spool.close()
    reader.look_after()
    found = reader.read(10)
    assert records(found) == [to_record(filled(*known))] * 2
    assert [each.segment.record_at(each.offset) for each in found] == records(found)
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_what_was_read_before_the_process_has_ended_is_superseded_by_what_is_read_after(make, tailed, root):
    spool = make()
    spool.append(begun(0))
    (reader,) = tailed()
    assert reader.read(10) == []
    append(spool, 0)
    spool.close()
    reader.look_after()
    found = read_all(reader)
    assert records(found) == full_records(1)
    settle(reader, found)
    assert list(root.iterdir()) == []


# When its process ends.


@pytest.mark.parametrize("end", [Spool.close, Spool.after_fork])
def test_who_reads_takes_over_when_the_process_has_ended(make, tailed, root, end):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (reader,) = tailed()
    found = reader.read(5)
    settle(reader, found[:2])
    reader.acknowledge()
    append(spool, *range(10, 15))
    path = spool.path
    reader.look_after()
    assert reader.is_alive
    end(spool)
    assert reader.is_alive  # as far as is known
    reader.look_after()
    assert not reader.is_alive
    assert try_lock(path / LOCK) is None
    assert reader.has_more()
    found += read_all(reader)
    assert records(found) == full_records(15)
    assert (reader.exhausted, reader.settled, reader.has_more()) == (True, False, False)
    settle(reader, found[2:])
    assert reader.settled
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_wrote_is_read_to_its_end(root, tailed, end):
    said, to_say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            spool = Spool(root, "there", max_bytes=10**9, max_in_memory=0, segment_bytes=2_000, cleared_by_others=True)
            append(spool, *range(10))
            spool.append(begun(10))
            os.write(to_say, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(to_say)
    os.read(said, 1)
    os.close(said)
    (reader,) = tailed()
    assert reader.is_alive
    found = reader.read(4)
    os.kill(child, end)
    os.waitpid(child, 0)
    reader.look_after()
    assert not reader.is_alive
    found += read_all(reader)
    assert records(found) == [*full_records(10), full_record(10, outcome="unknown", ended_at=None)]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_one_that_has_ended_is_looked_after_without_harm(make, tailed):
    spool = make()
    append(spool, *range(3))
    spool.close()
    (reader,) = tailed()
    before = descriptors()
    for _ in range(3):
        reader.look_after()
    found = read_all(reader)
    reader.look_after()
    settle(reader, found)
    assert descriptors() == before - 1
    reader.look_after()
    assert (reader.settled, reader.has_more(), descriptors()) == (True, False, before - 1)


def test_what_another_process_took_over_is_left_to_that(make, tailed, root):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (reader,) = tailed()
    settle(reader, reader.read(5))
    spool.close()
    (other,) = adopt(root, ["there"])
    before = descriptors()
    reader.look_after()
    assert (reader.is_alive, reader.exhausted) == (True, False)  # it may still let go of it
    found = read_all(other)
    settle(other, found)
    assert list(root.iterdir()) == []
    reader.look_after()
    assert (reader.exhausted, reader.settled, reader.has_more()) == (True, True, False)
    assert descriptors() == before - 2  # the file that was read last, and the other's lock


def test_what_another_process_took_over_before_any_of_it_was_read_is_left_to_that_too(make, tailed, root):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    spool.close()
    (other,) = adopt(root, ["there"])
    settle(other, read_all(other))
    reader.look_after()
    assert (reader.exhausted, reader.settled, reader.has_more()) == (True, True, False)


def test_what_is_on_its_way_when_another_process_took_over_is_settled_without_harm(make, tailed, root):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (reader,) = tailed()
    before = descriptors()
    found = reader.read(6)
    spool.close()
    (other,) = adopt(root, ["there"])
    settle(other, read_all(other))
    assert list(root.iterdir()) == []
    reader.look_after()
    assert (reader.exhausted, reader.settled) == (True, False)
    settle(reader, found)
    assert reader.settled
    assert descriptors() <= before
    assert list(root.iterdir()) == []


def test_what_another_process_has_let_go_of_is_taken_over_after_all(make, tailed, root):
    spool = make()
    append(spool, *range(10))
    (reader,) = tailed()
    spool.close()
    (other,) = adopt(root, ["there"])
    settle(other, other.read(5))
    reader.look_after()
    assert reader.is_alive
    other.close()
    reader.look_after()
    assert not reader.is_alive
    found = read_all(reader)
    assert records(found) == full_records(10)
    settle(reader, found)
    assert list(root.iterdir()) == []


# Files that somebody takes away.


def test_a_file_that_was_put_back_is_read_on(make, tailed):
    spool = make()
    append(spool, *range(3))
    (reader,) = tailed()
    found = reader.read(2)
    spool.segments[0].path.unlink()
    append(spool, 3)
    reader.look_after()
    found += read_all(reader)
    assert records(found) == full_records(4)  # from the file that nobody sees any more
    spool.put_back(spool.missing())
    append(spool, 4)
    before = descriptors()
    reader.look_after()
    found += read_all(reader)
    append(spool, 5)
    found += read_all(reader)
    assert records(found) == full_records(6)
    assert descriptors() == before


def test_a_file_that_was_put_back_is_cleared_away_as_any_other(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, 0)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    spool.segments[0].path.unlink()
    spool.put_back(spool.missing())
    reader.look_after()
    append(spool, *range(1, 6))
    settle(reader, read_all(reader))
    assert names(spool) == ["000002.segment"]


def test_what_is_in_a_directory_that_is_made_in_place_of_one_that_was_taken_away_is_read(make, tailed, root):
    spool = make(segment_bytes=2_000)
    append(spool, *range(7))
    (reader,) = tailed()
    before = descriptors()
    found = reader.read(5)
    take_away(spool.path)
    spool.put_back(spool.missing())
    reader.look_after()
    assert (reader.exhausted, reader.settled) == (True, False)
    (second,) = tailed(known=[reader.path])
    append(spool, 7)
    again = read_all(second)
    assert records(again)[-1] == full_record(7)
    assert {record.id for record in records(found + again)} >= {record.id for record in full_records(8)}
    settle(reader, found)
    assert reader.settled
    settle(second, again)
    assert descriptors() <= before
    assert names(spool) == ["000002.segment"]


def test_a_file_that_vanished_before_it_was_opened_costs_only_itself(make, tailed):
    spool = make(segment_bytes=1)
    append(spool, *range(5))
    (reader,) = tailed()
    found = reader.read(1)
    (spool.path / "000003.segment").unlink()
    found += read_all(reader)
    assert records(found) == [full_record(n) for n in (0, 1, 3, 4)]


def test_what_is_written_is_synced_by_who_reads_it(make, tailed, monkeypatch):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    reader.look_after()
    assert synced == []  # nothing of it is open
    read_all(reader)
    reader.look_after()
    assert synced == [spool.segments[0].path.stat().st_ino]


def test_what_cant_be_synced_is_said_once_and_that_it_can_be_again(make, tailed, monkeypatch, caplog):
    def failing(descriptor):
        raise OSError(errno.EIO, "")

    append(make(), 0)
    (reader,) = tailed()
    read_all(reader)
    monkeypatch.setattr(os, "fdatasync", failing)
    for _ in range(3):
        reader.look_after()
    name = reader.path.name
    trouble = f"the spool has trouble: what process {name} has in it can't be looked after: Input/output error."
    assert caplog.messages == [trouble]
    monkeypatch.undo()
    for _ in range(3):
        reader.look_after()
    assert caplog.messages == [trouble, f"what process {name} has in the spool is looked after again."]


# Acknowledging it.


def test_the_process_is_told_how_far_it_is_settled(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (reader,) = tailed()
    reader.acknowledge()
    assert read_acknowledged(spool.path) is None  # nothing of it was read
    found = read_all(reader)
    places = [(each.segment.number, each.offset) for each in found]

    def told():
        reader.acknowledge()
        return read_acknowledged(spool.path)

    assert told() == Acknowledged(*places[0], 0, 0)
    settle(reader, found[:3])
    assert told() == Acknowledged(*places[3], 3, 0)
    settle(reader, found[5:9])
    assert told()[:2] == places[3]
    settle(reader, found[3:4], stored=False)
    assert told() == Acknowledged(*places[4], 7, 1)
    settle(reader, found[4:5])
    assert told() == Acknowledged(*places[9], 8, 1)
    settle(reader, found[9:])
    assert told() == Acknowledged(*spool.end(), 9, 1)
    append(spool, 10)
    assert told() == Acknowledged(3, places[9][1] + len(line_of(9)), 9, 1)
    found = read_all(reader)
    assert told()[:2] == (found[0].segment.number, found[0].offset)
    settle(reader, found)
    assert told() == Acknowledged(*spool.end(), 10, 1)


def test_what_is_acknowledged_never_is_ahead_of_what_is_settled(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, 0)
    (reader,) = tailed()
    chance = random.Random(7)
    waiting, written, last = [], 1, (0, 0)
    for _ in range(300):
        append(spool, *range(written, written := written + chance.randrange(3)))
        waiting += reader.read(chance.randrange(1, 5))
        for _ in range(chance.randrange(len(waiting) + 1)):
            settle(reader, [waiting.pop(chance.randrange(len(waiting)))])
        reader.acknowledge()
        if (said := read_acknowledged(spool.path)) is not None:
            assert all((each.segment.number, each.offset) >= said[:2] for each in waiting)
            assert last <= said[:2] <= spool.end()
            last = said[:2]
        spool.missing()
    waiting += read_all(reader)
    settle(reader, waiting)
    reader.acknowledge()
    assert read_acknowledged(spool.path) == Acknowledged(*spool.end(), written, 0)


def test_lines_that_cant_be_read_are_told_as_refused(make, tailed):
    spool = make()
    append(spool, 0)
    os.write(spool.segments[0].descriptor, b"?\n" * 3)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    reader.acknowledge()
    assert read_acknowledged(spool.path)[2:] == (1, 3)


def test_what_has_begun_holds_up_no_acknowledgement(make, tailed):
    spool = make()
    append(spool, 0)
    spool.append(begun(1))
    (reader,) = tailed()
    settle(reader, read_all(reader))
    reader.acknowledge()
    assert read_acknowledged(spool.path) == Acknowledged(*spool.end(), 1, 0)


@pytest.mark.parametrize("line", [begun(1), b"?\n"])
def test_the_process_is_told_of_what_leaves_nothing_to_settle(make, tailed, line):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    found = read_all(reader)
    assert read_acknowledged(spool.path) is None  # something is to be settled first
    settle(reader, found)
    reader.acknowledge()
    os.write(spool.segments[0].descriptor, line)
    assert read_all(reader) == []
    end = (1, spool.segments[0].path.stat().st_size)
    assert read_acknowledged(spool.path) == Acknowledged(*end, 1, int(line == b"?\n"))


def test_what_cant_be_told_of_what_was_read_keeps_nothing_from_being_read(make, tailed, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, "")

    spool = make()
    spool.append(begun(0))
    (reader,) = tailed()
    monkeypatch.setattr(os, "pwrite", failing)
    assert reader.read(10) == []
    append(spool, 1)
    assert records(reader.read(10)) == [full_record(1)]


def test_the_same_is_not_told_twice(make, tailed):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    reader.acknowledge()
    (spool.path / ACKNOWLEDGED).unlink()
    reader.acknowledge()
    assert read_acknowledged(spool.path) is None
    append(spool, 1)
    settle(reader, read_all(reader))
    reader.acknowledge()
    assert read_acknowledged(spool.path) == Acknowledged(*spool.end(), 2, 0)


def test_nothing_is_told_when_the_process_has_ended(make, tailed):
    spool = make()
    append(spool, *range(3))
    path = spool.path
    (reader,) = tailed()
    found = read_all(reader)
    spool.close()
    reader.look_after()
    settle(reader, found[:1])
    reader.acknowledge()
    assert read_acknowledged(path) is None


def test_what_cant_be_told_is_the_systems_error(make, tailed):
    spool = make()
    append(spool, 0)
    (reader,) = tailed()
    settle(reader, read_all(reader))
    take_away(spool.path)
    with pytest.raises(FileNotFoundError):
        reader.acknowledge()


# Letting go of it.


def test_what_was_not_settled_is_there_for_the_next(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    before = descriptors()
    (first,) = tailed()
    found = read_all(first)
    settle(first, found[:5])
    first.acknowledge()
    first.close()
    assert descriptors() == before
    (second,) = tailed()
    again = read_all(second)
    assert records(again) == full_records(10)[4:]  # a file goes as a whole
    second.acknowledge()
    assert read_acknowledged(spool.path)[:2] == (again[0].segment.number, again[0].offset)
    settle(second, again)
    second.acknowledge()
    assert read_acknowledged(spool.path)[:2] == spool.end()


def test_what_is_settled_after_it_was_let_go_of_harms_nobody(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(10))
    (first,) = tailed()
    found = read_all(first)
    first.close()
    settle(first, found)
    assert names(spool) == ["000001.segment", "000002.segment", "000003.segment"]
    (second,) = tailed()
    assert records(read_all(second)) == full_records(10)


def test_descriptors_go_with_what_is_settled(make, tailed):
    spool = make(segment_bytes=2_000)
    append(spool, *range(40))
    before = descriptors()
    (reader,) = tailed()
    found = read_all(reader)
    assert descriptors() == before + 10
    settle(reader, found)
    append(spool, 40)
    settle(reader, read_all(reader))
    assert descriptors() == before + 2  # the file that grows, of either


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_every_record_is_read_and_none_goes_before_it_is_settled(make, tailed, root, seed):
    chance = random.Random(seed)
    spool = make(segment_bytes=chance.choice([1, 1_500, 4_000]))
    written, settled = 0, set()
    (reader, waiting, held) = None, [], []
    for _ in range(400):
        what = chance.random()
        if what < 0.35:
            append(spool, written)
            written += 1
        elif what < 0.45:
            spool.append(begun(written))
            held.append(written)
            written += 1
        elif what < 0.55 and held:
            append(spool, held.pop(chance.randrange(len(held))))
        elif what < 0.6:
            spool.missing()
        elif what < 0.62 and reader is not None:
            reader.close()
            reader, waiting = None, []
        elif reader is None:
            reader = next(iter(tailed()), None)
        elif what < 0.8:
            waiting += reader.read(chance.randrange(1, 6))
        elif what < 0.85:
            reader.look_after()
            reader.acknowledge()
        elif waiting:
            each = waiting.pop(chance.randrange(len(waiting)))
            reader.settle(each.segment, each.offset)
            settled.add(each.record.id)
        there = {path.name for path in spool.path.glob("0*")} if spool.path else set()
        assert {each.segment.path.name for each in waiting} <= there
        assert not spool.segments or spool.segments[-1].path.name in there
    spool.close()
    if reader is None:
        (reader,) = tailed()
    reader.look_after()
    assert not reader.is_alive
    waiting += read_all(reader)
    settle(reader, waiting)
    settled |= {each.record.id for each in waiting}
    assert settled == {record.id for record in full_records(written)}
    assert reader.settled
    assert list(directories(root)) == []


def test_what_had_begun_in_a_process_that_another_one_took_over_is_let_go_of(root, make, tailed):
    spool = make()
    spool.append(begun(1))
    (reader,) = tailed()
    assert reader.read(7) == []
    spool.close()
    (other,) = adopt(root, ["there"])
    for found in read_all(other):
        other.settle(found.segment, found.offset)
    assert other.settled
    reader.look_after()
    assert (reader.exhausted, reader.settled, reader.has_more(), reader.read(7)) == (True, True, False, [])
