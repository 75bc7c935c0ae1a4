"""The spool: what this process has accepted is in a file of its own before the application's call returns.

Its segments are pieces of one queue. One goes once everything in it is settled. What a dead process leaves is another
one's to adopt (`adoption.py`). A file that was written survives the process, however it ends; what survives the machine
is up to the file system and to `sync`. Where there is no disk, or while it fails, segments are in memory.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.pipeline.directory import SUFFIX, ProcessDirectory, SpoolError, create, in_words, worded
from astrocyte_otel_audit.pipeline.segment import (
    PIECE_BYTES,
    RECORD,
    FileSegment,
    MemorySegment,
    Segment,
    captured_frame,
    header_frame,
    padded,
)

#: When a file is synced to its disk: never, about once a second by the writer, or before each call returns.
Fsync: TypeAlias = Literal["never", "interval", "always"]

_GAP_BYTES: Final = 2048
#: A segment that has grown to this is followed by the next. A killed process's last ones are written once more.
_SEGMENT_BYTES = 4 * 1024 * 1024
_SYNC_SECONDS = 1.0
#: How long a disk that has failed isn't asked again.
_RETRY_SECONDS = 1.0


class SpoolFullError(SpoolError):
    """The spool has reached its cap."""


class Spool:
    """The segments of this process. Its users hold a lock of their own; the directory is made when it is first needed.

    Args:
        root: the spool's directory, shared with other processes; made if it isn't there. None for memory only.
        destination: where the operations belong; a process with another one leaves them alone.
        max_bytes: that this process's files may have.
        max_in_memory: operations that may be in memory, where there is no disk for them.
        fsync: when files are synced.
        cleared_by_others: another process writes what is in it, and clears away files that don't grow any more.
        keep_seconds: how long a file stays after all of it is settled, for `kept`.
        segment_bytes: that a file may have before the next is begun.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        root: Path | None,
        destination: str,
        *,
        max_bytes: int,
        max_in_memory: int,
        fsync: Fsync = "interval",
        cleared_by_others: bool = False,
        keep_seconds: float = 0.0,
        segment_bytes: int = _SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self.destination = destination
        self._max_bytes = max_bytes
        self._max_in_memory = max_in_memory
        self._fsync: Fsync = fsync
        self._cleared_by_others = cleared_by_others
        self._keep_seconds = keep_seconds
        self._segment_bytes = min(segment_bytes, max(1, max_bytes // 4))
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        #: The process's own directory, once it has one.
        self._directory: ProcessDirectory | None = None
        #: Those that hold something unsettled, oldest first, and the file that grows, if the last is one that does.
        self.segments: list[Segment] = []
        self._growing: FileSegment | None = None
        #: Files of which all is settled, with the time when they go.
        self._kept: deque[tuple[float, FileSegment]] = deque()
        self._kept_bytes = 0
        #: Set while somebody reads the files that are kept.
        self.is_being_read = False
        #: Bytes in its files, and operations in memory.
        self.bytes = self.in_memory = 0
        #: What keeps it from being written, for as long as it does.
        self.trouble: str | None = None
        self._fails = self._unsynced = False
        self._retry_at = 0.0
        self._number = 0
        self._gap: Captured | None = None
        self._synced_at = self._clock()

    def has_room(self, size: int = 0) -> bool:
        """Say whether that many bytes fit under the cap."""
        if self.root is None:
            return self.in_memory < self._max_in_memory
        return self.has_room_on_disk(size) and not (self._fails and self.in_memory >= self._max_in_memory)

    def has_room_on_disk(self, size: int = 0) -> bool:
        """Say whether that many bytes fit under the cap, if the disk takes them."""
        # What is kept goes as soon as nobody reads it.
        return self.root is not None and self.bytes - self._kept_bytes + size <= self._max_bytes

    def append(
        self, line: bytes, *, promised: bool = False, on_disk: bool = False, synced: bool = False
    ) -> tuple[Segment, int]:
        """Write one frame. When it returns, the frame survives the end of this process, unless there is `trouble`.

        Args:
            line: the frame.
            promised: there is room for it, whatever the cap says.
            on_disk: not in memory, however things stand.
            synced: sync it to the disk, whatever the policy says.

        Returns:
            The segment, with one unsettled operation more, and the frame's offset in it.

        Raises:
            SpoolError: nothing of it was written.
        """
        root, size = self.root, len(line)
        if root is None:
            if on_disk:
                raise SpoolError("it is in memory")
            return self._append_in_memory(line, promised)
        if self.bytes + size > self._max_bytes:
            self.expire(size)
        if not promised and not self.has_room_on_disk(size):
            self.trouble = f"it is full: {self._max_bytes} bytes (spool_max_bytes)"
            raise SpoolFullError(self.trouble)
        if self._fails and not on_disk and self._clock() < self._retry_at:
            return self._append_in_memory(line, promised)
        try:  # and not in_words(), which would cost each call a microsecond
            segment = self._growing or self._next_file(root)
            offset = segment.append(line)
            is_synced = self._sync_now(segment, offset) if synced or self._fsync == "always" else True
            if on_disk and not is_synced:
                raise OSError(errno.EIO, "")
        except OSError as error:
            trouble = worded("it can't be written", error)
            self.trouble, self._fails, self._retry_at = str(trouble), True, self._clock() + _RETRY_SECONDS
            self.seal()  # whatever has come of it, nothing is to follow
            if on_disk:
                raise trouble from None
            return self._append_in_memory(line, promised)  # a disk that fails, not a cap: better there than nowhere
        self.trouble, self._fails = None if is_synced else "it can't be synced", False
        self.bytes += size
        self._unsynced = True
        segment.unsettled += 1
        if segment.size >= self._segment_bytes:
            segment.sealed = True
            self._growing = None
        return segment, offset

    def settle(self, segment: Segment, offset: int) -> None:
        """Take one operation of a segment for settled."""
        segment.settle(offset)
        if isinstance(segment, MemorySegment):
            self.in_memory -= 1

    def sweep(self) -> None:
        """Let sealed segments go in which everything is settled. MUST be called where nobody reads meanwhile."""
        for segment in [segment for segment in self.segments if segment.sealed and not segment.unsettled]:
            self._remove(segment)

    def following(self, segment: Segment) -> Segment | None:
        """Return the next newer segment, if there is one."""
        later = self.segments[self.segments.index(segment) + 1 :]
        return later[0] if later else None

    def seal(self) -> None:
        """Let nothing come into the last segment any more: it would be read before what is in the next."""
        self._growing = None
        if self.segments:
            self.segments[-1].sealed = True

    @property
    def keeps(self) -> bool:
        """Whether files stay for a while after all of it is settled."""
        return self._keep_seconds > 0

    @property
    def settled(self) -> list[FileSegment]:
        """The files that hold what is settled: those that are kept, and at the end those that hold other things too."""
        return [segment for _, segment in self._kept] + [
            each for each in self.segments if isinstance(each, FileSegment)
        ]

    def expire(self, wanted: int = 0) -> None:
        """Remove files that were kept for long enough, and as many more as make room for some bytes."""
        if self.is_being_read:
            return
        now = self._clock()
        while self._kept and (self._kept[0][0] <= now or self.bytes + wanted > self._max_bytes):
            segment = self._kept.popleft()[1]
            self.bytes -= segment.size
            self._kept_bytes -= segment.size
            segment.remove()

    def note_gap(self, gap: Captured | None) -> None:
        """Keep the operation that stands for what was refused in a file of its own, in place of the one before.

        Its room is taken when the directory is made, so that it is there when the disk is full.

        Raises:
            SpoolError: it can't be written.
        """
        if self.root is not None:
            self._gap = gap
            with in_words("its gap can't be written"):
                self._own_directory(self.root).write_gap(_gap_lines(self.destination, gap))

    def sync(self) -> None:
        """Sync what was written, where that is due. Needs no lock, but none of its files may go meanwhile.

        Raises:
            SpoolError: a file can't be synced.
        """
        if not self._unsynced or self._fsync != "interval" or self._clock() - self._synced_at < _SYNC_SECONDS:
            return
        self._unsynced, self._synced_at = False, self._clock()  # first: what is written meanwhile is for the next time
        with in_words("it can't be synced"):
            for segment in self._files():
                if segment.synced < (size := segment.size):
                    os.fdatasync(segment.descriptor)
                    segment.synced = size

    def missing(self) -> list[FileSegment]:
        """Return the segments whose files were deleted or moved. Needs no lock, but where others clear them away.

        Raises:
            SpoolError: they can't be looked at.
        """
        missing: list[FileSegment] = []
        with in_words("its files can't be looked at"):
            for segment in self._files():
                if segment.is_in_place():
                    continue
                if self._cleared_by_others and segment.sealed:
                    self._remove(segment)
                else:
                    missing.append(segment)
        return missing

    def put_back(self, missing: list[FileSegment]) -> None:
        """Write files again, from their open descriptors, which still have all of them.

        Raises:
            SpoolError: they can't be written.
        """
        if self.root is None:
            return
        with in_words("files of it were deleted or moved, and can't be put back"):
            directory = self._own_directory(self.root)
            for segment in missing:
                segment.path = directory.path / segment.path.name
                segment.path.unlink(missing_ok=True)  # from an attempt that failed
                again = create(segment.path)
                try:
                    for offset in range(0, segment.size, PIECE_BYTES):
                        piece = os.pread(segment.descriptor, min(PIECE_BYTES, segment.size - offset), offset)
                        if os.write(again, piece) < len(piece):
                            raise OSError(errno.ENOSPC, "")
                    os.dup2(again, segment.descriptor, inheritable=False)
                    segment.synced = 0
                finally:
                    os.close(again)

    @property
    def path(self) -> Path | None:
        """The process's own directory, once it has one."""
        return None if self._directory is None else self._directory.path

    def end(self) -> tuple[int, int]:
        """Return where what was written so far ends: the number of its last file, and the size of that."""
        files = self._files()
        return (files[-1].number, files[-1].size) if files else (0, 0)

    def close(self) -> None:
        """Close everything. What is settled goes; what isn't stays, for another process to adopt."""
        for segment in list(self.segments):
            if segment.unsettled:
                segment.close()
            else:
                self._remove(segment)
        for _, segment in self._kept:
            segment.remove()
        if self._directory is not None:
            if not self._files() and self._gap is None:
                self._directory.remove()
            self._directory.close()
        self._begin()

    def after_fork(self) -> None:
        """Close in a child what is the parent's. A lock is the parent's until the parent closes it too."""
        for segment in (*self.segments, *(segment for _, segment in self._kept)):
            segment.close()
        if self._directory is not None:
            self._directory.close()
        self._begin()

    def _append_in_memory(self, line: bytes, promised: bool) -> tuple[Segment, int]:
        if self.in_memory >= self._max_in_memory and not promised:
            raise SpoolFullError(self.trouble or f"{self._max_in_memory} wait (max_queue_size)")
        last = self.segments[-1] if self.segments else None
        if not isinstance(last, MemorySegment):
            self.seal()
            last = MemorySegment()
            self.segments.append(last)
        offset = last.append(line)
        last.unsettled += 1
        self.in_memory += 1
        return last, offset

    def _next_file(self, root: Path) -> FileSegment:
        directory = self._own_directory(root)
        self._number += 1  # first: what an interrupt leaves has a name that is taken
        path = directory.path / f"{self._number:06d}{SUFFIX}"
        segment = FileSegment(path, create(path))
        try:
            segment.append(header_frame(self.destination, is_left_to_others=self._cleared_by_others))
        except BaseException:
            segment.remove()
            raise
        self.bytes += segment.size
        self.seal()
        self.segments.append(segment)
        self._growing = segment
        return segment

    def _files(self) -> list[FileSegment]:
        return [segment for segment in list(self.segments) if isinstance(segment, FileSegment)]

    def _own_directory(self, root: Path) -> ProcessDirectory:
        if self._directory is not None and not self._directory.path.is_dir():  # somebody has taken it away
            self._directory.close()
            self._directory = None
        if self._directory is None:
            self._directory = ProcessDirectory(root, _gap_lines(self.destination, self._gap))
        return self._directory

    def _sync_now(self, segment: FileSegment, offset: int) -> bool:
        """Sync what was written from an offset on; False where it can neither be synced nor taken back."""
        try:
            os.fdatasync(segment.descriptor)
        except BaseException as error:  # then it isn't to be found later either
            try:
                segment.take_back(offset)
            except OSError:
                if isinstance(error, OSError):
                    return False
            raise
        return True

    def _remove(self, segment: Segment) -> None:
        self.segments.remove(segment)
        if isinstance(segment, FileSegment):
            if self._keep_seconds and not self._cleared_by_others:
                self._kept.append((self._clock() + self._keep_seconds, segment))
                self._kept_bytes += segment.size
                return
            self.bytes -= segment.size
        segment.remove()


def _gap_lines(destination: str, gap: Captured | None) -> bytes:
    """Return a file of always the same size, so that the next one covers all of it."""
    header = header_frame(destination)
    line = header if gap is None else captured_frame(RECORD, gap)
    return header + (padded(line, _GAP_BYTES) or padded(header, _GAP_BYTES) or b"")
