"""The spool: an operation is in a file before the call returns, and the file goes once it is settled."""

import errno
import os
import stat
from itertools import groupby

import pytest

from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.directory import GAP, LOCK, SpoolError, destination_of, try_lock
from astrocyte_otel_audit.pipeline.segment import (
    PROVISIONAL,
    RECORD,
    FileSegment,
    MemorySegment,
    captured_frame,
    frames,
    parse_captured,
)  # fmt: skip
from astrocyte_otel_audit.pipeline.spool import Spool, SpoolFullError
from tests.records import full_captured, full_record, full_records

MEGABYTE = 1024 * 1024
#: How an operation is appended that must leave a row.
DURABLY = {"on_disk": True, "synced": True}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def make(root, now):
    made = []

    def make(root=root, **arguments):
        defaults = {"max_bytes": 64 * MEGABYTE, "max_in_memory": 1_000, "fsync": "never", "clock": lambda: now[0]}
        made.append(Spool(root, "there", **{**defaults, **arguments}))
        return made[-1]

    yield make
    for spool in made:
        spool.after_fork()  # closes, whatever is left


@pytest.fixture
def spool(make):
    return make()


@pytest.fixture
def memory(make):
    return make(root=None, max_in_memory=3)


@pytest.fixture
def fail(monkeypatch):
    """Has a function of the system fail until `monkeypatch.undo`; gives the list of its calls."""

    def fail(name="os.write", code=errno.EIO):
        calls = []

        def failing(*arguments, **options):
            calls.append(arguments)
            raise OSError(code, "secret path")

        monkeypatch.setattr(name, failing)
        return calls

    return fail


def own(spool):
    """The directory of the process."""
    (path,) = (path for path in spool.root.iterdir() if not path.name.startswith("damaged"))
    return path


def records_of(data):
    return [to_record(parse_captured(each.content)) for each in frames(data) if each.kind == RECORD]


def on_disk(spool):
    """Every record that the files hold, as another process would read them."""
    return [record for path in sorted(own(spool).glob("*.segment")) for record in records_of(path.read_bytes())]


def held(spool):
    """Every record that the segments hold, on disk or in memory, in their order."""
    return [record for segment in spool.segments for record in records_of(segment.read(0, MEGABYTE))]


def line_of(number):
    return captured_frame(RECORD, full_captured(number))


def append(spool, *numbers, **options):
    return [spool.append(line_of(number), **options) for number in numbers]


def settle(spool, places):
    for place in places:
        spool.settle(*place)
    spool.sweep()


def kinds(spool):
    return [type(segment) for segment in spool.segments]


def begun(number):
    """The line of an operation that has not ended."""
    return captured_frame(PROVISIONAL, full_captured(number))


def file_bytes(spool):
    return sum(path.stat().st_size for path in own(spool).glob("0*.segment"))


def take_away(directory):
    for each in directory.iterdir():
        each.unlink()
    directory.rmdir()


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


def test_what_is_appended_is_in_a_file_at_once(spool):
    places = append(spool, *range(3))
    assert on_disk(spool) == full_records(3)
    assert [segment.record_at(offset) for segment, offset in places] == full_records(3)
    assert (spool.in_memory, spool.trouble) == (0, None)


def test_nothing_is_made_before_it_is_needed(root, make):
    spool = make()
    assert spool.has_room()
    spool.sync()
    assert spool.missing() == []
    spool.close()
    assert not root.exists()


def test_files_are_the_owners_alone(spool):
    append(spool, 0)
    assert stat.S_IMODE(spool.root.stat().st_mode) == stat.S_IMODE(own(spool).stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in own(spool).iterdir()} == {0o600}


def test_its_directory_is_locked_as_long_as_it_is_open(spool):
    append(spool, 0)
    lock = own(spool) / LOCK
    assert try_lock(lock) is None
    spool.close()
    descriptor = try_lock(lock)
    assert descriptor is not None
    os.close(descriptor)


def test_a_full_segment_is_followed_by_the_next_and_goes_once_it_is_settled(make):
    spool = make(segment_bytes=2_000)
    places = append(spool, *range(20))
    segments = list(dict.fromkeys(segment for segment, _ in places))
    assert len(segments) > 3
    settle(spool, reversed(places[3:]))
    gone = [segment for segment in segments if not segment.path.exists()]
    assert gone == [segment for segment in segments[1:] if segment.sealed]  # the first one holds something
    assert gone
    assert spool.bytes == sum(segment.size for segment in spool.segments)


