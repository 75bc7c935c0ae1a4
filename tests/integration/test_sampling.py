"""The rows are the same at every sampling rate, but for what they say of the sampling."""

import contextlib
import random

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from astrocyte_otel_audit import AuditSampler, SpanMapping, audit_operation, audit_scope, audited
from astrocyte_otel_audit.postgres import AuditTable
from tests.servers import emptied_and_migrated

ROUNDS = 40


class SeededIds(IdGenerator):
    """Ids that are the same in every run, so that a ratio picks the same traces."""

    def __init__(self, *, is_random=False):
        self._chance = random.Random(20260304)
        self._is_random = is_random

    def generate_span_id(self):
        return self._chance.getrandbits(64) or 1

    def generate_trace_id(self):
        return self._chance.getrandbits(128) or 1

    def is_trace_id_random(self):
        return self._is_random


@pytest.fixture
def database(module_database):
    return emptied_and_migrated(module_database)


@pytest.fixture
def traced(audit, database):
    """Makes a provider that samples at a rate, with a pipeline onto the database and a trace backend beside it."""
    made = []

    def make(rate, **arguments):
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(rate)),
            resource=Resource({"service.name": f"at {rate}"}),
            shutdown_on_exit=False,
            **{"id_generator": SeededIds(), **arguments},
        )
        backend = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(backend))
        mappings = [SpanMapping(span_name="memory.{action}", scope="memory", kind=SpanKind.INTERNAL)]
        audit(dsn=database, tracer_provider=provider, mappings=mappings)
        made.append(provider)
        return provider, backend

    yield make
    for provider in made:
        provider.shutdown()


def program(provider):
    """A service at work: nested, failing, mapped, plain and scoped spans."""
    web, memory = provider.get_tracer("web"), provider.get_tracer("memory")

    @audited("recall", tracer_provider=provider)
    def recall(query, bank_id=None):
        with memory.start_as_current_span("memory.recall", attributes={"astrocyte.bank_id": "inner"}):
            return {"hits": len(query)}

    @audited("retain", tracer_provider=provider)
    def retain(text, bank_id):
        raise TimeoutError(text)

    for number in range(ROUNDS):
        with audit_scope(actor_id=f"user-{number}", transport="http"), web.start_as_current_span("POST /"):
            recall("where?" + "!" * number)
            with contextlib.suppress(TimeoutError):
                retain("a secret", bank_id=f"bank-{number}")
            with audit_operation("classify", tracer_provider=provider), web.start_as_current_span("model"):
                memory.start_span("memory.classify").end()


def rows_at(table, rate):
    """All rows of one rate, oldest first."""
    records = table.search(limit=10_000).records
    return sorted((row for row in records if row.service_name == f"at {rate}"), key=lambda row: row.started_at)


def said(row, rows):
    """What a row says that doesn't depend on its ids, its times and its sampling."""
    parents = {other.span_id: other.action for other in rows}
    return (
        row.action, row.transport, row.bank_id, row.request, row.response, row.metadata, row.outcome, row.error_type,
        row.actor_id, row.actor_type, parents.get(row.parent_span_id), row.parent_span_id is None,
    )  # fmt: skip


def test_the_rows_are_the_same_at_none_a_tenth_and_all_of_the_traces(traced, database, table: AuditTable):
    by_rate = {}
    for rate in (0.0, 0.1, 1.0):
        provider, backend = traced(rate)
        program(provider)
        provider.shutdown()
        rows = by_rate[rate] = rows_at(table, rate)
        # The row says whether its trace can be looked at, and the trace backend agrees.
        exported = {f"{span.context.trace_id:032x}" for span in backend.get_finished_spans()}
        assert {row.trace_id for row in rows if row.sampled} == exported
        assert not exported & {row.trace_id for row in rows if not row.sampled}
        assert len({row.id for row in rows}) == len(rows) == 4 * ROUNDS
    assert [{row.sampled for row in by_rate[rate]} for rate in by_rate] == [{False}, {False, True}, {True}]
    expected = [said(row, by_rate[1.0]) for row in by_rate[1.0]]
    for rate in (0.0, 0.1):
        assert [said(row, by_rate[rate]) for row in by_rate[rate]] == expected


