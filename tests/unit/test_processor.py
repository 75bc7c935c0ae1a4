"""`AuditSpanProcessor`: what it promises to the application, to the emitter and to whoever shuts it down."""

import logging
import threading

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, TraceFlags

from astrocyte_otel_audit import (
    AuditSpanExporter,
    AuditSpanProcessor,
    AuditUnavailableError,
    ConfigurationError,
    SpanMapping,
    audit_operation,
    audit_scope,
    audited,
)
from tests.support import MemoryStorage, unavailable


@pytest.fixture
def processor(audit, storage):
    return audit(storage=storage)


def emit(provider, action="recall", **arguments):
    """One audited operation; gives the id of its row, as the emitter knows it."""
    with audit_operation(action, tracer_provider=provider, **arguments) as operation:
        pass
    return operation.record_id


def context(number=1):
    return SpanContext(number, number, is_remote=False, trace_flags=TraceFlags(1))


# The application is left in peace.


class Broken:
    """Stands where a part of the exporter should be, and fails at every use."""

    def __getattr__(self, name):
        raise RuntimeError("its own words")


def test_an_exporter_that_fails_does_not_reach_the_application(provider, processor, storage, caplog):
    processor.exporter.selection = Broken()
    assert emit(provider) is None
    assert [message for message in caplog.messages if "RuntimeError" in message] == [
        "an audit span's start could not be noted (RuntimeError).",
        "an audit span could not become a record (RuntimeError).",
    ]
    assert "its own words" not in caplog.text


def test_a_failure_at_every_span_is_said_once(provider, processor, caplog):
    processor.exporter.selection = Broken()
    for _ in range(50):
        emit(provider)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2


@pytest.mark.parametrize(
    "span",
    [
        ReadableSpan("nothing at all"),
        ReadableSpan("no context", attributes={"audit.action": "recall"}),
        ReadableSpan("no status", context=context(), status=None, attributes={"audit.action": "recall"}),
        ReadableSpan("no attributes", context=context(), attributes=None),
        ReadableSpan("no resource", context=context(), resource=None, attributes={"audit.action": "recall"}),
        None,
    ],
    ids=lambda span: span.name if span else "no span",
)
def test_a_span_that_lacks_its_parts_raises_nothing(processor, span):
    processor.on_start(span)
    processor.on_end(span)


def test_a_span_without_times_is_a_row(processor, storage):
    processor.on_end(ReadableSpan("audit recall", context=context(), attributes={"audit.action": "recall"}))
    assert processor.force_flush(10_000)
    [row] = storage.records
    assert (row.action, row.ended_at) == ("recall", None)


def test_a_schema_function_that_fails_does_not_reach_the_application(audit, provider, storage):
    def tenant():
        raise LookupError

    processor = audit(storage=storage, schema=tenant)
    emit(provider)
    assert processor.force_flush(10_000)
    assert [row.schema for row in storage.records] == [None]


def test_a_span_that_was_started_before_the_processor_came_is_audited_at_its_end(audit, provider, storage):
    span = provider.get_tracer("test").start_span("audit recall", attributes={"audit.action": "recall"})
    processor = audit(storage=storage)
    span.end()
    assert processor.force_flush(10_000)
    assert [row.action for row in storage.records] == ["recall"]


# Receipts.


def test_the_receipt_is_the_id_of_the_row(provider, processor, storage):
    receipts = [emit(provider) for _ in range(3)]
    assert processor.force_flush(10_000)
    assert [row.id for row in storage.records] == receipts


def test_a_receipt_is_on_a_librarys_span_too(audit, provider, storage):
    processor = audit(storage=storage, mappings=[SpanMapping(span_name="memory.{action}")])
    with provider.get_tracer("memory").start_as_current_span("memory.recall") as span:
        receipt = span.attributes["audit.record.id"]
    assert processor.force_flush(10_000)
    assert [row.id for row in storage.records] == [receipt]


def test_what_is_not_audited_has_no_receipt(audit, provider, storage):
    audit(storage=storage, actions=["recall"])
    assert emit(provider, "retain") is None
    with provider.get_tracer("web").start_as_current_span("GET /") as span:
        assert "audit.record.id" not in span.attributes


def test_there_is_no_receipt_for_what_will_be_refused(audit, provider, storage):
    held = threading.Event()
    storage.before_append = lambda records: held.wait(20)
    processor = audit(storage=storage, max_queue_size=1, spool_dir=False)
    assert emit(provider) is not None
    assert emit(provider) is None
    held.set()
    assert processor.force_flush(10_000)
    assert (len(storage.records), processor.stats()["refused_full"]) == (1, 1)


