"""An audit trail for AI-memory services: audit operations are OpenTelemetry spans, and become rows in Postgres."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from astrocyte_otel_audit._version import __version__

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
    "RetentionPolicy",
    "SpanMapping",
    "SpanPattern",
    "__version__",
    "audit_operation",
    "audit_scope",
    "audited",
    "configure_audit",
    "enrich_astrocyte",
    "get_default_audit_logger",
    "set_default_audit_logger",
]

if TYPE_CHECKING:
    from astrocyte_otel_audit.configure import configure_audit
    from astrocyte_otel_audit.emit import audit_operation, audit_scope, audited, enrich_astrocyte
    from astrocyte_otel_audit.errors import AuditError, AuditUnavailableError, ConfigurationError
    from astrocyte_otel_audit.logger import AuditEntry, AuditLogger, get_default_audit_logger, set_default_audit_logger
    from astrocyte_otel_audit.normalize import Normalizer
    from astrocyte_otel_audit.pipeline import (
        AuditSampler,
        AuditSpanExporter,
        AuditSpanProcessor,
        SpanMapping,
        SpanPattern,
    )
    from astrocyte_otel_audit.record import AuditRecord
    from astrocyte_otel_audit.retention import RetentionPolicy
else:
    # Each name is imported when it is first asked for (PEP 562): code that only decorates loads neither the
    # OpenTelemetry SDK nor psycopg. Out of a type checker's sight, to which every name would be there.
    _HOMES = {
        "configure": ("configure_audit",),
        "emit": ("audit_operation", "audit_scope", "audited", "enrich_astrocyte"),
        "errors": ("AuditError", "AuditUnavailableError", "ConfigurationError"),
        "logger": ("AuditEntry", "AuditLogger", "get_default_audit_logger", "set_default_audit_logger"),
        "normalize": ("Normalizer",),
        "pipeline": ("AuditSampler", "AuditSpanExporter", "AuditSpanProcessor", "SpanMapping", "SpanPattern"),
        "record": ("AuditRecord",),
        "retention": ("RetentionPolicy",),
    }

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
