"""What a disk, a person or another process does to the spool of one that lives, and what it comes to."""

import contextlib
import errno
import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from astrocyte_otel_audit.pipeline.acknowledgement import read_acknowledged
from astrocyte_otel_audit.pipeline.adoption import adopt, tail
from astrocyte_otel_audit.pipeline.backlog import Backlog
from astrocyte_otel_audit.pipeline.directory import SpoolError
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.handover import Handover
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool, SpoolFullError
from astrocyte_otel_audit.pipeline.writer import Writer
from tests.records import full_captured, full_records
from tests.support import MemoryStorage


@pytest.fixture
def now():
    return [1_000.0]


@pytest.fixture
def make(tmp_path, now):
    def make(**arguments):
        options = {
            "max_bytes": 10**7,
            "max_in_memory": 100,
            "fsync": "never",
            "cleared_by_others": True,
            "clock": lambda: now[0],
        }
        return Spool(tmp_path / "spool", "there", **{**options, **arguments})

    return make


@pytest.fixture
def handover(make, now):
    def handover(**arguments):
        return Handover(
            make(**arguments), clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
        )

    return handover


def row(number):
    return captured_frame(RECORD, full_captured(number))


def begun(number, **changes):
    return captured_frame(PROVISIONAL, full_captured(number, outcome="unknown", ended_at=None, **changes))


def reader_of(spool):
    (reader,) = tail(spool.root, ["there"], ())
    return reader


def write(reader, **options):
    found = []
    while piece := reader.read(1_000):
        for each in piece:
            reader.settle(each.segment, each.offset, **options)
        found += [each.record for each in piece]
    reader.acknowledge()
    return found


def backlog_of(spool):
    backlog = Backlog(spool, lock=threading.RLock())
    return backlog, lambda number: backlog.append(full_captured(number), row(number))


def failing(code=errno.EIO):
    return mock.Mock(side_effect=OSError(code, ""))


