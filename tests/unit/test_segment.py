"""Frames: what was written is read as it was, and what is damaged costs no other."""

import os
import random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrocyte_otel_audit.pipeline.segment import (
    HEADER,
    INTENT,
    RECORD,
    Segment,
    frame,
    frames,
    header_frame,
    padded,
    parse_header,
    parse_record,
    record_frame,
)  # fmt: skip
from astrocyte_otel_audit.storable import MAX_PAYLOAD_BYTES
from tests.payloads import Hostile, cycle, nested
from tests.records import bare_record, full_record, full_records

LINES = [header_frame("there"), *map(record_frame, full_records(20))]


@pytest.fixture
def segment(tmp_path):
    """Makes segments of bytes."""
    made = []

    def make(data):
        path = tmp_path / f"{len(made):06d}.segment"
        path.write_bytes(data)
        made.append(Segment(path, os.open(path, os.O_RDONLY)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def sound(data):
    return [found.content for found in frames(data) if found.kind]


@pytest.mark.parametrize("record", [full_record(), bare_record(), full_record(schema="tenant_a")])
def test_a_record_comes_back_as_it_was(record):
    (found,) = frames(record_frame(record))
    assert (found.kind, parse_record(found.content)) == (RECORD, record)


def test_a_frame_says_where_it_is():
    found = list(frames(b"".join(LINES), 100))
    assert [each.offset for each in found] == [100 + sum(map(len, LINES[:n])) for n in range(len(LINES))]
    assert [each.end for each in found] == [*(each.offset for each in found[1:]), 100 + sum(map(len, LINES))]


def test_a_header_says_where_its_records_belong_and_what_their_values_are():
    (found,) = frames(header_frame("there"))
    header = parse_header(found.content)
    assert (found.kind, header.destination) == (HEADER, "there")
    assert header.fields == list(full_record()._fields)


@pytest.mark.parametrize(
    "said",
    [{}, [], "x", {"format": 2, "destination": "d", "fields": []}, {"format": 1}, {"format": 1, "destination": "d"}],
)
def test_a_header_of_another_format_is_none(said):
    assert parse_header(orjson.dumps(said)) is None
    assert parse_header(b"no JSON") is None


def test_records_of_a_release_with_other_fields_are_read_by_their_names():
    record = full_record()
    fields = ["since_forgotten", *reversed(record._fields[:-2])]
    content = orjson.dumps(["x", *reversed(record[:-2])])
    assert parse_record(content, fields) == record._replace(recorded_at=None, schema=None)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b"[1,2]", record_frame(full_record(started_at=7))[20:], b"\xff"]
)
def test_what_is_no_record_is_none(content):
    assert parse_record(content) is None


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


@given(st.binary(max_size=200), st.integers(0, len(LINES) - 1))
def test_rubbish_between_lines_costs_none_and_never_passes_for_one(rubbish, after):
    data = b"".join(LINES[:after]) + rubbish + b"\n" + b"".join(LINES[after:])
    assert sound(data) == [line[20:-1] for line in LINES]


@given(st.binary(max_size=300))
def test_reading_rubbish_never_raises(rubbish):
    for found in frames(rubbish + b"\n"):
        parse_record(found.content)
        parse_header(found.content)


@pytest.mark.parametrize("changes", [
    {"action": "a\x00\ud800\nb"},
    {"request": {"n": 10**5000, "s": "\ud800\n", "k": {Hostile(): Hostile()}}},
    {"request": cycle(2)},
    {"metadata": nested(5_000)},
    {"response": {"bytes": b"\x00\n\xff", "nan": float("nan")}},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_whatever_a_record_holds_it_is_one_line_that_is_read(changes):
    line = record_frame(full_record(**changes))
    assert line.count(b"\n") == 1
    (found,) = frames(line)
    assert parse_record(found.content).id == full_record().id


def test_a_giant_is_cut_before_it_fills_the_disk():
    giant = {"text": "x" * (3 * MAX_PAYLOAD_BYTES)}
    line = record_frame(full_record(request=giant, response={"hits": 3}, bank_id="b" * MAX_PAYLOAD_BYTES))
    record = parse_record(next(frames(line)).content)
    assert len(line) < 4096
    assert record.request == {"[truncated]": True, "bytes": 3 * MAX_PAYLOAD_BYTES + 11}
    assert (record.response, record.bank_id) == ({"hits": 3}, "b" * 512)


def test_a_padded_frame_is_of_the_size_and_says_the_same():
    line = padded(record_frame(full_record()), 4096)
    (found,) = frames(line)
    assert (len(line), parse_record(found.content)) == (4096, full_record())
    assert padded(record_frame(full_record()), 100) is None


def test_a_segment_gives_whole_lines_however_little_is_asked_for(segment):
    made = segment(b"".join(LINES))
    data, offset = b"", 0
    while piece := made.read(offset, 10):
        assert piece.endswith(b"\n")
        data, offset = data + piece, offset + len(piece)
    assert data == b"".join(LINES)
    assert segment(LINES[0] + LINES[1][:-1]).read(0, 10_000) == LINES[0]


def test_a_segment_gives_the_record_at_an_offset(segment):
    long = full_record(7, request={"keys": {f"key_{n}": n for n in range(500)}})
    made = segment(LINES[0] + record_frame(long) + frame(INTENT, b"[]") + b"rubbish\n")
    assert made.record_at(len(LINES[0])) == long
    for offset in (0, 3, len(LINES[0]) + len(record_frame(long)), 10**6):
        assert made.record_at(offset) is None


def test_a_segment_knows_whether_its_file_is_in_place(segment):
    made = segment(b"x\n")
    assert made.is_in_place()
    made.path.rename(made.path.with_suffix(".moved"))
    assert not made.is_in_place()
    made.path.write_bytes(b"another\n")
    assert not made.is_in_place()
