"""Frames: what was written is read as it was, and what is damaged costs no other."""

import errno
import os
import random
from zlib import crc32

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrocyte_otel_audit.pipeline.captured import Captured, to_record
from astrocyte_otel_audit.pipeline.segment import (
    ACKNOWLEDGEMENT,
    HEADER,
    PROVISIONAL,
    RECORD,
    FileSegment,
    MemorySegment,
    captured_frame,
    frame,
    frames,
    header_frame,
    padded,
    parse_captured,
    parse_header,
)  # fmt: skip
from tests.payloads import Hostile, cycle, nested
from tests.records import bare_record, captured_of, full_captured, full_record

FIELDS = list(Captured._fields)


def line_of(number):
    return captured_frame(RECORD, full_captured(number))


LINES = [header_frame("there"), *map(line_of, range(20))]


@pytest.fixture
def segment(tmp_path):
    """Makes files of bytes, and opens them to be read and written to."""
    made = []

    def make(data=b""):
        path = tmp_path / f"{len(made):06d}.segment"
        path.write_bytes(data)
        made.append(FileSegment(path, os.open(path, os.O_RDWR | os.O_APPEND)))
        made[-1].size = len(data)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=["in a file", "in memory"])
def empty(request, segment):
    return segment() if request.param == "in a file" else MemorySegment()


def sound(data):
    return [found.content for found in frames(data) if found.kind]


def failing(*arguments, **options):
    raise OSError(errno.EIO, "")


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


def read_whole(segment, limit, offset=0):
    data = b""
    while piece := segment.read(offset + len(data), limit):
        assert piece.endswith(b"\n")
        data += piece
    return data


@pytest.mark.parametrize("kind", [RECORD, PROVISIONAL])
@pytest.mark.parametrize(
    "captured",
    [
        full_captured(),
        captured_of(bare_record()),
        full_captured(schema="tenant_a"),
        full_captured()._replace(replaces=full_captured(1).id, dropped=3, transport=7),
    ],
)
def test_an_operation_comes_back_as_it_was(captured, kind):
    (found,) = frames(captured_frame(kind, captured))
    assert (found.kind, parse_captured(found.content)) == (kind, captured)


def test_its_record_is_what_it_was_before_it_was_written():
    told = {"astrocyte.audit.request.top_k": 7, "astrocyte.audit.response.hits": ("a", "b"), "astrocyte.bank_id": "x"}
    for captured in (full_captured(), full_captured()._replace(payload=told)):
        assert to_record(parse_captured(next(frames(captured_frame(RECORD, captured))).content)) == to_record(captured)
    assert to_record(full_captured()) == full_record()


def test_a_frame_says_where_it_is():
    found = list(frames(b"".join(LINES), 100))
    assert [each.offset for each in found] == [100 + sum(map(len, LINES[:n])) for n in range(len(LINES))]
    assert [each.end for each in found] == [*(each.offset for each in found[1:]), 100 + sum(map(len, LINES))]


def test_a_header_says_where_its_records_belong_and_what_their_values_are():
    (found,) = frames(header_frame("there"))
    header = parse_header(found.content)
    assert (found.kind, header.destination) == (HEADER, "there")
    assert header.fields == FIELDS


@pytest.mark.parametrize(
    "said",
    [{}, [], "x", {"format": 2, "destination": "d", "fields": []}, {"format": 1}, {"format": 1, "destination": "d"}],
)
def test_a_header_of_another_format_is_none(said):
    assert parse_header(orjson.dumps(said)) is None
    assert parse_header(b"no JSON") is None


def told_by(fields, captured):
    """What a release with those fields writes of an operation."""
    return orjson.dumps([getattr(captured, name, "of another release") for name in fields])


@pytest.mark.parametrize("fields", [
    FIELDS,
    FIELDS[::-1],
    random.Random(1).sample(FIELDS, len(FIELDS)),
    ["since_forgotten", *FIELDS],
    [*FIELDS[:5], "not_known_yet", *FIELDS[5:], "nor_this"],
], ids=["the same", "reversed", "shuffled", "one more before", "more between and behind"])  # fmt: skip
def test_an_operation_of_a_release_with_other_fields_is_read_by_their_names(fields):
    captured = full_captured(3, schema="tenant_a")._replace(replaces="inner", dropped=2)
    assert parse_captured(told_by(fields, captured), fields) == captured


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("id", "action", "start_ns")])
def test_a_release_that_has_not_known_a_field_says_nothing_in_it(name):
    captured = full_captured(3, schema="tenant_a")._replace(replaces="inner", dropped=2)
    fields = [each for each in FIELDS if each != name]
    nothing = {"outcome": "unknown", "dropped": 0, "payload": {}}.get(name)
    found = parse_captured(told_by(fields, captured), fields)
    assert found == captured._replace(**{name: nothing})
    assert to_record(found).id == captured.id


