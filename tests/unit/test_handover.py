"""The handover: what is accepted is in a file, and another process's acknowledgement says that it is in the table."""

import errno
import logging
import os
import signal
import threading
import time

import pytest

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, write_acknowledged
from astrocyte_otel_audit.pipeline.adoption import adopt, tail
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.directory import LOCK, directories, try_lock
from astrocyte_otel_audit.pipeline.handover import Handover
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, FileSegment, frames, parse_captured
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.records import full_captured, full_record, full_records

LOGGER = "astrocyte_otel_audit.pipeline.intake"
BEGUN = full_captured(100, action="forget", outcome="unknown", ended_at=None)
ENDED = full_captured(100, action="forget")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def now():
    return [1_000.0]


@pytest.fixture
def naps():
    """What is done in each sleep, instead of sleeping; at the end nothing."""
    return []


@pytest.fixture
def make(root, now, naps):
    """Makes handovers; time passes only where they sleep."""
    made = []

    def clock():
        return now[0]

    def sleep(seconds):
        now[0] += seconds
        if naps:
            naps.pop(0)()

    def make(block_seconds=0.0, clock=clock, **arguments):
        options = {"max_bytes": 10**9, "max_in_memory": 0, "fsync": "never", "cleared_by_others": True, **arguments}
        spool = Spool(root, "there", clock=clock, **options)
        made.append(spool)
        return Handover(spool, block_seconds=block_seconds, clock=clock, sleep=sleep)

    yield make
    for spool in made:
        spool.after_fork()  # closes, whatever is left


class Beside:
    """The process that writes what others have in the spool."""

    def __init__(self, root):
        self.root = root
        self.readers = {}
        self.records = []

    def read(self, limit=1_000):
        for reader in tail(self.root, ["there"], self.readers):
            self.readers[reader.path] = reader
        found = []
        for reader in self.readers.values():
            reader.look_after()
            found += [(reader, each) for each in reader.read(limit)]
        return found

    def write(self, limit=1_000, *, stored=True):
        found = self.read(limit)
        for reader, each in found:
            self.records.append(each.record)
            reader.settle(each.segment, each.offset, stored=stored)
        for reader in self.readers.values():
            reader.acknowledge()
        return len(found)

    def close(self):
        for reader in self.readers.values():
            reader.close()
        self.readers.clear()


@pytest.fixture
def beside(root):
    beside = Beside(root)
    yield beside
    beside.close()


def submit(handover, *numbers):
    return [handover.submit(full_captured(number)) for number in numbers]


def fill(handover, size):
    """Submit as many as there is room for, and return how many that was."""
    number = 0
    while handover.stats()["spool_bytes"] + 1_024 <= size:
        assert submit(handover, number) == [True]
        number += 1
    return number


def on_disk(root, kind=RECORD):
    """The records of frames of a kind in the files of all processes."""
    return [
        to_record(parse_captured(each.content))
        for path in sorted(root.glob("*/*.segment"))
        for each in frames(path.read_bytes())
        if each.kind == kind
    ]


def in_order(records):
    return sorted(records, key=lambda record: record.started_at)