def test_segments_are_kept_in_the_order_of_what_is_in_them(make):
    spool = make(segment_bytes=2_000)
    places = append(spool, *range(20))
    assert spool.segments == list(dict.fromkeys(segment for segment, _ in places))
    assert held(spool) == on_disk(spool) == full_records(20)


def test_a_settled_segment_is_there_until_it_is_swept_away(make):
    spool = make(segment_bytes=1)
    places = append(spool, *range(3))
    for place in places[:2]:
        spool.settle(*place)
    assert held(spool) == on_disk(spool) == full_records(3)
    spool.sweep()
    assert held(spool) == on_disk(spool) == [full_record(2)]
    assert spool.bytes == file_bytes(spool)


def test_a_segment_that_may_grow_is_not_swept_away(spool):
    settle(spool, append(spool, 0))
    append(spool, 1)
    assert on_disk(spool) == full_records(2)


def test_each_segment_knows_the_one_that_follows(make):
    spool = make(segment_bytes=1)
    append(spool, *range(3))
    first, second, third = spool.segments
    assert [spool.following(each) for each in (first, second, third)] == [second, third, None]


def test_what_comes_after_sealing_is_in_another_segment(spool):
    spool.seal()  # harmless where there is none
    append(spool, 0)
    spool.seal()
    append(spool, 1)
    assert [each.sealed for each in spool.segments] == [True, False]
    assert [records_of(each.read(0, MEGABYTE)) for each in spool.segments] == [[full_record(0)], [full_record(1)]]


def test_it_says_where_its_directory_is_and_where_what_was_written_ends(make):
    spool = make(segment_bytes=2_000)
    assert (spool.path, spool.end()) == (None, (0, 0))
    for number in range(10):
        append(spool, number)
        last = max(own(spool).glob("0*.segment"))
        assert spool.end() == (int(last.stem), last.stat().st_size)
    assert spool.path == own(spool)
    assert spool.end()[0] == 3
    spool.close()
    assert (spool.path, spool.end()) == (None, (0, 0))


def test_once_all_is_settled_closing_leaves_nothing(spool):
    settle(spool, append(spool, *range(3)))
    spool.close()
    assert list(spool.root.iterdir()) == []


def test_what_is_not_settled_stays_when_it_is_closed(spool):
    places = append(spool, *range(3))
    spool.settle(*places[0])
    spool.close()
    assert on_disk(spool) == full_records(3)  # one of them once more: nobody is hurt by that


def test_a_provisional_one_holds_its_segment_as_a_record_does(make):
    spool = make(segment_bytes=1)
    place = spool.append(captured_frame(PROVISIONAL, full_captured()))
    append(spool, 1)
    path = place[0].path
    assert path.exists()
    settle(spool, [place])
    assert not path.exists()
    assert on_disk(spool) == [full_record(1)]


def test_closing_costs_no_descriptor(make, tmp_path):
    before = descriptors()
    for end in (Spool.close, Spool.after_fork):
        spool = make(tmp_path / end.__name__, segment_bytes=1, keep_seconds=60.0)
        places = append(spool, *range(5))
        spool.note_gap(full_captured(9))
        settle(spool, places[:3])
        end(spool)
        assert descriptors() == before


def test_it_can_be_used_again_once_it_is_closed(make):
    spool = make(max_bytes=8_000)
    with pytest.raises(SpoolFullError):
        append(spool, *range(100))
    spool.close()
    assert (spool.bytes, spool.trouble, spool.has_room(1_000)) == (0, None, True)
    append(spool, 0)
    assert len(list(spool.root.iterdir())) == 2


def test_past_its_cap_it_takes_only_what_was_promised_a_place(make):
    spool = make(max_bytes=8_000)
    with pytest.raises(SpoolFullError, match=r"it is full: 8000 bytes \(spool_max_bytes\)"):
        append(spool, *range(100))
    count = len(on_disk(spool))
    assert 10 < count < 30
    assert not spool.has_room(1_000)
    assert spool.trouble == "it is full: 8000 bytes (spool_max_bytes)"
    append(spool, 0, 1, promised=True)
    assert len(on_disk(spool)) == count + 2
    assert spool.in_memory == 0  # a cap is no reason to go there


def test_room_comes_back_with_what_is_settled(make):
    spool = make(max_bytes=8_000)
    places = []
    with pytest.raises(SpoolFullError):
        for number in range(100):
            places += append(spool, number)
    settle(spool, places)
    assert spool.has_room(1_000)
    append(spool, 0)
    assert spool.trouble is None


# Syncing.


