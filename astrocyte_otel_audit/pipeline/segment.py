"""Segments: the files of the spool, as text that a person can read and a machine can check, one frame a line.

A line is a kind, the length of its JSON in bytes, its CRC-32 (both as eight hexadecimal digits), and the JSON::

    H 000000b1 5d3e81aa {"format":1,"destination":"…","fields":["id","action",…]}
    R 00000124 0c4f9a77 ["01a20c83-…","recall",…]

JSON holds no raw line feed, so a damaged or half-written line spoils no other: reading goes on behind its end.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from astrocyte_otel_audit.record import AuditRecord
from astrocyte_otel_audit.storable import MAX_PAYLOAD_BYTES, MAX_TEXT, encode, encode_payload

FORMAT: Final = 1
#: Kinds of frames: the header, a record, and the intent of an operation that has begun.
HEADER: Final = b"H"
RECORD: Final = b"R"
INTENT: Final = b"I"

#: Bytes that are read or copied of a segment at once.
PIECE_BYTES: Final = 1024 * 1024
#: Where the JSON begins in a line.
_PREFIX_BYTES: Final = len(b"R 00000000 00000000 ")
_FIELDS: Final = list(AuditRecord._fields)
_DATES: Final = tuple(name for name in _FIELDS if name.endswith("_at"))


class Header(NamedTuple):
    """What a segment says of itself."""

    #: Where its records belong; only a process with the same destination writes them.
    destination: str
    #: Names of a record's values, in their order.
    fields: list[str]


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
    return b"%s %08x %08x %s\n" % (kind, len(content), zlib.crc32(content), content)


def header_frame(destination: str) -> bytes:
    """Return the first line of a segment."""
    return frame(HEADER, orjson.dumps({"format": FORMAT, "destination": destination, "fields": _FIELDS}))


def record_frame(record: AuditRecord, kind: bytes = RECORD) -> bytes:
    """Return the line of one record; never raises, whatever the record holds. Giants are cut as their rows will be."""
    content = encode(list(record))
    if len(content) > MAX_PAYLOAD_BYTES:
        content = encode([_cut(value) for value in record])
    return frame(kind, content)


def padded(line: bytes, size: int) -> bytes | None:
    """Return a frame's line with spaces in its JSON up to a size; None where it is longer."""
    room = size - _PREFIX_BYTES - 1
    content = line[_PREFIX_BYTES:-1].ljust(room)
    return frame(line[:1], content) if len(content) == room else None


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MAX_TEXT]
    return orjson.Fragment(encode_payload(value)) if isinstance(value, dict) else value


def parse_header(content: bytes) -> Header | None:
    """Return what a header's JSON says, or None for one of another format."""
    try:
        said = orjson.loads(content)
        if said["format"] == FORMAT:
            return Header(str(said["destination"]), [str(name) for name in said["fields"]])
    except (ValueError, TypeError, KeyError):
        pass  # not ours, or of a release that is not known here
    return None


def parse_record(content: bytes, fields: list[str] | None = None) -> AuditRecord | None:
    """Return the record of a frame's JSON, or None where it is none.

    Args:
        content: the JSON.
        fields: names of its values, as the header has them: a release may have had fewer, or others.
    """
    try:
        values = dict(zip(fields or _FIELDS, orjson.loads(content), strict=True))
        for name in _DATES:
            if values.get(name) is not None:
                values[name] = datetime.fromisoformat(values[name])
        known: dict[str, Any] = {name: values.get(name) for name in _FIELDS}
        return AuditRecord(**known) if known["id"] and known["action"] and known["started_at"] else None
    except (ValueError, TypeError):
        return None


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
        if kind not in (HEADER, RECORD, INTENT) or not content or line != frame(kind, content):
            kind, content = b"", line
        yield Frame(offset + begin, offset + end, kind, content)
        begin = end


class Segment:
    """One file of the spool, and how much of it is not settled yet. Its users hold a lock of their own.

    Args:
        path: the file.
        descriptor: of the file, readable.
    """

    __slots__ = ("descriptor", "fields", "path", "sealed", "size", "unsettled")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        #: Bytes in it.
        self.size = 0
        #: Records in it that are not settled.
        self.unsettled = 0
        #: Nothing more comes into it.
        self.sealed = False
        #: Names of its records' values, where they aren't this release's.
        self.fields: list[str] | None = None

    def read(self, offset: int, limit: int) -> bytes:
        """Return at most `limit` bytes of whole lines from an offset on; more, where one line is longer."""
        data = os.pread(self.descriptor, limit, offset)
        end = data.rfind(b"\n") + 1
        while not end and len(data) == limit:
            limit *= 2
            data = os.pread(self.descriptor, limit, offset)
            end = data.rfind(b"\n") + 1
        return data[:end]

    def record_at(self, offset: int) -> AuditRecord | None:
        """Return the record of the frame at an offset, or None where it is damaged."""
        for found in frames(self.read(offset, 1024), offset):
            return parse_record(found.content, self.fields) if found.kind else None
        return None

    def is_in_place(self) -> bool:
        """Say whether the file is still where it was made: neither deleted nor moved."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        mine = os.fstat(self.descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def remove(self) -> None:
        """Delete the file, if it is still there, and close it."""
        if self.is_in_place():
            self.path.unlink()
        os.close(self.descriptor)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        os.close(self.descriptor)
