"""`AuditSpanProcessor`: what it promises to the application, to the emitter and to whoever shuts it down."""

import logging
import threading
import time
from datetime import UTC, datetime

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, TraceFlags

from astrocyte_otel_audit import (
    AuditSpanExporter,
    AuditSpanProcessor,
    AuditUnavailableError,
    ConfigurationError,
    RetentionPolicy,
    SpanMapping,
    audit_operation,
    audit_scope,
    audited,
)
from astrocyte_otel_audit.pipeline.replay import status
from astrocyte_otel_audit.pipeline.selection import Selection
from tests.support import MemoryStorage, unavailable


@pytest.fixture
def processor(audit, storage):
    return audit(storage=storage)


def emit(provider, action="recall", **arguments):
    """One audited operation; gives the id of its row, as the emitter knows it."""
    with audit_operation(action, tracer_provider=provider, **arguments) as operation:
        pass
    return operation.record_id


def wait_until(condition, seconds=20):
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def context(number=1):
    return SpanContext(number, number, is_remote=False, trace_flags=TraceFlags(1))


# The application is left in peace.


@pytest.fixture
def broken(audit, storage, monkeypatch):
    """A pipeline whose exporter fails whatever it is asked about a span."""

    def fail(*args):
        raise RuntimeError("its own words")

    monkeypatch.setattr(Selection, "expects", fail)
    monkeypatch.setattr(Selection, "capture", fail)
    return audit(storage=storage)


def test_an_exporter_that_fails_does_not_reach_the_application(provider, broken, caplog):
    assert emit(provider) is None
    assert [message for message in caplog.messages if "RuntimeError" in message] == [
        "an audit span's start could not be noted (RuntimeError).",
        "an audit span could not become a record (RuntimeError).",
    ]
    assert "its own words" not in caplog.text
    assert broken.stats()["unreadable"] == 1


def test_a_failure_at_every_span_is_said_once(provider, broken, caplog):
    for _ in range(50):
        emit(provider)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2
    assert broken.stats()["unreadable"] == 50


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


#: The last microseconds that 64 bits of nanoseconds can hold.
ENDS_OF_TIME = {
    10**30: datetime(2262, 4, 11, 23, 47, 16, 854775, UTC),
    -(10**30): datetime(1677, 9, 21, 0, 12, 43, 145224, UTC),
}


@pytest.mark.parametrize("spool_dir", [None, False])
@pytest.mark.parametrize(
    ("start_ns", "end_ns"),
    [(10**30, 10**30), (-(10**30), 10**30), (0, -(10**30))],
    ids=["after all time", "all time", "backwards"],
)
def test_times_that_no_clock_says_are_the_last_that_can_be_written(
    audit, provider, storage, spool_dir, start_ns, end_ns
):
    processor = audit(storage=storage, spool_dir=spool_dir)
    operation = audit_operation("recall", bank_id="b", start_ns=start_ns, tracer_provider=provider)
    operation.start()
    operation.finish(end_ns=end_ns)
    assert processor.force_flush(10_000)
    [row] = storage.records
    assert (row.id, row.bank_id) == (operation.record_id, "b")
    assert (row.started_at, row.ended_at) == (
        ENDS_OF_TIME.get(start_ns, datetime(1970, 1, 1, tzinfo=UTC)),
        ENDS_OF_TIME[end_ns],
    )


@pytest.mark.parametrize("start_ns", ENDS_OF_TIME, ids=["after", "before"])
def test_an_operation_that_began_when_no_clock_says_so_is_on_disk_before_it_ends(
    provider, processor, storage, start_ns
):
    outer = audit_operation("recall", required=True, start_ns=start_ns, tracer_provider=provider)
    outer.start()
    with outer.current():
        inner = audit_operation("recall", bank_id="b", start_ns=start_ns, tracer_provider=provider)
        inner.start()
        inner.finish(end_ns=start_ns)
    receipt = outer.record_id
    del outer
    assert processor.force_flush(10_000)
    [row] = storage.records
    assert (row.id, row.bank_id, row.started_at, row.outcome) == (receipt, "b", ENDS_OF_TIME[start_ns], "unknown")


