"""`AuditSpanExporter`: the way from a span to the table. Two doors, `record` and `write`, and `export`, their sum."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from opentelemetry import context as otel_context

# The public helper is in a package that the SDK does not need; every instrumentation reads this key.
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.pipeline.presets import resolve_mappings
from astrocyte_otel_audit.pipeline.processes import call_in_forked_children
from astrocyte_otel_audit.pipeline.selection import Selection
from astrocyte_otel_audit.pipeline.switch import EnabledFor, Switch
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.postgres import Appended, AuditTable, Connections, Fault, OwnConnection, PooledConnections
from astrocyte_otel_audit.postgres.sweep import AuditSweeper
from astrocyte_otel_audit.record import AuditRecord

_logger = logging.getLogger(__name__)

#: Parent of the spans that an instrumentation makes which doesn't read the key (psycopg's, as of 0.51b0): a
#: parent-based sampler drops them, and the id is the last that any ratio would take.
_UNSAMPLED = NonRecordingSpan(SpanContext((1 << 128) - 1, (1 << 64) - 1, is_remote=False))


class Storage(Protocol):
    """Where records go: an `AuditTable`, or what stands in for one in a test. Thread-safe."""

    def append(self, records: Sequence[AuditRecord]) -> Appended:
        """Store a batch, or raise DatabaseUnavailableError; see `AuditTable.append` for its duties."""

    def check(self) -> Fault | None:
        """Say what keeps records from being stored, or None; raise DatabaseUnavailableError while it is away."""

    def close(self) -> None:
        """Release what it holds."""

    def after_fork(self) -> None:
        """Become usable in a forked child."""


class Elsewhere:
    """Storage of a process that leaves writing to another one. Nothing is stored in here."""

    def append(self, records: Sequence[AuditRecord]) -> Appended:  # noqa: ARG002
        """Raise DatabaseUnavailableError."""
        raise DatabaseUnavailableError("this process has writer='external', and writes nothing itself")

    def check(self) -> Fault | None:
        """Say nothing."""
        return None

    def close(self) -> None:
        """Do nothing."""

    def after_fork(self) -> None:
        """Do nothing."""


class AuditSpanExporter(SpanExporter):
    """Turns allowlisted spans into rows. Thread-safe.

    Inside `AuditSpanProcessor` every record arrives. It also works in a stock `BatchSpanProcessor`, best-effort:
    that drops spans when its queue is full or Postgres is away, and never sees an unsampled one.

    Args:
        dsn: connection string of the writer's role, which needs INSERT only.
        pool: a `psycopg_pool.ConnectionPool` of the application's, in place of `dsn`.
        storage: anything else that keeps records, in place of both.
        actions: the allowlist; see `configure_audit`. All arguments fall back to their environment variables.
        mappings: mappings or preset names; see `configure_audit`.
        schema: schema of the table, or a function to it that is called on the thread where an operation starts.
        table: name of the table.
        migrate: create or upgrade missing tables, and schemas.
        destination: a name for where its records go: processes with the same one write each other's.
        export_timeout_millis: how long one statement may take.
        normalizer: what may be stored of values that mappings take; `Normalizer` has the defaults.
        actor_baggage: keys of OpenTelemetry baggage that say who acts, where nothing else does. Anybody may have sent
            it: the row's metadata then says ``actor_source: baggage``.
        enabled_for: says of an allowed action and its bank whether it is audited: True, False, or None for the default,
            which is that it is. Called on the application's threads, and its answers are kept for a minute.

    Raises:
        ConfigurationError: an argument or variable that can't be used, or no place to write to.
    """

    def __init__(
        self,
        *,
        dsn: str | None = None,
        pool: object = None,
        storage: Storage | None = None,
        actions: Iterable[str] | None = None,
        mappings: Iterable[SpanMapping | str | Mapping[str, Any]] | None = None,
        schema: str | Callable[[], str] | None = None,
        table: str | None = None,
        migrate: bool | None = None,
        destination: str | None = None,
        export_timeout_millis: float | None = None,
        normalizer: Normalizer | None = None,
        actor_baggage: Iterable[str] | None = None,
        enabled_for: EnabledFor | None = None,
    ) -> None:
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise ConfigurationError("normalizer", f"got a {type(normalizer).__name__}; accepted is a Normalizer")
        if enabled_for is not None and not callable(enabled_for):
            raise ConfigurationError(
                "enabled_for", f"got a {type(enabled_for).__name__}; accepted is a function of an action and a bank"
            )
        self.selection = Selection(
            settings.resolve("actions", actions),
            resolve_mappings(mappings),
            normalizer=normalizer,
            actor_baggage=settings.resolve("actor_baggage", actor_baggage),
            switch=None if enabled_for is None else Switch(enabled_for),
        )
        place = settings.resolve("schema", schema)
        self._schema_getter: Callable[[], Any] | None = place if callable(place) else None
        #: Where every record goes; None where a function decides.
        self.default_schema: str | None = None if callable(place) else place
        table = settings.resolve("table", table)
        migrates = settings.resolve("migrate", migrate)
        timeout_millis = settings.resolve("export_timeout_millis", export_timeout_millis)
        if sum(given is not None for given in (dsn, pool, storage)) > 1:
            raise ConfigurationError("dsn", "accepted is one of dsn, pool and storage")
        self._named: dict[str, Any] = {
            "schema": settings.DEFAULT_SCHEMA if callable(place) else place,
            "table": table,
            "statement_timeout_seconds": timeout_millis / 1000,
        }
        #: Makes connections for others than the storage; None where it is no table, or somebody else's.
        self._connections: Callable[[], Connections] | None = None
        if storage is None:
            self._connections = _connections(dsn, pool)
            storage = AuditTable(self._connections(), migrate=migrates, **self._named)
        self.storage = storage
        named = settings.resolve("destination", destination)
        #: Where its records belong: processes with the same one write what each other's spools hold.
        self.destination: str = named or getattr(storage, "destination", type(storage).__qualname__)
        self._warned_of_stock_processor = False
        self._troubles = Troubles(_logger, time.monotonic)
        call_in_forked_children(self, type(self)._after_fork)

    def current_schema(self) -> str | None:
        """Return the tenant's schema as the calling thread sees it; None for the table's default."""
        if self._schema_getter is None:
            return None
        try:
            found = self._schema_getter()
        except Exception as fault:
            self._troubles.report(
                "schema function",
                f"the schema function failed ({type(fault).__qualname__}): its records go to the default schema",
            )
            return None
        return found if isinstance(found, str) and found else None

    def record(self, span: ReadableSpan) -> AuditRecord | None:
        """Return the record of an ended span, or None if the allowlist and the mappings don't want it."""
        captured = self.selection.capture(span)
        return None if captured is None else to_record(captured)

    def write(self, records: Sequence[AuditRecord]) -> Appended:
        """Write records to the table.

        Raises:
            DatabaseUnavailableError: give the same records again later.
        """
        with suppressed_instrumentation():
            return self.storage.append(records)

    def check(self) -> Fault | None:
        """Say what keeps records from being written, or None; raises DatabaseUnavailableError like `write`."""
        with suppressed_instrumentation():
            return self.storage.check()

    def sweeper(self, dsn: str | None = None) -> AuditSweeper:
        """Return what deletes from the same tables, through a connection of its own or the lent pool.

        Args:
            dsn: connection string of the sweeper's role. It falls back to ``OTEL_ASTROCYTE_AUDIT_RETENTION_DSN``, then
                to what the records are written through.

        Raises:
            ConfigurationError: one that can't be used, or none at all.
        """
        dsn = settings.resolve("retention_dsn", dsn)
        if dsn is not None:
            return AuditSweeper(_own_connection(dsn, "retention_dsn"), **self._named)
        if self._connections is None:
            raise ConfigurationError(
                "retention_dsn",
                "no database to delete from, as this process writes to none; accepted is a connection string of the "
                "sweeper's role, here or in OTEL_ASTROCYTE_AUDIT_RETENTION_DSN",
            )
        return AuditSweeper(self._connections(), **self._named)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the audit records among some spans, once: for stock processors, which don't try again."""
        if not self._warned_of_stock_processor:
            self._warned_of_stock_processor = True
            _logger.warning(
                "Audit rows written through a stock span processor are best-effort: unsampled spans, a full queue and "
                "an absent database lose them. Use configure_audit() or AuditSpanProcessor, which lose none of these."
            )
        records: list[AuditRecord] = []
        for span in spans:
            try:
                record = self.record(span)
            except Exception as fault:  # a span of somebody else's making must not take its batch with it
                self._troubles.report("span", f"a span could not become a record ({type(fault).__qualname__})")
                continue
            if record is not None:
                records.append(record)
        if not records:
            return SpanExportResult.SUCCESS
        try:
            appended = self.write(records)
        except DatabaseUnavailableError as fault:
            _logger.warning("%d audit records are lost, as a stock processor does not retry: %s", len(records), fault)
            return SpanExportResult.FAILURE
        for reason, lost in appended.parked.values():
            _logger.warning("%d audit records are lost, as a stock processor does not retry: %s", len(lost), reason)
        return SpanExportResult.FAILURE if appended.parked else SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface's argument
        """Return True: nothing waits in here."""
        return True

    def shutdown(self) -> None:
        """Close the connection that it opened itself."""
        self.storage.close()

    def _after_fork(self) -> None:
        self._troubles = Troubles(_logger, time.monotonic)
        self.storage.after_fork()


def _connections(dsn: str | None, pool: object) -> Callable[[], Connections]:
    """Return what makes a connection each time it is called, or gives the lent pool."""
    if pool is not None:
        lent = PooledConnections(pool)
        return lambda: lent
    dsn = settings.resolve("dsn", dsn)
    if dsn is None:
        raise ConfigurationError(
            "dsn", "no database to write to; accepted is a connection string, here or in OTEL_ASTROCYTE_AUDIT_DSN"
        )
    return partial(_own_connection, dsn, "dsn")


def _own_connection(dsn: str, source: str) -> OwnConnection:
    try:
        return OwnConnection(dsn)
    except ConfigurationError as error:
        raise ConfigurationError(source, error.problem) from None


@contextmanager
def suppressed_instrumentation() -> Iterator[None]:
    """Keep the plugin's own SQL out of the traces: an instrumented psycopg would audit the audit, without end."""
    context = otel_context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True, set_span_in_context(_UNSAMPLED))
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)