def test_the_tenant_and_the_actor_are_those_of_the_start(audit, provider, storage):
    processor = audit(storage=storage, mappings=[SpanMapping(span_name="memory.{action}")])
    with audit_scope(schema="tenant_a", actor_id="alice"):
        span = provider.get_tracer("memory").start_span("memory.recall")
    with audit_scope(schema="tenant_b", actor_id="bob"):
        span.end()
    assert processor.force_flush(10_000)
    [row] = storage.records
    assert (row.schema, row.actor_id) == ("tenant_a", "alice")


def test_a_scope_is_that_of_the_context_in_which_the_span_is_started(audit, provider, storage):
    processor = audit(storage=storage, mappings=[SpanMapping(span_name="memory.{action}")])
    with audit_scope(actor_id="alice"):
        inside = otel_context.get_current()
    provider.get_tracer("memory").start_span("memory.recall", context=inside).end()
    assert processor.force_flush(10_000)
    assert [row.actor_id for row in storage.records] == ["alice"]


def test_a_scopes_schema_goes_before_the_schema_function(audit, provider, storage):
    processor = audit(storage=storage, schema=lambda: "by_function")
    with audit_scope(schema="by_scope"):
        emit(provider)
    emit(provider)
    assert processor.force_flush(10_000)
    assert [row.schema for row in storage.records] == ["by_scope", "by_function"]


# Operations that require their audit.


@pytest.fixture
def required(provider):
    """A function that runs only if it is audited, and the list of its runs."""
    runs = []

    @audited("recall", required=True, tracer_provider=provider)
    def recall(bank_id):
        runs.append(bank_id)

    recall.runs = runs
    return recall


def test_a_required_operation_runs_and_has_its_row_whatever_the_allowlist_says(audit, storage, required):
    processor = audit(storage=storage, actions=["retain"])
    required("b")
    assert processor.force_flush(10_000)
    assert (required.runs, [row.bank_id for row in storage.records]) == (["b"], ["b"])


def test_a_required_operation_runs_while_the_database_is_away(audit, storage, required):
    storage.before_append = unavailable
    processor = audit(storage=storage)
    required("b")
    storage.before_append = lambda records: None
    assert processor.force_flush(10_000)
    assert (required.runs, len(storage.records)) == (["b"], 1)


def test_a_required_operation_does_not_run_without_a_pipeline(required):
    with pytest.raises(AuditUnavailableError, match="'recall' is required"):
        required("b")
    assert required.runs == []


def test_a_required_operation_does_not_run_without_the_sampler(storage):
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(AuditSpanProcessor(AuditSpanExporter(storage=storage, actions="*")))
    with (
        pytest.raises(AuditUnavailableError, match="AuditSampler"),
        audit_operation("recall", required=True, tracer_provider=provider),
    ):
        pytest.fail("the body ran")
    provider.shutdown()


def test_a_required_operation_does_not_run_after_the_shutdown(processor, storage, required):
    processor.shutdown()
    with pytest.raises(AuditUnavailableError):
        required("b")
    assert (required.runs, storage.records) == ([], [])


def test_a_required_operation_does_not_run_while_the_spool_is_full(audit, provider, storage, required):
    held = threading.Event()
    storage.before_append = lambda records: held.wait(20)
    processor = audit(storage=storage, spool_max_bytes=4_000)
    while emit(provider) is not None:
        pass
    with pytest.raises(AuditUnavailableError):
        required("b")
    held.set()
    assert processor.force_flush(10_000)
    required("b")
    assert required.runs == ["b"]


def test_a_required_operation_does_not_run_without_a_spool(audit, provider, storage, required):
    audit(storage=storage, spool_dir=False)
    with pytest.raises(AuditUnavailableError):
        required("b")
    assert required.runs == []


async def test_a_required_coroutine_does_not_run_without_a_pipeline(provider):
    @audited("recall", required=True, tracer_provider=provider)
    async def recall():
        pytest.fail("the body ran")

    with pytest.raises(AuditUnavailableError):
        await recall()


# Flush and shutdown.


def test_flush_and_shutdown_are_harmless_when_repeated(provider, processor, storage):
    emit(provider)
    assert [processor.force_flush(10_000) for _ in range(3)] == [True] * 3
    for _ in range(3):
        processor.shutdown()
    assert processor.force_flush(10_000)
    assert (len(storage.records), storage.closed) == (1, True)


