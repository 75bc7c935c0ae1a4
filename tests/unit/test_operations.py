"""One operation, one row: how operations inside operations become rows."""

import gc
import threading

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased

from astrocyte_otel_audit import AuditSpanProcessor, SpanMapping, audit_operation, audit_scope, audited
from astrocyte_otel_audit.pipeline import captured as captured_module
from astrocyte_otel_audit.pipeline import operations as operations_module


@pytest.fixture(params=[ALWAYS_ON, ALWAYS_OFF], ids=["100%", "0%"])
def provider(request):
    """Every rule below holds whether or not the trace is sampled."""
    provider = TracerProvider(sampler=ParentBased(request.param), shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def processor(audit, storage) -> AuditSpanProcessor:
    return audit(storage=storage, mappings=[SpanMapping(span_name="memory.{action}", scope="memory")])


@pytest.fixture
def library(provider, processor):
    """The tracer of a library whose spans are audited through a mapping."""
    return provider.get_tracer("memory")


@pytest.fixture
def operation(provider, processor):
    """Starts an audit operation of ours."""

    def start(action="recall", **arguments):
        return audit_operation(action, tracer_provider=provider, **arguments)

    return start


@pytest.fixture
def rows(processor, storage):
    """What the table holds, once all is written."""

    def read():
        assert processor.force_flush(10_000)
        return storage.records

    return read


def test_a_decorated_function_around_a_librarys_span_is_one_row(provider, library, rows):
    @audited("recall", tracer_provider=provider)
    def recall(query):
        with library.start_as_current_span("memory.recall", attributes={"astrocyte.bank_id": "b"}):
            return {"hits": 3}

    recall("where?")
    [row] = rows()
    assert (row.action, row.parent_span_id, row.bank_id, row.response) == ("recall", None, "b", {"hits": 3})


def test_the_outermost_is_filled_from_the_inner_where_it_is_empty(operation, rows):
    with operation(request={"top_k": 3}) as outer:
        with operation(
            bank_id="b", transport="mcp", actor_id="alice", actor_type="user", request={"top_k": 9, "deep": True}
        ) as inner:
            inner.response = {"hits": 3}
            inner.metadata["model"] = "mock"
        outer.metadata["tier"] = "gold"
    [row] = rows()
    assert (row.bank_id, row.transport, row.actor_id, row.actor_type) == ("b", "mcp", "alice", "user")
    assert row.request == {"top_k": 3, "deep": True}
    assert row.response == {"hits": 3}
    assert row.metadata == {"model": "mock", "tier": "gold"}


def test_the_outermost_keeps_what_it_says_itself(operation, rows):
    with operation(bank_id="b", transport="http", actor_id="alice", actor_type="user") as outer:
        with operation(bank_id="b", transport="mcp", actor_id="alice", actor_type="service") as inner:
            inner.response = {"hits": 3}
        outer.response = {"hits": 1}
    [row] = rows()
    assert (row.transport, row.actor_id, row.actor_type, row.response) == ("http", "alice", "user", {"hits": 1})
    assert (row.outcome, row.error_type) == ("success", None)


def test_a_failure_of_both_takes_the_inner_error_where_the_outer_has_none(operation, rows):
    with operation() as outer:
        with operation() as inner:
            inner.outcome, inner.error_type = "failure", "TimeoutError"
        outer.outcome = "failure"
    [row] = rows()
    assert (row.outcome, row.error_type) == ("failure", "TimeoutError")


def test_the_row_has_the_outermosts_times_and_identity(operation, rows):
    with operation() as outer:
        outermost = trace.get_current_span()
        with operation():
            pass
        receipt = outer.record_id
    [row] = rows()
    assert (row.id, row.span_id) == (receipt, f"{outermost.get_span_context().span_id:016x}")


def test_three_levels_are_one_row(operation, rows):
    with operation(), operation(bank_id="b"), operation(transport="mcp"):
        pass
    [row] = rows()
    assert (row.parent_span_id, row.bank_id, row.transport) == (None, "b", "mcp")


def test_siblings_stay_separate(operation, provider, rows):
    with provider.get_tracer("web").start_as_current_span("POST /"):
        for number in range(3):
            with operation(bank_id=f"b{number}"):
                pass
    assert sorted(row.bank_id for row in rows()) == ["b0", "b1", "b2"]


def test_a_second_one_inside_keeps_a_row_of_its_own(operation, rows):
    with operation(bank_id="b"):
        for number in range(2):
            with operation(bank_id="b", request={f"part_{number}": number}):
                pass
    assert sorted(str(row.request) for row in rows()) == ["{'part_0': 0}", "{'part_1': 1}"]


def test_a_failure_inside_a_success_does_not_vanish(operation, rows):
    with operation(bank_id="b"), operation(bank_id="b") as inner:
        inner.outcome = "failure"
    assert sorted(row.outcome for row in rows()) == ["failure", "success"]


def test_another_actor_inside_does_not_vanish(operation, rows):
    with operation(bank_id="b", actor_id="admin"), operation(bank_id="b", actor_id="intruder"):
        pass
    assert sorted(row.actor_id for row in rows()) == ["admin", "intruder"]


def test_another_action_inside_stays_separate(operation, rows):
    with operation("recall", bank_id="b"), operation("classify"):
        pass
    assert sorted((row.action, row.bank_id) for row in rows()) == [("classify", None), ("recall", "b")]


def test_the_same_action_below_another_one_stays_separate(operation, rows):
    with operation("recall"), operation("classify"), operation("recall"):
        pass
    assert sorted(row.action for row in rows()) == ["classify", "recall", "recall"]


def test_another_bank_inside_stays_separate(operation, rows):
    with operation(bank_id="a"), operation(bank_id="b"):
        pass
    assert sorted(row.bank_id for row in rows()) == ["a", "b"]


def test_two_banks_inside_one_without_a_bank_are_both_in_the_log(operation, rows):
    with operation():
        for bank in ("a", "b"):
            with operation(bank_id=bank):
                pass
    assert sorted(row.bank_id for row in rows()) == ["a", "b"]


def test_another_bank_inside_stays_separate_where_the_outers_is_known_only_at_its_end(operation, rows):
    with operation() as outer:
        with operation(bank_id="b"):
            pass
        outer.bank_id = "a"
    assert sorted(row.bank_id for row in rows()) == ["a", "b"]


def test_another_bank_inside_stays_separate_where_the_outers_is_its_scopes(operation, rows):
    with audit_scope(bank_id="a"), operation(), operation(bank_id="b"):
        pass
    assert sorted(row.bank_id for row in rows()) == ["a", "b"]


def test_a_bank_of_another_key_inside_stays_separate(audit, provider, storage):
    mapping = SpanMapping(span_name="memory.{action}", bank_id=["memory.bank"])
    processor = audit(storage=storage, mappings=[mapping])
    tracer = provider.get_tracer("memory")
    with (
        tracer.start_as_current_span("memory.recall", attributes={"memory.bank": "a"}),
        audit_operation("recall", bank_id="b", tracer_provider=provider),
    ):
        pass
    assert processor.force_flush(10_000)
    assert sorted(row.bank_id for row in storage.records) == ["a", "b"]


def test_another_tenants_schema_inside_stays_separate(operation, rows):
    with audit_scope(schema="tenant_a"), operation(), audit_scope(schema="tenant_b"), operation():
        pass
    assert sorted(row.schema for row in rows()) == ["tenant_a", "tenant_b"]


def test_an_inner_that_ends_after_the_outer_is_a_row_of_its_own(operation, provider, rows):
    tracer = provider.get_tracer("memory")
    with operation(bank_id="b"):
        late = tracer.start_span("memory.recall")
    late.end()
    assert len(rows()) == 2


def test_an_inner_of_another_thread_is_taken_in_too(operation, rows):
    def work(context):
        token = otel_context.attach(context)
        with operation(bank_id="b"):
            pass
        otel_context.detach(token)

    with operation():
        thread = threading.Thread(target=work, args=[otel_context.get_current()])
        thread.start()
        thread.join()
    [row] = rows()
    assert row.bank_id == "b"


def test_a_plain_span_between_them_means_two_rows(operation, provider, rows):
    with operation(), provider.get_tracer("web").start_as_current_span("GET /"), operation():
        pass
    assert len(rows()) == 2


def test_an_operation_that_is_not_audited_takes_nothing_in(audit, provider, storage):
    mappings = [SpanMapping(span_name="memory.recall", action="recall"), SpanMapping(span_name="*", action="other")]
    processor = audit(storage=storage, mappings=mappings, actions=["recall"])
    tracer = provider.get_tracer("memory")
    with tracer.start_as_current_span("anything"), tracer.start_as_current_span("memory.recall"):
        pass
    assert processor.force_flush(10_000)
    assert [row.action for row in storage.records] == ["recall"]


def test_open_counts_the_operations_under_way(operation, processor):
    with operation():
        assert processor.stats()["open"] == 1
        with operation("classify"):
            assert processor.stats()["open"] == 2
    assert processor.stats()["open"] == 0


def test_a_span_that_is_never_ended_is_forgotten(library, processor):
    spans = [library.start_span("memory.recall") for _ in range(3)]
    assert processor.stats()["open"] == 3
    del spans
    gc.collect()
    assert processor.stats()["open"] == 0


def test_what_a_forgotten_operation_had_taken_in_is_a_row_after_all(library, operation, rows):
    never_ended = library.start_span("memory.recall")
    with trace.use_span(never_ended), operation(bank_id="b"):
        pass
    assert rows() == []
    del never_ended
    gc.collect()
    [row] = rows()
    assert row.bank_id == "b"


def test_what_a_forgotten_operation_had_taken_in_goes_with_the_next_one(library, operation, processor, storage):
    never_ended = library.start_span("memory.recall")
    with trace.use_span(never_ended), operation(bank_id="b"):
        pass
    del never_ended
    gc.collect()
    with operation("retain"):
        pass
    assert processor.stats()["accepted"] == 2


def test_what_an_operation_under_way_has_taken_in_is_written_at_the_shutdown(library, operation, processor, storage):
    outer = library.start_span("memory.recall")
    with trace.use_span(outer), operation(bank_id="b"):
        pass
    processor.shutdown()
    outer.end()
    assert [row.bank_id for row in storage.records] == ["b"]
    assert processor.stats()["refused_shutdown"] == 1


@pytest.fixture
def meanwhile(monkeypatch):
    """Makes something happen while an operation is being taken in by the one around it."""

    def happens(event):
        def to_record(captured):
            monkeypatch.undo()
            event()
            return captured_module.to_record(captured)

        monkeypatch.setattr(operations_module, "to_record", to_record)

    return happens


def test_what_is_taken_in_by_an_operation_that_is_forgotten_meanwhile_is_a_row_of_its_own(
    library, operation, rows, meanwhile
):
    outer = [library.start_span("memory.recall")]

    def forget():
        outer.clear()
        gc.collect()

    meanwhile(forget)
    inner = operation(bank_id="b")
    with trace.use_span(trace.NonRecordingSpan(outer[0].get_span_context())):
        inner.start()
    inner.finish()
    assert outer == []
    [row] = rows()
    assert row.bank_id == "b"


def test_what_is_taken_in_by_an_operation_that_ends_meanwhile_is_a_row_of_its_own(library, operation, rows, meanwhile):
    outer = library.start_span("memory.recall")
    meanwhile(outer.end)
    with trace.use_span(outer), operation(bank_id="b"):
        pass
    assert sorted(row.bank_id or "" for row in rows()) == ["", "b"]


def test_of_two_that_are_taken_in_at_once_both_are_in_the_log(library, operation, rows, meanwhile):
    outer = library.start_span("memory.recall")

    def another():
        with operation(request={"part": 2}):
            pass

    with trace.use_span(outer):
        meanwhile(another)
        with operation(request={"part": 1}):
            pass
    outer.end()
    assert sorted(row.request["part"] for row in rows()) == [1, 2]


@pytest.mark.parametrize("sampler", [ParentBased(ALWAYS_ON), ParentBased(ALWAYS_OFF), ALWAYS_ON, ALWAYS_OFF])
def test_spans_of_an_instrumentation_that_cannot_be_suppressed_do_not_audit_the_audit(audit, storage, sampler):
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    mapping = SpanMapping(span_name="*", action="anything")
    processor = audit(storage=storage, tracer_provider=provider, mappings=[mapping])
    psycopg = provider.get_tracer("psycopg")
    storage.before_append = lambda records: psycopg.start_span("INSERT").end()
    with audit_operation("recall", tracer_provider=provider):
        pass
    for _ in range(3):  # each write would otherwise cause another
        assert processor.force_flush(10_000)
    assert [row.action for row in storage.records] == ["recall"]


def test_a_suppressed_instrumentations_span_that_was_not_taken_is_not_audited_at_its_end(audit, storage):
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    processor = audit(storage=storage, tracer_provider=provider, mappings=[SpanMapping(span_name="*", action="sql")])
    token = otel_context.attach(otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True))
    try:
        provider.get_tracer("psycopg").start_span("SELECT").end()
        late = provider.get_tracer("theirs").start_span("late")
        late.set_attribute("audit.action", "recall")
        late.end()
    finally:
        otel_context.detach(token)
    seen = provider.get_tracer("psycopg").start_span("SELECT")
    token = otel_context.attach(otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True))
    try:
        seen.end()
    finally:
        otel_context.detach(token)
    assert processor.force_flush(10_000)
    assert sorted(row.action for row in storage.records) == ["recall", "sql"]


def test_a_remote_parent_takes_nothing_in(operation, rows):
    with operation():
        here = trace.get_current_span().get_span_context()
        remote = trace.SpanContext(here.trace_id, here.span_id, is_remote=True, trace_flags=here.trace_flags)
        with trace.use_span(trace.NonRecordingSpan(remote)), operation(bank_id="b"):
            pass
    assert len(rows()) == 2
