"""Looking at a spool from outside, and writing what ended processes have left, for the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from astrocyte_otel_audit.pipeline.adoption import adopt
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.directory import GAP, LOCK, SUFFIX, destination_of, directories, try_lock
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, frames, parse_captured
from astrocyte_otel_audit.record import datetime_from_ns

_BATCH = 2048


class ProcessStatus(NamedTuple):
    """What one process has in the spool."""

    process: str
    #: Whether it lives; what a dead one left waits for another with the same destination.
    alive: bool
    #: Where its records belong; None where none of its files says so.
    destination: str | None
    #: Records in its files. A living process's may be in the table already: a file goes as a whole.
    records: int
    #: Operations that began and whose record isn't there.
    begun: int
    #: Lines that can't be read.
    damaged: int
    bytes: int
    #: Start of the oldest operation.
    oldest: datetime | None
    #: Records that could not be accepted.
    missing: int


class Replayed(NamedTuple):
    """What became of the records that ended processes had left."""

    processes: int = 0
    written: int = 0
    set_aside: int = 0
    #: Still in the spool: their tables can't take them.
    waiting: int = 0
    damaged: int = 0


def status(root: Path) -> Iterator[ProcessStatus]:
    """Yield what each process has in the spool, by reading all of it; nothing is locked for longer than a moment."""
    for path in sorted(directories(root)):
        records, begun, damaged, size, missing = 0, set[str](), 0, 0, 0
        start_ns: int | None = None
        for segment in sorted(path.glob(f"*{SUFFIX}")):
            with contextlib.suppress(FileNotFoundError), segment.open("rb") as file:
                for line in file:
                    size += len(line)
                    frame = next(frames(line), None)
                    captured = parse_captured(frame.content) if frame and frame.kind in (RECORD, PROVISIONAL) else None
                    if frame is None or not frame.kind:
                        damaged += 1
                    elif captured is None:
                        continue
                    elif segment.name == GAP:
                        missing += int(to_record(captured).metadata.get("missing", 0))
                    elif frame.kind == PROVISIONAL:
                        begun = {*begun, captured.id} - {captured.replaces}
                    else:
                        records += 1
                        begun.discard(captured.id)
                        start_ns = captured.start_ns if start_ns is None else min(start_ns, captured.start_ns)
        lock = try_lock(path / LOCK)
        if lock is not None:
            os.close(lock)
        yield ProcessStatus(
            path.name, lock is None, destination_of(path), records, len(begun), damaged, size,
            None if start_ns is None else datetime_from_ns(start_ns), missing,
        )  # fmt: skip


def replay(
    root: Path, exporter: AuditSpanExporter, *, any_destination: bool = False, progress: Callable[[int], None]
) -> Replayed:
    """Write what ended processes have left, and clear it away.

    Args:
        root: the spool's directory.
        exporter: writes the records.
        any_destination: write also what was meant for another database or table, as after it was renamed.
        progress: called with the number of records that were dealt with, after each batch.

    Raises:
        DatabaseUnavailableError: Postgres can't be used; what isn't written stays.
    """
    total = Replayed()
    for reader in adopt(root, None if any_destination else [exporter.destination]):
        total = total._replace(processes=total.processes + 1)
        try:
            while found := reader.read(_BATCH):
                appended = exporter.write([each.record for each in found])
                waiting = appended.waiting_ids()
                for each in found:
                    if each.record.id not in waiting:
                        reader.settle(each.segment, each.offset)
                set_aside = len(appended.set_aside)
                rows = {each.record.id for each in found}  # of one, there may be more than one line
                total = total._replace(
                    written=total.written + len(rows) - len(waiting) - set_aside,
                    set_aside=total.set_aside + set_aside,
                    waiting=total.waiting + len(waiting),
                )
                progress(len(found))
        finally:
            total = total._replace(damaged=total.damaged + reader.damaged)
            if not reader.settled:
                reader.close()
    return total
