"""OpenLLMetry's tracer provider: initialize Traceloop, then configure the audit.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table, and TRACELOOP_BASE_URL to
where the traces go.
"""

from opentelemetry import trace
from traceloop.sdk import Traceloop
from traceloop.sdk.decorators import task

from astrocyte_otel_audit import audited, configure_audit


@audited("recall")
@task(name="search")
def recall(query: str, bank_id: str) -> list[str]:
    return ["m-42"]


if __name__ == "__main__":
    Traceloop.init(app_name="memory", telemetry_enabled=False)
    processor = configure_audit(actions=["recall"], migrate=True)
    recall("What does Calvin like?", bank_id="user-calvin")
    trace.get_tracer_provider().shutdown()
    print("all written:", processor.force_flush())