@pytest.mark.parametrize("start_ns", ENDS_OF_TIME, ids=["after", "before"])
def test_a_gap_in_which_no_clock_says_so_is_a_row(audit, provider, storage, start_ns):
    held = threading.Event()
    storage.before_append = lambda records: held.wait(20)
    processor = audit(storage=storage, max_queue_size=1, spool_dir=False)
    for _ in range(2):
        operation = audit_operation("recall", start_ns=start_ns, tracer_provider=provider)
        operation.start()
        operation.finish(end_ns=start_ns)
    held.set()
    assert processor.force_flush(10_000)
    processor.shutdown()
    [gap] = [row for row in storage.records if row.action == "audit.gap"]
    assert (gap.started_at, gap.ended_at, gap.metadata["missing"]) == (ENDS_OF_TIME[start_ns],) * 2 + (1,)


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
    assert [row.action for row in storage.records if row.action != "audit.gap"] == ["recall"]
    assert processor.stats()["refused_full"] == 1


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


def test_a_required_operation_inside_another_keeps_a_row_of_its_own(provider, processor, storage):
    with audit_operation("recall", tracer_provider=provider) as outer:
        receipt = emit(provider, required=True)
    assert processor.force_flush(10_000)
    assert [row.id for row in storage.records] == [receipt, outer.record_id]


async def test_a_required_coroutine_does_not_run_without_a_pipeline(provider):
    @audited("recall", required=True, tracer_provider=provider)
    async def recall():
        pytest.fail("the body ran")

    with pytest.raises(AuditUnavailableError):
        await recall()


def test_a_required_operation_does_not_run_while_it_can_not_be_put_on_the_disk(audit, storage, required, tmp_path):
    audit(storage=storage)
    (tmp_path / "astrocyte-otel-audit" / "spool").rmdir()
    (tmp_path / "astrocyte-otel-audit" / "spool").write_text("a file in its place")
    with pytest.raises(AuditUnavailableError):
        required("b")
    assert required.runs == []


# Operations inside operations.


def in_spool(tmp_path):
    """Records in the spool, and operations that it has something of while they are under way."""
    [process] = status(tmp_path / "astrocyte-otel-audit" / "spool")
    return process.records, process.begun


def test_an_operation_inside_another_is_on_disk_before_that_ends(provider, processor, tmp_path):
    with audit_operation("recall", tracer_provider=provider):
        with audit_operation("recall", bank_id="b", tracer_provider=provider):
            pass
        assert in_spool(tmp_path) == (0, 1)
    assert in_spool(tmp_path) == (1, 0)


def test_what_is_on_disk_of_an_operation_under_way_is_nothing_that_waits(provider, processor, storage):
    with audit_operation("recall", tracer_provider=provider):
        emit(provider)
        assert processor.force_flush(10_000)
        stats = processor.stats()
        assert (stats["accepted"], stats["waiting"], stats["open"], storage.records) == (0, 0, 1, [])
    assert processor.force_flush(10_000)
    stats = processor.stats()
    assert (stats["accepted"], stats["stored"], stats["open"], len(storage.records)) == (1, 1, 0, 1)


def test_an_operation_inside_another_is_counted_by_itself_where_the_spool_has_no_room(audit, provider, storage):
    held = threading.Event()
    storage.before_append = lambda records: held.wait(20)
    processor = audit(storage=storage, spool_max_bytes=4_000)
    with audit_operation("recall", tracer_provider=provider):
        while emit(provider, "fill") is not None:
            pass
        refused = processor.stats()["refused_full"]
        emit(provider, bank_id="x" * 1_100)
        assert processor.stats()["refused_full"] == refused + 1  # it survives the process, as its row would have
        held.set()
        assert processor.force_flush(10_000)
    assert processor.force_flush(10_000)
    [row] = [row for row in storage.records if row.action == "recall"]
    assert row.bank_id is None


