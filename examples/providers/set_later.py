"""A tracer provider that an application makes when it starts, after the audit was configured.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from astrocyte_otel_audit import audited, configure_audit


@audited("recall")
def recall(query: str, bank_id: str) -> list[str]:
    return ["m-42"]


@contextmanager
def lifespan() -> Iterator[None]:
    """As an application has one that isn't yours to change."""
    provider = TracerProvider(sampler=TraceIdRatioBased(0.0))
    provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
    trace.set_tracer_provider(provider)
    yield
    provider.shutdown()


if __name__ == "__main__":
    processor = configure_audit(actions=["recall"], migrate=True, create_provider=False)
    recall("Who asks before the start?", bank_id="user-calvin")  # no row: there is nothing yet that makes spans
    with lifespan():
        recall("What does Calvin like?", bank_id="user-calvin")
    print("all written:", processor.force_flush())
