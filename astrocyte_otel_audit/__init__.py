"""An audit trail for AI-memory services: audit operations are OpenTelemetry spans, and become rows in Postgres."""

from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.emit import audit_operation, audit_scope, audited
from astrocyte_otel_audit.errors import AuditError, AuditUnavailableError, ConfigurationError
from astrocyte_otel_audit.logger import AuditEntry, AuditLogger, get_default_audit_logger, set_default_audit_logger
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline import AuditSampler, AuditSpanExporter, AuditSpanProcessor, SpanMapping
from astrocyte_otel_audit.record import AuditRecord

__all__ = [
    "AuditEntry",
    "AuditError",
    "AuditLogger",
    "AuditRecord",
    "AuditSampler",
    "AuditSpanExporter",
    "AuditSpanProcessor",
    "AuditUnavailableError",
    "ConfigurationError",
    "Normalizer",
    "SpanMapping",
    "__version__",
    "audit_operation",
    "audit_scope",
    "audited",
    "configure_audit",
    "get_default_audit_logger",
    "set_default_audit_logger",
]
