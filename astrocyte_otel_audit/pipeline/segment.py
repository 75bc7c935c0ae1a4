"""Segments: the files of the spool, as text that a person can read and a machine can check, one frame a line.

A line is a kind, the length of its JSON in bytes, the CRC-32 of kind and JSON (both as eight hexadecimal digits), and
the JSON::

    H 000000b1 5d3e81aa {"format":1,"destination":"…","fields":["id","action",…]}
    P 0000011f 92ab0d3c ["01a20c83-…","forget",…]
    R 00000124 0c4f9a77 ["01a20c83-…","forget",…]

JSON holds no raw line feed, so a damaged or half-written line spoils no other: reading goes on behind its end.
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Final, NamedTuple
from zlib import crc32

import orjson

from astrocyte_otel_audit.pipeline.captured import Captured, to_record
from astrocyte_otel_audit.record import AuditRecord
from astrocyte_otel_audit.storable import OPTIONS, encode

FORMAT: Final = 1
#: Kinds of frames: the header, an operation that is to become a row, and what is known so far of one that has not
#: ended: it becomes a row only if none with the same id follows.
HEADER: Final = b"H"
RECORD: Final = b"R"
PROVISIONAL: Final = b"P"
#: Beside a segment: how far its operations are settled.
ACKNOWLEDGEMENT: Final = b"A"
#: The kind is a part of what a checksum is made of.
_SEEDS: Final = {kind: crc32(kind) for kind in (HEADER, RECORD, PROVISIONAL, ACKNOWLEDGEMENT)}

#: Bytes that are read or copied of a segment at once.
PIECE_BYTES: Final = 1024 * 1024
#: Where the JSON begins in a line.
_PREFIX_BYTES: Final = len(b"R 00000000 00000000 ")
_FIELDS: Final = list(Captured._fields)
#: What stands for a value that another release did not write, where None can't.
_ABSENT: Final[dict[str, Any]] = {"outcome": "unknown", "dropped": 0, "payload": {}}


class Header(NamedTuple):
    """What a segment says of itself."""

    #: Where its records belong; only a process with the same destination writes them.
    destination: str
    #: Names of an operation's values, in their order.
    fields: list[str]
    #: Its process leaves writing to another one.
    is_left_to_others: bool = False


class Frame(NamedTuple):
    """One line of a segment."""

    #: Where its line begins, and where the next one does.
    offset: int
    end: int
    #: Empty where the line is damaged.
    kind: bytes
    #: The JSON, or the whole line where it is damaged.
    content: bytes


def frame(kind: bytes, content: bytes) -> bytes:
    """Return the line of one frame."""
    return b"%b %08x %08x %b\n" % (kind, len(content), crc32(content, _SEEDS[kind]), content)


def header_frame(destination: str, *, is_left_to_others: bool = False) -> bytes:
    """Return the first line of a segment."""
    writer = {"writer": "external"} if is_left_to_others else {}
    return frame(HEADER, orjson.dumps({"format": FORMAT, "destination": destination, "fields": _FIELDS, **writer}))


def captured_frame(kind: bytes, captured: Captured) -> bytes:
    """Return the line of an operation; never raises, whatever it holds."""
    # As `encode` and `frame` do it, in half of their time; a NUL does no harm in a file.
    try:
        content = orjson.dumps([*captured], option=OPTIONS)
    except (orjson.JSONEncodeError, RecursionError):
        content = encode([*captured._replace(start_ns=_int64(captured.start_ns), end_ns=_int64(captured.end_ns))])
    return b"%b %08x %08x %b\n" % (kind, len(content), crc32(content, _SEEDS[kind]), content)


def _int64(number: Any) -> Any:
    """Return a time that a person set to what no clock says as the last that JSON can hold."""
    return max(-(1 << 63), min(number, (1 << 63) - 1)) if type(number) is int else number


def padded(line: bytes, size: int) -> bytes | None:
    """Return a frame's line with spaces in its JSON up to a size; None where it is longer."""
    room = size - _PREFIX_BYTES - 1
    content = line[_PREFIX_BYTES:-1].ljust(room)
    return frame(line[:1], content) if len(content) == room else None


def parse_header(content: bytes) -> Header | None:
    """Return what a header's JSON says, or None for one of another format."""
    try:
        said = orjson.loads(content)
        if said["format"] == FORMAT:
            fields = [str(name) for name in said["fields"]]
            return Header(str(said["destination"]), fields, said.get("writer") == "external")
    except (ValueError, TypeError, KeyError):
        pass  # not ours, or of a release that is not known here
    return None


def parse_captured(content: bytes, fields: list[str] | None = None) -> Captured | None:
    """Return the operation of a frame's JSON, or None where it is none.

    Args:
        content: the JSON.
        fields: names of its values, as the header has them: a release may have had fewer, or others.
    """
    try:
        values = orjson.loads(content)
        if fields is not None and fields != _FIELDS:
            named = dict(zip(fields, values, strict=True))
            values = [named.get(name, _ABSENT.get(name)) for name in _FIELDS]
        found = Captured(*values)
    except (ValueError, TypeError):
        return None
    is_one = (
        isinstance(found.id, str)
        and isinstance(found.action, str)
        and isinstance(found.outcome, str)
        and isinstance(found.schema, (str, NoneType))
        and isinstance(found.replaces, (str, NoneType))
        and type(found.start_ns) is int
        and type(found.end_ns) in (int, NoneType)
        and isinstance(found.payload, dict)
    )
    return found if is_one else None


