"""The spool: what this process has accepted is in a file of its own before the application's call returns.

A spool directory has a directory for each process that uses it::

    spool/4242-9f3a1c22/lock             locked for as long as the process lives, and the only sign of life
    spool/4242-9f3a1c22/000001.segment   records, see `segment.py`
    spool/4242-9f3a1c22/gap.segment      a record that says how many could not be accepted, if there are any

A segment goes once every record in it is settled. What a dead process leaves is another one's to adopt
(`adoption.py`). A file that was written survives the process, however it ends; what survives the machine is up to
the file system and to `sync`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias

from astrocyte_otel_audit.pipeline.segment import PIECE_BYTES, Segment, header_frame, padded, record_frame
from astrocyte_otel_audit.record import AuditRecord

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

#: When a file is synced to its disk: never, about once a second by the writer, or before each call returns.
Fsync: TypeAlias = Literal["never", "interval", "always"]

LOCK: Final = "lock"
SUFFIX: Final = ".segment"
GAP: Final = "gap.segment"
_GAP_BYTES = 2048
#: A segment that has grown to this is followed by the next. A killed process's last ones are written once more.
_SEGMENT_BYTES = 4 * 1024 * 1024
_SYNC_SECONDS = 1.0


class SpoolError(Exception):
    """A record could not be put into the spool. The message says why, to a person."""


class SpoolFullError(SpoolError):
    """The spool has reached its cap."""


class Spool:
    """The files of this process. Its users hold a lock of their own; the directory is made when it is first needed.

    Args:
        root: the spool's directory, shared with other processes; made if it isn't there.
        destination: where the records belong; a process with another one leaves them alone.
        max_bytes: that this process's files may have.
        fsync: when files are synced.
        segment_bytes: that a file may have before the next is begun.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        destination: str,
        *,
        max_bytes: int,
        fsync: Fsync = "interval",
        segment_bytes: int = _SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self.destination = destination
        self._max_bytes = max_bytes
        self._fsync: Fsync = fsync
        self._segment_bytes = min(segment_bytes, max(1, max_bytes // 4))
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        #: The process's own directory, once it has one.
        self._path: Path | None = None
        self._lock: int | None = None
        self._gap: int | None = None
        self._has_gap = False
        #: Its segments that hold something unsettled, oldest first; the last one grows, unless it is sealed.
        self.segments: list[Segment] = []
        #: Bytes in them.
        self.bytes = 0
        self._number = 0
        self._unsynced = False
        self._synced_at = self._clock()

    def prepare(self) -> None:
        """Make the shared directory, so that what keeps it from being used is known early.

        Raises:
            SpoolError: it can't be used.
        """
        if fcntl is None:
            raise SpoolError("this system has no file locks that end with their process")
        with in_words("its directory can't be made"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(self.root, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError("its directory can't be written to")

    def has_room(self, size: int = 0) -> bool:
        """Say whether that many bytes fit under the cap."""
        return self.bytes + size <= self._max_bytes

    def append(self, line: bytes, *, durable: bool = False, promised: bool = False) -> tuple[Segment, int]:
        """Write one frame. When it returns, the frame survives the end of this process.

        Args:
            line: the frame.
            durable: sync it to the disk, whatever the policy says.
            promised: there is room for it, whatever the cap says.

        Returns:
            The segment, with one unsettled record more, and the frame's offset in it.

        Raises:
            SpoolError: nothing of it was written.
        """
        if not promised and not self.has_room(len(line)):
            raise SpoolFullError(f"it is full: {self._max_bytes} bytes (spool_max_bytes)")
        try:  # and not in_words(), which would cost each call a microsecond
            segment = self._current()
            offset = segment.size
            self._write(segment, line)
            if durable or self._fsync == "always":
                self._sync_now(segment, offset)
            else:
                self._unsynced = True
        except OSError as error:
            raise _worded("it can't be written", error) from None
        segment.unsettled += 1
        if segment.size >= self._segment_bytes:
            segment.sealed = True
        return segment, offset

    def settle(self, segment: Segment) -> None:
        """Take one record of a segment for settled; a sealed segment without any other goes."""
        segment.unsettled -= 1
        if segment.sealed and not segment.unsettled:
            self._remove(segment)

    def note_gap(self, gap: AuditRecord | None) -> None:
        """Keep the record that stands for what was refused in a file of its own, in place of the one before.

        Its room is taken when the directory is made, so that it is there when the disk is full.

        Raises:
            SpoolError: it can't be written.
        """
        with in_words("its gap can't be written"):
            if self._path is None:
                self._path = self._make_directory()
            if self._gap is not None:
                os.pwrite(self._gap, _gap_line(self.destination, gap), 0)
                self._has_gap = gap is not None

    def sync(self) -> None:
        """Sync what was written, where that is due. Needs no lock, but none of its files may go meanwhile.

        Raises:
            SpoolError: a file can't be synced.
        """
        if not self._unsynced or self._fsync != "interval" or self._clock() - self._synced_at < _SYNC_SECONDS:
            return
        self._unsynced, self._synced_at = False, self._clock()  # first: what is written meanwhile is for the next time
        with in_words("it can't be synced"):
            for segment in self.segments[-2:]:  # the one before may have been sealed since
                os.fdatasync(segment.descriptor)

    def missing(self) -> list[Segment]:
        """Return the segments whose files were deleted or moved. Needs no lock.

        Raises:
            SpoolError: they can't be looked at.
        """
        with in_words("its files can't be looked at"):
            return [segment for segment in list(self.segments) if not segment.is_in_place()]

    def put_back(self, missing: list[Segment]) -> None:
        """Write files again, from their open descriptors, which still have all of them.

        Raises:
            SpoolError: they can't be written.
        """
        with in_words("files of it were deleted or moved, and can't be put back"):
            if self._path is None or not self._path.is_dir():
                self._path = self._make_directory()
            for segment in missing:
                segment.path = self._path / segment.path.name
                again = _create(segment.path)
                try:
                    for offset in range(0, segment.size, PIECE_BYTES):
                        os.write(again, os.pread(segment.descriptor, min(PIECE_BYTES, segment.size - offset), offset))
                    os.dup2(again, segment.descriptor, inheritable=False)
                finally:
                    os.close(again)

    def close(self) -> None:
        """Close everything. What is settled goes; what isn't stays, for another process to adopt."""
        for segment in list(self.segments):
            if segment.unsettled:
                segment.close()
            else:
                self._remove(segment)
        if self._path is not None and not self.segments and not self._has_gap:
            with contextlib.suppress(OSError):  # somebody has put something of theirs into it, or taken it away
                (self._path / GAP).unlink(missing_ok=True)
                remove_directory(self._path)
        self._close_directory()
        self._begin()

    def after_fork(self) -> None:
        """Close in a child what is the parent's. A lock is the parent's until the parent closes it too."""
        for segment in self.segments:
            segment.close()
        self._close_directory()
        self._begin()

    def _current(self) -> Segment:
        if self.segments and not self.segments[-1].sealed:
            return self.segments[-1]
        if self._path is None:
            self._path = self._make_directory()
        self._number += 1
        path = self._path / f"{self._number:06d}{SUFFIX}"
        segment = Segment(path, _create(path))
        try:
            self._write(segment, header_frame(self.destination))
        except OSError:
            segment.remove()
            raise
        self.segments.append(segment)
        return segment

    def _write(self, segment: Segment, line: bytes) -> None:
        written = os.write(segment.descriptor, line)
        if written < len(line):  # the kernel takes what fits on the disk, and says no more
            os.ftruncate(segment.descriptor, segment.size)
            raise OSError(errno.ENOSPC, "")
        segment.size += written
        self.bytes += written

    def _sync_now(self, segment: Segment, offset: int) -> None:
        try:
            os.fdatasync(segment.descriptor)
        except OSError:  # then it isn't to be found later either
            os.ftruncate(segment.descriptor, offset)
            self.bytes -= segment.size - offset
            segment.size = offset
            raise

    def _remove(self, segment: Segment) -> None:
        self.segments.remove(segment)
        self.bytes -= segment.size
        segment.remove()

    def _make_directory(self) -> Path:
        # Under another name until it is locked, or it would look like a dead process's.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        hidden = self.root / f".{token}"
        hidden.mkdir(mode=0o700)
        lock = _create(hidden / LOCK)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gap = _create(hidden / GAP, appending=False)  # it is written over
        os.pwrite(gap, _gap_line(self.destination, None), 0)
        hidden.rename(self.root / token)
        self._close_directory()  # the one that this stands in for
        self._lock, self._gap = lock, gap
        return self.root / token

    def _close_directory(self) -> None:
        for descriptor in (self._lock, self._gap):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._gap = None


def _gap_line(destination: str, gap: AuditRecord | None) -> bytes:
    """Return one line of always the same size, so that the next one covers all of it."""
    if gap is not None and (line := padded(record_frame(gap), _GAP_BYTES)) is not None:
        return line
    return padded(header_frame(destination), _GAP_BYTES) or b""


def remove_directory(path: Path) -> None:
    """Remove a process's directory with what belongs to the spool in it.

    Raises:
        OSError: something else is in it, or it is gone.
    """
    (path / LOCK).unlink(missing_ok=True)
    path.rmdir()


def try_lock(path: Path) -> int | None:
    """Return a descriptor of a lock file, locked; None where its process lives, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _create(path: Path, *, appending: bool = True) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(path, flags | os.O_APPEND if appending else flags, 0o600)


@contextlib.contextmanager
def in_words(trouble: str) -> Iterator[None]:
    """Turn what the system says into a `SpoolError`, in words that name no path of somebody's."""
    try:
        yield
    except OSError as error:
        raise _worded(trouble, error) from None


def _worded(trouble: str, error: OSError) -> SpoolError:
    return SpoolError(f"{trouble}: {os.strerror(error.errno or 0)}")
