"""Directories: one below the spool's for each process that uses it, and the lock that says whether that process lives.

    spool/4242-9f3a1c22/lock             locked for as long as the process lives, and the only sign of life
    spool/4242-9f3a1c22/000001.segment   operations, see `segment.py`
    spool/4242-9f3a1c22/gap.segment      an operation that says how many could not be accepted, if there are any
    spool/4242-9f3a1c22/acknowledged     how far another process has written its operations, where one does

The kernel lets go of a lock when its process ends, however it ends; a process id could be somebody else's by now.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from astrocyte_otel_audit.errors import AuditError
from astrocyte_otel_audit.pipeline.segment import HEADER, Header, frames, parse_header

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

LOCK: Final = "lock"
SUFFIX: Final = ".segment"
GAP: Final = "gap.segment"
ACKNOWLEDGED: Final = "acknowledged"
#: A directory is locked within microseconds of its making, or its process has died in between.
_UNFINISHED_SECONDS = 60.0


class SpoolError(AuditError):
    """An operation could not be put into the spool. The message says why, to a person."""


class ProcessDirectory:
    """The directory of this process, locked. Its users hold a lock of their own.

    Args:
        root: the spool's directory; made if it isn't there.
        gap: what its gap's file holds at first. That file never grows, so that there is room for it on a full disk.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, root: Path, gap: bytes) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        # Under another name until it is locked, or it would look like a dead process's.
        hidden, self.path = root / f".{token}", root / token
        hidden.mkdir(mode=0o700)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, hidden, ignore_errors=True)
            self._lock = create(hidden / LOCK)
            undo.callback(os.close, self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._gap = create(hidden / GAP, appending=False)  # it is written over
            undo.callback(os.close, self._gap)
            self.write_gap(gap)
            hidden.rename(self.path)
            undo.pop_all()

    def write_gap(self, gap: bytes) -> None:
        """Write over what the gap's file holds. Raises OSError where it can't."""
        if os.pwrite(self._gap, gap, 0) < len(gap):
            raise OSError(errno.ENOSPC, "")

    def close(self) -> None:
        """Unlock it, as the end of the process would. In a forked child, the lock stays the parent's."""
        os.close(self._lock)
        os.close(self._gap)

    def remove(self) -> None:
        """Remove it with what belongs to the spool in it, unless somebody has put something of theirs into it."""
        with contextlib.suppress(OSError):
            (self.path / GAP).unlink(missing_ok=True)
            remove(self.path)


def remove(path: Path) -> None:
    """Remove a process's directory, which holds no segment any more.

    Raises:
        OSError: something else is in it, or it is gone.
    """
    (path / ACKNOWLEDGED).unlink(missing_ok=True)
    (path / LOCK).unlink(missing_ok=True)
    path.rmdir()


def create(path: Path, *, appending: bool = True) -> int:
    """Make a file that nobody else may read, and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(path, flags | os.O_APPEND if appending else flags, 0o600)


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


def check(root: Path) -> None:
    """Make the spool's directory, so that what keeps it from being used is known early.

    Raises:
        SpoolError: it can't be used.
    """
    if fcntl is None:
        raise SpoolError("this system has no file locks that end with their process")
    with in_words("its directory can't be made"):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise SpoolError("its directory can't be written to")


def directories(root: Path) -> list[Path]:
    """Return the directories of the processes that use a spool, or did."""
    with contextlib.suppress(OSError):
        # One that begins with a dot isn't locked yet.
        return [path for path in root.iterdir() if path.name[0] != "." and (path / LOCK).is_file()]
    return []


def clear_unfinished(root: Path) -> None:
    """Remove what processes have left that died while they made their directory."""
    for path in root.glob(".*-*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or nothing of ours
            if time.time() - path.stat().st_mtime < _UNFINISHED_SECONDS:
                continue
            lock = try_lock(path / LOCK)
            try:
                if lock is not None or not (path / LOCK).exists():
                    (path / GAP).unlink(missing_ok=True)
                    remove(path)
            finally:
                if lock is not None:
                    os.close(lock)


def header_of(path: Path) -> Header | None:
    """Return what the segments of a process's directory say of themselves, all alike; None where none can be read."""
    for segment in sorted(path.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError), segment.open("rb") as file:
            for frame in frames(file.readline()):
                if frame.kind == HEADER and (header := parse_header(frame.content)) is not None:
                    return header
    return None


def destination_of(path: Path) -> str | None:
    """Return where the operations of a process's directory belong; None where none of its segments says so."""
    header = header_of(path)
    return None if header is None else header.destination


@contextlib.contextmanager
def in_words(trouble: str) -> Iterator[None]:
    """Turn what the system says into a `SpoolError`, in words that name no path of somebody's."""
    try:
        yield
    except OSError as error:
        raise worded(trouble, error) from None


def worded(trouble: str, error: OSError) -> SpoolError:
    """Return what the system says as a `SpoolError`."""
    return SpoolError(f"{trouble}: {os.strerror(error.errno or errno.EIO)}")