def test_what_must_be_durable_and_cant_be_synced_is_not_there_later(spool, fail):
    append(spool, 0, 1)
    fail("os.fdatasync")
    with pytest.raises(SpoolError, match="it can't be written: Input/output error"):
        append(spool, 2, **DURABLY)
    assert held(spool) == on_disk(spool) == full_records(2)
    assert spool.bytes == file_bytes(spool)


def test_where_every_call_is_synced_and_that_fails_it_is_in_memory_and_not_there_twice(make, fail):
    spool = make(fsync="always")
    append(spool, 0)
    fail("os.fdatasync")
    append(spool, 1)
    assert on_disk(spool) == full_records(1)
    assert held(spool) == full_records(2)
    assert spool.bytes == file_bytes(spool)


@pytest.mark.parametrize(("fsync", "synced", "syncs"), [
    ("never", False, 0), ("never", True, 3), ("interval", False, 1), ("always", False, 3),
])  # fmt: skip
def test_it_is_synced_as_the_policy_says(make, monkeypatch, now, fsync, synced, syncs):
    spool = make(fsync=fsync)
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    append(spool, *range(3), synced=synced)
    spool.sync()
    now[0] += 5.0
    spool.sync()
    spool.sync()
    assert len(calls) == syncs


def test_a_file_that_was_sealed_since_the_last_time_is_synced_too(make, monkeypatch, now, fail):
    spool = make(fsync="interval", segment_bytes=1_200)
    append(spool, 0)
    fail()
    append(spool, 1)
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 2)
    assert kinds(spool) == [FileSegment, MemorySegment, FileSegment]
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    spool.sync()
    assert calls == [segment.descriptor for segment in spool.segments[::2]]


def test_what_is_asked_to_be_synced_is_on_the_disk_before_the_call_returns(spool, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: seen.append(on_disk(spool)))
    append(spool, 0)
    append(spool, 1, **DURABLY)
    assert seen == [full_records(2)]


def test_a_file_that_cant_be_synced_is_said_in_words(make, now, fail):
    spool = make(fsync="interval")
    append(spool, 0)
    now[0] += 5.0
    fail("os.fdatasync")
    with pytest.raises(SpoolError) as caught:
        spool.sync()
    assert str(caught.value) == "it can't be synced: Input/output error"


# In memory.


def test_without_a_directory_all_is_in_memory(memory, tmp_path):
    places = append(memory, *range(3))
    assert [segment.record_at(offset) for segment, offset in places] == full_records(3)
    assert held(memory) == full_records(3)
    assert kinds(memory) == [MemorySegment]
    assert (memory.in_memory, memory.bytes, memory.trouble) == (3, 0, None)
    assert list(tmp_path.iterdir()) == []


def test_in_memory_there_is_a_cap_of_operations(memory):
    places = append(memory, 0, 1)
    assert memory.has_room(10**12)
    places += append(memory, 2)
    assert not memory.has_room()
    with pytest.raises(SpoolFullError, match=r"3 wait \(max_queue_size\)"):
        append(memory, 3)
    assert (memory.in_memory, held(memory)) == (3, full_records(3))
    places += append(memory, 3, 4, promised=True)
    settle(memory, places[:2])
    assert not memory.has_room()  # three are left
    settle(memory, places[2:3])
    assert memory.has_room()
    append(memory, 5)
    assert [segment.record_at(offset) for segment, offset in places] == [None] * 3 + [full_record(3), full_record(4)]


def test_what_is_to_be_on_the_disk_is_refused_in_memory(memory):
    append(memory, 0)
    with pytest.raises(SpoolError, match="it is in memory"):
        memory.append(begun(1), on_disk=True)
    assert (memory.in_memory, held(memory), memory.trouble) == (1, full_records(1), None)


def test_what_is_settled_in_memory_is_let_go_of_at_once(memory):
    for number in range(50):
        ((segment, offset),) = append(memory, number)
        assert segment.record_at(offset) == full_record(number)
        memory.settle(segment, offset)
        assert segment.record_at(offset) is None
    assert (memory.in_memory, kinds(memory)) == (0, [MemorySegment])


def test_what_is_the_disks_is_nothing_in_memory(memory, now, tmp_path):
    append(memory, 0)
    now[0] += 5.0
    memory.sync()
    memory.note_gap(full_captured(1, action="audit.gap"))
    assert memory.missing() == []
    memory.put_back([])
    memory.close()
    assert (memory.segments, memory.in_memory, memory.has_room()) == ([], 0, True)
    assert list(tmp_path.iterdir()) == []