def test_of_three_levels_one_is_in_the_spool_at_last(provider, processor, storage, tmp_path):
    with audit_operation("recall", tracer_provider=provider) as outermost:
        with audit_operation("recall", tracer_provider=provider):
            emit(provider, bank_id="b")
            assert in_spool(tmp_path) == (0, 1)
        assert processor.stats()["accepted"] == 0
    assert in_spool(tmp_path)[0] == processor.stats()["accepted"] == 1
    assert processor.force_flush(10_000)
    assert [(row.id, row.bank_id) for row in storage.records] == [(outermost.record_id, "b")]
    processor.shutdown()
    assert list(status(tmp_path / "astrocyte-otel-audit" / "spool")) == []


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


def test_the_stats_are_those_of_the_writer_and_the_open_operations(provider, processor, tmp_path):
    assert processor.stats()["spool_bytes"] == 0
    emit(provider)
    with audit_operation("recall", tracer_provider=provider):
        assert processor.force_flush(10_000)
        [segment] = tmp_path.rglob("000*.segment")
        assert processor.stats() == {
            "accepted": 1, "waiting": 0, "parked": 0, "stored": 1, "set_aside": 0, "lost": 0,
            "refused_full": 0, "adopted": 0, "damaged": 0, "refused_shutdown": 0, "unreadable": 0, "open": 1,
            "spool_bytes": segment.stat().st_size,
        }  # fmt: skip
    processor.shutdown()
    assert processor.stats()["spool_bytes"] == 0


def test_what_is_settled_stays_in_the_spool_for_as_long_as_it_is_told_to(audit, provider, storage, tmp_path):
    processor = audit(storage=storage, spool_keep_seconds=3600, spool_max_bytes=40_000)
    for _ in range(4):
        emit(provider, bank_id="b" * 6_000)  # two fill one part
        assert processor.force_flush(10_000)
    assert len(list(tmp_path.rglob("000*.segment"))) == 2
    processor.shutdown()
    assert (list(tmp_path.rglob("000*.segment")), len(storage.records)) == ([], 4)


def test_what_has_stayed_is_written_again_when_the_database_was_away(audit, provider, storage):
    processor = audit(storage=storage, spool_keep_seconds=3600)
    first = emit(provider)
    assert processor.force_flush(10_000)
    storage.records.clear()  # as a standby that has taken over, and lacks the last commits
    storage.before_append = unavailable
    second = emit(provider)
    assert not processor.force_flush(50)
    storage.before_append = lambda records: None
    assert wait_until(lambda: {row.id for row in storage.records} == {first, second})


def test_its_counts_are_metrics_of_the_meter_provider_that_is_given(audit, provider, storage):
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    processor = audit(storage=storage, meter_provider=meters)
    emit(provider)
    assert processor.force_flush(10_000)
    [resource] = reader.get_metrics_data().resource_metrics
    [scope] = resource.scope_metrics
    found = {metric.name: metric.data.data_points for metric in scope.metrics}
    assert [point.value for point in found["audit.records.exported"]] == [1]
    meters.shutdown()


# Another process writes.


@pytest.fixture
def beside(storage, provider):
    """A processor that leaves writing to another process."""
    exporter = AuditSpanExporter(storage=storage, actions="*", destination="here")
    processor = AuditSpanProcessor(exporter, writer="external")
    provider.add_span_processor(processor)
    return processor


@pytest.fixture
def threads():
    """Those that ran before the test."""
    return set(threading.enumerate())


def test_with_an_external_writer_nothing_is_written_here_and_no_thread_runs(
    threads, beside, provider, storage, tmp_path
):
    assert emit(provider) is not None
    assert not beside.force_flush(50)
    assert set(threading.enumerate()) <= threads
    [process] = status(tmp_path / "astrocyte-otel-audit" / "spool")
    assert (process.alive, process.destination, process.records) == (True, "here", 1)
    assert (storage.records, storage.batches) == ([], [])
    stats = beside.stats()
    assert stats.pop("spool_bytes") > 0
    assert stats == {
        "accepted": 1, "waiting": 1, "stored": 0, "set_aside": 0, "refused_full": 0, "refused_shutdown": 0,
        "unreadable": 0, "open": 0,
    }  # fmt: skip


