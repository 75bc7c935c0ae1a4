"""What a dead process has left is read as it was written, once, by one process with the same destination."""

import errno
import os
import shutil

import orjson
import pytest

from astrocyte_otel_audit.pipeline.adoption import adopt
from astrocyte_otel_audit.pipeline.captured import Captured, filled, to_record
from astrocyte_otel_audit.pipeline.directory import ACKNOWLEDGED, GAP, LOCK, destination_of, directories
from astrocyte_otel_audit.pipeline.segment import (
    HEADER,
    PROVISIONAL,
    RECORD,
    captured_frame,
    frame,
    padded,
)  # fmt: skip
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.records import full_captured, full_record, full_records


@pytest.fixture
def root(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def leave(root):
    """Leaves what a process does that dies: its files, and no lock."""

    def leave(lines, destination="there", gap=None, **arguments):
        options = {"max_bytes": 10**9, "max_in_memory": 0, "fsync": "never", **arguments}
        before = set(directories(root))
        spool = Spool(root, destination, **options)
        for line in lines:
            spool.append(line)
        if gap is not None:
            spool.note_gap(gap)
        (path,) = set(directories(root)) - before
        spool.after_fork()
        return path

    return leave


@pytest.fixture
def adopted(root):
    """Adopts what is there, and closes it after the test."""
    made = []

    def adopted(destinations=("there",)):
        found = list(adopt(root, destinations))
        made.extend(found)
        return found

    yield adopted
    for reader in made:
        reader.close()


def read(reader, limit=7):
    found = []
    while not reader.exhausted:
        piece = reader.read(limit)
        assert len(piece) <= limit + 1  # one row's places come together
        found += piece
    return found


def settle(reader, found):
    for each in found:
        reader.settle(each.segment, each.offset)


def row(number, **changes):
    return captured_frame(RECORD, full_captured(number, **changes))


def lines(count):
    return [row(number) for number in range(count)]


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


def ids(found):
    return [each.record.id for each in found]


# One row: what was known of its operation when that began, the inner one that is a part of it, and what it is at last.

OUTER = full_captured(100, action="forget")
BEGUN = OUTER._replace(outcome="unknown", end_ns=None, bank_id=None, actor_id=None, payload={})
INNER = full_captured(101, action="forget")
PART = INNER._replace(id=OUTER.id, replaces=INNER.id)


def provisional(captured):
    return captured_frame(PROVISIONAL, captured)


def final(captured):
    return captured_frame(RECORD, captured)


def test_everything_is_read_in_order_and_cleared_away_once_it_is_settled(leave, adopted, root):
    leave(lines(50), segment_bytes=3_000)
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == full_records(50)
    assert [each.segment.record_at(each.offset) for each in found] == full_records(50)
    settle(reader, found[:-1])
    assert not reader.settled
    settle(reader, found[-1:])
    assert reader.settled
    assert list(root.iterdir()) == []


def test_segments_go_one_by_one(leave, adopted):
    path = leave(lines(50), segment_bytes=3_000)
    before = len(list(path.iterdir()))
    (reader,) = adopted()
    found = read(reader)
    settle(reader, found[:25])
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
    spool = Spool(root, "there", max_bytes=10**9, max_in_memory=0)
    spool.append(lines(1)[0])
    assert adopted() == []
    spool.after_fork()
    assert len(adopted()) == 1


def test_another_destination_is_left_alone_unless_it_or_any_is_asked_for(leave, adopted):
    leave(lines(1), destination="elsewhere")
    leave(lines(2))
    assert [len(read(reader)) for reader in adopted()] == [2]
    assert adopted([]) == []
    assert [len(read(reader)) for reader in adopted(["nowhere", "elsewhere"])] == [1]


@pytest.mark.parametrize("destinations", [None, ["elsewhere", "there"], {"there": 1, "elsewhere": 2}])
def test_of_several_destinations_all_are_taken(leave, adopted, destinations):
    made = [leave(lines(1), destination=destination) for destination in ("there", "elsewhere", "there")]
    found = adopted(destinations)
    assert [reader.path for reader in found] == sorted(made)  # in one order, whoever asks
    assert not any(reader.is_alive for reader in found)


def test_a_destination_is_found_behind_a_damaged_header(leave, adopted):
    path = leave(lines(50), segment_bytes=3_000)
    first = min(path.glob("0*.segment"))
    first.write_bytes(b"?" + first.read_bytes()[1:])
    assert destination_of(path) == "there"
    (reader,) = adopted()
    assert [each.record for each in read(reader)] == full_records(50)


def test_what_says_nowhere_where_it_belongs_is_left_alone(leave, adopted):
    path = leave(lines(5))
    for each in path.glob("*.segment"):
        each.write_bytes(b"?" + each.read_bytes()[1:])
    assert adopted() == []
    (reader,) = adopted(None)
    assert [each.record for each in read(reader)] == full_records(5)


def test_an_empty_directory_is_cleared_away(root, adopted):
    (root / "4242-dead").mkdir(parents=True)
    (root / "4242-dead" / LOCK).touch()
    assert destination_of(root / "4242-dead") is None
    (reader,) = adopted()
    assert read(reader) == []
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
    (reader,) = adopted()
    settle(reader, read(reader))
    assert (path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("tail", [b"R 000", b"R 00000010 00000000 [1", b"x" * 5_000_000])
def test_a_torn_tail_costs_itself_only_and_is_kept_for_a_person(leave, adopted, root, tail):
    path = leave(lines(5))
    segment = path / "000001.segment"
    segment.write_bytes(segment.read_bytes() + tail)
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == full_records(5)
    assert reader.damaged == 1
    settle(reader, found)
    (kept,) = root.iterdir()
    assert kept.name == f"damaged-{path.name}-000001"
    assert kept.read_bytes().startswith(tail[:1000])
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_damaged_line_in_the_middle_costs_itself_only_and_is_kept(leave, adopted, root):
    path = leave([*lines(3), b"R 00000002 00000000 []\n", *lines(3)])
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == full_records(3) * 2
    settle(reader, found)
    assert [each.name for each in root.iterdir()] == [f"damaged-{path.name}-000001"]


def test_what_another_release_has_left_is_read_by_its_headers_names(leave, adopted):
    path = leave(lines(2))
    fields = ["since_forgotten", *Captured._fields[::-1]]
    header = orjson.dumps({"format": 1, "destination": "there", "fields": fields})
    values = [[None, *full_captured(number)[::-1]] for number in range(2, 5)]
    old = [frame(HEADER, header), *(frame(RECORD, orjson.dumps(each)) for each in values)]
    (path / "000002.segment").write_bytes(b"".join(old))
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == full_records(5)
    assert [each.segment.record_at(each.offset) for each in found] == full_records(5)


# Gaps.


def test_a_gap_is_read_like_a_record(leave, adopted, root):
    leave(lines(2), gap=full_captured(9, action="audit.gap"))
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [*full_records(2), full_record(9, action="audit.gap")]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_a_gap_alone_belongs_somewhere_too(leave, adopted, root):
    path = leave([], gap=full_captured(9, action="audit.gap"))
    assert (list(path.glob("*.segment")), destination_of(path)) == ([path / GAP], "there")
    assert adopted(["elsewhere"]) == []
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [full_record(9, action="audit.gap")]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_where_nothing_is_missing_the_gaps_file_is_nothing_to_keep(leave, adopted, root):
    path = leave(lines(1))
    (path / "000001.segment").unlink()
    assert adopted(["elsewhere"]) == []
    (reader,) = adopted()
    assert (read(reader), reader.settled) == ([], True)
    assert list(root.iterdir()) == []


def test_a_gaps_file_that_was_half_written_over_costs_itself_only(leave, adopted):
    path = leave(lines(3), gap=full_captured(9, action="audit.gap"))
    old, new = (path / GAP).read_bytes(), padded(row(8, action="audit.gap"), 2048)
    header = old.index(b"\n") + 1
    (path / GAP).write_bytes(old[:header] + new[:300] + old[header + 300 :])
    (reader,) = adopted()
    assert [each.record for each in read(reader)] == full_records(3)
    assert reader.damaged == 1


# What is a row only if none follows that says more.


@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("segment_bytes", [500, 10**6])
def test_an_operation_that_had_begun_and_has_no_record_ends_as_unknown(leave, adopted, root, limit, segment_bytes):
    leave([*lines(3), provisional(BEGUN), row(3)], segment_bytes=segment_bytes)
    (reader,) = adopted()
    found = read(reader, limit)
    assert [each.record for each in found] == [*full_records(4), to_record(BEGUN)]
    assert (found[-1].record.outcome, found[-1].record.ended_at) == ("unknown", None)
    settle(reader, found)
    assert reader.settled
    assert list(root.iterdir()) == []


def test_an_operation_that_had_begun_and_has_a_record_is_that_record(leave, adopted, root):
    leave([provisional(BEGUN), *lines(5), final(OUTER), row(5)], segment_bytes=1_000)
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [*full_records(5), to_record(OUTER), full_record(5)]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_a_part_is_in_the_record_of_the_operation_around_it(leave, adopted, root):
    leave([row(0), provisional(PART), row(1), final(OUTER), row(2)], segment_bytes=500)
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [*full_records(2), to_record(OUTER), full_record(2)]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_a_part_of_an_operation_that_never_ended_is_that_operations_row(leave, adopted, root):
    leave([row(0), provisional(PART), row(1)])
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [*full_records(2), full_record(101, action="forget", id=OUTER.id)]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_an_inner_operation_that_became_a_row_of_its_own_is_one_beside_the_outer(leave, adopted, root):
    leave([provisional(PART), final(INNER), row(0), final(OUTER)])
    (reader,) = adopted()
    found = read(reader)
    assert ids(found) == [INNER.id, full_record(0).id, OUTER.id]
    settle(reader, found)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("limit", [1, 2, 100])
@pytest.mark.parametrize("segment_bytes", [1, 10**6])
def test_of_an_operation_that_never_ended_all_that_is_known_is_one_row(leave, adopted, root, segment_bytes, limit):
    leave([row(0), provisional(BEGUN), row(1), provisional(PART), row(2)], segment_bytes=segment_bytes)
    (reader,) = adopted()
    found = read(reader, limit)
    whole = to_record(filled(BEGUN, PART))
    assert [each.record for each in found] == [*full_records(3), whole, whole]  # once for each place
    assert (whole.id, whole.outcome, whole.bank_id, whole.request) == (
        OUTER.id, "unknown", "bank-101", full_record(101).request,
    )  # fmt: skip
    assert len({(each.segment, each.offset) for each in found}) == 5
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_what_is_known_first_of_a_row_stands_and_what_follows_fills_it(leave, adopted):
    said = [BEGUN._replace(transport="first"), PART._replace(transport="second"), PART._replace(payload={})]
    leave(list(map(provisional, said)))
    (reader,) = adopted()
    records = [each.record for each in read(reader)]
    assert records == [to_record(filled(filled(said[0], said[1]), said[2]))] * 3
    assert (records[0].transport, records[0].actor_id) == ("first", "alice")


@pytest.mark.parametrize("other", [{"bank_id": "other"}, {"actor_id": "other"}, {"outcome": "failure"}])
def test_a_part_that_its_row_would_hide_is_one_of_its_own(leave, adopted, other):
    begun, part = BEGUN._replace(bank_id=PART.bank_id, actor_id=PART.actor_id), PART._replace(**other)
    leave([provisional(begun), provisional(part)])
    (reader,) = adopted()
    assert [each.record for each in read(reader)] == [to_record(begun), to_record(part._replace(id=INNER.id))]


@pytest.mark.parametrize("segment_bytes", [1, 10**6])
def test_both_its_beginning_and_its_part_are_in_the_record_of_the_whole(leave, adopted, root, segment_bytes):
    leave([provisional(BEGUN), row(0), provisional(PART), row(1), final(OUTER), row(2)], segment_bytes=segment_bytes)
    (reader,) = adopted()
    found = read(reader)
    assert [each.record for each in found] == [*full_records(2), to_record(OUTER), full_record(2)]
    settle(reader, found)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("segment_bytes", [1, 10**6])
@pytest.mark.parametrize("kind", [PROVISIONAL, RECORD])
def test_what_is_known_of_a_row_that_another_one_replaces_is_none(leave, adopted, root, segment_bytes, kind):
    inner = INNER._replace(outcome="unknown", end_ns=None)
    leave([provisional(inner), row(0), captured_frame(kind, PART), row(1)], segment_bytes=segment_bytes)
    (reader,) = adopted()
    found = read(reader)
    assert sorted(ids(found)) == sorted([full_record(0).id, full_record(1).id, OUTER.id])
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_what_replaces_a_row_replaces_no_other(leave, adopted):
    leave([provisional(BEGUN), provisional(INNER), provisional(full_captured(7)._replace(replaces=INNER.id))])
    (reader,) = adopted()
    assert ids(read(reader)) == [OUTER.id, full_captured(7).id]


def test_a_part_whose_record_another_has_settled_is_no_row_beside_it(leave, adopted, root):
    path = leave([provisional(PART), row(0), final(OUTER)], segment_bytes=900)
    (first,) = adopted()
    settle(first, [each for each in read(first) if each.record.id == OUTER.id])
    first.close()
    assert [each.name for each in path.glob("0*.segment")] == ["000001.segment"]
    (second,) = adopted()
    found = read(second)
    assert ids(found) == [full_record(0).id, OUTER.id]  # which is in the table already
    settle(second, found)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_provisional_ones_come_last_and_in_their_order(leave, adopted, root, limit):
    some = [full_captured(200 + n, outcome="unknown", ended_at=None) for n in range(8)]
    said = [line for n, each in enumerate(some) for line in (provisional(each), row(n))]
    ended = [full_captured(203), full_captured(206)]
    leave([*said, *map(final, ended)], segment_bytes=2_000)
    (reader,) = adopted()
    found = read(reader, limit)
    left = [each for n, each in enumerate(some) if n not in (3, 6)]
    assert [each.record for each in found] == [*full_records(8), *map(to_record, [*ended, *left])]
    assert [each.segment.record_at(each.offset) for each in found] == [each.record for each in found]
    settle(reader, found)
    assert list(root.iterdir()) == []


def test_the_record_of_another_releases_nothing(leave, adopted):
    leave([provisional(BEGUN), final(full_captured(102))])
    (reader,) = adopted()
    assert ids(read(reader)) == [full_captured(102).id, OUTER.id]


def test_a_file_of_provisional_ones_goes_once_all_have_a_record(leave, adopted):
    path = leave([provisional(BEGUN), provisional(PART), final(OUTER), row(0)], segment_bytes=1)
    (reader,) = adopted()
    reader.read(1)
    assert [each.name for each in sorted(path.glob("0*"))] == ["000003.segment", "000004.segment"]


def test_a_provisional_one_that_is_not_settled_is_there_for_the_next(leave, adopted, root):
    leave([row(0), provisional(BEGUN), provisional(PART)], segment_bytes=1)
    (first,) = adopted()
    found = read(first)
    settle(first, found[:2])
    assert not first.settled
    first.close()
    (second,) = adopted()
    found = read(second)
    assert [each.record for each in found] == [to_record(PART)]  # of a row that says more already
    settle(second, found)
    assert list(root.iterdir()) == []


def test_a_damaged_record_leaves_what_said_less(leave, adopted):
    whole = final(OUTER)
    leave([provisional(BEGUN), row(0), whole[:40] + b"?" + whole[41:], row(1)])
    (reader,) = adopted()
    assert [each.record for each in read(reader)] == [*full_records(2), to_record(BEGUN)]
    assert reader.damaged == 1


# Troubles.


def test_files_that_vanish_meanwhile_cost_only_themselves(leave, adopted, root):
    path = leave(lines(50), segment_bytes=3_000)
    (reader,) = adopted()
    found = reader.read(1)
    for each in list(path.glob("0*.segment"))[1:]:
        each.unlink()
    found += read(reader)
    assert 0 < len(found) < 50
    settle(reader, found)
    assert reader.settled


def test_a_file_that_vanishes_while_it_is_opened_costs_only_itself(leave, adopted, monkeypatch):
    path = leave(lines(5), segment_bytes=1)
    (reader,) = adopted()
    found = reader.read(2)
    real = os.open

    def vanishing(file, *arguments, **options):
        if str(file).endswith("000003.segment"):
            (path / "000003.segment").unlink()
        return real(file, *arguments, **options)

    monkeypatch.setattr(os, "open", vanishing)
    found += read(reader)
    assert [each.record for each in found] == [full_record(n) for n in (0, 1, 3, 4)]
    settle(reader, found)
    assert reader.settled


def test_what_cant_be_opened_is_an_error_and_is_there_the_next_time(leave, adopted, monkeypatch):
    leave(lines(10), segment_bytes=1)
    (reader,) = adopted()
    found = reader.read(3)
    real = os.open

    def failing(path, *arguments, **options):
        if str(path).endswith("000004.segment"):
            raise OSError(errno.EACCES, "")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError):
        reader.read(3)
    settle(reader, found)
    reader.close()
    monkeypatch.undo()
    (again,) = adopted()
    assert [each.record for each in read(again)] == full_records(10)[3:]


def test_reading_costs_no_descriptor_once_it_is_settled_or_closed(leave, adopted):
    for _ in range(2):
        leave([*lines(20), provisional(BEGUN)], segment_bytes=2_000, gap=full_captured(9))
    before = descriptors()
    first, second = adopted()
    settle(first, read(first))
    assert first.settled
    settle(second, second.read(13))
    second.close()
    assert descriptors() == before


def test_what_ended_processes_have_left_is_not_acknowledged(leave, adopted):
    path = leave(lines(3))
    (reader,) = adopted()
    settle(reader, reader.read(2))
    reader.acknowledge()
    assert not (path / ACKNOWLEDGED).exists()


def test_an_acknowledgement_goes_with_its_directory(leave, adopted, root):
    path = leave(lines(3))
    (path / ACKNOWLEDGED).touch()
    (reader,) = adopted()
    settle(reader, read(reader))
    assert list(root.iterdir()) == []


def test_two_processes_never_adopt_the_same(leave, root):
    for _ in range(20):
        leave(lines(5))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            count = 0
            try:
                for reader in adopt(root, ["there"]):
                    found = reader.read(100)
                    count += len(found)
                    settle(reader, found)
                    reader.read(1)
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
