"""Adoption: reading what another process has put into the spool, and clearing it away once it is settled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from astrocyte_otel_audit.pipeline.segment import (
    HEADER,
    INTENT,
    PIECE_BYTES,
    Frame,
    Segment,
    frames,
    parse_header,
    parse_record,
)
from astrocyte_otel_audit.pipeline.spool import LOCK, SUFFIX, remove_directory, try_lock
from astrocyte_otel_audit.record import AuditRecord


class Found(NamedTuple):
    """A record of another process's spool."""

    record: AuditRecord
    segment: Segment
    #: Where it is in there; -1 for an intent, which is not what the record says.
    offset: int


class Orphan:
    """The directory of a dead process, locked by this one. Not thread-safe.

    Args:
        path: the directory.
        lock: descriptor of its lock, held; closed by `close`.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        #: Segments that aren't read to their end, and those that are and hold something unsettled.
        self._unread: list[Path] = sorted(path.glob(f"*{SUFFIX}"))
        self._open: list[Segment] = []
        self._reading: tuple[Segment, int] | None = None
        #: Operations that had begun, by their id, until their record is found.
        self._intents: dict[str, Found] = {}
        #: Lines that could not be read.
        self.damaged = 0
        #: Everything was read, and everything that was read is settled and gone.
        self.exhausted = self.settled = False

    def read(self, limit: int) -> list[Found]:
        """Return the next records, `limit` of them; fewer at the end only.

        An operation that had begun and has no record gives one at the end: its outcome is unknown.
        """
        found: list[Found] = []
        while len(found) < limit and (reading := self._reading or self._next()) is not None:
            self._reading = self._read_piece(reading, found, limit)
        if len(found) < limit and self._intents:
            found += (
                Found(begun.record._replace(outcome="unknown", ended_at=None), begun.segment, -1)
                for begun in self._intents.values()
            )
            self._intents.clear()
        if len(found) < limit:
            self.exhausted = True
            self._leave()
        return found

    def settle(self, segment: Segment) -> None:
        """Take one record of a segment for settled; what holds nothing else goes, and the directory after the last."""
        segment.unsettled -= 1
        self._let_go(segment)

    def close(self) -> None:
        """Let another process have what is not settled."""
        for segment in self._open:
            segment.close()
        self._open.clear()
        self._unread.clear()
        self._close_lock()

    def _close_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _next(self) -> tuple[Segment, int] | None:
        while self._unread:
            path = self._unread.pop(0)
            with contextlib.suppress(FileNotFoundError):  # a person may have taken it away since it was listed
                segment = Segment(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                segment.size = os.fstat(segment.descriptor).st_size
                self._open.append(segment)
                return segment, 0
        return None

    def _read_piece(self, reading: tuple[Segment, int], found: list[Found], limit: int) -> tuple[Segment, int] | None:
        segment, offset = reading
        data = segment.read(offset, PIECE_BYTES)
        for frame in frames(data, offset):
            if len(found) >= limit:
                return segment, frame.offset
            if not self._take(segment, frame, found):
                self._set_aside(segment, frame.content)
        if data:
            return segment, offset + len(data)
        if offset < segment.size:  # a torn tail
            self._set_aside(segment, os.pread(segment.descriptor, PIECE_BYTES, offset))
        segment.sealed = True
        self._let_go(segment)
        return None

    def _take(self, segment: Segment, frame: Frame, found: list[Found]) -> bool:
        if frame.kind == HEADER:
            header = parse_header(frame.content)
            segment.fields = header.fields if header else None
            return header is not None
        record = parse_record(frame.content, segment.fields) if frame.kind else None
        if record is None:
            return False
        segment.unsettled += 1
        if frame.kind == INTENT:
            self._intents[record.id] = Found(record, segment, -1)
            return True
        if (begun := self._intents.pop(record.id, None)) is not None:
            self.settle(begun.segment)
        found.append(Found(record, segment, frame.offset))
        return True

    def _let_go(self, segment: Segment) -> None:
        if segment.sealed and not segment.unsettled:
            self._open.remove(segment)
            segment.remove()
            self._leave()

    def _leave(self) -> None:
        if self.exhausted and not self._open and not self.settled:
            self.settled = True
            with contextlib.suppress(OSError):  # somebody has put something of theirs into it
                remove_directory(self.path)
            self._close_lock()

    def _set_aside(self, segment: Segment, line: bytes) -> None:
        """Keep a line that can't be read, beside the process's directory, for a person to look at."""
        self.damaged += 1
        name = self.path.parent / f"damaged-{self.path.name}-{segment.path.stem}"
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line if line.endswith(b"\n") else line + b"\n")
        finally:
            os.close(descriptor)


def adopt(root: Path, destination: str | None) -> Iterator[Orphan]:
    """Yield what dead processes with that destination have left, each locked for this one.

    Args:
        root: the spool's directory.
        destination: where their records belong; None for any.
    """
    for path in sorted(directories(root)):
        with contextlib.suppress(FileNotFoundError):  # somebody else has cleared it away since it was listed
            if destination is not None and any(path.glob(f"*{SUFFIX}")) and destination_of(path) != destination:
                continue
            if (lock := try_lock(path / LOCK)) is None:
                continue
            if (path / LOCK).exists():
                yield Orphan(path, lock)
            else:
                os.close(lock)


def destination_of(path: Path) -> str | None:
    """Return where the records of a process's directory belong; None where none of its segments says so."""
    for segment in sorted(path.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError), segment.open("rb") as file:
            for frame in frames(file.readline()):
                if frame.kind == HEADER and (header := parse_header(frame.content)) is not None:
                    return header.destination
    return None


def directories(root: Path) -> list[Path]:
    """Return the directories of the processes that use a spool, or did."""
    with contextlib.suppress(OSError):
        # One that begins with a dot isn't locked yet.
        return [path for path in root.iterdir() if path.name[0] != "." and (path / LOCK).is_file()]
    return []
