"""`AuditSpanProcessor`: hears of every span's start and end, and owns the writer."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from opentelemetry import trace
from opentelemetry.baggage import get_baggage
from opentelemetry.context import Context, get_value
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import TracerProvider

from astrocyte_otel_audit import attributes, settings
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.captured import as_str
from astrocyte_otel_audit.pipeline.directory import SpoolError, check
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.handover import Handover
from astrocyte_otel_audit.pipeline.intake import Intake
from astrocyte_otel_audit.pipeline.metrics import Metrics
from astrocyte_otel_audit.pipeline.operations import OpenOperations
from astrocyte_otel_audit.pipeline.parking import Backoff
from astrocyte_otel_audit.pipeline.processes import call_at_the_end_of_children, call_in_forked_children
from astrocyte_otel_audit.pipeline.retention import RetentionTask
from astrocyte_otel_audit.pipeline.selection import Chance, Selection, plain_attributes
from astrocyte_otel_audit.pipeline.spool import Fsync, Spool
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.pipeline.writer import Writer
from astrocyte_otel_audit.record import NO_SCOPE, ScopeDefaults
from astrocyte_otel_audit.retention import Retention, RetentionPolicy, resolve_retention

_logger = logging.getLogger(__name__)

#: The longest id that is taken from baggage, which anybody may have sent.
_MAX_BAGGAGE: Final = 256


class AuditSpanProcessor(SpanProcessor):
    """Makes every audit span a row of the table, from a thread of its own. Thread-safe and fork-safe.

    Unlike the stock processor it takes unsampled spans too, tries again while Postgres is away, refuses the newest
    record rather than the oldest when its queue is full and counts it, and answers `force_flush` honestly. Nothing
    it does raises into the application, or lets it wait for Postgres.

    The arguments have the stock `BatchSpanProcessor`'s names and meanings. Each falls back to
    ``OTEL_ASTROCYTE_AUDIT_<NAME>``, then to the standard ``OTEL_BSP_<NAME>``, then to its default.

    Args:
        exporter: says which spans are records, and writes them.
        retention: how long records are kept: a `RetentionPolicy`, or days. Where it is None and no variable says so
            either, and where it is False, nothing is deleted, and nothing runs for it.
        retention_dsn: connection string of the role that deletes; what the records are written through by default.
        writer: ``thread``, or ``external``: nothing is written here, and the command `astrocyte-otel-audit writer`
            writes what this and other processes of this machine put into the spool.
        spool_dir: directory where records are kept until they are in the table, so that they survive a killed
            process; several processes may share it. Below the user's state directory by default; False for none.
        spool_max_bytes: bytes that this process's part of it may have (1 GiB).
        spool_fsync: when it is synced to its disk: ``never``, ``interval`` (about once a second, the default) or
            ``always``, before a call returns. A killed process loses nothing either way.
        spool_keep_seconds: how long a part of it stays after it is in the table (0). What is there is written once more
            when Postgres was away, since a standby that has taken over may lack the last commits. In this process only.
        on_full: what a call does where the spool is full: ``drop``, the record is counted in a gap record; or
            ``block``, wait for room, then drop.
        on_full_timeout_millis: milliseconds of that wait (1,000).
        max_queue_size: records that are held in memory (32,768); more are in the spool only.
        schedule_delay_millis: milliseconds that a record waits for company (200).
        max_export_batch_size: records in one transaction at most (2,048; never more than the queue holds).
        export_timeout_millis: milliseconds that the drain at shutdown may take (30,000).
        backoff: pauses between attempts while Postgres is away.
        meter_provider: makes the metrics; the global one by default.

    Raises:
        ConfigurationError: an argument or variable that can't be used.
    """

    def __init__(
        self,
        exporter: AuditSpanExporter,
        *,
        retention: Retention = None,
        retention_dsn: str | None = None,
        writer: Literal["thread", "external"] | None = None,
        spool_dir: str | os.PathLike[str] | Literal[False] | None = None,
        spool_max_bytes: int | None = None,
        spool_fsync: Fsync | None = None,
        spool_keep_seconds: float | None = None,
        on_full: Literal["drop", "block"] | None = None,
        on_full_timeout_millis: float | None = None,
        max_queue_size: int | None = None,
        schedule_delay_millis: float | None = None,
        max_export_batch_size: int | None = None,
        export_timeout_millis: float | None = None,
        backoff: Backoff = Backoff(0.1, 30.0),
        meter_provider: MeterProvider | None = None,
    ) -> None:
        if not isinstance(exporter, AuditSpanExporter):
            raise ConfigurationError("exporter", f"got a {type(exporter).__name__}; accepted is an AuditSpanExporter")
        capacity = settings.resolve("max_queue_size", max_queue_size)
        batch_size = min(settings.resolve("max_export_batch_size", max_export_batch_size), capacity)
        delay_millis = settings.resolve("schedule_delay_millis", schedule_delay_millis)
        self._drain_seconds = settings.resolve("export_timeout_millis", export_timeout_millis) / 1000
        policy = resolve_retention(retention)
        if policy is not None:
            exporter.sweeper(retention_dsn)  # refused before anything runs
        self._retention: RetentionTask | None = None
        self._is_shut_down = False
        self._exporter = exporter
        self._troubles = Troubles(_logger, time.monotonic)
        blocks = settings.resolve("on_full", on_full) == "block"
        block_seconds = settings.resolve("on_full_timeout_millis", on_full_timeout_millis) / 1000 if blocks else 0.0
        is_external = settings.resolve("writer", writer) == "external"
        fsync = settings.resolve("spool_fsync", spool_fsync)
        keep_seconds = settings.resolve("spool_keep_seconds", spool_keep_seconds)
        if is_external and keep_seconds:
            raise ConfigurationError("spool_keep_seconds", "accepted is 0 with writer='external', which keeps nothing")
        spool = Spool(
            _root(settings.resolve("spool_dir", spool_dir), is_required=is_external),
            exporter.destination,
            max_bytes=settings.resolve("spool_max_bytes", spool_max_bytes),
            max_in_memory=0 if is_external else capacity,
            # Where another process writes, that one syncs the files, about once a second.
            fsync="never" if is_external and fsync == "interval" else fsync,
            cleared_by_others=is_external,
            keep_seconds=keep_seconds,
        )
        metrics = Metrics(meter_provider)
        self._writer: Intake = (
            Handover(spool, block_seconds=block_seconds)
            if is_external
            else Writer(
                exporter,
                spool=spool,
                capacity=capacity,
                batch_size=batch_size,
                delay_seconds=delay_millis / 1000,
                block_seconds=block_seconds,
                backoff=backoff,
                attempted=metrics.attempted,
            )
        )
        metrics.observe(self, capacity)
        self._operations = OpenOperations(exporter.selection, self._writer)
        call_in_forked_children(self, type(self)._after_fork)
        call_at_the_end_of_children(self, type(self).shutdown)
        self._writer.start()
        if policy is not None:
            self.start_retention(policy, dsn=retention_dsn)

    @property
    def exporter(self) -> AuditSpanExporter:
        """The exporter that was given."""
        return self._exporter

    @property
    def retention(self) -> RetentionTask | None:
        """What deletes expired records; None where they are kept for ever."""
        return self._retention

    @property
    def is_shut_down(self) -> bool:
        """Whether it refuses new spans."""
        return self._is_shut_down

    def start_retention(
        self, policy: RetentionPolicy, *, dsn: str | None = None, tracer_provider: TracerProvider | None = None
    ) -> RetentionTask:
        """Have deleted from now on what a policy says is expired, in place of the policy before.

        Args:
            policy: how long records are kept.
            dsn: connection string of the role that deletes, as `retention_dsn`.
            tracer_provider: the one that this processor is attached to, as each run is a span; the global one by
                default.

        Raises:
            ConfigurationError: a connection string that can't be used, or none at all.
        """
        sweeper = self._exporter.sweeper(dsn)
        if self._retention is not None:
            self._retention.stop(self._drain_seconds)
        self._retention = RetentionTask(
            sweeper,
            policy,
            tracer=lambda: trace.get_tracer(attributes.SCOPE_NAME, __version__, tracer_provider),
        )
        self._retention.start()
        return self._retention

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note an audit span: who acts for which tenant, and, on the span, the id of the row to be."""
        try:
            given = plain_attributes(span)
            selection = self._exporter.selection
            selection.surroundings.start(span, parent_context)
            chance = selection.expects(span, given, parent_context)
            if chance is Chance.NONE:
                return
            scope = self._scope(selection, parent_context)
            schema = scope.schema or self._exporter.current_schema()
            row_id = self._operations.start(span, as_str(given.get(attributes.ACTION)), scope, schema)
            if given.get(attributes.REQUIRED) is True:
                begun = selection.capture(span, row_id, scope, schema)
                if taken := begun is not None and self._writer.begin(begun := begun._replace(outcome="unknown")):
                    self._operations.note_begun(span, begun)
            else:
                taken = chance is Chance.CERTAIN and self._writer.has_room()
            if taken:
                span.set_attribute(attributes.RECORD_ID, row_id)
        except Exception as fault:  # it would reach the application, and keep the audited body from running
            self._troubles.report("on_start", f"an audit span's start could not be noted ({type(fault).__qualname__})")

    def on_end(self, span: ReadableSpan) -> None:
        """Capture the span, if it is an audit span, and hand it to the writer."""
        try:
            self._operations.end(span)
            self._exporter.selection.surroundings.end(span)
        except Exception as fault:  # it would reach the application
            self._writer.count_unreadable()
            self._troubles.report("on_end", f"an audit span could not become a record ({type(fault).__qualname__})")

    def _scope(self, selection: Selection, parent_context: Context | None) -> ScopeDefaults:
        found = get_value(attributes.SCOPE_CONTEXT_KEY, parent_context)
        scope = found if isinstance(found, ScopeDefaults) else NO_SCOPE
        if selection.actor_baggage and scope.actor_id is None:
            said = (get_baggage(key, parent_context) for key in selection.actor_baggage)
            asserted = next(
                (value for value in said if isinstance(value, str) and 0 < len(value) <= _MAX_BAGGAGE), None
            )
            scope = replace(scope, asserted_actor_id=asserted)
        return scope

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Write what waits, and answer True only if every record accepted before the call is in the table.

        Args:
            timeout_millis: how long to wait at most, in milliseconds.
        """
        self._operations.hand_on_orphans()
        return self._writer.flush(timeout_millis / 1000)

    def shutdown(self) -> None:
        """Refuse new spans, write what waits for at most `export_timeout_millis`, and close the connection.

        The retention stops first, so that the row of a run that is under way still gets in. What can't be written by
        then stays in the spool, for the next process. Harmless when repeated.
        """
        self._is_shut_down = True
        seconds = self._drain_seconds
        if self._retention is not None:
            began = time.monotonic()
            self._retention.stop(seconds / 2)  # the rest is the writer's, even where a batch hangs
            seconds -= time.monotonic() - began
        self._operations.abandon()
        self._writer.stop(seconds)

    def stats(self) -> dict[str, int]:
        """Return counts since the start of this process; see `Writer.stats`. `open` is operations under way.

        With a retention there are `retention_runs`, `retention_failed_runs` and `retention_rows`, which are deleted;
        with an `enabled_for`, `enabled_for_failed`.
        """
        counts = {**self._writer.stats(), "open": len(self._operations)}
        if (switch := self._exporter.selection.switch) is not None:
            counts["enabled_for_failed"] = switch.failed
        if self._retention is not None:
            done = self._retention.stats()
            counts |= {f"retention_{name}": done[name] for name in ("runs", "failed_runs")}
            counts["retention_rows"] = done["rows_deleted"]
        return counts

    def _after_fork(self) -> None:
        self._troubles = Troubles(_logger, time.monotonic)
        self._operations.after_fork()
        self._writer.after_fork()
        if self._retention is not None:
            self._retention.after_fork()


def _root(directory: Path | Literal[False] | None, *, is_required: bool) -> Path | None:
    """Return the spool's directory, or None where there shall be none or can be none.

    Raises:
        ConfigurationError: there has to be one, and it can't be used.
    """
    if directory is False:
        if is_required:
            raise ConfigurationError("spool_dir", "is off; with writer='external' accepted is a directory")
        return None
    root = directory or settings.default_spool_dir()
    try:
        check(root)
    except SpoolError as error:
        if is_required:
            raise ConfigurationError(
                "spool_dir", f"can't be used, as {error}; with writer='external' accepted is one that can"
            ) from None
        _logger.error(
            "Audit records are kept in memory only, and a killed process loses them: the spool can't be used, as %s. "
            "Name a directory of your own with spool_dir=… or OTEL_ASTROCYTE_AUDIT_SPOOL_DIR, or set it to 'off'.",
            error,
        )
        return None
    return root