# A disk that fails.


@pytest.mark.parametrize(
    "trouble", ["full", "half a line", "failing", "a file is in the way", "no more descriptors", "no locks"]
)
def test_what_a_disk_does_not_take_is_in_memory(spool, root, monkeypatch, fail, trouble):
    if trouble == "full":
        fail(code=errno.ENOSPC)
    elif trouble == "half a line":
        real = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[: len(line) // 2]))
    elif trouble == "failing":
        fail()
    elif trouble == "a file is in the way":
        root.touch()
    elif trouble == "no more descriptors":
        fail("os.open", errno.EMFILE)
    else:
        fail("fcntl.flock", errno.ENOLCK)
    places = append(spool, *range(3))
    assert held(spool) == full_records(3)
    assert [segment.record_at(offset) for segment, offset in places] == full_records(3)
    assert (kinds(spool), spool.in_memory, spool.bytes) == ([MemorySegment], 3, 0)
    assert spool.trouble.startswith("it can't be written: ")


@pytest.mark.parametrize("promised", [False, True])
def test_what_is_to_be_on_the_disk_is_nowhere_while_that_fails(spool, monkeypatch, now, fail, promised):
    append(spool, 0)
    fail()
    places = append(spool, 1)
    for _ in range(3):
        with pytest.raises(SpoolError, match="it can't be written: Input/output error"):
            spool.append(begun(9), on_disk=True, promised=promised)
    places += append(spool, 2)
    assert (held(spool), spool.in_memory) == (full_records(3), 2)
    # Nothing that is settled early is between others in memory, where reading would end at it.
    assert sum(len(each.read(0, MEGABYTE)) == each.size for each in spool.segments) == len(spool.segments)
    monkeypatch.undo()
    now[0] += 1.0
    place = spool.append(begun(9), on_disk=True)
    append(spool, 3)
    spool.settle(*place)
    assert held(spool) == full_records(4)


def test_while_the_disk_fails_there_is_room_as_long_as_there_is_in_memory(make, monkeypatch, now, fail):
    spool = make(max_in_memory=2)
    append(spool, 0)
    fail()
    assert spool.has_room()
    places = append(spool, 1)
    assert spool.has_room()
    places += append(spool, 2)
    assert not spool.has_room()
    settle(spool, places[:1])
    assert spool.has_room()
    append(spool, 3)
    assert not spool.has_room()
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 4)  # it is on the disk, however little room is in memory
    assert spool.has_room()
    assert on_disk(spool) == [full_record(0), full_record(4)]


def test_a_file_of_which_a_half_line_cant_be_cut_off_is_not_written_to_any_more(spool, monkeypatch, now, fail):
    append(spool, 0)
    real = os.write
    fail("os.ftruncate")
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[: len(line) // 2]))
    append(spool, 1)
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 2)
    assert kinds(spool) == [FileSegment, MemorySegment, FileSegment]
    assert [each.sealed for each in spool.segments] == [True, True, False]
    assert held(spool) == full_records(3)
    assert on_disk(spool) == [full_record(0), full_record(2)]


