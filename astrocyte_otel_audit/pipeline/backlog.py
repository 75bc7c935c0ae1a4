"""The backlog: what was accepted and is not settled, in the spool; the oldest of it in memory, to be written next."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from astrocyte_otel_audit.pipeline.adoption import SpoolReader, adopt, tail
from astrocyte_otel_audit.pipeline.captured import Captured, to_record
from astrocyte_otel_audit.pipeline.directory import SpoolError, clear_unfinished, in_words, worded
from astrocyte_otel_audit.pipeline.gap import widened
from astrocyte_otel_audit.pipeline.segment import (
    PIECE_BYTES,
    PROVISIONAL,
    RECORD,
    FileSegment,
    MemorySegment,
    Segment,
    captured_frame,
    frames,
    parse_captured,
)
from astrocyte_otel_audit.pipeline.spool import Spool, SpoolFullError
from astrocyte_otel_audit.record import AuditRecord

_logger = logging.getLogger(__name__)

#: Most operations are smaller in the spool.
_USUAL_BYTES = 1024


@dataclass(slots=True, eq=False)
class Entry:
    """An accepted operation on its way to the table."""

    #: Place in the order in which entries were taken, counted from 0.
    number: int
    schema: str | None
    #: None where it is in the spool only; `Backlog.load` reads it.
    record: AuditRecord | None
    #: Where it is in the spool.
    segment: Segment
    offset: int
    #: The other process's part of the spool that it was found in.
    reader: SpoolReader | None = None


class Backlog:
    """A first-in, first-out queue.

    Args:
        spool: where all of it is.
        lock: its users hold it around every call, but for those that read files and take it themselves.
        tailed: destinations of processes that leave writing to this one; their operations are in it as well.
    """

    def __init__(self, spool: Spool, *, lock: AbstractContextManager[Any], tailed: Collection[str] = ()) -> None:
        self.spool = spool
        self._lock = lock
        self._tailed = tailed
        #: Own ones that were read and not taken; how many were not read, and where the oldest of those is.
        self._read: deque[Entry] = deque()
        self.unread = 0
        self._unread_at: tuple[Segment, int] | None = None
        #: What is known of rows whose operations have not ended, by the id of the row.
        self._held: dict[str, list[tuple[Segment, int]]] = {}
        #: What other processes have in the spool, and what was read of it and not taken.
        self._readers: list[SpoolReader] = []
        self._found: deque[Entry] = deque()
        self._gap: Captured | None = None
        #: Operations accepted, taken out of here, and done with, whatever became of them. Those
        #: of other processes are accepted when they are taken.
        self.accepted = self.taken = self.settled = 0
        #: Operations refused, taken from other processes, and lost as their place in the spool is damaged.
        self.refused = self.adopted = self.damaged = 0
        #: Why the last one was refused.
        self.refusal = ""
        #: Why what another process has in the spool could not be read, since that was last said.
        self._unreadable: str | None = None

    def __len__(self) -> int:
        """Return how many were not taken yet, without those of other processes."""
        return len(self._read) + self.unread

    def has_room(self) -> bool:
        """Say whether an operation would be accepted now."""
        return self.spool.has_room(_USUAL_BYTES)

    def begin(self, captured: Captured) -> bool:
        """Put an operation that has begun on the disk, synced, and promise it a place.

        Returns:
            False where that can't be done.
        """
        if not self.spool.has_room_on_disk(_USUAL_BYTES):
            return False
        try:
            self._hold(captured, synced=True)
        except SpoolError:
            return False
        return True

    def hold(self, captured: Captured) -> bool:
        """Put what is known so far of a row where another process finds it, if its operation never ends.

        Returns:
            False where there is no room for it. True where it is in memory only, as all else is then.
        """
        try:
            self._hold(captured, synced=False)
        except SpoolFullError:
            return False
        except SpoolError:
            return True
        if captured.replaces is not None:
            self.release(captured.replaces)
        return True

    def release(self, row_id: str) -> None:
        """Take what was held until a row is written for settled, if anything was."""
        for segment, offset in self._held.pop(row_id, ()):
            self.spool.settle(segment, offset)

    def has_begun(self, row_id: str) -> bool:
        """Say whether an operation has been promised a place."""
        return row_id in self._held

    def append(self, captured: Captured, line: bytes, *, promised: bool = False) -> bool:
        """Accept an operation, or count it in the gap. Once it returns True, it survives what the spool survives.

        Args:
            captured: the operation.
            line: its frame.
            promised: there is room for it, whatever the cap says, as for one that has begun.
        """
        try:
            place = self.spool.append(line, promised=promised or captured.id in self._held)
        except SpoolError as error:
            self.refusal = str(error)
            self.refused += 1
            self._gap = widened(self._gap, captured, self.refusal)
            self._note_gap()
            return False
        self.accepted += 1
        if not self.unread:
            self._unread_at = place
        self.unread += 1
        if self._held:
            self.release(captured.id)
            if captured.replaces is not None:
                self.release(captured.replaces)
        return True

    @property
    def has_gap(self) -> bool:
        """Whether operations were refused of which no record says so yet."""
        return self._gap is not None

    def close_gap(self) -> bool:
        """Turn what was refused into a record that says so; False where nothing was, or there is no room yet."""
        gap = self._gap
        if gap is None or not self.has_room() or not self.append(gap, captured_frame(RECORD, gap), promised=True):
            return False
        self._gap = None
        self._note_gap()
        return True

    def take(self, limit: int) -> list[Entry]:
        """Return the oldest entries that were read, at most `limit`. They stay the backlog's concern until settled."""
        taken = [self._read.popleft() for _ in range(min(limit, len(self._read)))]
        if not len(self):
            found = [self._found.popleft() for _ in range(min(limit - len(taken), len(self._found)))]
            taken += found
            self.accepted += len(found)
            self.adopted += len(found)
        for number, entry in enumerate(taken, self.taken):
            entry.number = number
        self.taken += len(taken)
        return taken

    def settle(self, entries: Iterable[Entry], *, stored: bool = True) -> None:
        """Forget entries that were taken. MUST only be called once each is settled.

        Args:
            entries: they are settled all alike.
            stored: they are in the table; else they are beside it, or counted as lost.
        """
        readers: list[SpoolReader] = []
        for entry in entries:
            self.settled += 1
            if entry.reader is None:
                self.spool.settle(entry.segment, entry.offset)
                continue
            entry.reader.settle(entry.segment, entry.offset, stored=stored)
            if entry.reader not in readers:
                readers.append(entry.reader)
        for reader in readers:
            with suppress(OSError):  # it will be told the next time
                reader.acknowledge()
            if reader.settled:
                self._readers.remove(reader)
        self._sweep()

    def drop(self, entry: Entry) -> bool:
        """Keep an entry on disk only; False where it is in memory anyway."""
        if isinstance(entry.segment, MemorySegment):
            return False
        entry.record = None
        return True

    def close(self) -> None:
        """Let go of the files. What is not settled stays on disk, for another process."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        if not self._held:  # else their operations are still to come, for another process
            self.spool.close()

    def after_fork(self) -> None:
        """Close in a child what is the parent's; the child has to make a backlog of its own."""
        for reader in self._readers:
            reader.close()
        self.spool.after_fork()

    def unsettled(self) -> int:
        """Return how many accepted operations are not settled."""
        return self.accepted - self.settled

    def has_found(self) -> bool:
        """Say whether something of other processes is to be taken. Needs no lock."""
        return bool(self._found) or any(reader.has_more() for reader in list(self._readers))

    # What follows reads files, on the writer's thread, and takes the lock itself for as short as it can.

    def refill(self, limit: int) -> None:
        """Read what `take` shall find: about `limit` entries.

        Raises:
            SpoolError: it can't be read.
        """
        with self._lock:
            at, wanted = self._unread_at, min(limit - len(self._read), self.unread)
        if at is not None and wanted > 0:
            self._read_own(at, wanted)
        with self._lock:
            missing = limit - len(self._read) - len(self._found)
            readers = list(self._readers)
        for reader in readers:
            if missing > 0 and reader.has_more():
                missing -= self._read_other(reader, missing)

    def load(self, entries: Sequence[Entry]) -> None:
        """Have the entries' records in memory. One whose place is damaged stays None, and is counted.

        Raises:
            SpoolError: they can't be read for now.
        """
        for entry in entries:
            if entry.record is None:
                with in_words("it can't be read"):
                    entry.record = entry.segment.record_at(entry.offset)
                if entry.record is None:
                    with self._lock:
                        self.damaged += 1

    def tend(self, *, adopting: bool) -> Iterator[str]:
        """Look after the spool, about once a second; yields what a person has to know.

        Args:
            adopting: look also for what other processes have in it.
        """
        with self._lock:
            self._sweep()
            self.spool.expire()
            self.close_gap()  # no more often, or a spool that is nearly full would leave a row for each operation
        try:
            self.spool.sync()
            if missing := self.spool.missing():
                with self._lock:
                    self.spool.put_back(missing)
                yield "files of the spool were deleted or moved, and were written again"
            if adopting and (found := self.adopt()):
                _logger.info("Audit records of other processes are written now: %s.", ", ".join(found))
        except SpoolError as error:
            yield f"the spool has trouble: {error}"
        for trouble in (self.spool.trouble, self._unreadable):
            if trouble is not None:
                yield f"the spool has trouble: {trouble}"
        self._unreadable = None
        for reader in self._readers:
            reader.rests = False

    def settled_before(self) -> Iterator[list[Entry]]:
        """Yield what is settled and still on disk, in pieces, and with it what is on its way.

        Raises:
            SpoolError: it can't be read.
        """
        with self._lock:
            self.spool.is_being_read = True
            segments, end = self.spool.settled, self._unread_at
        try:
            yield from self._read_again(segments, end)
        finally:
            self.spool.is_being_read = False

    def _read_again(self, segments: list[FileSegment], end: tuple[Segment, int] | None) -> Iterator[list[Entry]]:
        for segment in segments:
            offset = 0
            while True:
                with in_words("it can't be read"):
                    data = segment.read(offset, PIECE_BYTES)
                found = [
                    Entry(0, captured.schema, to_record(captured), segment, frame.offset)
                    for frame in frames(data, offset)
                    if frame.kind == RECORD
                    and (end is None or segment is not end[0] or frame.offset < end[1])
                    and (captured := parse_captured(frame.content)) is not None
                ]
                if found:
                    yield found
                if not data:
                    break
                offset += len(data)
            if end is not None and segment is end[0]:
                return

    def adopt(self) -> list[str]:
        """Look for what other processes have in the spool; return the names of what was found.

        Raises:
            SpoolError: there is no looking.
        """
        root = self.spool.root
        if root is None:
            return []
        with in_words("what other processes have in it can't be looked at"):
            clear_unfinished(root)
            if self._tailed:
                for reader in list(self._readers):
                    reader.look_after()
                    if reader.settled:
                        self._readers.remove(reader)
                found = list(tail(root, self._tailed, {reader.path for reader in self._readers}))
            else:
                found = list(adopt(root, [self.spool.destination]))
        with self._lock:
            self._readers += found
        return [reader.path.name for reader in found]

    def _read_own(self, at: tuple[Segment, int], wanted: int) -> None:
        """Read the oldest that were not read. Meanwhile their number can only grow."""
        segment, offset = at
        entries: list[Entry] = []
        damaged: list[int] = []
        with in_words("it can't be read"):
            data = segment.read(offset, PIECE_BYTES)
        for frame in frames(data, offset):
            if len(entries) + len(damaged) == wanted:
                break
            offset = frame.end
            captured = parse_captured(frame.content) if frame.kind == RECORD else None
            if captured is not None:
                entries.append(Entry(0, captured.schema, to_record(captured), segment, frame.offset))
            elif frame.kind == RECORD or (not frame.kind and frame.offset and frame.content[:1] != PROVISIONAL):
                # It was one, when it was written.
                damaged.append(frame.offset)
        with self._lock:
            self._read += entries
            self.unread -= len(entries) + len(damaged)
            self._lose(len(damaged))
            self._unread_at = self._next_unread(segment, offset if data else segment.size)
            for place in damaged:
                self.spool.settle(segment, place)

    def _read_other(self, reader: SpoolReader, limit: int) -> int:
        damaged = reader.damaged
        try:
            found = reader.read(limit)
        except OSError as error:
            reader.rests = True
            self._unreadable = str(worded(f"what process {reader.path.name} has in it can't be read", error))
            return 0
        with self._lock:
            self._found += (
                Entry(0, each.record.schema, each.record, each.segment, each.offset, reader) for each in found
            )
            self.damaged += reader.damaged - damaged
            if reader.settled:
                self._readers.remove(reader)
        return len(found)

    # With the lock held again.

    def _next_unread(self, segment: Segment, offset: int) -> tuple[Segment, int] | None:
        """Return where reading goes on: at once in the next segment, as a settled one goes."""
        if not self.unread:
            return None
        if offset < segment.size:
            return segment, offset
        following = self.spool.following(segment)
        if following is None:  # somebody has cut a file off
            self._lose(self.unread)
            self.unread = 0
            self.spool.seal()
            return None
        return following, 0

    def _sweep(self) -> None:
        if self._unread_at is not None and self.unread:
            segment = self._unread_at[0]
            # What is left of it was no record, and is settled too.
            if segment.sealed and not segment.unsettled and (following := self.spool.following(segment)) is not None:
                self._unread_at = following, 0
        self.spool.sweep()

    def _lose(self, count: int) -> None:
        self.damaged += count
        self.taken += count
        self.settled += count

    def _hold(self, captured: Captured, *, synced: bool) -> None:
        place = self.spool.append(captured_frame(PROVISIONAL, captured), on_disk=True, synced=synced)
        self._held.setdefault(captured.id, []).append(place)

    def _note_gap(self) -> None:
        with suppress(SpoolError):  # then it is in memory only
            self.spool.note_gap(self._gap)