@pytest.mark.parametrize("name", ["id", "action", "start_ns"])
def test_without_one_of_these_it_is_no_operation(name):
    fields = [each for each in FIELDS if each != name]
    assert parse_captured(told_by(fields, full_captured()), fields) is None


@pytest.mark.parametrize("fields", [[], FIELDS[1:], [*FIELDS, "one_more"]])
def test_more_or_fewer_values_than_the_header_has_names_are_no_operation(fields):
    assert parse_captured(told_by(FIELDS, full_captured()), fields) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"null", b"7", b"[1,2]", b"\xff", b'"' + b"x" * len(FIELDS) + b'"'],
)
def test_what_is_no_operation_is_none(content):
    assert parse_captured(content) is None
    assert parse_captured(content, FIELDS[::-1]) is None


@pytest.mark.parametrize(("name", "wrong"), [
    *(("id", wrong) for wrong in (None, 7, ["id"], {})),
    *(("action", wrong) for wrong in (None, 7, ["forget"], {})),
    *(("outcome", wrong) for wrong in (None, 7, ["success"], {})),
    *(("replaces", wrong) for wrong in (7, True, ["id"], {})),
    *(("schema", wrong) for wrong in (7, True, ["tenant_a"], {})),
    *(("start_ns", wrong) for wrong in (None, "7", 7.0, True, [7], {})),
    *(("end_ns", wrong) for wrong in ("7", 7.0, True, [7], {})),
    *(("payload", wrong) for wrong in (None, 7, "x", [], [["key", "value"]])),
])  # fmt: skip
def test_a_value_of_the_wrong_type_makes_it_no_operation(name, wrong):
    content = orjson.dumps([*full_captured()._replace(**{name: wrong})])
    assert parse_captured(content) is None


def test_an_unfinished_line_is_left_out_and_every_whole_one_is_read():
    data = b"".join(LINES)
    for length in range(0, len(data), 7):
        whole = [line for n, line in enumerate(LINES) if sum(map(len, LINES[: n + 1])) <= length]
        assert sound(data[:length]) == [line[20:-1] for line in whole]


def test_any_damaged_byte_costs_its_own_line_and_no_other():
    data = b"".join(LINES)
    starts = [sum(map(len, LINES[:n])) for n in range(len(LINES))]
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        line = max(n for n, start in enumerate(starts) if start <= position)
        hit = {line, line + 1} if data[position : position + 1] == b"\n" else {line}
        expected = [each[20:-1] for n, each in enumerate(LINES) if n not in hit]
        assert sound(bytes(damaged)) == expected


@pytest.mark.parametrize("kind", [HEADER, RECORD, PROVISIONAL, ACKNOWLEDGEMENT])
@pytest.mark.parametrize("other", [HEADER, RECORD, PROVISIONAL, ACKNOWLEDGEMENT])
def test_a_frame_of_which_the_kind_was_changed_is_damaged(kind, other):
    line = frame(kind, b"[1]")
    (found,) = frames(other + line[1:])
    assert (found.kind, found.content) == ((kind, b"[1]") if other == kind else (b"", other + line[1:]))


@pytest.mark.parametrize("kind", [b"X", b"r", b" ", b"\x00"])
def test_a_frame_of_no_known_kind_is_damaged(kind):
    content = b"[1]"
    line = b"%b %08x %08x %b\n" % (kind, len(content), crc32(content, crc32(kind)), content)
    assert [found.kind for found in frames(line)] == [b""]
    line = frame(RECORD, content)
    assert line == b"R %08x %08x %b\n" % (len(content), crc32(content, crc32(b"R")), content)


@given(st.binary(max_size=200), st.integers(0, len(LINES) - 1))
def test_rubbish_between_lines_costs_none_and_never_passes_for_one(rubbish, after):
    data = b"".join(LINES[:after]) + rubbish + b"\n" + b"".join(LINES[after:])
    assert sound(data) == [line[20:-1] for line in LINES]


@given(st.binary(max_size=300))
def test_reading_rubbish_never_raises(rubbish):
    for found in frames(rubbish + b"\n"):
        parse_captured(found.content)
        parse_header(found.content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(JSON, min_size=len(FIELDS) - 1, max_size=len(FIELDS) + 1) | JSON, st.permutations(FIELDS))
