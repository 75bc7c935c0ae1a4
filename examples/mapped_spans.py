"""Spans of a library that knows nothing of audits: which are operations, where their parts are, and for which banks.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table.
"""

from opentelemetry import baggage, context, trace
from opentelemetry.trace import SpanKind

from astrocyte_otel_audit import SpanMapping, SpanPattern, configure_audit

tracer = trace.get_tracer("memory")


def recall(query: str, collection: str) -> list[str]:
    """What the library does: it has no audit, and its spans hold what people ask."""
    with tracer.start_as_current_span("memory.recall") as span:
        span.set_attributes({"memory.collection": collection, "memory.query": query, "memory.limit": 10})
        span.set_attribute("memory.result_count", 1)
        return ["Calvin prefers dark mode"]


def reflect(query: str, collection: str) -> str:
    """An operation that recalls, which is none of its own."""
    with tracer.start_as_current_span("memory.reflect", attributes={"memory.collection": collection}):
        return f"So I remember: {recall(query, collection)[0]}"


MEMORY = SpanMapping(
    scope="memory",
    span_name="memory.{action}",
    not_inside=[SpanPattern(scope="memory", span_name="memory.reflect")],
    bank_id="memory.collection",
    request={"query": "memory.query", "top_k": "memory.limit"},  # the query becomes its length
    response={"hits": "memory.result_count"},
)


def main() -> None:
    # As a web framework's instrumentation has it: the transport is read off the request, the actor off its baggage.
    with tracer.start_as_current_span("POST /ask", kind=SpanKind.SERVER, attributes={"http.request.method": "POST"}):
        token = context.attach(baggage.set_baggage("enduser.id", "calvin"))
        try:
            recall("What does Calvin like?", "user-calvin")
            reflect("What does Calvin like?", "user-calvin")
            recall("What does anybody like?", "scratch")
        finally:
            context.detach(token)


if __name__ == "__main__":
    processor = configure_audit(
        actions=["recall", "reflect"],
        mappings=[MEMORY, "gen_ai"],
        enabled_for=lambda action, bank_id: bank_id != "scratch",
        actor_baggage=["enduser.id"],
        migrate=True,
    )
    main()
    print("all written:", processor.force_flush())
