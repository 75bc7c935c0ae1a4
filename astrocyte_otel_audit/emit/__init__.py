"""Making audit spans: what an application calls. Knows the OpenTelemetry API, and nothing of where spans go."""

from astrocyte_otel_audit.emit.decorator import audited
from astrocyte_otel_audit.emit.enrichment import enrich_astrocyte
from astrocyte_otel_audit.emit.operation import (
    AuditOperation,
    audit_operation,
    default_normalizer,
    renew_tracers,
    set_default_normalizer,
)
from astrocyte_otel_audit.emit.scope import audit_scope, current_scope

__all__ = [
    "AuditOperation",
    "audit_operation",
    "audit_scope",
    "audited",
    "current_scope",
    "default_normalizer",
    "enrich_astrocyte",
    "renew_tracers",
    "set_default_normalizer",
]
