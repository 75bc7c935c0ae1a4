"""The spool: a record is in a file before the call returns, and the file goes once it is settled."""

import errno
import fcntl
import os
import stat

import pytest

from astrocyte_otel_audit.pipeline.segment import RECORD, frames, parse_record, record_frame
from astrocyte_otel_audit.pipeline.spool import GAP, LOCK, Spool, SpoolError, SpoolFullError, try_lock
from tests.records import full_record, full_records

MEGABYTE = 1024 * 1024


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**arguments):
        defaults = {"max_bytes": 64 * MEGABYTE, "fsync": "never"}
        made.append(Spool(tmp_path / "spool", "there", **{**defaults, **arguments}))
        return made[-1]

    yield make
    for spool in made:
        spool.after_fork()  # closes, whatever is left


@pytest.fixture
def spool(make):
    return make()


def own(spool):
    """The directory of the process."""
    (path,) = (path for path in spool.root.iterdir() if not path.name.startswith("damaged"))
    return path


def on_disk(spool):
    """Every record that the files hold, as another process would read them."""
    found = [each for path in sorted(own(spool).glob("*.segment")) for each in frames(path.read_bytes())]
    return [parse_record(each.content) for each in found if each.kind == RECORD]


def append(spool, count, **options):
    return [spool.append(record_frame(record), **options) for record in full_records(count)]


def test_what_is_appended_is_in_a_file_at_once(spool):
    places = append(spool, 3)
    assert on_disk(spool) == full_records(3)
    assert [segment.record_at(offset) for segment, offset in places] == full_records(3)


def test_nothing_is_made_before_it_is_needed(spool):
    spool.prepare()
    assert list(spool.root.iterdir()) == []


def test_files_are_the_owners_alone(spool):
    append(spool, 1)
    assert stat.S_IMODE(spool.root.stat().st_mode) == stat.S_IMODE(own(spool).stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in own(spool).iterdir()} == {0o600}


def test_its_directory_is_locked_as_long_as_it_is_open(spool):
    append(spool, 1)
    lock = own(spool) / LOCK
    assert try_lock(lock) is None
    spool.close()
    descriptor = try_lock(lock)
    assert descriptor is not None
    os.close(descriptor)


def test_a_full_segment_is_followed_by_the_next_and_goes_once_it_is_settled(make):
    spool = make(segment_bytes=2_000)
    places = append(spool, 20)
    segments = list(dict.fromkeys(segment for segment, _ in places))
    assert len(segments) > 3
    for segment, _ in reversed(places[4:]):
        spool.settle(segment)
    gone = [segment for segment in segments if not segment.path.exists()]
    assert gone == [segment for segment in segments[1:] if segment.sealed]  # the first one holds something
    assert gone
    assert spool.bytes == sum(segment.size for segment in spool.segments)


def test_once_all_is_settled_closing_leaves_nothing(spool):
    for segment, _ in append(spool, 3):
        spool.settle(segment)
    spool.close()
    assert list(spool.root.iterdir()) == []


def test_what_is_not_settled_stays_when_it_is_closed(spool):
    places = append(spool, 3)
    spool.settle(places[0][0])
    spool.close()
    assert on_disk(spool) == full_records(3)  # one of them once more: nobody is hurt by that


def test_past_its_cap_it_takes_only_what_was_promised_a_place(make):
    spool = make(max_bytes=8_000)
    with pytest.raises(SpoolFullError, match=r"it is full: 8000 bytes \(spool_max_bytes\)"):
        append(spool, 100)
    count = len(on_disk(spool))
    assert 10 < count < 30
    assert not spool.has_room(1_000)
    append(spool, 2, promised=True)
    assert len(on_disk(spool)) == count + 2


def test_room_comes_back_with_what_is_settled(make):
    spool = make(max_bytes=8_000)
    places = []
    with pytest.raises(SpoolFullError):
        for record in full_records(100):
            places.append(spool.append(record_frame(record)))
    for segment, _ in places:
        spool.settle(segment)
    assert spool.has_room(1_000)


