"""What is read from around an audited span: the request it serves, the spans it is inside of, and baggage."""

import gc

import pytest
from opentelemetry import baggage, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind

from astrocyte_otel_audit import ConfigurationError, SpanMapping, SpanPattern, audit_operation, audit_scope


@pytest.fixture(params=[ALWAYS_ON, TraceIdRatioBased(0.1), ALWAYS_OFF], ids=["100%", "10%", "0%"])
def provider(request):
    """Every rule below holds whether or not the trace is sampled."""
    provider = TracerProvider(sampler=ParentBased(request.param), shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def rows(storage):
    """What the table holds, once all is written."""

    def read(processor):
        assert processor.force_flush(10_000)
        return storage.records

    return read


@pytest.fixture
def request_span(provider):
    """A request that is being served, as a web framework's instrumentation has it."""

    def serve(kind=SpanKind.SERVER, name="GET /", **attributes):
        return provider.get_tracer("web").start_as_current_span(name, kind=kind, attributes=attributes)

    return serve


HTTP = {"http.request.method": "POST"}
MCP = {"mcp.method.name": "tools/call"}


@pytest.mark.parametrize(
    ("kind", "attributes", "transport"),
    [
        (SpanKind.SERVER, HTTP, "http"),
        (SpanKind.SERVER, {"http.method": "POST"}, "http"),
        (SpanKind.SERVER, MCP, "mcp"),
        (SpanKind.SERVER, {**HTTP, **MCP}, "mcp"),
        (SpanKind.SERVER, {"rpc.system": "grpc"}, "grpc"),
        (SpanKind.CONSUMER, {"messaging.system": "kafka"}, "kafka"),
        (SpanKind.SERVER, {}, "unknown"),
        (SpanKind.CLIENT, HTTP, "unknown"),
        (SpanKind.INTERNAL, HTTP, "unknown"),
    ],
)
def test_the_transport_is_that_of_the_request(
    provider, audit, rows, storage, request_span, kind, attributes, transport
):
    processor = audit(storage=storage)
    with request_span(kind, **attributes), audit_operation("recall", tracer_provider=provider):
        pass
    assert [row.transport for row in rows(processor)] == [transport]


def test_the_transport_is_the_requests_whatever_is_between(provider, audit, rows, storage, request_span):
    processor = audit(storage=storage)
    with (
        request_span(**HTTP),
        provider.get_tracer("framework").start_as_current_span("middleware"),
        provider.get_tracer("framework").start_as_current_span("handler"),
        audit_operation("recall", tracer_provider=provider),
    ):
        pass
    assert [row.transport for row in rows(processor)] == ["http"]


def test_of_two_requests_inside_each_other_the_inner_one_counts_while_it_lasts(
    provider, audit, rows, storage, request_span
):
    processor = audit(storage=storage)
    with request_span(**HTTP):
        with request_span(**MCP), audit_operation("inner", tracer_provider=provider):
            pass
        with audit_operation("outer", tracer_provider=provider):
            pass
    assert [(row.action, row.transport) for row in rows(processor)] == [("inner", "mcp"), ("outer", "http")]


def test_another_traces_request_is_nobodys_business(provider, audit, rows, storage, request_span):
    processor = audit(storage=storage)
    with request_span(**HTTP):
        other = trace.set_span_in_context(trace.INVALID_SPAN)
        span = provider.get_tracer("mine").start_span("x", other, attributes={"audit.action": "recall"})
        span.end()
    assert [row.transport for row in rows(processor)] == ["unknown"]


def test_a_scope_and_the_operation_itself_go_before_the_request(provider, audit, rows, storage, request_span):
    processor = audit(storage=storage)
    with request_span(**HTTP, **{"enduser.id": "calvin"}):
        with audit_scope(transport="bench", actor_id="susie"), audit_operation("a", tracer_provider=provider):
            pass
        with audit_operation("b", transport="mcp", actor_id="hobbes", tracer_provider=provider):
            pass
    assert [(row.transport, row.actor_id) for row in rows(processor)] == [("bench", "susie"), ("mcp", "hobbes")]


@pytest.mark.parametrize("key", ["enduser.id", "user.id"])
def test_the_actor_is_whom_the_request_was_authenticated_as_by_then(provider, audit, rows, storage, request_span, key):
    processor = audit(storage=storage)
    with request_span(**HTTP) as served:
        with audit_operation("before", tracer_provider=provider):
            pass
        served.set_attribute(key, "calvin")
        with audit_operation("after", tracer_provider=provider):
            pass
    assert [(row.action, row.actor_id) for row in rows(processor)] == [("before", None), ("after", "calvin")]


class TestBaggage:
    def test_is_not_believed_unless_its_key_was_allowed(self, provider, audit, rows, storage):
        processor = audit(storage=storage)
        context = baggage.set_baggage("enduser.id", "calvin")
        provider.get_tracer("x").start_span("x", context, attributes={"audit.action": "recall"}).end()
        assert [row.actor_id for row in rows(processor)] == [None]

    def test_says_who_acts_and_the_row_says_that_nobody_has_checked_it(self, provider, audit, rows, storage):
        processor = audit(storage=storage, actor_baggage=["tenant.user", "enduser.id"])
        context = baggage.set_baggage("enduser.id", "calvin")
        provider.get_tracer("x").start_span("x", context, attributes={"audit.action": "recall"}).end()
        [row] = rows(processor)
        assert (row.actor_id, row.metadata) == ("calvin", {"actor_source": "baggage"})

    def test_gives_way_to_whoever_was_authenticated(self, provider, audit, rows, storage, request_span):
        processor = audit(storage=storage, actor_baggage=["enduser.id"])
        with request_span(**HTTP, **{"enduser.id": "calvin"}):
            context = baggage.set_baggage("enduser.id", "moe")
            provider.get_tracer("x").start_span("x", context, attributes={"audit.action": "recall"}).end()
        [row] = rows(processor)
        assert (row.actor_id, row.metadata) == ("calvin", {})

    @pytest.mark.parametrize("value", ["", 7, "x" * 257])
    def test_is_not_taken_where_it_is_no_id(self, provider, audit, rows, storage, value):
        processor = audit(storage=storage, actor_baggage=["enduser.id"])
        context = baggage.set_baggage("enduser.id", value)
        provider.get_tracer("x").start_span("x", context, attributes={"audit.action": "recall"}).end()
        assert [(row.actor_id, row.metadata) for row in rows(processor)] == [(None, {})]

    @pytest.mark.parametrize("keys", ["enduser.id", [7], [""], 7])
    def test_is_named_by_a_list_of_keys(self, audit, storage, keys):
        with pytest.raises(ConfigurationError, match=r"^actor_baggage: .*\['enduser.id'\]"):
            audit(storage=storage, actor_baggage=keys)


REFLECT = SpanPattern(span_name="memory.reflect", scope="memory")
RECALL = {"span_name": "memory.recall", "action": "recall", "scope": "memory"}


class TestSpansInsideOthers:
    def emit(self, provider, *names):
        """A library's spans, each inside the one before."""
        tracer = provider.get_tracer("memory")
        context, spans = None, []
        for name in names:
            spans.append(tracer.start_span(name, context))
            context = trace.set_span_in_context(spans[-1])
        for span in reversed(spans):
            span.end()

    def test_are_no_rows_of_their_own_where_the_mapping_says_so(self, provider, audit, rows, storage):
        processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, not_inside=[REFLECT])])
        self.emit(provider, "memory.recall")
        self.emit(provider, "memory.reflect", "memory.recall")
        self.emit(provider, "memory.reflect", "llm", "step", "memory.recall")
        self.emit(provider, "request", "step", "memory.recall")
        assert [row.action for row in rows(processor)] == ["recall", "recall"]

    def test_are_rows_only_there_where_the_mapping_says_so(self, provider, audit, rows, storage):
        processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, inside=[REFLECT])])
        self.emit(provider, "memory.recall")
        self.emit(provider, "memory.reflect", "memory.recall")
        self.emit(provider, "memory.reflect", "llm", "step", "memory.recall")
        assert [row.action for row in rows(processor)] == ["recall", "recall"]

    def test_are_found_inside_a_span_that_was_renamed_or_said_more_meanwhile(self, provider, audit, rows, storage):
        around = SpanPattern(span_name="memory.reflect", kind="server", required=["memory.bank"])
        processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, not_inside=[around])])
        outer = provider.get_tracer("web").start_span("POST /", kind=SpanKind.SERVER)
        inner = provider.get_tracer("memory").start_span("memory.recall", trace.set_span_in_context(outer))
        outer.update_name("memory.reflect")
        outer.set_attribute("memory.bank", "b")
        inner.end()
        outer.end()
        assert rows(processor) == []

    def test_are_found_inside_one_that_has_ended_before_them(self, provider, audit, rows, storage):
        processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, not_inside=[REFLECT])])
        tracer = provider.get_tracer("memory")
        outer = tracer.start_span("memory.reflect")
        inner = tracer.start_span("memory.recall", trace.set_span_in_context(outer))
        outer.end()
        del outer
        gc.collect()
        inner.end()
        assert rows(processor) == []

    def test_of_a_concurrent_request_in_the_same_trace_are_rows(self, provider, audit, rows, storage):
        processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, not_inside=[REFLECT])])
        tracer = provider.get_tracer("memory")
        root = trace.set_span_in_context(tracer.start_span("agent"))
        reflect = tracer.start_span("memory.reflect", root)
        tracer.start_span("memory.recall", root).end()
        reflect.end()
        assert [row.action for row in rows(processor)] == ["recall"]


