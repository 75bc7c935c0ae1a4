"""Adoption: reading what another process has put into the spool, and clearing it away once it is settled.

Of a process that has ended, whoever locks its directory takes over what it left. Of a process that lives and leaves
writing to another, segments are read while they grow, and a file in its directory tells it how far that has come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged, write_acknowledged
from astrocyte_otel_audit.pipeline.captured import Captured, contradicts, filled, to_record
from astrocyte_otel_audit.pipeline.directory import (
    GAP,
    LOCK,
    SUFFIX,
    directories,
    header_of,
    remove,
    try_lock,
    worded,
)
from astrocyte_otel_audit.pipeline.segment import (
    HEADER,
    PIECE_BYTES,
    PROVISIONAL,
    FileSegment,
    Frame,
    Header,
    Segment,
    frames,
    parse_captured,
    parse_header,
)
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.record import AuditRecord

_logger = logging.getLogger(__name__)
_RECENT: Final = 1_000
_A_RECORD: Final = re.compile(rb"R [0-9a-f]{8} [0-9a-f]{8} \[")


class Found(NamedTuple):
    """A record of another process's spool."""

    record: AuditRecord
    segment: Segment
    #: Where it is in there.
    offset: int


class _OthersSegment(FileSegment):
    """A file of another process, which remembers the rows that more than one place in it speaks for."""

    __slots__ = ("rows",)

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__(path, descriptor)
        #: By the offset of the place.
        self.rows: dict[int, AuditRecord] = {}

    def record_at(self, offset: int) -> AuditRecord | None:
        """Return the record that was found at an offset, or None where it is damaged."""
        return self.rows.get(offset) or super().record_at(offset)

    def settle(self, offset: int) -> None:
        """Take the operation at an offset for settled."""
        self.rows.pop(offset, None)
        super().settle(offset)


