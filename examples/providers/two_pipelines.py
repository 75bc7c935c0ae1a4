"""Two pipelines on one tracer provider: all operations to one table, deletions to another one as well.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the tables.
"""

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from astrocyte_otel_audit import audited, configure_audit


@audited("recall")
def recall(query: str, bank_id: str) -> list[str]:
    return ["m-42"]


@audited("forget")
def forget(memory_id: str, bank_id: str) -> int:
    return 1


if __name__ == "__main__":
    trace.set_tracer_provider(TracerProvider(sampler=TraceIdRatioBased(0.1)))
    everything = configure_audit(actions="*", migrate=True)
    deletions = configure_audit(actions=["forget"], table="deletion_log", migrate=True)
    recall("What does Calvin like?", bank_id="user-calvin")
    forget("m-42", bank_id="user-calvin")
    print("all written:", everything.force_flush() and deletions.force_flush())
