"""From an ended span to a row: sampler, selection, processor, writer and exporter."""

from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter, Storage
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.pipeline.parking import Backoff
from astrocyte_otel_audit.pipeline.pattern import SpanPattern
from astrocyte_otel_audit.pipeline.processor import AuditSpanProcessor
from astrocyte_otel_audit.pipeline.sampler import AuditSampler

__all__ = [
    "AuditSampler",
    "AuditSpanExporter",
    "AuditSpanProcessor",
    "Backoff",
    "SpanMapping",
    "SpanPattern",
    "Storage",
]