def test_what_an_external_writer_was_to_write_is_written_by_the_next_process_with_its_destination(
    beside, provider, storage, audit
):
    with audit_operation("recall", tracer_provider=provider) as outer:
        emit(provider, bank_id="b")
    beside.shutdown()
    another = MemoryStorage()
    other = audit(storage=another, tracer_provider=TracerProvider(shutdown_on_exit=False), destination="there")
    following = audit(storage=storage, tracer_provider=TracerProvider(shutdown_on_exit=False), destination="here")
    assert wait_until(lambda: following.stats()["adopted"] == following.stats()["stored"] == 1)
    assert [(row.id, row.bank_id) for row in storage.records] == [(outer.record_id, "b")]
    for processor in (other, following):
        processor.shutdown()
    assert (another.records, other.stats()["adopted"]) == ([], 0)


def test_a_required_operation_runs_beside_an_external_writer(beside, required, tmp_path):
    required("b")
    beside.shutdown()
    with pytest.raises(AuditUnavailableError):
        required("c")
    assert required.runs == ["b"]
    [process] = status(tmp_path / "astrocyte-otel-audit" / "spool")
    assert (process.alive, process.records, process.begun) == (False, 1, 0)


def test_a_shutdown_inside_a_required_operation_leaves_its_row_to_the_external_writer(beside, provider, tmp_path):
    with audit_operation("recall", required=True, tracer_provider=provider):
        emit(provider, bank_id="b")
        beside.shutdown()
        assert in_spool(tmp_path) == (0, 1)
    assert in_spool(tmp_path) == (1, 0)
    assert beside.stats()["refused_shutdown"] == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [("spool_dir", False), ("spool_dir", __file__), ("spool_keep_seconds", 1), ("spool_keep_seconds", 0.5)],
)
def test_with_an_external_writer_what_would_leave_it_nothing_to_write_is_refused(storage, argument, value):
    with pytest.raises(ConfigurationError, match=rf"^{argument}: .*writer='external'") as refused:
        AuditSpanProcessor(AuditSpanExporter(storage=storage), writer="external", **{argument: value})
    assert refused.value.source == argument


def test_without_an_external_writer_a_spool_that_can_not_be_used_is_loudly_done_without(audit, storage, caplog):
    audit(storage=storage, spool_dir=__file__, spool_keep_seconds=1)
    [message] = [message for message in caplog.messages if "kept in memory only" in message]
    assert "the spool can't be used, as its directory can't be made" in message


def test_who_writes_may_come_from_the_environment(storage, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "external")
    processor = AuditSpanProcessor(AuditSpanExporter(storage=storage))
    assert "adopted" not in processor.stats()
    processor.shutdown()
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "somebody")
    with pytest.raises(ConfigurationError, match=r"^OTEL_ASTROCYTE_AUDIT_WRITER: got 'somebody'; accepted is thread"):
        AuditSpanProcessor(AuditSpanExporter(storage=storage))


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


@pytest.mark.parametrize("argument", ["writer", "spool_fsync", "on_full"])
@pytest.mark.parametrize("value", ["somebody", "", "THREAD", True, 1, ["thread"]])
def test_a_word_that_is_none_of_the_accepted_is_refused(storage, argument, value):
    with pytest.raises(ConfigurationError, match=f"^{argument}: got .*; accepted is .* or "):
        AuditSpanProcessor(AuditSpanExporter(storage=storage), **{argument: value})


@pytest.mark.parametrize("value", [-1, -0.1, 86_401, float("inf"), float("nan"), True, "soon"])
def test_a_time_to_keep_the_spool_that_is_negative_or_longer_than_a_day_is_refused(storage, value):
    with pytest.raises(ConfigurationError, match=r"^spool_keep_seconds: got .* seconds from 0 to 86400"):
        AuditSpanProcessor(AuditSpanExporter(storage=storage), spool_keep_seconds=value)


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