def test_a_full_handover_finds_the_room_that_another_process_has_made(handover, now):
    it = handover(max_bytes=40_000)
    number = 0
    while it.submit(full_captured(number)):
        number += 1
    write(reader_of(it._spool))
    now[0] += 10.0
    it.submit(full_captured(number))  # may be refused, if it makes the spool be tended
    assert it.submit(full_captured(number + 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_cant_be_deleted_does_not_end_the_writer(make):
    storage = MemoryStorage()
    spool = make(cleared_by_others=False, segment_bytes=1, clock=time.monotonic)
    writer = Writer(
        AuditSpanExporter(storage=storage, actions="*"), spool=spool, capacity=100, batch_size=10, delay_seconds=0.001
    )
    with mock.patch.object(Path, "unlink", failing(errno.EROFS)):
        writer.submit(full_captured(0))
        time.sleep(0.3)
    writer.submit(full_captured(1))
    assert writer.flush(2.0)


# B, of another process's
def test_a_file_of_another_process_that_cant_be_deleted_is_no_error(make):
    spool = make(segment_bytes=1)
    for number in range(3):
        spool.append(row(number))
    reader = reader_of(spool)
    with mock.patch.object(Path, "unlink", failing(errno.EROFS)):
        assert write(reader) == full_records(3)


def test_what_is_put_back_is_whole_or_it_is_not_put_back(make):
    spool = make(cleared_by_others=False)
    places = [spool.append(row(number)) for number in range(4)]
    places[0][0].path.unlink()
    real = os.write
    cut = mock.patch("os.write", lambda descriptor, data: real(descriptor, data[:700]))
    with cut, contextlib.suppress(SpoolError):
        spool.put_back(spool.missing())
    assert [segment.record_at(offset) for segment, offset in places] == full_records(4)


def test_what_could_not_be_put_back_is_put_back_later(make):
    spool = make(cleared_by_others=False)
    spool.append(row(0))
    spool.segments[0].path.unlink()
    with mock.patch("os.write", failing(errno.ENOSPC)), pytest.raises(SpoolError):
        spool.put_back(spool.missing())
    spool.put_back(spool.missing())


def test_what_is_submitted_while_another_waits_for_room_is_not_taken_for_accepted(make):
    it = Handover(make(max_bytes=5_000, clock=time.monotonic), block_seconds=0.5)
    number = 0
    while it._backlog.has_room():
        it.submit(full_captured(number))
        number += 1
    it._spool._max_bytes = it._spool.bytes  # not one more
    said = []
    threads = [threading.Thread(target=lambda: said.append(it.submit(full_captured(100)))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert said == [False, False]
    assert it.stats()["refused_full"] == 2


def test_a_file_that_was_put_back_and_then_followed_is_read_to_its_end(make):
    spool = make(segment_bytes=2_500)
    spool.append(row(0))
    reader = reader_of(spool)
    found = write(reader)
    spool.segments[0].path.unlink()
    spool.put_back(spool.missing())
    for number in range(1, 8):
        spool.append(row(number))
    found += write(reader)  # before the next look_after
    spool.after_fork()
    reader.look_after()
    found += write(reader)
    assert found == full_records(8)
    assert list(spool.root.iterdir()) == []


def test_a_writer_is_not_missed_by_the_first_operation_of_a_process_that_waited_for_it(handover, now, caplog):
    it = handover()
    now[0] += 61.0
    it.submit(full_captured(0))
    assert caplog.messages == []


def test_a_writer_is_not_missed_after_an_hour_in_which_nothing_was_to_be_written(handover, now, caplog):
    it = handover()
    it.submit(full_captured(0))
    write(reader_of(it._spool))
    it.stats()  # as metrics ask for them
    now[0] += 3_600.0
    it.submit(full_captured(1))
    assert caplog.messages == []


def test_what_is_written_behind_what_waits_is_told_too(make):
    spool = make()
    for number in range(5):
        spool.append(row(number))
    reader = reader_of(spool)
    found = reader.read(10)
    reader.acknowledge()
    for each in found[1:]:
        reader.settle(each.segment, each.offset)
    reader.acknowledge()
    assert read_acknowledged(spool.path).stored == 4


# I, as a person sees it
def test_a_writer_that_one_parked_tenant_holds_up_is_not_missed(handover, now, caplog):
    it = handover()
    it.submit(full_captured(0))
    reader = reader_of(it._spool)
    reader.read(10)  # parked
    for number in range(1, 100):
        it.submit(full_captured(number))
        for each in reader.read(10):
            reader.settle(each.segment, each.offset)
        reader.acknowledge()
        now[0] += 1.0
    assert caplog.messages == []


def test_a_writer_that_was_started_anew_knows_what_was_written_before(handover):
    it = handover(segment_bytes=2_000)
    for number in range(20):
        it.submit(full_captured(number))
    first = reader_of(it._spool)
    write(first)
    assert it.stats()["waiting"] == 0
    first.close()
    write(reader_of(it._spool))
    assert it.stats()["waiting"] == 0


def test_what_was_set_aside_stays_so_when_the_writer_is_started_anew(handover):
    it = handover()
    it.submit(full_captured(0))
    first = reader_of(it._spool)
    write(first, stored=False)
    assert not it.flush(0.0)
    first.close()
    write(reader_of(it._spool))
    assert not it.flush(0.0)


def test_flushing_after_the_stop_is_not_true_of_what_is_not_written(handover):
    it = handover()
    it.submit(full_captured(0))
    it.stop(1.0)
    assert not it.flush(0.0)


def test_what_had_begun_is_left_to_who_took_it_over(make):
    spool = make()
    spool.append(begun(0))
    reader = reader_of(spool)
    assert reader.read(10) == []
    spool.after_fork()
    (other,) = adopt(spool.root, ["there"])
    write(other)
    before = len(os.listdir("/dev/fd"))
    reader.look_after()
    assert (reader.settled, len(os.listdir("/dev/fd"))) == (True, before - 1)


def test_a_damaged_line_that_cant_be_kept_does_not_repeat_what_is_before_it(make):
    spool = make()
    spool.append(row(0))
    spool.append(b"R 00000002 00000000 []\n")
    reader = reader_of(spool)
    real, found = os.open, []

    def opened(path, *arguments, **options):
        if "damaged-" in str(path):
            raise OSError(errno.ENOSPC, "")
        return real(path, *arguments, **options)

    with mock.patch("os.open", opened):
        for _ in range(5):
            with contextlib.suppress(OSError):
                found += reader.read(10)
    assert len(found) == 1
    assert reader.damaged <= 1


def test_what_is_kept_is_not_closed_while_it_is_read(make):
    spool = make(cleared_by_others=False, keep_seconds=60.0, max_bytes=40_000)
    backlog, append = backlog_of(spool)
    for number in range(40):
        append(number)
    for _ in range(5):
        backlog.refill(100)
    backlog.settle(backlog.take(100))
    again = backlog.settled_before()
    next(again)
    for number in range(40, 80):
        append(number)  # another thread
    list(again)


def test_each_file_that_was_written_since_is_synced(make, now):
    spool = make(cleared_by_others=False, fsync="interval", segment_bytes=1_000)
    for number in range(8):
        spool.append(row(number))
    now[0] += 5.0
    with mock.patch("os.fdatasync") as synced:
        spool.sync()
    assert synced.call_count == len(spool.segments) == 4


def test_a_torn_line_at_the_end_keeps_no_writer_busy(make):
    spool = make()
    spool.append(row(0))
    os.write(spool.segments[0].descriptor, row(1)[:50])
    spool.seal()
    reader = reader_of(spool)
    write(reader)
    assert not reader.has_more()


def test_what_is_held_is_released_only_once_what_replaces_it_is_on_the_disk(make):
    spool = make(cleared_by_others=False)
    backlog, _ = backlog_of(spool)
    backlog.hold(full_captured(1))
    with mock.patch("os.write", failing()):
        backlog.hold(full_captured(2)._replace(replaces=full_captured(1).id))
    assert backlog.has_begun(full_captured(1).id)


def test_a_line_that_can_neither_be_synced_nor_taken_back_costs_no_other(make):
    spool = make(fsync="always", cleared_by_others=False)
    backlog, append = backlog_of(spool)
    append(0)
    with mock.patch("os.fdatasync", failing()), mock.patch("os.ftruncate", failing(errno.EROFS)):
        append(1)
    assert spool.trouble == "it can't be synced"
    append(2)
    backlog.refill(100)
    backlog.refill(100)
    taken = backlog.take(100)
    assert {entry.record.id for entry in taken} == {record.id for record in full_records(3)}
    backlog.settle(taken)
    assert (spool.in_memory, backlog.unsettled()) == (0, 0)


def test_an_operation_that_must_leave_a_row_asks_a_disk_that_has_failed_again(handover, now):
    it = handover(max_in_memory=1)
    it.submit(full_captured(0))
    with mock.patch("os.write", failing()):
        it.submit(full_captured(1))
    now[0] += 60.0
    assert it.begin(full_captured(2))


def test_there_is_no_room_where_it_is_full_and_the_disk_fails(make):
    spool = make(max_bytes=8_000, cleared_by_others=False)
    with mock.patch("os.write", failing()):
        spool.append(row(0))
    spool._fails, spool.bytes = True, 8_000
    with pytest.raises(SpoolFullError):
        spool.append(row(0))
    assert not spool.has_room(1_024)