def test_reading_other_json_never_raises(said, fields):
    for known in (None, fields, fields[1:]):
        parse_captured(orjson.dumps(said), known)
    parse_header(orjson.dumps(said))


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_of_what_is_an_operation_a_record_can_be_made(said):
    found = parse_captured(orjson.dumps([*full_captured()._replace(**said)]))
    if found is not None:
        record = to_record(found)
        hash((record.id, record.schema, record.action, record.outcome, found.replaces))


@pytest.mark.parametrize("changes", [
    {"action": "a\x00\ud800\nb"},
    {"bank_id": Hostile()},
    {"transport": cycle(2)},
    {"error_type": "\ud800"},
    {"payload": {"n": 10**5000, "s": "\ud800\n", "k": {Hostile(): Hostile()}}},
    {"payload": cycle(2)},
    {"payload": nested(5_000)},
    {"payload": {"bytes": b"\x00\n\xff", "nan": float("nan")}},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_whatever_an_operation_holds_it_is_one_line_that_is_read(changes):
    line = captured_frame(RECORD, full_captured()._replace(**changes))
    assert line.count(b"\n") == 1
    (found,) = frames(line)
    captured = parse_captured(found.content)
    assert captured.id == full_captured().id
    assert to_record(captured).id == full_record().id


def test_a_nul_and_what_json_has_to_escape_come_back_as_they_were():
    captured = full_captured(action='a\x00\n\r\x1f"\\\u2028é')
    line = captured_frame(RECORD, captured)
    assert line.count(b"\n") == 1
    assert parse_captured(next(frames(line)).content) == captured


def test_a_padded_frame_is_of_the_size_and_says_the_same():
    line = padded(line_of(0), 4096)
    (found,) = frames(line)
    assert (len(line), parse_captured(found.content)) == (4096, full_captured())
    assert padded(line, 4096) == line
    assert padded(line_of(0), 100) is None


def test_lines_are_where_append_says(empty):
    offsets = [empty.append(line) for line in LINES]
    assert offsets == [sum(map(len, LINES[:n])) for n in range(len(LINES))]
    assert empty.size == sum(map(len, LINES))
    assert [empty.record_at(offset) for offset in offsets] == [None, *map(full_record, range(20))]


@pytest.mark.parametrize("limit", [1, 10, 1_000, 10**6])
def test_a_segment_gives_whole_lines_however_little_is_asked_for(empty, limit):
    for line in LINES:
        empty.append(line)
    assert read_whole(empty, limit) == b"".join(LINES)
    assert read_whole(empty, limit, len(LINES[0])) == b"".join(LINES[1:])
    assert empty.read(empty.size, limit) == b""


def test_a_segment_gives_no_more_lines_than_it_is_asked_for(empty):
    for line in LINES:
        empty.append(line)
    assert empty.read(0, len(LINES[0])) == LINES[0]
    assert empty.read(len(LINES[0]), len(LINES[1] + LINES[2])) == LINES[1] + LINES[2]


def test_what_comes_while_it_is_read_is_read_too(empty):
    empty.append(LINES[0])
    assert empty.read(0, 10_000) == LINES[0]
    empty.append(LINES[1])
    assert empty.read(len(LINES[0]), 10_000) == LINES[1]


def test_a_segment_gives_the_record_at_an_offset(empty):
    long = full_record(7, request={"keys": {f"key_{n}": n for n in range(500)}})
    lines = [LINES[0], captured_frame(RECORD, captured_of(long)), frame(PROVISIONAL, b"[]"), b"rubbish\n"]
    offsets = [empty.append(line) for line in lines]
    assert [empty.record_at(offset) for offset in offsets] == [None, long, None, None]
    for offset in (3, offsets[1] + 1, 10**6):
        assert empty.record_at(offset) is None


def test_a_segment_gives_a_giant_as_it_was(empty):
    giant = full_record(1, response={"text": "x" * 3_000_000})
    for line in (LINES[0], captured_frame(RECORD, captured_of(giant)), LINES[1]):
        empty.append(line)
    assert empty.record_at(len(LINES[0])) == giant
    assert sound(read_whole(empty, 4096))[2] == LINES[1][20:-1]


def test_records_of_a_segment_are_read_by_the_names_of_its_header(segment):
    made = segment(frame(RECORD, told_by(FIELDS[::-1], full_captured())))
    assert made.record_at(0) is None
    made.fields = FIELDS[::-1]
    assert made.record_at(0) == full_record()


def test_each_that_is_settled_is_one_fewer(empty):
    offsets = [empty.append(line) for line in LINES]
    empty.unsettled = len(LINES)
    for offset in offsets[:3]:
        empty.settle(offset)
    assert empty.unsettled == len(LINES) - 3


def test_an_unfinished_line_in_a_file_is_not_read(segment):
    assert segment(LINES[0] + LINES[1][:-1]).read(0, 10_000) == LINES[0]


def test_a_line_that_does_not_fit_on_the_disk_is_not_there(segment, monkeypatch):
    made = segment(LINES[0])
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[:-1]))
    with pytest.raises(OSError) as caught:
        made.append(LINES[1])
    assert caught.value.errno == errno.ENOSPC
    assert (made.size, made.path.read_bytes()) == (len(LINES[0]), LINES[0])
    monkeypatch.undo()
    assert made.append(LINES[2]) == len(LINES[0])
    assert made.path.read_bytes() == LINES[0] + LINES[2]


