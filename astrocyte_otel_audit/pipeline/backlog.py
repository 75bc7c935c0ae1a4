"""The backlog: what was accepted and is not settled. On disk where there is a spool, in memory up to a limit."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final

from astrocyte_otel_audit.pipeline.adoption import Orphan, adopt
from astrocyte_otel_audit.pipeline.segment import (
    INTENT,
    PIECE_BYTES,
    RECORD,
    Segment,
    frames,
    parse_record,
    record_frame,
)
from astrocyte_otel_audit.pipeline.spool import Spool, SpoolError, SpoolFullError, in_words
from astrocyte_otel_audit.record import AuditRecord, ns_from_datetime, record_id

#: Action of the row that stands for operations that could not be accepted.
GAP_ACTION: Final = "audit.gap"
#: Most records are smaller in the spool.
_RECORD_BYTES = 1024


@dataclass(slots=True, eq=False)
class Entry:
    """An accepted record on its way to the table."""

    #: Place in the order in which entries were taken, counted from 0.
    number: int
    schema: str | None
    #: None where it is on disk only; `Backlog.load` reads it.
    record: AuditRecord | None
    #: Where it is on disk; None for one that is in memory only.
    segment: Segment | None = None
    #: Negative for a record that can't be read there again.
    offset: int = 0
    #: The dead process's directory that it was found in.
    orphan: Orphan | None = None


class Backlog:
    """A first-in, first-out queue of records.

    Args:
        spool: where records are kept; None for memory only, which survives an absent database and no more.
        memory_limit: records that are kept in memory. Further ones are in the spool only and are read back in
            their order, or are refused where there is none.
        lock: its users hold it around every call, but for those that read files and take it themselves.
    """

    def __init__(self, spool: Spool | None, *, memory_limit: int, lock: AbstractContextManager[Any]) -> None:
        self.spool = spool
        self._memory_limit = memory_limit
        self._lock = lock
        self._window: deque[Entry] = deque()
        #: Entries whose records are in memory, wherever they are by now.
        self._in_memory = 0
        #: Records that are in the spool only, and where the oldest of them is to be read.
        self._spilled = 0
        self._spill_at: tuple[Segment, int] | None = None
        #: Operations that have begun and must leave a row, by the id of that row.
        self._begun: dict[str, Segment] = {}
        #: What dead processes left, and what was read of it and not taken.
        self._orphans: list[Orphan] = []
        self._found: deque[Entry] = deque()
        self._gap: AuditRecord | None = None
        self._gaps = 0
        #: Records accepted, taken out of here, and done with, whatever became of them. Those
        #: that dead processes left are accepted when they are taken.
        self.accepted = self.taken = self.settled = 0
        #: Records refused, found in what dead processes left, and lost as their place in the spool is damaged.
        self.refused = self.adopted = self.damaged = 0
        #: Why the spool did not take a record; None while it does.
        self.trouble: str | None = None

    def __len__(self) -> int:
        """Return how many were not taken yet, without those that dead processes left."""
        return len(self._window) + self._spilled

    def has_room(self) -> bool:
        """Say whether a record would be accepted now."""
        return self._in_memory < self._memory_limit if self.spool is None else self.spool.has_room(_RECORD_BYTES)

    def begin(self, record: AuditRecord) -> bool:
        """Put the intent of an operation on the disk, synced, and promise its record a place.

        Returns:
            False where that can't be done.
        """
        if self.spool is None or not self.has_room():
            return False
        try:
            segment, _ = self.spool.append(record_frame(record, INTENT), durable=True)
        except SpoolError as error:
            self.trouble = str(error)
            return False
        self._begun[record.id] = segment
        return True

    def has_begun(self, record_id: str) -> bool:
        """Say whether a record has been promised a place."""
        return record_id in self._begun

    def append(self, record: AuditRecord) -> bool:
        """Accept a record, or count it in the gap. Once it returns True, it survives what the spool survives."""
        begun = self._begun.get(record.id) if self._begun else None
        if not self._push(record, promised=begun is not None):
            self._widen_gap(record)
            return False
        if begun is not None and self.spool is not None:
            del self._begun[record.id]
            self.spool.settle(begun)
        return True

    @property
    def has_gap(self) -> bool:
        """Whether records were refused of which no record says so yet."""
        return self._gap is not None

    def close_gap(self) -> bool:
        """Turn what was refused into a record that says so; False where nothing was, or there is no room yet."""
        if self._gap is None or not self.has_room() or not self._push(self._gap, promised=True):
            return False
        self._gap = None
        self._note_gap()
        return True

    def take(self, limit: int) -> list[Entry]:
        """Return the oldest entries in memory, at most `limit`. They stay the backlog's concern until settled."""
        taken = [self._window.popleft() for _ in range(min(limit, len(self._window)))]
        if not self._spilled:
            found = [self._found.popleft() for _ in range(min(limit - len(taken), len(self._found)))]
            taken += found
            self.accepted += len(found)
            self.adopted += len(found)
        for number, entry in enumerate(taken, self.taken):
            entry.number = number
        self.taken += len(taken)
        return taken

    def settle(self, entries: Iterable[Entry]) -> None:
        """Forget entries that were taken. MUST only be called once each is in the table, or counted as lost."""
        for entry in entries:
            self.settled += 1
            if entry.record is not None:
                self._in_memory -= 1
            if entry.orphan is not None and entry.segment is not None:
                entry.orphan.settle(entry.segment)
                if entry.orphan.settled:
                    self._orphans.remove(entry.orphan)
            elif entry.segment is not None and self.spool is not None:
                self.spool.settle(entry.segment)

    def drop(self, entry: Entry) -> bool:
        """Keep an entry on disk only; False where it is nowhere else."""
        if entry.segment is None or entry.offset < 0:
            return False
        if entry.record is not None:
            entry.record = None
            self._in_memory -= 1
        return True

    def close(self) -> None:
        """Let go of the files. What is not settled stays on disk, for another process."""
        for orphan in self._orphans:
            orphan.close()
        self._orphans.clear()
        if self.spool is not None and not self._begun:  # else their records are still to come, for another process
            self.spool.close()

    def after_fork(self) -> None:
        """Close in a child what is the parent's; the child has to make a backlog of its own."""
        for orphan in self._orphans:
            orphan.close()
        if self.spool is not None:
            self.spool.after_fork()

    # What follows reads files, on the writer's thread, and takes the lock itself for as short as it can.

    def refill(self, limit: int) -> None:
        """Bring what is on disk only into memory, so that `take` finds about `limit` entries."""
        with self._lock:
            at, wanted = self._spill_at, min(limit - len(self._window), self._spilled)
        if at is not None and wanted > 0:
            self._read_back(at, wanted)
        with self._lock:
            missing = limit - len(self._window) - len(self._found)
            orphan = next((orphan for orphan in self._orphans if not orphan.exhausted), None)
        if orphan is not None and missing > 0:
            self._read_orphan(orphan, missing)

    def load(self, entries: Sequence[Entry]) -> None:
        """Have the entries' records in memory. One that can't be read any more stays None, and is counted."""
        for entry in entries:
            if entry.record is None and entry.segment is not None:
                entry.record = entry.segment.record_at(entry.offset)
                with self._lock:
                    self._in_memory += entry.record is not None
                    self.damaged += entry.record is None

    def unsettled(self) -> int:
        """Return how many accepted records are not settled."""
        return self.accepted - self.settled

    def has_found(self) -> bool:
        """Say whether something that dead processes left is still to be taken. Needs no lock."""
        return bool(self._found) or any(not orphan.exhausted for orphan in self._orphans)

    def adopt(self) -> list[str]:
        """Look for what dead processes have left for the same destination; return the names of what was found.

        Raises:
            SpoolError: there is no looking.
        """
        if self.spool is None:
            return []
        with in_words("what ended processes have left can't be looked at"):
            found = list(adopt(self.spool.root, self.spool.destination))
        with self._lock:
            self._orphans += found
        return [orphan.path.name for orphan in found]

    def _read_back(self, at: tuple[Segment, int], wanted: int) -> None:
        """Read the oldest records that are in the spool only. Meanwhile their number can only grow."""
        segment, offset = at
        entries: list[Entry] = []
        damaged = 0
        data = segment.read(offset, PIECE_BYTES)
        for frame in frames(data, offset):
            if len(entries) + damaged == wanted:
                break
            offset = frame.end
            record = parse_record(frame.content) if frame.kind == RECORD else None
            if record is not None:
                entries.append(Entry(0, record.schema, record, segment, frame.offset))
            elif not frame.kind or frame.kind == RECORD:  # it was one, when it was written
                damaged += 1
        with self._lock:
            self._window += entries
            self._in_memory += len(entries)
            self._spilled -= len(entries) + damaged
            self.damaged += damaged
            self.taken += damaged
            self.settled += damaged
            self._spill_at = self._next_spilled(segment, offset if data else segment.size)
            if self.spool is not None:
                for _ in range(damaged):
                    self.spool.settle(segment)

    def _read_orphan(self, orphan: Orphan, limit: int) -> None:
        try:
            with in_words(f"what process {orphan.path.name} has left can't be read"):
                found = orphan.read(limit)
        except SpoolError as error:
            self.trouble = str(error)
            orphan.close()
            orphan.exhausted, found = True, []
        with self._lock:
            self._found += (
                Entry(0, each.record.schema, each.record, each.segment, each.offset, orphan) for each in found
            )
            self._in_memory += len(found)
            if orphan.exhausted:
                self.damaged += orphan.damaged
                if orphan.settled:
                    self._orphans.remove(orphan)

    # With the lock held again.

    def _next_spilled(self, segment: Segment, offset: int) -> tuple[Segment, int] | None:
        """Return where reading back goes on: at once in the next segment, as a settled one goes."""
        if self.spool is None or not self._spilled:
            return None
        if offset < segment.size:
            return segment, offset
        following = self.spool.segments[self.spool.segments.index(segment) + 1 :]
        if not following:  # somebody has cut a file off
            self.damaged, self.taken = self.damaged + self._spilled, self.taken + self._spilled
            self.settled, self._spilled = self.settled + self._spilled, 0
            return None
        return following[0], 0

    def _push(self, record: AuditRecord, *, promised: bool = False) -> bool:
        segment, offset = None, 0
        if self.spool is not None:
            try:
                segment, offset = self.spool.append(record_frame(record), promised=promised)
                self.trouble = None
            except SpoolFullError as error:
                self.trouble = str(error)
                return False
            except SpoolError as error:  # a disk that fails, not a cap that was set: better in memory than nowhere
                self.trouble = str(error)
        fits_in_memory = not self._spilled and self._in_memory < self._memory_limit
        if segment is None and not fits_in_memory:
            return False
        self.accepted += 1
        if fits_in_memory:
            self._window.append(Entry(0, record.schema, record, segment, offset))
            self._in_memory += 1
        elif segment is not None:
            if not self._spilled:
                self._spill_at = (segment, offset)
            self._spilled += 1
        return True

    def _widen_gap(self, record: AuditRecord) -> None:
        self.refused += 1
        end = record.ended_at or record.started_at
        gap = self._gap
        if gap is None:
            self._gaps += 1
            identity = record_id(int.from_bytes(os.urandom(16)), self._gaps, ns_from_datetime(record.started_at))
            gap = AuditRecord(
                identity, GAP_ACTION, "system", None, record.started_at, end, None, None, {"missing": 0}, "unknown",
                None, "astrocyte-otel-audit", "system", None, None, None, None, record.service_name,
            )  # fmt: skip
        until = max(gap.ended_at or end, end)
        metadata = {"missing": gap.metadata["missing"] + 1, "reason": self.trouble or "the queue is full"}
        since = min(gap.started_at, record.started_at)
        self._gap = gap._replace(started_at=since, ended_at=until, metadata=metadata)
        self._note_gap()

    def _note_gap(self) -> None:
        if self.spool is not None:
            with suppress(SpoolError):  # then it is in memory only
                self.spool.note_gap(self._gap)