def left(root):
    """What another process would write, now that those that wrote it have ended, and clears away."""
    found = []
    for reader in adopt(root, ["there"]):
        pieces = reader.read(1_000)
        found += [each.record for each in pieces]
        for each in pieces:
            reader.settle(each.segment, each.offset)
    return found


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def in_a_child(body):
    """Say whether it is true in a forked child."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if body() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Accepting.


def test_what_is_accepted_is_in_a_file_and_nothing_runs_beside(make, root):
    before = threading.active_count()
    handover = make()
    handover.start()
    for number in range(5):
        assert submit(handover, number) == [True]
        assert on_disk(root) == full_records(number + 1)
    assert threading.active_count() == before


def test_nothing_is_made_before_something_is_accepted(make, root):
    handover = make()
    handover.start()
    assert handover.has_room()
    assert handover.flush(0.0)
    assert handover.stats()["spool_bytes"] == 0
    assert handover.stop(1.0) == 0
    assert not root.exists()


def test_operations_of_all_threads_are_in_it_once(make, root, beside):
    handover = make(segment_bytes=5_000)
    threads = [threading.Thread(target=submit, args=(handover, *range(n, 200, 4))) for n in range(4)]
    for thread in threads:
        thread.start()
    beside.write()
    for thread in threads:
        thread.join()
    beside.write()
    assert in_order(beside.records) == full_records(200)
    assert handover.stats()["accepted"] == 200


def test_counts_are_what_both_processes_say(make, beside):
    handover = make()
    submit(handover, *range(5))
    handover.count_unreadable()
    counts = handover.stats()
    assert counts == {
        "accepted": 5, "waiting": 5, "stored": 0, "set_aside": 0, "refused_full": 0, "refused_shutdown": 0,
        "unreadable": 1, "spool_bytes": counts["spool_bytes"],
    }  # fmt: skip
    assert counts["spool_bytes"] > 2_000
    beside.write(3)
    assert {**counts, "waiting": 2, "stored": 3} == handover.stats()
    beside.write(stored=False)
    assert {**counts, "waiting": 0, "stored": 3, "set_aside": 2} == handover.stats()


# Flushing.


def test_flushing_waits_until_another_process_has_written_it(make, now, naps, beside):
    handover = make(segment_bytes=2_000)
    submit(handover, *range(10))
    naps += [lambda: None, lambda: beside.write(4), lambda: beside.write(5), beside.write, pytest.fail]
    assert handover.flush(5.0)
    assert naps == [pytest.fail]
    assert now[0] == pytest.approx(1_000.04)
    assert handover.flush(0.0)


def test_flushing_gives_up_at_its_timeout(make, now, naps, beside):
    handover = make()
    submit(handover, *range(10))
    naps.append(lambda: beside.write(9))
    assert not handover.flush(5.0)
    assert now[0] == pytest.approx(1_005.0, abs=0.02)
    assert not handover.flush(0.0)
    beside.write()
    assert handover.flush(0.0)


def test_flushing_waits_for_what_was_accepted_before_it_only(make, naps, beside):
    handover = make()
    submit(handover, *range(3))

    def one_more():
        submit(handover, 3)
        beside.write(3)

    naps.append(one_more)
    assert handover.flush(1.0)
    assert beside.records == full_records(3)
    assert not handover.flush(1.0)


def test_flushing_waits_for_each_file(make, beside):
    handover = make(segment_bytes=1)
    for number in range(5):
        submit(handover, number)
        assert not handover.flush(0.1)
        beside.write()
        assert handover.flush(0.1)


def test_what_was_set_aside_is_not_in_the_table(make, beside):
    handover = make()
    submit(handover, *range(3))
    beside.write(2)
    beside.write(stored=False)
    assert not handover.flush(60.0)
    submit(handover, 3)
    beside.write()
    assert not handover.flush(60.0)


def test_what_cant_be_read_is_not_in_the_table(make, beside, now, root):
    handover = make()
    submit(handover, 0)
    (path,) = root.glob("*/0*.segment")
    with path.open("ab") as file:
        file.write(b"?\n")
    beside.write()
    assert (handover.flush(60.0), now[0]) == (False, 1_000.0)
    assert (handover.stats()["stored"], handover.stats()["set_aside"]) == (1, 1)


def test_what_a_file_half_said_is_waited_for(make, naps, beside, root, monkeypatch):
    handover = make()
    submit(handover, 0)
    beside.write()
    assert handover.flush(0.0)
    submit(handover, 1)
    beside.write()
    (path,) = root.glob("*/acknowledged")
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    naps.append(lambda: path.write_bytes(whole))
    assert handover.flush(0.1)
    assert naps == []


def test_what_has_begun_is_not_waited_for(make, beside):
    handover = make()
    handover.begin(BEGUN)
    submit(handover, 0)
    handover.hold(full_captured(7))
    beside.write()
    assert handover.flush(0.1)
    assert beside.records == full_records(1)


# When there is no room.


def test_past_the_cap_it_is_refused_and_counted_and_said_once(make, root, caplog):
    handover = make(max_bytes=20_000)
    accepted = submit(handover, *range(100))
    count = accepted.index(False)
    assert (accepted[count:], handover.has_room()) == ([False] * (100 - count), False)
    assert (handover.stats()["accepted"], handover.stats()["refused_full"]) == (count, 100 - count)
    (gap,) = [record for record in on_disk(root) if record.action == "audit.gap"]
    assert gap.metadata["missing"] == 100 - count
    assert messages(caplog) == [
        "new audit records are refused and counted in a gap record: it is full: 20000 bytes (spool_max_bytes)."
    ]


def test_files_that_are_cleared_away_leave_room_for_any_number(make, now, beside):
    handover = make(max_bytes=20_000)
    for number in range(500):
        assert submit(handover, number) == [True]
        now[0] += 0.1
        if number % 10 == 0:
            beside.write()
    beside.write()
    assert beside.records == full_records(500)
    counts = handover.stats()
    assert (counts["stored"], counts["waiting"], counts["refused_full"]) == (500, 0, 0)
    assert counts["spool_bytes"] <= 20_000


def test_it_is_looked_for_room_about_once_a_second(make, now, monkeypatch):
    handover = make()
    looks = []
    real = FileSegment.is_in_place
    monkeypatch.setattr(FileSegment, "is_in_place", lambda segment: looks.append(now[0]) or real(segment))
    for _ in range(45):
        submit(handover, 0)
        now[0] += 0.1
    assert looks == pytest.approx([1_000.0, 1_001.0, 1_002.0, 1_003.0, 1_004.0], abs=0.11)


def test_a_caller_that_may_wait_for_room_waits_until_files_are_cleared_away(make, beside):
    handover = make(block_seconds=30.0, clock=time.monotonic, max_bytes=20_000)
    number = fill(handover, 20_000)
    assert handover.has_room()  # for who waits
    later = threading.Timer(0.05, beside.write)
    later.start()
    began = time.monotonic()
    assert submit(handover, number) == [True]
    assert 0.04 < time.monotonic() - began < 20.0
    later.join()
    beside.write()
    assert beside.records == full_records(number + 1)
    assert handover.stats()["refused_full"] == 0


def test_a_caller_waits_for_room_no_longer_than_it_may(make, caplog):
    handover = make(block_seconds=0.1, clock=time.monotonic, max_bytes=20_000)
    number = fill(handover, 20_000)
    began = time.monotonic()
    assert not all(submit(handover, *range(number, number + 3)))
    assert 0.1 <= time.monotonic() - began < 10.0
    assert handover.stats()["refused_full"] > 0


def fail(monkeypatch, name="os.write"):
    def failing(*arguments, **options):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(name, failing)


def test_what_was_refused_is_a_record_once_there_is_room(make, now, root, beside, monkeypatch):
    handover = make()
    submit(handover, 0)
    fail(monkeypatch)
    assert submit(handover, 1, 2, 3) == [False] * 3
    monkeypatch.undo()
    assert [record.action for record in on_disk(root)] == ["recall", "audit.gap"]  # in the gap's own file
    for number in (4, 5):
        now[0] += 1.0
        assert submit(handover, number) == [True]  # and it is tended, now that there is room again
    beside.write()
    [gap] = [record for record in beside.records if record.action == "audit.gap"]
    assert [record.id for record in beside.records if record != gap] == [full_record(n).id for n in (0, 4, 5)]
    assert gap.metadata["missing"] == 3
    assert handover.flush(0.0)
    assert handover.stats()["refused_full"] == 3
    handover.stop(1.0)
    beside.write()
    assert len(beside.records) == 4
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("end", ["flush", "stop"])
def test_at_the_end_what_was_refused_is_a_record_too(make, now, beside, monkeypatch, end):
    handover = make()
    submit(handover, 0)
    fail(monkeypatch)
    assert submit(handover, 1) == [False]
    monkeypatch.undo()
    now[0] += 1.0
    handover.hold(full_captured(2))  # on a disk that doesn't fail any more
    handover.release(full_captured(2).id)
    if end == "flush":
        handover.flush(0.0)
    else:
        handover.stop(1.0)
    beside.write()
    (gap,) = [record for record in beside.records if record.action == "audit.gap"]
    assert gap.metadata["missing"] == 1


# When there is nobody who writes.


def test_a_writer_that_is_missed_is_said_once_and_that_it_is_back_too(make, now, beside, caplog):
    handover = make()
    caplog.set_level(logging.WARNING)
    for _ in range(60):
        submit(handover, 0)
        now[0] += 1.0
    assert messages(caplog) == []
    for _ in range(60):
        submit(handover, 0)
        now[0] += 1.0
    missed = (
        "audit records wait in the spool, and no process has written any for a minute: run "
        "`astrocyte-otel-audit writer`, as this user, for the same spool and destination."
    )
    assert messages(caplog) == [missed]
    beside.write()
    now[0] += 1.0
    submit(handover, 0)
    again = "audit records are being written again."
    assert messages(caplog) == [missed, again]
    for _ in range(62):
        submit(handover, 0)
        now[0] += 1.0
    assert messages(caplog) == [missed, again, missed]


def test_a_writer_that_writes_is_never_missed(make, now, beside, caplog):
    handover = make(segment_bytes=2_000)
    for number in range(200):
        submit(handover, number)
        now[0] += 3.0
        if number % 9 == 0:
            beside.write()
    assert messages(caplog) == []


def test_where_nothing_waits_nobody_is_missed(make, now, beside, caplog):
    handover = make()
    submit(handover, 0)
    beside.write()
    for _ in range(10):
        now[0] += 100.0
        handover.stats()
        assert handover.flush(0.0)
    assert messages(caplog) == []


# Files that somebody takes away.


def test_the_file_that_grows_is_put_back_within_a_second(make, now, root, beside, caplog):
    handover = make()
    submit(handover, 0)
    (path,) = root.glob("*/0*.segment")
    path.unlink()
    submit(handover, 1)
    assert not path.exists()
    now[0] += 1.0
    submit(handover, 2)
    assert on_disk(root) == full_records(3)
    assert messages(caplog) == ["files of the spool were deleted or moved, and were written again."]
    beside.write()
    assert handover.flush(0.0)


def test_a_disk_that_fails_is_said(make, now, caplog, monkeypatch):
    handover = make(max_in_memory=10)
    submit(handover, 0)
    now[0] += 1.0
    fail(monkeypatch)
    submit(handover, 1)
    assert messages(caplog) == ["the spool has trouble: it can't be written: Input/output error."]


# Stopping.


def test_stopping_leaves_all_that_was_accepted(make, root, now):
    handover = make(segment_bytes=2_000)
    submit(handover, *range(10))
    assert not list(adopt(root, ["there"]))
    assert handover.stop(60.0) == 0
    assert now[0] == 1_000.0
    assert on_disk(root) == full_records(10)
    assert left(root) == full_records(10)
    assert list(root.iterdir()) == []


def test_what_was_written_is_not_there_once_it_has_stopped(make, root, beside):
    handover = make(segment_bytes=2_000)
    submit(handover, *range(10))
    beside.write()
    handover.stop(1.0)
    beside.write()
    assert list(root.iterdir()) == []


def test_once_it_has_stopped_all_is_refused(make, root, caplog):
    handover = make()
    submit(handover, 0)
    handover.stop(1.0)
    assert submit(handover, 1, 2) == [False, False]
    assert (handover.has_room(), handover.begin(BEGUN)) == (False, False)
    handover.hold(BEGUN)
    assert handover.stats()["refused_shutdown"] == 2
    assert messages(caplog) == ["new audit records are refused: the pipeline is shut down."]
    assert left(root) == full_records(1)


def test_stopping_twice_is_harmless(make, root):
    handover = make()
    submit(handover, 0)
    assert [handover.stop(1.0), handover.stop(1.0)] == [0, 0]
    assert left(root) == full_records(1)


def test_what_has_begun_has_its_place_once_it_has_stopped(make, root):
    handover = make()
    assert handover.begin(BEGUN)
    handover.stop(1.0)
    assert list(adopt(root, ["there"])) == []  # its record is to come
    assert (handover.submit(ENDED), *submit(handover, 0)) == (True, False)
    assert on_disk(root) == [to_record(ENDED)]


# Operations that must leave a row.


def test_what_has_begun_is_on_the_disk_before_the_call_returns(make, root, monkeypatch):
    handover = make()
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(on_disk(root, PROVISIONAL)))
    assert handover.begin(BEGUN)
    assert synced == [[to_record(BEGUN)]]
    handover.hold(full_captured(1))
    assert (len(synced), len(on_disk(root, PROVISIONAL))) == (1, 2)


def test_what_has_begun_and_ended_is_one_row(make, root, beside):
    handover = make(segment_bytes=1)
    handover.begin(BEGUN)
    handover.hold(full_captured(101)._replace(id=BEGUN.id))
    submit(handover, 0)
    beside.write()
    assert handover.submit(ENDED)
    handover.stop(1.0)
    beside.write()
    assert beside.records == [full_record(0), to_record(ENDED)]
    assert list(root.iterdir()) == []


def test_what_has_begun_and_never_ended_is_a_row_when_the_process_was_killed(make, root):
    def begin_and_die():
        handover.after_fork()
        handover.begin(BEGUN)
        os.kill(os.getpid(), signal.SIGKILL)

    handover = make()
    assert not in_a_child(begin_and_die)
    assert left(root) == [to_record(BEGUN)]


def test_what_was_released_is_cleared_away_by_either(make, root, now, beside):
    handover = make(segment_bytes=1)
    handover.begin(BEGUN)
    handover.release(BEGUN.id)
    handover.release(BEGUN.id)
    submit(handover, 0)
    assert on_disk(root, PROVISIONAL) == []
    now[0] += 1.0
    handover.stop(1.0)
    assert left(root) == full_records(1)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("trouble", ["full", "failing", "not synced", "stopped"])
def test_what_cant_be_put_on_the_disk_has_not_begun(make, root, monkeypatch, trouble):
    handover = make(max_bytes=20_000, max_in_memory=100)
    submit(handover, *(range(100) if trouble == "full" else range(1)))
    if trouble == "failing":
        fail(monkeypatch)
    elif trouble == "not synced":
        fail(monkeypatch, "os.fdatasync")
    elif trouble == "stopped":
        handover.stop(1.0)
    assert not handover.begin(BEGUN)
    monkeypatch.undo()
    handover.stop(1.0)
    assert BEGUN.id not in [record.id for record in left(root)]


def test_what_has_begun_has_a_place_however_full_it_is(make, root):
    handover = make(max_bytes=20_000)
    assert handover.begin(BEGUN)
    assert not all(submit(handover, *range(100)))
    assert handover.submit(ENDED)
    assert to_record(ENDED) in on_disk(root)


# In the middle of a call.


def test_an_operation_that_ends_while_another_is_taken_in_follows_it(make, root, monkeypatch):
    handover = make()
    submit(handover, 0)
    real, inner = os.write, [full_captured(2)]

    def write(descriptor, line):
        if inner:
            assert handover.submit(inner.pop())
            assert not handover.begin(BEGUN)
        return real(descriptor, line)

    monkeypatch.setattr(os, "write", write)
    assert submit(handover, 1) == [True]
    assert on_disk(root) == full_records(3)
    assert handover.stats()["accepted"] == 3


# Forked children.


def test_a_child_has_files_of_its_own_and_leaves_its_parents(make, root, beside):
    handover = make()
    submit(handover, 0, 1)
    (parents,) = directories(root)

    def child():
        handover.after_fork()
        counts = handover.stats()
        submit(handover, 2)
        return (counts["accepted"], handover.stats()["accepted"], handover.stop(1.0)) == (0, 1, 0)

    assert in_a_child(child)
    assert try_lock(parents / LOCK) is None
    assert len(directories(root)) == 2
    submit(handover, 3)
    beside.write()
    assert in_order(beside.records) == full_records(4)
    assert handover.flush(0.0)
    assert (handover.stats()["accepted"], handover.stats()["stored"]) == (3, 3)


def test_a_child_of_one_that_has_stopped_has_stopped(make):
    handover = make()
    submit(handover, 0)
    handover.stop(1.0)

    def child():
        handover.after_fork()
        return submit(handover, 1) == [False]

    assert in_a_child(child)


def test_what_has_begun_in_the_parent_is_not_the_childs(make, root):
    handover = make()
    handover.begin(BEGUN)

    def child():
        handover.after_fork()
        handover.release(BEGUN.id)
        return handover.submit(full_captured(0)) and handover.stop(1.0) == 0

    assert in_a_child(child)
    assert on_disk(root, PROVISIONAL) == [to_record(BEGUN)]
    assert left(root) == full_records(1)


# What the other process says.


def test_what_is_said_of_a_directory_that_is_gone_is_remembered(make, root, beside):
    handover = make()
    submit(handover, 0)
    beside.write()
    assert handover.flush(0.0)
    (directory,) = directories(root)
    (directory / "acknowledged").unlink()
    assert handover.flush(0.0)
    assert handover.stats()["stored"] == 1


def test_more_than_was_accepted_is_no_debt(make, root):
    handover = make()
    submit(handover, 0)
    (directory,) = directories(root)
    write_acknowledged(directory, Acknowledged(segment=1, offset=10**6, stored=5, refused=0))
    assert (handover.stats()["waiting"], handover.flush(0.0)) == (0, True)


# What is said.


def test_nothing_is_said_to_a_log_with_the_lock_held(make, now, beside, root, monkeypatch):
    free = []

    def try_it():
        if taken := handover._lock.acquire(timeout=0.2):
            handover._lock.release()
        free.append(taken)

    class Handler(logging.Handler):
        def emit(self, record):
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()

    handover = make()
    handler = Handler()
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        for _ in range(70):
            submit(handover, 0)
            now[0] += 1.0
        beside.write()
        now[0] += 1.0
        submit(handover, 1)  # it is back
        handover.stats()
        next(root.glob("*/0*.segment")).unlink()
        now[0] += 1.0
        submit(handover, 2)  # and a file is put back
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    assert free == [True] * 3


# A disk that fails.


def test_what_is_in_memory_is_not_in_the_table_and_is_lost_when_it_stops(make, beside, monkeypatch, caplog):
    handover = make()
    assert handover.begin(BEGUN)
    with monkeypatch.context() as failing:
        fail(failing)
        assert handover.submit(ENDED)  # it was promised a place
    beside.write()
    assert not handover.flush(0.0)
    assert [handover.stop(1.0), handover.stop(1.0)] == [1, 1]
    assert not handover.flush(0.0)
    assert "1 audit records could not be put into the spool and are lost." in caplog.messages


@pytest.mark.parametrize("what", ["begin", "hold"])
def test_what_has_begun_since_is_not_waited_for(make, beside, what):
    handover = make()
    submit(handover, 0)
    beside.write()
    assert handover.flush(0.0)
    getattr(handover, what)(full_captured(1, outcome="unknown", ended_at=None))
    assert not handover.flush(0.0)  # nobody has read it
    beside.read()
    assert handover.flush(0.0)
    assert beside.records == full_records(1)