def test_where_nothing_that_fails_is_to_be_in_memory_the_next_is_in_another_file(spool, monkeypatch, fail):
    append(spool, 0)
    real = os.write
    fail("os.ftruncate")
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[: len(line) // 2]))
    with pytest.raises(SpoolError):
        spool.append(begun(9), on_disk=True)
    monkeypatch.undo()
    spool.append(begun(1), on_disk=True)
    append(spool, 2)
    assert (kinds(spool), held(spool)) == ([FileSegment, FileSegment], [full_record(0), full_record(2)])


def test_a_disk_that_is_full_leaves_no_half_line(spool, monkeypatch, now):
    append(spool, 0, 1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[: len(line) // 2]))
    append(spool, 2)
    assert spool.trouble == "it can't be written: No space left on device"
    assert on_disk(spool) == full_records(2)
    assert spool.bytes == file_bytes(spool)
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 3)
    assert on_disk(spool) == [*full_records(2), full_record(3)]
    assert sorted(path.name for path in own(spool).glob("0*.segment")) == ["000001.segment", "000002.segment"]


def test_a_disk_that_cant_be_written_is_said_in_words(spool, fail):
    append(spool, 0, 1)
    fail()
    append(spool, 2)
    assert spool.trouble == "it can't be written: Input/output error"


def test_a_file_that_got_no_header_is_not_there(spool, monkeypatch, now):
    append(spool, 0)
    settle(spool, [(spool.segments[0], 0)])
    spool.close()
    monkeypatch.setattr(os, "write", lambda descriptor, line: 0)
    append(spool, 1)
    assert [path.name for path in own(spool).iterdir() if path.name not in (LOCK, GAP)] == []
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 2)
    assert [path.name for path in own(spool).glob("0*")] == ["000002.segment"]
    assert held(spool) == [full_record(1), full_record(2)]


def test_a_disk_that_has_failed_is_asked_again_after_a_second(spool, monkeypatch, now, fail):
    append(spool, 0)
    calls = fail()
    append(spool, 1)
    now[0] += 0.99
    append(spool, 2)
    assert len(calls) == 1
    now[0] += 0.01
    append(spool, 3)
    assert len(calls) > 1
    monkeypatch.undo()
    append(spool, 4)
    assert on_disk(spool) == full_records(1)
    assert spool.trouble is not None
    now[0] += 1.0
    append(spool, 5)
    assert on_disk(spool) == [full_record(0), full_record(5)]
    assert spool.trouble is None


def test_what_came_before_and_during_and_after_a_trouble_stays_in_order(make, monkeypatch, now, fail):
    spool = make(segment_bytes=2_000)
    places = append(spool, *range(7))
    for number in range(7, 27, 10):
        fail(code=errno.ENOSPC)
        places += append(spool, *range(number, number + 5))
        monkeypatch.undo()
        now[0] += 1.0
        places += append(spool, *range(number + 5, number + 10))
    turns = [kind for kind, _ in groupby(kinds(spool))]
    assert turns == [FileSegment, MemorySegment, FileSegment, MemorySegment, FileSegment]
    assert [segment.record_at(offset) for segment, offset in places] == held(spool) == full_records(27)
    assert all(segment.sealed for segment in spool.segments[:-1])
    assert spool.in_memory == 10
    assert spool.bytes == file_bytes(spool)
    settle(spool, places[:-1])
    assert kinds(spool) == [FileSegment]
    assert (spool.in_memory, len(list(own(spool).glob("0*.segment")))) == (0, 1)
    settle(spool, places[-1:])
    spool.close()
    assert list(spool.root.iterdir()) == []


def test_what_is_settled_when_the_other_kind_follows_goes(spool, monkeypatch, now, fail):
    settle(spool, append(spool, 0))
    fail()
    append(spool, 1)
    spool.sweep()
    assert (kinds(spool), spool.bytes) == ([MemorySegment], 0)
    assert list(own(spool).glob("0*.segment")) == []
    settle(spool, [(spool.segments[0], 0)])
    monkeypatch.undo()
    now[0] += 1.0
    append(spool, 2)
    spool.sweep()
    assert kinds(spool) == [FileSegment]


def test_what_must_be_durable_asks_the_disk_at_once(spool, monkeypatch, fail):
    fail()
    append(spool, 0)
    with pytest.raises(SpoolError, match="it can't be written: Input/output error"):
        append(spool, 1, **DURABLY)
    assert (held(spool), spool.in_memory) == (full_records(1), 1)
    monkeypatch.undo()
    append(spool, 1, **DURABLY)
    append(spool, 2)
    assert on_disk(spool) == [full_record(1), full_record(2)]
    assert (kinds(spool), held(spool)) == ([MemorySegment, FileSegment], full_records(3))
    assert spool.trouble is None


def test_what_must_be_durable_and_fails_leaves_the_next_to_memory_in_its_place(spool, monkeypatch, now, fail):
    append(spool, 0)
    fail("os.fdatasync")
    with pytest.raises(SpoolError):
        append(spool, 9, **DURABLY)
    monkeypatch.undo()
    append(spool, 1)
    now[0] += 1.0
    append(spool, 2)
    assert kinds(spool) == [FileSegment, MemorySegment, FileSegment]
    assert held(spool) == full_records(3)


def test_in_place_of_a_disk_there_is_a_cap_of_operations_too(make, fail):
    spool = make(max_in_memory=2)
    append(spool, 0)
    fail(code=errno.ENOSPC)
    places = append(spool, 1, 2)
    with pytest.raises(SpoolFullError, match="it can't be written: No space left on device"):
        append(spool, 3)
    places += append(spool, 3, promised=True)
    settle(spool, places[:2])
    places += append(spool, 4)
    assert [segment.record_at(offset) for segment, offset in places] == [None, None, full_record(3), full_record(4)]


def test_the_cap_of_bytes_holds_where_the_disk_fails(make, fail):
    spool = make(max_bytes=8_000)
    with pytest.raises(SpoolFullError):
        append(spool, *range(100))
    fail()
    with pytest.raises(SpoolFullError, match="it is full: 8000 bytes"):
        append(spool, 0)
    assert spool.in_memory == 0


def test_only_files_are_synced_and_looked_for(make, monkeypatch, now, fail):
    spool = make(fsync="interval")
    append(spool, 0)
    fail()
    append(spool, 1)
    monkeypatch.undo()
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    now[0] += 5.0
    spool.sync()
    assert synced == [spool.segments[0].descriptor]
    assert spool.missing() == []
    spool.segments[0].path.unlink()
    assert spool.missing() == spool.segments[:1]
    spool.put_back(spool.missing())
    assert on_disk(spool) == full_records(1)


def test_where_all_that_is_left_is_in_memory_closing_leaves_no_directory(spool, monkeypatch, now, fail):
    settle(spool, append(spool, 0))
    fail()
    append(spool, 1)
    monkeypatch.undo()
    now[0] += 1.0
    settle(spool, append(spool, 2))
    spool.close()
    assert list(spool.root.iterdir()) == []


def test_closing_keeps_what_is_on_disk_where_something_is_in_memory_too(spool, fail):
    append(spool, 0)
    fail()
    append(spool, 1)
    spool.close()
    assert on_disk(spool) == full_records(1)
    assert (spool.segments, spool.in_memory, spool.trouble) == ([], 0, None)


# Files that somebody takes away.


@pytest.mark.parametrize("harm", ["delete", "move", "replace", "delete the directory", "move the directory"])
def test_files_that_somebody_took_away_are_put_back_and_go_on_growing(make, harm, tmp_path):
    spool = make(segment_bytes=2_000)
    places = append(spool, *range(12))
    path = places[-1][0].path
    if harm == "delete":
        path.unlink()
    elif harm == "move":
        path.rename(tmp_path / "elsewhere")
    elif harm == "replace":
        path.unlink()
        path.with_name("new").write_bytes(b"")
        path.with_name("new").rename(path)
        path.unlink()
    elif harm == "delete the directory":
        for each in path.parent.iterdir():
            each.unlink()
        path.parent.rmdir()
    else:
        path.parent.rename(tmp_path / "elsewhere")
    missing = spool.missing()
    assert missing
    spool.put_back(missing)
    assert spool.missing() == []
    append(spool, *range(12, 15))
    assert on_disk(spool) == full_records(15)
    assert [segment.record_at(offset) for segment, offset in places] == full_records(12)
    assert try_lock(own(spool) / LOCK) is None
    assert destination_of(own(spool)) == "there"


def test_a_directory_that_was_taken_away_while_nothing_was_in_it_is_made_again(make):
    spool = make(segment_bytes=1)
    settle(spool, append(spool, 0))
    assert spool.segments == []
    take_away(own(spool))
    append(spool, 1)
    assert on_disk(spool) == [full_record(1)]
    assert spool.trouble is None
    assert try_lock(own(spool) / LOCK) is None


def test_a_directory_that_was_taken_away_costs_no_descriptor(make):
    spool = make(segment_bytes=1_200)
    append(spool, 0)
    before = descriptors()
    for _ in range(3):
        take_away(own(spool))
        spool.put_back(spool.missing())
    assert descriptors() == before
    assert on_disk(spool) == full_records(1)


def test_a_gap_is_in_the_directory_that_is_made_in_place_of_one_that_was_taken_away(spool):
    append(spool, 0)
    gap = full_captured(9, action="audit.gap")
    spool.note_gap(gap)
    take_away(own(spool))
    spool.put_back(spool.missing())
    assert on_disk(spool) == [full_record(0), to_record(gap)]
    spool.note_gap(None)
    take_away(own(spool))
    spool.put_back(spool.missing())
    assert on_disk(spool) == full_records(1)
    take_away(own(spool))
    spool.note_gap(gap)
    assert on_disk(spool) == [to_record(gap)]


@pytest.mark.parametrize("count", [1, 6_000])
def test_a_file_is_put_back_whole_however_large_it_is(spool, count):
    append(spool, *range(count))
    before = file_bytes(spool)
    for segment in spool.segments:
        segment.path.unlink()
    spool.put_back(spool.missing())
    assert file_bytes(spool) == before == spool.bytes
    assert on_disk(spool) == full_records(count)


def test_files_that_cant_be_put_back_are_as_good_as_before(spool, fail, monkeypatch):
    places = append(spool, *range(3))
    places[0][0].path.unlink()
    missing = spool.missing()
    before = descriptors()
    fail("os.open", errno.EACCES)
    with pytest.raises(SpoolError) as caught:
        spool.put_back(missing)
    assert str(caught.value) == "files of it were deleted or moved, and can't be put back: Permission denied"
    monkeypatch.undo()
    assert descriptors() == before
    assert [segment.record_at(offset) for segment, offset in places] == full_records(3)
    assert spool.missing() == missing
    spool.put_back(missing)
    assert on_disk(spool) == full_records(3)


# Files that another process clears away.


def test_files_that_another_process_has_cleared_away_are_forgotten(make):
    spool = make(cleared_by_others=True, segment_bytes=2_000, max_bytes=9_000)
    with pytest.raises(SpoolFullError):
        append(spool, *range(100))
    for segment in spool.segments[:-1]:
        segment.path.unlink()
    before = descriptors()
    gone = len(spool.segments) - 1
    assert spool.missing() == []
    assert (spool.bytes, len(spool.segments), descriptors()) == (file_bytes(spool), 1, before - gone)
    assert spool.has_room(1_000)
    append(spool, 0)
    assert spool.trouble is None


def test_the_file_that_grows_is_put_back_where_another_process_clears_away_too(make):
    spool = make(cleared_by_others=True, segment_bytes=2_000)
    append(spool, *range(5))
    growing = spool.segments[1]
    take_away(own(spool))
    assert spool.missing() == [growing]
    spool.put_back([growing])
    assert spool.segments == [growing]
    assert on_disk(spool) == records_of(growing.read(0, MEGABYTE))
    assert spool.end() == (2, growing.size)


def test_where_another_process_clears_away_nothing_that_is_sealed_is_put_back(make):
    spool = make(cleared_by_others=True, segment_bytes=1)
    append(spool, *range(3))
    assert all(segment.sealed for segment in spool.segments)
    take_away(own(spool))
    assert (spool.missing(), spool.segments, spool.bytes) == ([], [], 0)
    append(spool, 3)
    assert spool.end()[0] == 4  # no number comes twice


# Files that are kept.


def test_a_settled_file_is_kept_for_a_while(make, now):
    spool = make(keep_seconds=60.0, segment_bytes=1)
    assert spool.keeps
    places = append(spool, *range(3))
    settle(spool, places[:2])
    assert [segment.path for segment in spool.segments] == [places[2][0].path]
    assert on_disk(spool) == full_records(3)
    now[0] += 59.0
    settle(spool, places[2:])
    spool.expire()
    assert on_disk(spool) == full_records(3)
    assert spool.bytes == file_bytes(spool)
    now[0] += 1.0
    spool.expire()
    assert on_disk(spool) == [full_record(2)]
    assert spool.bytes == file_bytes(spool)
    now[0] += 60.0
    before = descriptors()
    spool.expire()
    assert (on_disk(spool), spool.bytes, descriptors()) == ([], 0, before - 1)


def test_by_default_nothing_is_kept(make):
    spool = make(segment_bytes=1)
    assert not spool.keeps
    settle(spool, append(spool, 0))
    assert (on_disk(spool), spool.settled) == ([], [])


def test_what_is_settled_is_in_what_is_kept_and_then_in_what_holds_other_things_too(make):
    spool = make(keep_seconds=60.0, segment_bytes=2_000)
    places = append(spool, *range(12))
    segments = list(dict.fromkeys(segment for segment, _ in places))
    assert len(segments) == 3
    assert spool.settled == segments
    settle(spool, places[1:8])
    assert spool.settled == [segments[1], segments[0], segments[2]]
    assert records_of(spool.settled[0].read(0, MEGABYTE)) == full_records(8)[4:]
    settle(spool, places[:1])
    assert spool.settled == [segments[1], segments[0], segments[2]]
    assert spool.segments == segments[2:]


def test_of_what_is_kept_only_files_are_settled(make, fail):
    spool = make(keep_seconds=60.0, segment_bytes=1)
    settle(spool, append(spool, 0))
    fail()
    append(spool, 1)
    assert [segment.path.name for segment in spool.settled] == ["000001.segment"]


def test_what_is_kept_is_no_reason_to_refuse_anything(make):
    spool = make(keep_seconds=60.0, max_bytes=8_000)
    for number in range(100):
        assert spool.has_room(1_000)
        settle(spool, append(spool, number))
        assert spool.bytes == file_bytes(spool) <= 8_000
    assert on_disk(spool)[-1] == full_record(99)
    assert 4 < len(on_disk(spool)) < 16  # as many as there is room for, the newest


def test_no_more_of_what_is_kept_goes_than_makes_room(make):
    spool = make(keep_seconds=60.0, max_bytes=8_000)
    settle(spool, append(spool, *range(12)))
    assert (on_disk(spool), spool.segments) == (full_records(12), [])
    append(spool, *range(12, 16))
    assert on_disk(spool) == full_records(16)[4:]
    assert spool.bytes == file_bytes(spool) <= 8_000


def test_closing_leaves_nothing_of_what_is_kept(make):
    spool = make(keep_seconds=60.0, segment_bytes=1)
    places = append(spool, *range(3))
    settle(spool, places[:2])
    spool.close()
    assert on_disk(spool) == [full_record(2)]
    other = make(keep_seconds=60.0)
    settle(other, append(other, 3))
    other.close()
    assert len(list(spool.root.iterdir())) == 1


def test_where_another_process_clears_away_nothing_is_kept(make):
    spool = make(keep_seconds=60.0, cleared_by_others=True, segment_bytes=1)
    append(spool, 0, 1)
    spool.segments[0].path.unlink()
    assert spool.missing() == []
    assert [each.path for each in spool.settled] == [each.path for each in spool.segments]
    assert spool.bytes == file_bytes(spool)


# The gap.


def test_the_gap_has_its_place_before_the_disk_is_full(spool, monkeypatch):
    append(spool, 0)
    monkeypatch.setattr(os, "write", lambda descriptor, line: 0)
    size = (own(spool) / GAP).stat().st_size
    spool.note_gap(full_captured(1, action="audit.gap"))
    spool.note_gap(full_captured(2, action="audit.gap"))
    assert on_disk(spool) == [full_record(0), full_record(2, action="audit.gap")]
    spool.note_gap(None)
    assert on_disk(spool) == full_records(1)
    assert (own(spool) / GAP).stat().st_size == size


@pytest.mark.parametrize("bank_id", ["b", "b" * 1_000, "b" * 1_000_000])
def test_the_gaps_file_never_grows_and_always_names_its_destination(spool, bank_id):
    spool.note_gap(None)
    gap = own(spool) / GAP
    size = gap.stat().st_size
    for noted in (full_captured(1, bank_id=bank_id), full_captured(2), None, full_captured(3, bank_id=bank_id)):
        spool.note_gap(noted)
        assert gap.stat().st_size == size
        assert destination_of(own(spool)) == "there"
        assert all(each.kind for each in frames(gap.read_bytes()))
    assert on_disk(spool) == ([full_record(3, bank_id=bank_id)] if len(bank_id) <= 1_000 else [])


def test_a_gap_needs_no_other_file(spool):
    spool.note_gap(full_captured(action="audit.gap"))
    assert sorted(path.name for path in own(spool).iterdir()) == [GAP, LOCK]
    assert on_disk(spool) == [full_record(action="audit.gap")]


def test_a_gap_stays_when_all_else_is_settled(spool):
    settle(spool, append(spool, 0))
    spool.note_gap(full_captured(1, action="audit.gap"))
    spool.close()
    assert [record.action for record in on_disk(spool)] == ["audit.gap"]


def test_a_gap_that_was_closed_goes_with_the_rest(spool):
    settle(spool, append(spool, 0))
    spool.note_gap(full_captured(1, action="audit.gap"))
    spool.note_gap(None)
    spool.close()
    assert list(spool.root.iterdir()) == []


def test_a_gap_that_cant_be_written_is_said_in_words(spool, fail):
    append(spool, 0)
    fail("os.pwrite")
    with pytest.raises(SpoolError) as caught:
        spool.note_gap(full_captured(1))
    assert str(caught.value) == "its gap can't be written: Input/output error"


# Forked children.


def test_a_child_makes_files_of_its_own_and_leaves_its_parents_locked(make):
    spool = make()
    append(spool, 0)
    parents = own(spool)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            spool.after_fork()
            append(spool, 0, 1)
            status = len(list(spool.root.iterdir()))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert try_lock(parents / LOCK) is None  # the child has neither unlocked it nor taken it along
    (other,) = (path for path in spool.root.iterdir() if path != parents)
    descriptor = try_lock(other / LOCK)
    assert descriptor is not None
    os.close(descriptor)


def test_what_is_in_memory_is_the_parents_alone(memory):
    append(memory, *range(3))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            memory.after_fork()
            append(memory, 7)
            status = 42 if held(memory) == [full_record(7)] and memory.in_memory == 1 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert (held(memory), memory.in_memory) == (full_records(3), 3)
