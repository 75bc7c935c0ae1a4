"""The writer beside the processes: one connection for all processes of a machine that leave writing to it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.pipeline.directory import check, try_lock
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.spool import Spool
from astrocyte_otel_audit.pipeline.writer import Writer

_logger = logging.getLogger(__name__)
_TRY_SECONDS = 1.0


def write_beside(
    root: Path, exporter: AuditSpanExporter, destinations: Sequence[str], stopped: threading.Event
) -> dict[str, int]:
    """Write what processes put into a spool, until it is stopped.

    Of several that are started for the same destinations, one writes and the others stand by.

    Args:
        root: the spool's directory.
        exporter: writes the records; closed at the end.
        destinations: of the processes; those with the exporter's own are written as well.
        stopped: set to stop it.

    Returns:
        Counts; see `Writer.stats`.

    Raises:
        SpoolError: the directory can't be used.
        ConfigurationError: a variable that can't be used.
    """
    check(root)
    batch_size = settings.resolve("max_export_batch_size")
    tailed = sorted({*destinations, exporter.destination})
    capacity = settings.resolve("max_queue_size")
    writer = Writer(
        exporter,
        spool=Spool(root, exporter.destination, max_bytes=settings.resolve("spool_max_bytes"), max_in_memory=capacity),
        capacity=capacity,
        batch_size=min(batch_size, capacity),
        delay_seconds=settings.resolve("schedule_delay_millis") / 1000,
        tailed=tailed,
    )
    with _alone(root, tailed, stopped):
        if not stopped.is_set():
            _logger.info("writing what is in %s for %s", root, ", ".join(tailed))
            writer.start()
            stopped.wait()
        writer.stop(settings.resolve("export_timeout_millis") / 1000)
    return writer.stats()


def written_for(root: Path) -> set[str]:
    """Return the destinations whose processes have a writer at work beside them.

    Args:
        root: the spool's directory.
    """
    found: set[str] = set()
    for lock in root.glob("writer-*.lock"):
        if (descriptor := try_lock(lock)) is not None:
            os.close(descriptor)
            continue
        with contextlib.suppress(OSError, ValueError):  # one that has just begun
            found.update(orjson.loads(lock.read_bytes()))
    return found


@contextlib.contextmanager
def _alone(root: Path, destinations: Sequence[str], stopped: threading.Event) -> Iterator[None]:
    """Wait until nobody else writes for the same destinations, or it is stopped."""
    name = hashlib.sha256(repr(destinations).encode()).hexdigest()[:16]
    descriptor = os.open(root / f"writer-{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, orjson.dumps(destinations), 0)  # for `doctor`; the same of all that want this lock
        said = False
        while not stopped.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    _logger.info("another writer is at work on this spool: standing by")
                said = True
                stopped.wait(_TRY_SECONDS)
        yield
    finally:
        os.close(descriptor)