def test_the_providers_shutdown_is_enough(provider, processor, storage):
    for _ in range(3):
        emit(provider)
    provider.shutdown()
    assert (len(storage.records), storage.closed) == (3, True)


def test_the_providers_flush_is_enough(provider, audit, storage):
    audit(storage=storage, schedule_delay_millis=3_600_000.0)
    emit(provider)
    assert provider.force_flush(10_000)
    assert len(storage.records) == 1


def test_what_ends_after_the_shutdown_is_refused_and_counted(provider, processor, storage):
    with audit_operation("recall", tracer_provider=provider):
        processor.shutdown()
    assert (storage.records, processor.stats()["refused_shutdown"]) == ([], 1)


def test_flush_is_false_at_its_timeout(provider, processor, storage):
    held = threading.Event()
    storage.before_append = lambda records: held.wait(20)
    emit(provider)
    assert not processor.force_flush(50)
    held.set()
    assert processor.force_flush(10_000)


def test_the_stats_are_those_of_the_writer_and_the_open_operations(provider, processor):
    emit(provider)
    with audit_operation("recall", tracer_provider=provider):
        assert processor.force_flush(10_000)
        assert processor.stats() == {
            "accepted": 1, "waiting": 0, "parked": 0, "stored": 1, "set_aside": 0, "lost": 0,
            "refused_full": 0, "adopted": 0, "damaged": 0, "refused_shutdown": 0, "unreadable": 0, "open": 1,
        }  # fmt: skip


# Next to others.


def test_two_pipelines_on_one_provider_each_have_their_own_actions(audit, provider):
    first, second = MemoryStorage(), MemoryStorage()
    audit(storage=first, actions=["recall"])
    audit(storage=second, actions=["recall", "retain"])
    receipts = {action: emit(provider, action) for action in ("recall", "retain", "forget")}
    assert provider.force_flush(10_000)
    assert [row.id for row in first.records] == [receipts["recall"]]
    assert [row.id for row in second.records] == [receipts["recall"], receipts["retain"]]
    assert receipts["forget"] is None


def test_two_pipelines_beside_a_dropping_sampler_both_get_their_rows(audit):
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    first, second = MemoryStorage(), MemoryStorage()
    audit(storage=first, actions=["recall"], tracer_provider=provider)
    audit(storage=second, actions=["retain"], tracer_provider=provider)
    emit(provider, "recall")
    emit(provider, "retain")
    provider.shutdown()
    assert [[row.action for row in storage.records] for storage in (first, second)] == [["recall"], ["retain"]]


def test_the_current_span_is_a_pipelines_business_no_more_than_the_context(provider, processor):
    before = otel_context.get_current()
    emit(provider)
    assert otel_context.get_current() == before
    assert trace.get_current_span() is trace.INVALID_SPAN


# What can't be used.


@pytest.mark.parametrize("exporter", [None, "exporter", MemoryStorage()])
def test_an_exporter_of_another_kind_is_refused(exporter):
    with pytest.raises(ConfigurationError, match=r"^exporter: got a .*accepted is an AuditSpanExporter") as refused:
        AuditSpanProcessor(exporter)
    assert refused.value.source == "exporter"


@pytest.mark.parametrize("argument", ["max_queue_size", "max_export_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_a_size_below_one_or_of_no_whole_number_is_refused(storage, argument, value):
    with pytest.raises(ConfigurationError, match=f"^{argument}: got .* a whole number of at least 1"):
        AuditSpanProcessor(AuditSpanExporter(storage=storage), **{argument: value})


@pytest.mark.parametrize("argument", ["schedule_delay_millis", "export_timeout_millis"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), True, "soon"])
def test_a_time_that_is_no_positive_number_is_refused(storage, argument, value):
    with pytest.raises(ConfigurationError, match=f"^{argument}: got .* a number above 0"):
        AuditSpanProcessor(AuditSpanExporter(storage=storage), **{argument: value})


def test_a_batch_is_never_larger_than_the_queue(audit, provider, storage):
    """It would never be full, and its records would always wait for the delay."""
    processor = audit(storage=storage, max_queue_size=2, max_export_batch_size=512, schedule_delay_millis=3_600_000.0)
    arrived = threading.Event()
    storage.before_append = lambda records: arrived.set()
    emit(provider)
    emit(provider)
    assert arrived.wait(20)
    assert processor.force_flush(10_000)
    assert storage.batches == [2]