def test_what_of_a_line_cant_be_cut_off_again_passes_for_none(segment, monkeypatch):
    made = segment(LINES[0])
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[:-1]))
    monkeypatch.setattr(os, "ftruncate", failing)
    with pytest.raises(OSError) as caught:
        made.append(LINES[1])
    assert caught.value.errno == errno.EIO
    assert made.size == len(LINES[0])
    assert made.read(0, 10_000) == LINES[0]


def test_what_was_written_can_be_taken_back(segment):
    made = segment(LINES[0])
    made.take_back(made.append(LINES[1]))
    assert made.append(LINES[2]) == len(LINES[0])
    assert made.path.read_bytes() == LINES[0] + LINES[2]


def test_a_segment_knows_whether_its_file_is_in_place(segment):
    made = segment(b"x\n")
    assert made.is_in_place()
    made.path.rename(made.path.with_suffix(".moved"))
    assert not made.is_in_place()
    made.path.write_bytes(b"another\n")
    assert not made.is_in_place()


def test_a_segment_reads_on_in_what_was_put_in_its_place(segment):
    made = segment(LINES[0])
    before = made.descriptor
    made.path.rename(made.path.with_suffix(".moved"))
    made.path.write_bytes(LINES[0] + LINES[1])
    assert made.read(0, 10_000) == LINES[0]
    made.reopen()
    assert made.is_in_place()
    assert made.read(0, 10_000) == LINES[0] + LINES[1]
    assert made.descriptor == before
    assert not os.get_inheritable(made.descriptor)


def test_where_nothing_is_in_its_place_it_reads_on_where_it_was(segment):
    made = segment(LINES[0])
    made.path.unlink()
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            made.reopen()
    assert made.read(0, 10_000) == LINES[0]


def test_reading_on_elsewhere_costs_no_descriptor(segment, monkeypatch):
    made = segment(LINES[0])
    before = descriptors()
    made.reopen()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "dup2", failing)
        made.reopen()
    assert descriptors() == before


@pytest.mark.parametrize(("name", "number"), [("000007.segment", 7), ("123456.segment", 123_456), ("gap.segment", 0)])
def test_a_files_name_says_its_place(tmp_path, name, number):
    (tmp_path / name).touch()
    made = FileSegment(tmp_path / name, os.open(tmp_path / name, os.O_RDONLY))
    assert made.number == number
    made.close()


@pytest.mark.parametrize("taken_away", [False, True])
def test_only_its_own_file_is_removed(tmp_path, taken_away):
    path = tmp_path / "000001.segment"
    made = FileSegment(path, os.open(path, os.O_RDWR | os.O_CREAT))
    if taken_away:
        path.unlink()
        path.write_bytes(b"somebody else's")
    made.remove()
    assert path.exists() == taken_away
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made.descriptor)


def test_what_is_settled_in_memory_goes_and_the_rest_stays():
    made = MemorySegment()
    offsets = [made.append(line) for line in LINES]
    made.unsettled = len(LINES)
    for offset in offsets[1:8:2]:
        made.settle(offset)
    for n, offset in enumerate(offsets[1:]):
        assert made.record_at(offset) == (None if n in (0, 2, 4, 6) else full_record(n))
    assert made.size == sum(map(len, LINES))
    assert made.append(LINES[1]) == sum(map(len, LINES))


def test_what_is_left_in_memory_is_read_behind_what_is_settled():
    made = MemorySegment()
    offsets = [made.append(line) for line in LINES]
    for offset in offsets[:7]:
        made.settle(offset)
    assert read_whole(made, 1_000, offsets[7]) == b"".join(LINES[7:])


@pytest.mark.parametrize("end", [MemorySegment.close, MemorySegment.remove])
def test_memory_is_let_go_of_as_a_whole(end):
    made = MemorySegment()
    for line in LINES:
        made.append(line)
    end(made)
    assert made.read(0, 10_000) == b""
    assert made.record_at(len(LINES[0])) is None