def test_a_trace_backend_gets_no_span_more_than_without_the_audit(traced, table):
    plain = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(0.1)), id_generator=SeededIds(), shutdown_on_exit=False
    )
    expected = InMemorySpanExporter()
    plain.add_span_processor(SimpleSpanProcessor(expected))
    program(plain)
    provider, backend = traced(0.1)
    program(provider)
    names = [sorted(span.name for span in each.get_finished_spans()) for each in (expected, backend)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("flags", "sampled"),
    [("00", False), ("01", True), ("02", False), ("03", True)],
    ids=["unsampled", "sampled", "unsampled, random", "sampled, random"],
)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_callers_decision_is_kept_and_its_operation_audited(traced, table, flags, sampled, rate):
    provider, backend = traced(rate)
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    carrier = {"traceparent": f"00-{trace_id}-{span_id}-{flags}"}
    token = otel_context.attach(TraceContextTextMapPropagator().extract(carrier))
    try:
        with audit_operation("recall", bank_id="b", tracer_provider=provider) as operation:
            receipt = operation.record_id
    finally:
        otel_context.detach(token)
    provider.shutdown()
    [row] = rows_at(table, rate)
    assert (row.id, row.trace_id, row.parent_span_id, row.bank_id) == (receipt, trace_id, span_id, "b")
    assert row.sampled is sampled
    assert len(backend.get_finished_spans()) == sampled


@pytest.mark.parametrize(("rate", "sampled"), [(0.0, False), (1.0, True)])
def test_the_random_bit_of_a_new_trace_is_not_the_sampled_bit(traced, table, rate, sampled):
    random_bit = 2 if hasattr(IdGenerator, "is_trace_id_random") else 0  # an older SDK has none
    provider, _ = traced(rate, id_generator=SeededIds(is_random=True))
    with audit_operation("recall", tracer_provider=provider), audit_operation("recall", tracer_provider=provider):
        flags = trace.get_current_span().get_span_context().trace_flags
    assert flags == random_bit + sampled
    provider.shutdown()
    [row] = rows_at(table, rate)
    assert (row.parent_span_id, row.sampled) == (None, sampled)


@pytest.mark.parametrize(
    "sampler",
    [ParentBased(ALWAYS_ON), ParentBased(ALWAYS_OFF), ALWAYS_ON, ALWAYS_OFF],
    ids=["parent-based, on", "parent-based, off", "on", "off"],
)
def test_a_mapping_of_everything_does_not_audit_the_audit(audit, database, table, sampler):
    mapping = SpanMapping(span_name="*", action="anything")
    provider = TracerProvider(sampler=AuditSampler(sampler, actions="*", mappings=[mapping]), shutdown_on_exit=False)
    instrumentor = PsycopgInstrumentor()
    instrumentor.instrument(tracer_provider=provider)  # first: the connection is opened at once
    try:
        processor = audit(dsn=database, tracer_provider=provider, mappings=[mapping])
        with audit_operation("recall", tracer_provider=provider):
            pass
        for _ in range(3):  # each write would otherwise cause another
            assert processor.force_flush(10_000)
    finally:
        instrumentor.uninstrument()
        provider.shutdown()
    assert [row.action for row in table.search(limit=100).records] == ["recall"]


def test_the_callers_trace_state_travels_on(traced):
    provider, _ = traced(0.0)
    carrier = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        "tracestate": "vendor=kept",
    }
    token = otel_context.attach(TraceContextTextMapPropagator().extract(carrier))
    try:
        with audit_operation("recall", tracer_provider=provider):
            onward: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(onward)
    finally:
        otel_context.detach(token)
    assert onward["tracestate"] == "vendor=kept"
    assert onward["traceparent"].endswith("-00")
