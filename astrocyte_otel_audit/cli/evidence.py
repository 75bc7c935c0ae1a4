"""What a command that deletes records leaves of itself in the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Tracer

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.cli.options import UNAVAILABLE, fail, say
from astrocyte_otel_audit.pipeline import AuditSpanExporter, AuditSpanProcessor
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.record import record_id


class _Receipts(SpanProcessor):
    """Remembers the ids of the records that spans of one action become, but for those of their parts."""

    def __init__(self, action: str) -> None:
        self.ids: list[str] = []
        self._action = action

    def on_end(self, span: ReadableSpan) -> None:
        if span.parent is None and (span.attributes or {}).get(attributes.ACTION) == self._action:
            self.ids.append(record_id(span.context.trace_id, span.context.span_id, span.start_time or 0))


@contextmanager
def evidence(dsn: str, schema: str, table: str, action: str) -> Iterator[Tracer]:
    """Give a tracer whose audit spans become rows of one table; in the end they are there, and their ids are told.

    Nothing is begun where a record of it could not be written: who deletes leaves a trace. It goes by the spool, so
    that it is written by the next process where this one is killed. The provider is the command's own: what the
    environment says of sampling, of other writers and of retention isn't for it.

    Args:
        dsn: connection string of a role that may INSERT. It needs no other right.
        schema, table: where the rows go.
        action: of the spans whose records are told.
    """
    where = f"{schema}.{table}"
    provider = TracerProvider(
        sampler=ALWAYS_ON, resource=Resource.create({"service.name": "astrocyte-otel-audit"}), shutdown_on_exit=False
    )
    with ExitStack() as stack:
        log = AuditTable(OwnConnection(dsn), schema=schema, table=table)
        stack.callback(log.close)
        if (fault := log.check()) is not None:
            fail(f"nothing was deleted, as the record of it can't be written to {where}: {fault}", UNAVAILABLE)
        exporter = AuditSpanExporter(dsn=dsn, schema=schema, table=table, actions=[action], mappings=[], migrate=False)
        processor = AuditSpanProcessor(exporter, writer="thread", retention=False)
        receipts = _Receipts(action)
        for each in (processor, receipts):
            provider.add_span_processor(each)
        stack.callback(provider.shutdown)
        tracer = provider.get_tracer(attributes.SCOPE_NAME, __version__)
        if not tracer.start_span("is there a pipeline?").get_span_context().is_valid:
            fail("nothing was deleted, as no record of it can be made: unset OTEL_SDK_DISABLED", UNAVAILABLE)
        yield tracer
        is_stored = processor.force_flush()
    if not (is_stored and receipts.ids):
        fail(f"the record of this run is not in {where}; the lines above say why", UNAVAILABLE)
    for receipt in receipts.ids:
        say(f"the record of this run: {receipt}")
