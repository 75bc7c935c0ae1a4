"""What a dead process has left is read as it was written, once, by one process with the same destination."""

import os
import shutil

import pytest

from astrocyte_otel_audit.pipeline.adoption import adopt, destination_of
from astrocyte_otel_audit.pipeline.segment import INTENT, record_frame
from astrocyte_otel_audit.pipeline.spool import LOCK, Spool
from tests.records import full_record, full_records


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def leave(root):
    """Leaves what a process does that dies: its files, and no lock."""

    def leave(lines, destination="there", gap=None, **arguments):
        spool = Spool(root, destination, **{"max_bytes": 10**9, "fsync": "never", **arguments})
        for line in lines:
            spool.append(line)
        if gap is not None:
            spool.note_gap(gap)
        (path,) = (path for path in root.iterdir() if path.name == spool._path.name)
        spool.after_fork()
        return path

    return leave


@pytest.fixture
def adopted(root):
    """Adopts what is there, and closes it after the test."""
    made = []

    def adopted(destination="there"):
        found = list(adopt(root, destination))
        made.extend(found)
        return found

    yield adopted
    for orphan in made:
        orphan.close()


def read(orphan, limit=7):
    found = []
    while not orphan.exhausted:
        piece = orphan.read(limit)
        assert len(piece) <= limit or orphan.exhausted
        found += piece
    return found


def settle(orphan, found):
    for each in found:
        orphan.settle(each.segment)


def lines(count, **changes):
    return [record_frame(record) for record in full_records(count, **changes)]


def test_everything_is_read_in_order_and_cleared_away_once_it_is_settled(leave, adopted, root):
    leave(lines(50), segment_bytes=3_000)
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == full_records(50)
    assert [each.segment.record_at(each.offset) for each in found] == full_records(50)
    settle(orphan, found[:-1])
    assert not orphan.settled
    settle(orphan, found[-1:])
    assert orphan.settled
    assert list(root.iterdir()) == []


def test_segments_go_one_by_one(leave, adopted):
    path = leave(lines(50), segment_bytes=3_000)
    before = len(list(path.iterdir()))
    (orphan,) = adopted()
    found = read(orphan)
    settle(orphan, found[:25])
    assert 3 < len(list(path.iterdir())) < before - 3


def test_what_is_not_settled_is_there_for_the_next(leave, adopted):
    leave(lines(50), segment_bytes=3_000)
    (first,) = adopted()
    settle(first, first.read(25))
    assert adopted() == []  # it is taken
    first.close()
    (second,) = adopted()
    records = [each.record for each in read(second)]
    assert records[-25:] == full_records(50)[25:]  # and perhaps some of those that share a segment with them


def test_a_living_process_is_left_alone(root, adopted):
    spool = Spool(root, "there", max_bytes=10**9)
    spool.append(lines(1)[0])
    assert adopted() == []
    spool.after_fork()
    assert len(adopted()) == 1


def test_another_destination_is_left_alone_unless_any_is_asked_for(leave, adopted):
    leave(lines(1), destination="elsewhere")
    assert adopted() == []
    (orphan,) = adopted(None)
    assert len(read(orphan)) == 1


def test_a_destination_is_found_behind_a_damaged_header(leave):
    path = leave(lines(50), segment_bytes=3_000)
    first = min(path.glob("0*.segment"))
    first.write_bytes(b"?" + first.read_bytes()[1:])
    assert destination_of(path) == "there"


def test_what_says_nowhere_where_it_belongs_is_left_alone(leave, adopted):
    path = leave(lines(5))
    for each in path.glob("*.segment"):
        each.write_bytes(b"?" + each.read_bytes()[1:])
    assert adopted() == []
    (orphan,) = adopted(None)
    assert [each.record for each in read(orphan)] == full_records(5)