def test_a_disk_that_is_full_leaves_no_half_line(spool, monkeypatch):
    append(spool, 2)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[: len(line) // 2]))
    with pytest.raises(SpoolError, match="it can't be written: No space left on device"):
        append(spool, 1)
    monkeypatch.undo()
    append(spool, 1)
    assert on_disk(spool) == [*full_records(2), full_record()]


def test_a_disk_that_cant_be_written_is_said_in_words(spool, monkeypatch):
    append(spool, 2)

    def fail(descriptor, line):
        raise OSError(errno.EIO, "secret path")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(SpoolError) as caught:
        append(spool, 1)
    assert str(caught.value) == "it can't be written: Input/output error"


def test_what_must_be_durable_and_cant_be_synced_is_not_there_later(spool, monkeypatch):
    append(spool, 2)

    def fail(descriptor):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(SpoolError):
        append(spool, 1, durable=True)
    assert on_disk(spool) == full_records(2)
    assert spool.bytes == sum(path.stat().st_size for path in own(spool).glob("0*.segment"))


@pytest.mark.parametrize(("fsync", "durable", "syncs"), [
    ("never", False, 0), ("never", True, 3), ("interval", False, 1), ("always", False, 3),
])  # fmt: skip
def test_it_is_synced_as_the_policy_says(make, monkeypatch, fsync, durable, syncs):
    now = [100.0]
    spool = make(fsync=fsync, clock=lambda: now[0])
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    append(spool, 3, durable=durable)
    spool.sync()
    now[0] += 5.0
    spool.sync()
    spool.sync()
    assert len(synced) == syncs


@pytest.mark.parametrize("harm", ["delete", "move", "replace", "delete the directory", "move the directory"])
def test_files_that_somebody_took_away_are_put_back_and_go_on_growing(make, harm, tmp_path):
    spool = make(segment_bytes=2_000)
    places = append(spool, 12)
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
    append(spool, 3)
    assert on_disk(spool) == [*full_records(12), *full_records(3)]
    assert [segment.record_at(offset) for segment, offset in places] == full_records(12)
    assert try_lock(own(spool) / LOCK) is None


def test_the_gap_has_its_place_before_the_disk_is_full(spool, monkeypatch):
    append(spool, 1)
    monkeypatch.setattr(os, "write", lambda descriptor, line: 0)
    size = (own(spool) / GAP).stat().st_size
    spool.note_gap(full_record(1, action="audit.gap"))
    spool.note_gap(full_record(2, action="audit.gap"))
    assert [record.bank_id for record in on_disk(spool)] == ["bank-0", "bank-2"]
    spool.note_gap(None)
    assert [record.bank_id for record in on_disk(spool)] == ["bank-0"]
    assert (own(spool) / GAP).stat().st_size == size


def test_a_gap_stays_when_all_else_is_settled(spool):
    ((segment, _),) = append(spool, 1)
    spool.settle(segment)
    spool.note_gap(full_record(1, action="audit.gap"))
    spool.close()
    assert [record.action for record in on_disk(spool)] == ["audit.gap"]


def test_a_child_makes_files_of_its_own_and_leaves_its_parents_locked(make):
    spool = make()
    append(spool, 1)
    parents = own(spool)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            spool.after_fork()
            append(spool, 2)
            status = len(list(spool.root.iterdir()))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert try_lock(parents / LOCK) is None  # the child has neither unlocked it nor taken it along
    (other,) = (path for path in spool.root.iterdir() if path != parents)
    descriptor = try_lock(other / LOCK)
    assert descriptor is not None
    os.close(descriptor)


@pytest.mark.parametrize("trouble", ["a file is in the way", "not writable", "no locks"])
def test_a_directory_that_cant_be_used_is_known_early(make, tmp_path, monkeypatch, trouble):
    spool = make()
    if trouble == "a file is in the way":
        spool.root.write_text("")
    elif trouble == "not writable":
        spool.root.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # these tests may be root's, who may all
    else:
        monkeypatch.setattr("astrocyte_otel_audit.pipeline.spool.fcntl", None)
    with pytest.raises(SpoolError):
        spool.prepare()
    if trouble == "a file is in the way":
        spool.root.unlink()


def test_a_lock_that_is_gone_or_held_is_none(tmp_path):
    assert try_lock(tmp_path / "absent") is None
    held = os.open(tmp_path / "held", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert try_lock(tmp_path / "held") is None
    os.close(held)