def frames(data: bytes, offset: int = 0) -> Iterator[Frame]:
    """Yield the frames of whole lines, damaged ones as such. An unfinished last line is left out.

    Args:
        data: what was read, beginning at a line's begin.
        offset: where it was read.
    """
    begin = 0
    while (end := data.find(b"\n", begin) + 1) > 0:
        line = data[begin:end]
        kind, content = line[:1], line[_PREFIX_BYTES:-1]
        if kind not in _SEEDS or not content or line != frame(kind, content):
            kind, content = b"", line
        yield Frame(offset + begin, offset + end, kind, content)
        begin = end


class Segment(ABC):
    """A piece of the spool, and how much of it is not settled yet. Its users hold a lock of their own."""

    __slots__ = ("fields", "sealed", "size", "unsettled")

    def __init__(self) -> None:
        #: Bytes in it.
        self.size = 0
        #: Operations in it that are not settled.
        self.unsettled = 0
        #: Nothing more comes into it.
        self.sealed = False
        #: Names of its operations' values, where they aren't this release's.
        self.fields: list[str] | None = None

    @abstractmethod
    def append(self, line: bytes) -> int:
        """Write a line at its end and return its offset. Raises OSError where it can't; nothing of it is there then."""

    @abstractmethod
    def read(self, offset: int, limit: int) -> bytes:
        """Return about `limit` bytes of whole lines from an offset on; more, where one line is longer."""

    @abstractmethod
    def settle(self, offset: int) -> None:
        """Take the operation at an offset for settled."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it, and leave it where it is."""

    @abstractmethod
    def remove(self) -> None:
        """Let go of it, and have it gone."""

    def record_at(self, offset: int) -> AuditRecord | None:
        """Return the record of the frame at an offset, or None where it is damaged."""
        for found in frames(self.read(offset, 1024), offset):
            captured = parse_captured(found.content, self.fields) if found.kind else None
            return None if captured is None else to_record(captured)
        return None


class FileSegment(Segment):
    """A piece of the spool on disk.

    Args:
        path: the file.
        descriptor: of the file, readable; where it is written to, appending.
    """

    __slots__ = ("descriptor", "number", "path", "synced")

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__()
        self.path = path
        self.descriptor = descriptor
        #: Bytes of it that are known to be on the disk.
        self.synced = 0
        #: Its place among those of its process; 0 for a gap.
        self.number = int(path.stem) if path.stem.isdecimal() else 0

    def append(self, line: bytes) -> int:
        """Write a line at the end of the file and return its offset."""
        offset = self.size
        try:
            written = os.write(self.descriptor, line)
            if written < len(line):  # the kernel takes what fits on the disk, and says no more
                raise OSError(errno.ENOSPC, "")
        except BaseException:  # a signal's handler may raise when all of it is written
            os.ftruncate(self.descriptor, offset)
            raise
        self.size = offset + written
        return offset

    def take_back(self, offset: int) -> None:
        """Cut off what was written from an offset on."""
        os.ftruncate(self.descriptor, offset)
        self.size = offset

    def read(self, offset: int, limit: int) -> bytes:
        """Return whole lines from an offset on."""
        data = os.pread(self.descriptor, limit, offset)
        end = data.rfind(b"\n") + 1
        while not end and len(data) == limit:
            limit *= 2
            data = os.pread(self.descriptor, limit, offset)
            end = data.rfind(b"\n") + 1
        return data[:end]

    def settle(self, offset: int) -> None:  # noqa: ARG002 - the file goes as a whole
        """Take one operation for settled."""
        self.unsettled -= 1

    def is_in_place(self) -> bool:
        """Say whether the file is still where it was made: neither deleted nor moved."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        mine = os.fstat(self.descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def reopen(self) -> None:
        """Read from now on what stands in the file's place, which has the same lines."""
        again = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(again, self.descriptor, inheritable=False)
        finally:
            os.close(again)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        os.close(self.descriptor)

    def remove(self) -> None:
        """Delete the file, if it is still there, and close it."""
        with contextlib.suppress(OSError):  # what stays is written once more, which does no harm
            if self.is_in_place():
                self.path.unlink()
        os.close(self.descriptor)


class MemorySegment(Segment):
    """A piece of the spool in memory, where there is no disk for it. Each operation goes when it is settled."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[int, bytes] = {}

    def append(self, line: bytes) -> int:
        """Write a line at the end of the file and return its offset."""
        offset = self.size
        self._lines[offset] = line
        self.size = offset + len(line)
        return offset

    def read(self, offset: int, limit: int) -> bytes:
        """Return whole lines from an offset on."""
        lines: list[bytes] = []
        end = offset + limit
        while offset < end and (line := self._lines.get(offset)) is not None:
            lines.append(line)
            offset += len(line)
        return b"".join(lines)

    def settle(self, offset: int) -> None:
        """Take one operation for settled, and forget it."""
        del self._lines[offset]
        self.unsettled -= 1

    def close(self) -> None:
        """Forget all of it."""
        self._lines.clear()

    def remove(self) -> None:
        """Forget all of it."""
        self._lines.clear()