def test_a_requests_span_that_gets_its_name_later_takes_in_the_operation_inside_it(provider, audit, rows, storage):
    mapping = SpanMapping(span_name="memory.{action}", bank_id="memory.bank")
    processor = audit(storage=storage, mappings=[mapping])
    outer = provider.get_tracer("web").start_span("POST /", kind=SpanKind.SERVER, attributes=HTTP)
    inner = provider.get_tracer("memory").start_span("memory.recall", trace.set_span_in_context(outer))
    outer.update_name("memory.recall")
    inner.set_attribute("memory.bank", "b")
    inner.end()
    assert "audit.record.id" not in outer.attributes, "it was not yet sure to become a record"
    outer.end()
    [row] = rows(processor)
    assert (row.action, row.bank_id, row.transport, row.parent_span_id) == ("recall", "b", "http", None)


def test_nothing_is_kept_of_spans_that_are_gone(provider, audit, storage, request_span):
    processor = audit(storage=storage, mappings=[SpanMapping(**RECALL, not_inside=[REFLECT])])
    surroundings = processor.exporter.selection.surroundings
    forgotten = provider.get_tracer("web").start_span("forgotten", kind=SpanKind.SERVER)
    with request_span(**HTTP), request_span(**MCP):
        assert len(surroundings._entries) == 2
    del forgotten
    gc.collect()
    assert (len(surroundings._entries), len(surroundings._parents)) == (0, 0)