class SpoolReader:
    """Reads the directory of another process. Not thread-safe.

    Args:
        path: the directory.
        lock: descriptor of its lock, held, where its process has ended; closed by `close`. None while that lives.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock
        #: Names of the segments that were opened, and those that hold something unsettled.
        self._seen: set[str] = set()
        self._open: list[Segment] = []
        self._reading: tuple[_OthersSegment, int] | None = None
        #: What is known so far of rows, by their id, until their record is found.
        self._provisional: dict[str, list[tuple[Captured, _OthersSegment, int]]] = {}
        #: Rows whose record was found last: another thread's part of one may have come a little too late.
        self._recent: deque[str] = deque(maxlen=_RECENT)
        #: Those that were read and are not settled, oldest first: the number of their segment, and their offset.
        self._unsettled: dict[tuple[int, int], None] = {}
        #: What its process was told by whoever wrote for it before, and what there is to tell it.
        self._told = self._acknowledged = read_acknowledged(path) or Acknowledged(0, 0, 0, 0)
        #: Where it was read to its end, and what size it had: half a line may follow, and stay for good.
        self._stalled_at = (-1, -1)
        self._troubles = Troubles(_logger, time.monotonic)
        #: Lines that are damaged, but for headers, which are no records.
        self.damaged = 0
        #: It could not be read, and is left alone for a while.
        self.rests = False
        #: Everything was read, and everything that was read is settled and gone.
        self.exhausted = self.settled = False

    @property
    def is_alive(self) -> bool:
        """Whether its process lives, as far as is known."""
        return self._lock is None

    def look_after(self) -> None:
        """Lock the directory, if its process has ended meanwhile, and find the file that is read, if it was made anew.

        Never raises, since others have to be looked after too: what keeps it from that is said in the log.
        """
        try:
            self._look_after()
        except OSError as error:
            trouble = worded(f"what process {self.path.name} has in it can't be looked after", error)
            self._troubles.report("spool", f"the spool has trouble: {trouble}")
        else:
            self._troubles.clear("spool", f"what process {self.path.name} has in the spool is looked after again")

    def _look_after(self) -> None:
        if self._lock is not None or self.exhausted:
            return
        self._lock = try_lock(self.path / LOCK)
        if self._lock is None and not (self.path / LOCK).exists():  # whoever took it over is done with it
            self.exhausted, self._reading = True, None
            for row_id in list(self._provisional):
                self._forget(row_id)
            for segment in list(self._open):
                segment.sealed = True
                self._let_go(segment)
            self._leave()
        elif self._reading is not None:
            segment = self._reading[0]
            if not segment.is_in_place():
                with contextlib.suppress(FileNotFoundError):  # until its process has put it back
                    segment.reopen()
            os.fdatasync(segment.descriptor)  # which its process leaves to this one

    def has_more(self) -> bool:
        """Say whether there is something to read."""
        if self.exhausted or self.rests:
            return False
        if self._lock is not None:
            return True
        with contextlib.suppress(OSError):
            if self._reading is not None:
                segment, offset = self._reading
                size = os.fstat(segment.descriptor).st_size
                return (size > offset and self._stalled_at != (offset, size)) or bool(self._unread())
            return bool(self._unread())
        return False

    def read(self, limit: int) -> list[Found]:
        """Return the next records, about `limit` of them; fewer where there are no more, for now or at the end.

        Provisional ones come at the end, where no record of their row was found.

        Raises:
            OSError: it can't be read. What was read before is not lost.
        """
        found: list[Found] = []
        try:
            while len(found) < limit and (self._reading is not None or self._next()):
                if not self._read_piece(found, limit):
                    break
        except OSError:
            if found:
                return found  # it will come again
            raise
        if self._lock is None:
            if not self._unsettled:  # else its process is told when that is settled
                with contextlib.suppress(OSError):  # it will be told the next time
                    self.acknowledge()
            return found
        while len(found) < limit and self._provisional:
            found += _known_so_far(self._provisional.pop(next(iter(self._provisional))))
        if len(found) < limit:
            self.exhausted = True
            self._leave()
        return found

    def settle(self, segment: Segment, offset: int, *, stored: bool = True) -> None:
        """Take one record of a segment for settled; what holds nothing else goes, and the directory after the last.

        Args:
            segment, offset: where it is.
            stored: it is in the table.
        """
        if isinstance(segment, FileSegment):
            self._unsettled.pop((segment.number, offset), None)
        done = self._acknowledged
        self._acknowledged = done._replace(stored=done.stored + stored, refused=done.refused + (not stored))
        segment.settle(offset)
        self._let_go(segment)

    def acknowledge(self) -> None:
        """Tell a process that lives how far its operations are settled.

        Raises:
            OSError: it can't be told.
        """
        if self._lock is not None:
            return
        at = next(iter(self._unsettled), None)
        if at is None and self._reading is not None:
            at = self._reading[0].number, self._reading[1]
        if at is not None:
            done = self._acknowledged._replace(segment=at[0], offset=at[1])
            if done != self._told:
                write_acknowledged(self.path, done)
                self._told = self._acknowledged = done

    def close(self) -> None:
        """Let another process have what is not settled."""
        for segment in self._open:
            segment.close()
        self._open.clear()
        self._reading = None
        self._close_lock()

    def _close_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _unread(self) -> list[Path]:
        """Return the segments that were not opened, oldest first. A gap is its process's own until that has ended."""
        paths = (path for path in self.path.glob(f"*{SUFFIX}") if path.name not in self._seen)
        return sorted(path for path in paths if self._lock is not None or path.name != GAP)

    def _next(self) -> bool:
        for path in self._unread():
            self._seen.add(path.name)
            with contextlib.suppress(FileNotFoundError):  # a person may have taken it away since it was listed
                segment = _OthersSegment(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._open.append(segment)
                self._reading = segment, 0
                return True
        return False

    def _read_piece(self, found: list[Found], limit: int) -> bool:
        """Read on where it was left; False where there is nothing more for now."""
        if self._reading is None:
            return False
        segment, offset = self._reading
        # Before it is read: what is written afterwards may be followed by another segment.
        is_final = self._lock is not None or bool(self._unread())
        data = segment.read(offset, PIECE_BYTES)
        for frame in frames(data, offset):
            if len(found) >= limit:
                self._reading = segment, frame.offset
                return True
            if not self._take(segment, frame, found):
                self._set_aside(segment, frame.offset, frame.content)
        if data:
            self._reading = segment, offset + len(data)
            return True
        if not is_final:
            self._stalled_at = offset, os.fstat(segment.descriptor).st_size
            return False
        if not segment.is_in_place():
            with contextlib.suppress(FileNotFoundError):  # nobody has put it back
                segment.reopen()
                return True
        segment.size = os.fstat(segment.descriptor).st_size
        if offset < segment.size:  # a torn tail
            self._set_aside(segment, offset, os.pread(segment.descriptor, PIECE_BYTES, offset))
        self._reading = None
        segment.sealed = True
        self._let_go(segment)
        return True

    def _take(self, segment: _OthersSegment, frame: Frame, found: list[Found]) -> bool:
        if frame.kind == HEADER:
            header = parse_header(frame.content)
            segment.fields = header.fields if header else None
            return header is not None
        captured = parse_captured(frame.content, segment.fields) if frame.kind else None
        if captured is None:
            return False
        if captured.replaces is not None:
            self._forget(captured.replaces)
        if frame.kind == PROVISIONAL and captured.id in self._recent:
            return True
        segment.unsettled += 1
        if frame.kind == PROVISIONAL:
            self._provisional.setdefault(captured.id, []).append((captured, segment, frame.offset))
            return True
        self._forget(captured.id)
        self._recent.append(captured.id)
        self._unsettled[segment.number, frame.offset] = None
        found.append(Found(to_record(captured), segment, frame.offset))
        return True

    def _forget(self, row_id: str) -> None:
        """Take what was known so far of a row for settled."""
        for _, segment, offset in self._provisional.pop(row_id, ()):
            segment.settle(offset)
            self._let_go(segment)

    def _let_go(self, segment: Segment) -> None:
        if segment.sealed and not segment.unsettled and segment in self._open:
            self._open.remove(segment)
            segment.remove()
            self._leave()

    def _leave(self) -> None:
        if self.exhausted and not self._open and not self.settled:
            self.settled = True
            with contextlib.suppress(OSError):  # somebody has put something of theirs into it
                remove(self.path)
            self._close_lock()

    def _set_aside(self, segment: FileSegment, offset: int, line: bytes) -> None:
        """Keep a line that can't be read, beside the process's directory, for a person to look at."""
        # What is at 0 is a header, whatever has become of it, unless a record has run into it.
        if offset or _A_RECORD.search(line):
            self.damaged += 1
            self._acknowledged = self._acknowledged._replace(refused=self._acknowledged.refused + 1)
        name = self.path.parent / f"damaged-{self.path.name}-{segment.path.stem}"
        with contextlib.suppress(OSError), open(name, "ab", opener=_private) as file:  # else it is counted only
            file.write(line if line.endswith(b"\n") else line + b"\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _known_so_far(places: list[tuple[Captured, _OthersSegment, int]]) -> list[Found]:
    """Return the record of a row whose operation never ended, once for each place where something of it is."""
    known, *parts = (captured for captured, _, _ in places)
    rows = [known] * len(places)
    for position, part in enumerate(parts, 1):
        if contradicts(known, part):  # then it is a row of its own, as it would have been
            rows[position] = part._replace(id=part.replaces or part.id)
        else:
            known = filled(known, part)
            rows = [known if row.id == known.id else row for row in rows]
    found: list[Found] = []
    for row, (_, segment, offset) in zip(rows, places, strict=True):
        segment.rows[offset] = record = to_record(row)
        found.append(Found(record, segment, offset))
    return found


def adopt(root: Path, destinations: Collection[str] | None) -> Iterator[SpoolReader]:
    """Yield what dead processes with one of those destinations have left, each locked for this one.

    Args:
        root: the spool's directory.
        destinations: where their operations belong; None for any.
    """
    for path, _ in _with_destination(root, destinations):
        with contextlib.suppress(FileNotFoundError):  # somebody else has cleared it away since it was listed
            if (lock := try_lock(path / LOCK)) is None:
                continue
            if (path / LOCK).exists():
                yield SpoolReader(path, lock)
            else:
                os.close(lock)


def tail(root: Path, destinations: Collection[str], known: Collection[Path]) -> Iterator[SpoolReader]:
    """Yield what processes have in the spool that are not known yet: those that have ended, or leave writing to others.

    Args:
        root: the spool's directory.
        destinations: where their operations belong.
        known: directories that are read already.
    """
    for path, header in _with_destination(root, destinations):
        if path not in known:
            reader = SpoolReader(path, None)
            reader.look_after()
            if not reader.is_alive or (header is not None and header.is_left_to_others):
                yield reader


def _with_destination(root: Path, destinations: Collection[str] | None) -> Iterator[tuple[Path, Header | None]]:
    for path in sorted(directories(root)):
        with contextlib.suppress(FileNotFoundError):
            header = header_of(path)
            said = None if header is None else header.destination
            if destinations is None or not any(path.glob(f"*{SUFFIX}")) or said in destinations:
                yield path, header
