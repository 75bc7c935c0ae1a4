"""Checks of what `writer="external"` needs: a process that writes, and that it keeps up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, ok, warning
from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged
from astrocyte_otel_audit.pipeline.beside import written_for
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.pipeline.directory import (
    ACKNOWLEDGED,
    SUFFIX,
    directories,
    header_of,
)
from astrocyte_otel_audit.pipeline.handover import MISSED_SECONDS
from astrocyte_otel_audit.pipeline.segment import RECORD, frames, parse_captured

_RUN = "run `astrocyte-otel-audit writer`, as this user, for the same spool and destination"


def check_writer(examination: Examination) -> Iterator[Finding]:
    """Where another process shall write, one is at work for this spool and destination, and nothing waits for long."""
    if not examination.is_external:
        yield ok("writer", "each process writes its own records")
        return
    root = examination.spool
    if root is None:
        yield failed(
            "writer",
            "another process shall write, and finds nothing, as the spool is off",
            f"unset {settings.PREFIX}SPOOL_DIR, or {settings.PREFIX}WRITER",
        )
        return
    destination = examination.value("destination") or settings.DEFAULT_DESTINATION
    at_work = written_for(root)
    if destination in at_work:
        yield ok("writer", f"one is at work for {destination}")
    elif at_work:
        yield warning(
            "writer",
            f"the one that is at work writes nothing for {destination}: records wait in the spool",
            f"start it with --destination {destination} too",
        )
    else:
        yield warning("writer", "none is at work: records wait in the spool", _RUN)
    yield _waiting(root, destination, is_written=destination in at_work)


def _waiting(root: Path, destination: str, *, is_written: bool) -> Finding:
    late = [
        path
        for path in directories(root)
        if (header := header_of(path)) is not None
        and header.is_left_to_others
        and header.destination == destination
        and time.time() - _waiting_since(path) > MISSED_SECONDS
    ]
    if not late:
        return ok("writer-waiting", "no record has waited for a minute without any being written")
    advice = "look at what the writer says: Postgres may be away, or a tenant's table missing" if is_written else _RUN
    return warning(
        "writer-waiting", f"records of {len(late)} processes wait, and none was written for a minute", advice
    )


def _waiting_since(path: Path) -> float:
    """Return since when something of a process waits, or since when something of it was last written; in seconds."""
    oldest = _oldest_after(path, read_acknowledged(path) or Acknowledged(0, 0, 0, 0))
    if oldest is None:
        return time.time()
    said = 0.0
    with contextlib.suppress(OSError):  # nothing was said yet
        said = (path / ACKNOWLEDGED).stat().st_mtime
    return max(said, (oldest.end_ns or oldest.start_ns) / 1e9)


def _oldest_after(path: Path, done: Acknowledged) -> Captured | None:
    """Return the oldest operation of a process that nobody has said to be settled."""
    for segment in sorted(path.glob(f"*{SUFFIX}")):
        number = int(segment.stem) if segment.stem.isdecimal() else 0  # a gap waits for no one
        if number < max(1, done.segment):
            continue
        with contextlib.suppress(OSError), segment.open("rb") as file:
            file.seek(done.offset if number == done.segment else 0)
            for line in file:
                frame = next(frames(line), None)
                captured = parse_captured(frame.content) if frame is not None and frame.kind == RECORD else None
                if captured is not None:
                    return captured
    return None
