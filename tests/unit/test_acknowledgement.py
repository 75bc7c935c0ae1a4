"""Acknowledgements: what one process writes of another's operations is read by that one as it was, or not at all."""

import os
import stat
import threading
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged, write_acknowledged
from astrocyte_otel_audit.pipeline.directory import ACKNOWLEDGED
from astrocyte_otel_audit.pipeline.segment import ACKNOWLEDGEMENT, HEADER, PROVISIONAL, RECORD, frame, frames
from tests.records import full_captured

DONE = Acknowledged(segment=7, offset=4_242, stored=99, refused=1)
#: Longer than any that will ever be.
LARGEST = Acknowledged(*[2**63 - 1] * 4)

NUMBERS = st.integers(0, 2**63 - 1)


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("done", [DONE, Acknowledged(0, 0, 0, 0), LARGEST])
def test_what_was_written_is_read(tmp_path, done):
    write_acknowledged(tmp_path, done)
    found = read_acknowledged(tmp_path)
    assert found == done
    assert type(found) is Acknowledged


@given(first=st.builds(Acknowledged, *[NUMBERS] * 4), second=st.builds(Acknowledged, *[NUMBERS] * 4))
def test_whatever_was_said_before_the_last_is_read(tmp_path_factory, first, second):
    path = tmp_path_factory.getbasetemp()
    write_acknowledged(path, first)
    write_acknowledged(path, second)
    assert read_acknowledged(path) == second


def test_it_is_one_line_of_always_the_same_size_and_the_owners_alone(tmp_path):
    for done in (LARGEST, DONE, LARGEST, Acknowledged(0, 0, 0, 0)):
        write_acknowledged(tmp_path, done)
        file = tmp_path / ACKNOWLEDGED
        assert (file.stat().st_size, stat.S_IMODE(file.stat().st_mode)) == (128, 0o600)
        (found,) = frames(file.read_bytes())
        assert (found.kind, orjson.loads(found.content)) == (ACKNOWLEDGEMENT, [*done])
    assert [path.name for path in tmp_path.iterdir()] == [ACKNOWLEDGED]


def test_where_nothing_was_said_nothing_is_read(tmp_path):
    assert read_acknowledged(tmp_path) is None
    assert read_acknowledged(tmp_path / "absent") is None
    (tmp_path / ACKNOWLEDGED).touch()
    assert read_acknowledged(tmp_path) is None


def test_a_directory_is_nothing_that_was_said(tmp_path):
    (tmp_path / ACKNOWLEDGED).mkdir()
    assert read_acknowledged(tmp_path) is None
    with pytest.raises(OSError):
        write_acknowledged(tmp_path, DONE)


def test_what_is_half_written_is_not_read(tmp_path):
    write_acknowledged(tmp_path, DONE)
    file = tmp_path / ACKNOWLEDGED
    before = file.read_bytes()
    write_acknowledged(tmp_path, DONE._replace(offset=5_353, stored=123))
    after = file.read_bytes()
    for position in range(len(before) + 1):
        file.write_bytes(after[:position] + before[position:])
        assert read_acknowledged(tmp_path) in (None, DONE, DONE._replace(offset=5_353, stored=123))
        file.write_bytes(after[:position])
        assert (read_acknowledged(tmp_path) is None) == (position < len(after))


def test_what_is_damaged_is_not_read(tmp_path):
    write_acknowledged(tmp_path, DONE)
    file = tmp_path / ACKNOWLEDGED
    sound = file.read_bytes()
    for position in range(len(sound)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        assert read_acknowledged(tmp_path) is None


@pytest.mark.parametrize("line", [
    *(frame(kind, orjson.dumps([*DONE])) for kind in (HEADER, RECORD, PROVISIONAL)),
    *(frame(ACKNOWLEDGEMENT, said) for said in (b"[]", b"[1,2,3]", b"[1,2,3,4,5]", b"7", b"null", b"{}", b"no JSON")),
    frame(RECORD, orjson.dumps([*full_captured()])) + frame(ACKNOWLEDGEMENT, orjson.dumps([*DONE])),
    b"\xff\x00\n",
    b"\n",
])  # fmt: skip
def test_what_is_no_acknowledgement_is_not_read(tmp_path, line):
    (tmp_path / ACKNOWLEDGED).write_bytes(line)
    assert read_acknowledged(tmp_path) is None


def test_what_cant_be_written_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_acknowledged(tmp_path / "absent", DONE)


def test_it_costs_no_descriptor(tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise OSError

    before = descriptors()
    write_acknowledged(tmp_path, DONE)
    assert read_acknowledged(tmp_path) == DONE
    (tmp_path / ACKNOWLEDGED).write_bytes(b"no line")
    assert read_acknowledged(tmp_path) is None
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError):
        write_acknowledged(tmp_path, DONE)
    assert descriptors() == before


def test_who_reads_while_it_is_written_reads_what_was_said_or_nothing(tmp_path):
    said = [Acknowledged(number, 10**number, number, 0) for number in range(1, 16)]
    stopped = threading.Event()

    def write():
        while not stopped.is_set():
            for done in said:
                write_acknowledged(tmp_path, done)

    writer = threading.Thread(target=write)
    writer.start()
    found: set[Acknowledged | None] = set()
    deadline = time.monotonic() + 20.0
    try:
        while len(found) < 5 and time.monotonic() < deadline:
            found |= {read_acknowledged(tmp_path) for _ in range(500)}
    finally:
        stopped.set()
        writer.join()
    assert found <= {None, *said}
    assert len(found) > 1
