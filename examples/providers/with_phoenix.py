"""Arize Phoenix's tracer provider: register with Phoenix, then configure the audit.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table, and
PHOENIX_COLLECTOR_ENDPOINT to where Phoenix listens.
"""

from opentelemetry import trace
from phoenix.otel import register

from astrocyte_otel_audit import audited, configure_audit

tracer = trace.get_tracer("memory")


@audited("recall")
def recall(query: str, bank_id: str) -> list[str]:
    with tracer.start_as_current_span("search"):
        return ["m-42"]


if __name__ == "__main__":
    provider = register(project_name="memory", protocol="http/protobuf", batch=True, verbose=False)
    processor = configure_audit(actions=["recall"], migrate=True)  # Phoenix keeps its exporter
    recall("What does Calvin like?", bank_id="user-calvin")
    provider.shutdown()
    print("all written:", processor.force_flush())