def test_a_flush_waits_until_what_is_kept_is_written_again(audit, provider, storage):
    processor = audit(storage=storage, spool_keep_seconds=3600)
    emit(provider)
    assert processor.force_flush(10_000)
    storage.before_append = unavailable
    emit(provider)
    assert not processor.force_flush(50)
    again = threading.Event()

    def slow(records):
        if again.is_set():
            time.sleep(0.3)
        again.set()

    storage.before_append = slow
    assert processor.force_flush(10_000)


def test_after_its_end_a_process_that_wrote_nothing_does_not_say_that_all_is_in_the_table(audit, provider):
    processor = audit(writer="external")
    emit(provider)
    assert not processor.force_flush(20)
    processor.shutdown()
    assert not processor.force_flush(20)


# Retention.


NOWHERE = "postgresql://127.0.0.1:1/none"


def retention_threads():
    return [thread for thread in threading.enumerate() if thread.name == "astrocyte-audit-retention"]


@pytest.fixture
def alone():
    """Makes a processor that no `configure_audit` has made, and shuts it down."""
    made = []

    def make(**arguments):
        exporter = AuditSpanExporter(**{"storage": MemoryStorage(), "actions": [], **arguments.pop("exporter", {})})
        made.append(AuditSpanProcessor(exporter, **arguments))
        return made[-1]

    yield make
    for processor in made:
        processor.shutdown()
    assert retention_threads() == []


def test_without_a_policy_nothing_runs_and_nothing_is_counted(alone):
    processor = alone()
    assert processor.retention is None
    assert retention_threads() == []
    assert [name for name in processor.stats() if name.startswith("retention")] == []


def test_with_a_policy_a_thread_runs_and_is_counted(alone):
    policy = RetentionPolicy(days=30)
    processor = alone(retention=policy, retention_dsn=NOWHERE)
    assert processor.retention.policy is policy
    assert processor.retention.is_started
    assert len(retention_threads()) == 1
    stats = {name: count for name, count in processor.stats().items() if name.startswith("retention")}
    assert stats == {"retention_runs": 0, "retention_failed_runs": 0, "retention_rows": 0}


def test_days_are_a_policy(alone):
    assert alone(retention=30, retention_dsn=NOWHERE).retention.policy == RetentionPolicy(days=30)


def test_a_policy_may_come_from_the_environment(alone, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS", "30")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DSN", NOWHERE)
    assert alone().retention.policy == RetentionPolicy(days=30)
    assert alone(retention=False).retention is None


def test_a_server_that_is_not_there_is_a_failed_run_and_one_warning(alone, caplog):
    policy = RetentionPolicy(days=30, jitter_seconds=0, interval_seconds=0.01)
    processor = alone(retention=policy, retention_dsn=NOWHERE)
    assert wait_until(lambda: processor.stats()["retention_failed_runs"] >= 2)
    assert processor.stats()["retention_runs"] == 0
    [warning] = [message for message in caplog.messages if "expired" in message]
    assert warning.startswith("expired audit records are not deleted, until a later run: nothing listens at that host")


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ({"retention": 30}, "retention_dsn"),
        ({"retention": 30, "retention_dsn": "postgresql://u:%zz@h"}, "retention_dsn"),
        ({"retention": 30, "retention_dsn": ""}, "retention_dsn"),
        ({"retention": 0, "retention_dsn": NOWHERE}, "retention"),
        ({"retention": "30", "retention_dsn": NOWHERE}, "retention"),
    ],
    ids=str,
)
def test_a_retention_that_can_not_be_used_is_refused_before_anything_runs(storage, arguments, source):
    before = threading.active_count()
    with pytest.raises(ConfigurationError) as refused:
        AuditSpanProcessor(AuditSpanExporter(storage=storage), **arguments)
    assert refused.value.source == source
    assert threading.active_count() == before