def test_an_empty_directory_is_cleared_away(root, adopted):
    (root / "4242-dead").mkdir(parents=True)
    (root / "4242-dead" / LOCK).touch()
    (orphan,) = adopted()
    assert read(orphan) == []
    assert list(root.iterdir()) == []


def test_what_is_no_spool_is_left_alone(root, adopted):
    (root / "notes").mkdir(parents=True)
    (root / "notes" / "mine.txt").write_text("mine")
    (root / "file").touch()
    assert adopted() == []
    shutil.rmtree(root)
    assert adopted() == []


def test_somebody_elses_file_in_it_is_not_removed(leave, adopted):
    path = leave(lines(3))
    (path / "mine.txt").write_text("mine")
    (orphan,) = adopted()
    settle(orphan, read(orphan))
    assert (path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("tail", [b"R 000", b"R 00000010 00000000 [1", b"x" * 5_000_000])
def test_a_torn_tail_costs_itself_only_and_is_kept_for_a_person(leave, adopted, root, tail):
    path = leave(lines(5))
    segment = path / "000001.segment"
    segment.write_bytes(segment.read_bytes() + tail)
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == full_records(5)
    assert orphan.damaged == 1
    settle(orphan, found)
    (kept,) = root.iterdir()
    assert kept.name == f"damaged-{path.name}-000001"
    assert kept.read_bytes().startswith(tail[:1000])
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_damaged_line_in_the_middle_costs_itself_only_and_is_kept(leave, adopted, root):
    path = leave([*lines(3), b"R 00000002 00000000 []\n", *lines(3)])
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == full_records(3) * 2
    settle(orphan, found)
    assert [each.name for each in root.iterdir()] == [f"damaged-{path.name}-000001"]


def test_an_operation_that_had_begun_and_has_no_record_ends_as_unknown(leave, adopted, root):
    begun = full_record(9, action="forget", ended_at=None, outcome=None)
    leave([*lines(3), record_frame(begun, INTENT), *lines(3)], segment_bytes=500)
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == [*full_records(3) * 2, begun._replace(outcome="unknown")]
    settle(orphan, found)
    assert list(root.iterdir()) == []


def test_an_operation_that_had_begun_and_has_a_record_is_that_record(leave, adopted, root):
    begun = full_record(9, action="forget", ended_at=None, outcome=None)
    done = full_record(9, action="forget")
    leave([record_frame(begun, INTENT), *lines(5), record_frame(done), *lines(1)], segment_bytes=1_000)
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == [*full_records(5), done, *full_records(1)]
    settle(orphan, found)
    assert list(root.iterdir()) == []


def test_a_gap_is_read_like_a_record(leave, adopted, root):
    gap = full_record(9, action="audit.gap")
    leave(lines(2), gap=gap)
    (orphan,) = adopted()
    found = read(orphan)
    assert [each.record for each in found] == [*full_records(2), gap]
    settle(orphan, found)
    assert list(root.iterdir()) == []


def test_files_that_vanish_meanwhile_cost_only_themselves(leave, adopted, root):
    path = leave(lines(50), segment_bytes=3_000)
    (orphan,) = adopted()
    found = orphan.read(1)
    for each in list(path.glob("0*.segment"))[1:]:
        each.unlink()
    found += read(orphan)
    assert 0 < len(found) < 50
    settle(orphan, found)
    assert orphan.settled


def test_two_processes_never_adopt_the_same(leave, root):
    for _ in range(20):
        leave(lines(5))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            count = 0
            try:
                for orphan in adopt(root, "there"):
                    found = orphan.read(100)
                    count += len(found)
                    settle(orphan, found)
                    orphan.read(1)
            finally:
                os._exit(count)
        children.append(child)
    counts = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(counts) == 100
    assert list(root.iterdir()) == []


def test_a_half_made_directory_is_not_taken_for_a_dead_process(leave, root, adopted):
    path = leave(lines(1))
    path.rename(root / f".{path.name}")
    assert adopted() == adopted(None) == []
