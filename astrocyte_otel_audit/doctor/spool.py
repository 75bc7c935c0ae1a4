"""Checks of the spool: its directory, its disk, and what is in it. The directory isn't made: it is the service's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, ok, skipped, warning
from astrocyte_otel_audit.doctor.mounts import MOUNTS, mount_of, trouble_with
from astrocyte_otel_audit.pipeline.directory import LOCK, create
from astrocyte_otel_audit.pipeline.replay import ProcessStatus, status

_AS_SERVICE = "run doctor as the user that your service runs as"
_ELSEWHERE = f"name a directory of your own: {settings.PREFIX}SPOOL_DIR"
_REPLAY = "run `astrocyte-otel-audit spool replay`, or start a process with the same database and table"
#: Bytes and files without which nothing is written for long.
_LEAST_BYTES, _LEAST_FILES = 1 << 20, 100


def check_directory(examination: Examination) -> Iterator[Finding]:
    """Its directory can be made or is there, is this user's alone, and files in it are kept, synced and locked."""
    root = examination.spool
    if root is None:
        yield warning(
            "spool",
            "it is off: records wait in memory, and a killed process loses them",
            f"unset {settings.PREFIX}SPOOL_DIR",
        )
        return
    place = nearest(root)
    if not place.is_dir():
        yield failed("spool", f"{place} is no directory", _ELSEWHERE)
        return
    try:
        holds = _probe(place)
    except OSError as error:
        why = os.strerror(error.errno or errno.EIO)
        yield failed("spool", f"{place} can't be written to: {why}", f"{_AS_SERVICE}, or {_ELSEWHERE}")
        return
    if place != root:
        yield ok("spool", f"{root} will be made")
    else:
        yield from _owned(root)
    if holds:
        yield ok("spool-locks", "locks hold, and files are synced")
    else:
        yield failed(
            "spool-locks",
            "locks do not hold: a living process's records would be taken for a dead one's",
            "name a directory on a disk of this machine: " + settings.PREFIX + "SPOOL_DIR",
        )


def _owned(root: Path) -> Iterator[Finding]:
    found = root.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        yield warning(
            "spool",
            f"{root} is {_user(found.st_uid)}'s, and this is {_user(os.geteuid())}: what is said here is not what your "
            "service will see",
            _AS_SERVICE,
        )
    elif mode & 0o077:
        yield warning("spool", f"{root} is open to other users (mode {mode:o})", f"chmod 700 {root}")
    else:
        yield ok("spool", f"{root} can be written to, by {_user(found.st_uid)} alone")


def nearest(path: Path) -> Path:
    """Return a path, or the nearest of its parents that exists."""
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _probe(place: Path) -> bool:
    """Do in a directory what the spool does, and say whether a lock keeps others out.

    Raises:
        OSError: a directory or file can't be made, written, synced or renamed there.
    """
    # A name that the spool takes for a process's own which died while it made it, should this be killed.
    made = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    try:
        descriptor = create(made / LOCK)
        try:
            os.write(descriptor, b"doctor\n")
            os.fsync(descriptor)
            return _locks_hold(descriptor, made / LOCK)
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            (made / LOCK).unlink(missing_ok=True)
        made.rmdir()


def _locks_hold(descriptor: int, path: Path) -> bool:
    other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # as where there are no locks at all
        return False
    finally:
        os.close(other)
    return False


def check_disk(examination: Examination) -> Iterator[Finding]:
    """There is room for as much as a process may have in it."""
    if examination.spool is None:
        return
    found = os.statvfs(nearest(examination.spool))
    free, wanted = found.f_bavail * found.f_frsize, examination.value("spool_max_bytes")
    what = f"{_size(free)} are free, and a process may take {_size(wanted)}"
    advice = f"free some, or lower {settings.PREFIX}SPOOL_MAX_BYTES"
    if free < _LEAST_BYTES:
        yield failed("spool-disk", what, advice)
    elif found.f_files and found.f_favail < _LEAST_FILES:
        yield failed(
            "spool-disk", f"{found.f_favail} more files can be made", "remove files: the disk is out of inodes"
        )
    elif free < wanted:
        yield warning("spool-disk", what, advice)
    else:
        yield ok("spool-disk", what)


def _size(number: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 10_000:
            return f"{number:,} {unit}"
        number //= 1024
    return f"{number:,} TiB"


def check_file_system(examination: Examination) -> Iterator[Finding]:
    """It is on a disk of this machine that outlives the process, the container and the machine's restart."""
    if examination.spool is None:
        return
    try:
        mount = mount_of(nearest(examination.spool).resolve(), MOUNTS.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        mount = None
    if mount is None:
        yield skipped(
            "spool-filesystem", "this system doesn't say which it is", "see that it is a disk of this machine's own"
        )
    elif (trouble := trouble_with(mount.type)) is not None:
        yield warning("spool-filesystem", *trouble)
    else:
        yield ok("spool-filesystem", f"it is {mount.type}, mounted at {mount.point}")


def check_what_is_left(examination: Examination) -> Iterator[Finding]:
    """Nothing waits in it that nobody writes, nothing could not be accepted, and nothing is damaged."""
    root = examination.spool
    if root is None:
        return
    processes = list(status(root))
    inspector = examination.inspector
    yield _left(processes, None if inspector is None else inspector.destination)
    missing = sum(process.missing for process in processes)
    if missing:
        yield warning(
            "spool-gaps", f"{missing:,} records could not be accepted, and the table doesn't say so yet", _REPLAY
        )
    else:
        yield ok("spool-gaps", "no record was refused that the table doesn't know of")
    kept = len(list(root.glob("damaged-*")))
    # A living process may be about to write its last line.
    damaged = sum(process.damaged for process in processes if not process.alive)
    if kept or damaged:
        yield warning(
            "spool-damaged",
            f"{damaged:,} lines can't be read, and {kept:,} files of such lines are kept",
            f"look at {root}/damaged-*, and remove them when you have; then look at that disk",
        )
    else:
        yield ok("spool-damaged", "no line is damaged")


def _left(processes: list[ProcessStatus], destination: str | None) -> Finding:
    ended = [process for process in processes if not process.alive and (process.records or process.begun)]
    alive = sum(process.alive for process in processes)
    if not ended:
        return ok("spool-left", "no ended process has left anything" + (f"; {alive} live" if alive else ""))
    records = sum(process.records + process.begun for process in ended)
    oldest = min((process.oldest for process in ended if process.oldest is not None), default=None)
    since = f", the oldest of {oldest:%Y-%m-%d %H:%M} UTC" if oldest is not None else ""
    advice = _REPLAY
    if destination is not None and any(process.destination != destination for process in ended):
        advice += "; what is for another one needs --any-destination, or its --dsn and --table"
    return warning("spool-left", f"{records:,} records of {len(ended)} ended processes wait{since}", advice)
