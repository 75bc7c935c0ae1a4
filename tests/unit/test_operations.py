"""One operation, one row: how operations inside operations become rows."""

import gc
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased

from astrocyte_otel_audit import (
    AuditSpanExporter,
    AuditSpanProcessor,
    SpanMapping,
    audit_operation,
    audit_scope,
    audited,
)
from astrocyte_otel_audit.pipeline import operations as operations_module
from astrocyte_otel_audit.pipeline.operations import OpenOperations
from astrocyte_otel_audit.pipeline.replay import replay
from astrocyte_otel_audit.pipeline.selection import Selection
from astrocyte_otel_audit.pipeline.writer import Writer
from astrocyte_otel_audit.record import NO_SCOPE
from tests.support import MemoryStorage, unavailable


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


def test_what_both_say_under_one_key_is_the_outermosts_as_a_whole(operation, rows):
    with operation(request={"filters": {"limit": 3}, "options": {}, "a": 1}):
        inner = {"filters": {"limit": 9, "since": 5}, "options": {"deep": True}, "a.b": 2}
        with operation(request=inner):
            pass
    [row] = rows()
    assert row.request == {"filters": {"limit": 3}, "options": {}, "a": 1, "a.b": 2}


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


def test_what_a_forgotten_operation_had_taken_in_is_its_row_after_all(library, operation, rows):
    never_ended = library.start_span("memory.recall")
    receipt = never_ended.attributes["audit.record.id"]
    with trace.use_span(never_ended), operation(bank_id="b"):
        pass
    assert rows() == []
    del never_ended
    gc.collect()
    [row] = rows()
    assert (row.id, row.bank_id, row.outcome) == (receipt, "b", "success")


def test_what_a_forgotten_operation_had_taken_in_goes_with_the_next_one(library, operation, processor, storage):
    never_ended = library.start_span("memory.recall")
    with trace.use_span(never_ended), operation(bank_id="b"):
        pass
    del never_ended
    gc.collect()
    with operation("retain"):
        pass
    assert processor.stats()["accepted"] == 2


def forget_required(operation, *, inside=()):
    """Begin an operation that requires its row, end others inside it, and forget it; gives its receipt."""
    never_ended = operation(required=True, actor_id="alice", bank_id="b")
    never_ended.start()
    for arguments in inside:
        with never_ended.current(), operation(**arguments):
            pass
    receipt = never_ended.record_id
    del never_ended
    gc.collect()
    return receipt


def test_a_forgotten_operation_that_required_its_row_has_one_at_the_next_flush(operation, processor, rows):
    receipt = forget_required(operation)
    assert processor.stats()["accepted"] == 0
    [row] = rows()
    assert (row.id, row.bank_id, row.outcome, row.ended_at) == (receipt, "b", "unknown", None)


def test_a_forgotten_operation_that_required_its_row_goes_with_the_next_one(operation, processor, storage):
    receipt = forget_required(operation)
    with operation("retain") as next_one:
        pass
    assert processor.stats()["accepted"] == 2
    assert processor.force_flush(10_000)
    assert [row.id for row in storage.records] == [receipt, next_one.record_id]


def test_a_forgotten_operation_that_required_its_row_and_what_it_had_taken_in_are_one_row(operation, rows):
    receipt = forget_required(operation, inside=[{"transport": "mcp", "request": {"top_k": 3}}])
    [row] = rows()
    assert (row.id, row.outcome, row.ended_at) == (receipt, "unknown", None)
    assert (row.bank_id, row.transport, row.request) == ("b", "mcp", {"top_k": 3})


def test_a_forgotten_operation_that_required_its_row_has_it_at_the_shutdown(operation, processor, storage):
    receipt = forget_required(operation)
    processor.shutdown()
    assert [row.id for row in storage.records] == [receipt]


def test_what_an_operation_under_way_has_taken_in_is_written_as_its_row_at_the_shutdown(
    library, operation, processor, storage
):
    outer = library.start_span("memory.recall")
    with trace.use_span(outer), operation(bank_id="b"):
        pass
    processor.shutdown()
    outer.end()
    assert [(row.id, row.bank_id) for row in storage.records] == [(outer.attributes["audit.record.id"], "b")]
    assert processor.stats()["refused_shutdown"] == 1


def once(monkeypatch, owner, name, event):
    """Make something happen just before a function is called the next time."""
    original = getattr(owner, name)

    def replaced(*args):
        monkeypatch.setattr(owner, name, original)
        event()
        return original(*args)

    monkeypatch.setattr(owner, name, replaced)


@pytest.fixture
def meanwhile(monkeypatch):
    """Makes something happen while an operation is being taken in by the one around it, which is still open."""
    return lambda event: once(monkeypatch, operations_module, "_bank_of_open", event)


@pytest.fixture
def before_it_is_held(monkeypatch):
    """Makes something happen when an operation was taken in by the one around it, and is not on disk yet."""
    return lambda event: once(monkeypatch, Writer, "hold", event)


@pytest.fixture
def forgotten(library, operation):
    """An operation inside another one that is never ended, the receipt of that one, and a function that forgets it."""
    outer = [library.start_span("memory.recall")]
    inner = operation(bank_id="b")
    with trace.use_span(trace.NonRecordingSpan(outer[0].get_span_context())):
        inner.start()

    def forget():
        outer.clear()
        gc.collect()

    return inner, outer[0].attributes["audit.record.id"], forget


def test_what_is_taken_in_by_an_operation_that_is_forgotten_meanwhile_is_a_row_of_its_own(forgotten, rows, meanwhile):
    inner, _, forget = forgotten
    meanwhile(forget)
    inner.finish()
    [row] = rows()
    assert (row.id, row.bank_id) == (inner.record_id, "b")


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


# What a process leaves that is killed.


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "astrocyte-otel-audit" / "spool"


@pytest.fixture
def if_killed(spool, tmp_path):
    """The rows of the next process, were this one killed now: nobody holds the lock of a copy of its files."""

    def written():
        copy, storage = Path(tempfile.mkdtemp(dir=tmp_path)), MemoryStorage()
        shutil.copytree(spool, copy, dirs_exist_ok=True)
        exporter = AuditSpanExporter(storage=storage)
        said = replay(copy, exporter, any_destination=True, progress=lambda count: None)
        assert (said.set_aside, said.waiting, said.damaged, list(copy.iterdir())) == (0, 0, 0, [])
        return storage.records

    return written


def test_what_had_returned_inside_an_operation_is_the_row_of_that_if_the_process_is_killed_before_it_ends(
    operation, if_killed
):
    with operation(actor_id="alice") as outer:
        with operation(bank_id="b") as inner:
            inner.response = {"hits": 3}
        [row] = if_killed()
    assert (row.id, row.bank_id, row.actor_id, row.response) == (outer.record_id, "b", None, {"hits": 3})
    assert row.outcome == "success"


def test_of_three_levels_the_outermosts_row_is_what_had_returned_if_the_process_is_killed(operation, if_killed):
    with operation(actor_id="alice") as outermost:
        with operation(bank_id="b") as middle:
            with operation(transport="mcp") as innermost:
                innermost.response = {"hits": 3}
            [row] = if_killed()
            assert (row.id, row.bank_id, row.transport, row.response) == (middle.record_id, None, "mcp", {"hits": 3})
        [row] = if_killed()
        assert (row.id, row.bank_id, row.transport, row.response) == (outermost.record_id, "b", "mcp", {"hits": 3})
        assert row.actor_id is None
    [row] = if_killed()
    assert (row.id, row.bank_id, row.transport, row.actor_id) == (outermost.record_id, "b", "mcp", "alice")


def test_of_three_levels_of_which_the_outermost_required_its_row_that_is_all_that_is_known_if_the_process_is_killed(
    operation, if_killed
):
    with operation(required=True) as outermost:
        with operation(bank_id="b"), operation(transport="mcp"):
            pass
        [row] = if_killed()
    assert (row.id, row.bank_id, row.transport, row.outcome) == (outermost.record_id, "b", "mcp", "unknown")


def test_an_operation_that_has_ended_is_one_row_if_the_process_is_killed_before_it_is_written(
    operation, if_killed, rows, storage
):
    storage.before_append = unavailable
    with operation(actor_id="alice") as outer, operation(bank_id="b"):
        pass
    [row] = if_killed()
    assert (row.id, row.bank_id, row.actor_id) == (outer.record_id, "b", "alice")
    storage.before_append = lambda records: None
    assert rows() == [row]


def test_one_row_speaks_for_both_if_the_process_is_killed_after_it_was_written(operation, if_killed, rows):
    with operation() as outer, operation(bank_id="b"):
        pass
    [written] = rows()
    assert [row.id for row in if_killed()] == [written.id] == [outer.record_id]


def test_of_two_inside_an_operation_each_is_a_row_if_the_process_is_killed_before_that_ends(operation, if_killed):
    with operation(bank_id="b") as outer:
        for part in range(2):
            with operation(bank_id="b", request={"part": part}) as inner:
                pass
        found = {row.id: row.request for row in if_killed()}
        assert found == {outer.record_id: {"part": 0}, inner.record_id: {"part": 1}}
    assert {row.id: row.request for row in if_killed()} == found


def test_an_operation_that_required_its_row_and_what_had_returned_inside_it_are_one_row_if_the_process_is_killed(
    operation, if_killed
):
    with audit_scope(actor_id="alice"), operation(required=True) as outer:
        outermost = trace.get_current_span().get_span_context()
        with operation(bank_id="b", transport="mcp") as inner:
            inner.response = {"hits": 3}
        [row] = if_killed()
    assert (row.id, row.outcome, row.ended_at) == (outer.record_id, "unknown", None)
    assert (row.span_id, row.parent_span_id) == (f"{outermost.span_id:016x}", None)
    assert (row.bank_id, row.transport, row.actor_id, row.response) == ("b", "mcp", "alice", {"hits": 3})
    [row] = if_killed()
    assert (row.id, row.outcome, row.bank_id) == (outer.record_id, "success", "b")


@pytest.mark.parametrize("has_part", [True, False])
def test_an_operation_that_required_its_row_is_left_to_the_next_process_by_a_shutdown_inside_it(
    operation, processor, if_killed, storage, has_part
):
    with operation(required=True, bank_id="b") as outer:
        if has_part:
            with operation(transport="mcp"):
                pass
        processor.shutdown()
        assert storage.records == []
        [row] = if_killed()
        assert (row.id, row.bank_id, row.outcome) == (outer.record_id, "b", "unknown")
        assert row.transport == ("mcp" if has_part else "unknown")
    [row] = if_killed()
    assert (row.id, row.bank_id, row.outcome) == (outer.record_id, "b", "success")
    assert row.transport == ("mcp" if has_part else "unknown")
    assert (storage.records, processor.stats()["refused_shutdown"]) == ([], 0)


def test_a_forgotten_operation_that_required_its_row_is_one_row_if_the_process_is_killed(
    operation, processor, if_killed, storage
):
    storage.before_append = unavailable
    receipt = forget_required(operation, inside=[{"transport": "mcp"}])
    [before] = if_killed()
    assert not processor.force_flush(50)
    assert if_killed() == [before]
    assert (before.id, before.transport, before.outcome) == (receipt, "mcp", "unknown")
    storage.before_append = lambda records: None


def in_one(operation):
    with operation(), operation(bank_id="b"):
        pass


def of_another_bank(operation):
    with operation() as outer:
        with operation(bank_id="b"):
            pass
        outer.bank_id = "a"


def three_levels(operation):
    with operation(), operation(bank_id="b"), operation(transport="mcp"):
        pass


def another_bank_in_the_middle(operation):
    with operation(bank_id="a"), operation() as middle:
        with operation():
            pass
        middle.bank_id = "b"


def failing_innermost(operation):
    with operation(), operation(), operation() as innermost:
        innermost.outcome = "failure"


def failing_inside(operation):
    with operation(), operation() as inner:
        inner.outcome = "failure"


def several_inside(operation):
    with operation():
        for _ in range(3):
            with operation():
                pass


def required(operation):
    with operation(required=True), operation():
        pass


def required_inside(operation):
    with operation(), operation(required=True):
        pass


def required_around_two(operation):
    with operation(required=True), operation(), operation():
        pass


NESTED = pytest.mark.parametrize(
    "nested",
    [
        in_one,
        of_another_bank,
        three_levels,
        another_bank_in_the_middle,
        failing_innermost,
        failing_inside,
        several_inside,
        required,
        required_inside,
        required_around_two,
        forget_required,
    ],
)


@NESTED
def test_nothing_of_an_operation_stays_in_the_spool_once_it_is_written(operation, processor, rows, spool, nested):
    nested(operation)
    written = len(rows())
    assert processor.stats()["accepted"] == written
    processor.shutdown()
    assert list(spool.iterdir()) == []


@NESTED
def test_the_next_process_writes_the_same_rows_if_this_one_is_killed_before_it_can(
    operation, if_killed, rows, storage, nested
):
    storage.before_append = unavailable
    nested(operation)
    found = if_killed()
    storage.before_append = lambda records: None
    assert sorted(found) == sorted(rows())


def test_what_a_forgotten_operation_had_taken_in_is_one_row_if_the_process_is_killed(
    forgotten, processor, if_killed, storage
):
    inner, receipt, forget = forgotten
    storage.before_append = unavailable
    inner.finish()
    assert [row.id for row in if_killed()] == [receipt]
    forget()
    assert [row.id for row in if_killed()] == [receipt]
    assert not processor.force_flush(50)
    assert [row.id for row in if_killed()] == [receipt]
    storage.before_append = lambda records: None


def test_nothing_of_an_operation_that_was_forgotten_stays_in_the_spool(library, operation, processor, rows, spool):
    never_ended = library.start_span("memory.recall")
    with trace.use_span(never_ended), operation(bank_id="b"):
        pass
    del never_ended
    gc.collect()
    assert len(rows()) == 1
    processor.shutdown()
    assert list(spool.iterdir()) == []


def test_nothing_of_an_operation_under_way_at_the_shutdown_stays_in_the_spool(operation, processor, storage, spool):
    with operation() as outer:
        with operation(bank_id="b"):
            pass
        processor.shutdown()
        assert list(spool.iterdir()) == []
    assert [row.id for row in storage.records] == [outer.record_id]


def test_what_is_held_once_the_operation_around_it_has_ended_is_let_go_of(
    library, operation, processor, rows, spool, before_it_is_held
):
    outer = library.start_span("memory.recall")
    before_it_is_held(outer.end)
    with trace.use_span(outer), operation(bank_id="b"):
        pass
    [row] = rows()
    assert (row.id, row.bank_id) == (outer.attributes["audit.record.id"], "b")
    processor.shutdown()
    assert list(spool.iterdir()) == []


def test_what_is_held_once_the_operation_around_it_is_forgotten_is_let_go_of(
    forgotten, processor, rows, spool, before_it_is_held
):
    inner, receipt, forget = forgotten
    before_it_is_held(forget)
    inner.finish()
    assert [row.id for row in rows()] == [receipt]
    processor.shutdown()
    assert list(spool.iterdir()) == []


def test_without_a_spool_an_operation_inside_another_is_a_part_of_its_row_too(audit, provider, storage):
    processor = audit(storage=storage, spool_dir=False)
    with audit_operation("recall", tracer_provider=provider) as outer:
        with audit_operation("recall", bank_id="b", tracer_provider=provider):
            pass
        assert processor.force_flush(10_000)
        assert storage.records == []
    assert processor.force_flush(10_000)
    assert [(row.id, row.bank_id) for row in storage.records] == [(outer.record_id, "b")]


# What a forked child has of its parent.


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.submitted = []

    def submit(self, captured):
        self.submitted.append(captured)
        return True

    def hold(self, captured):
        return True

    def release(self, row_id):
        pass


@pytest.fixture
def child():
    """Operations of a process that has just been forked, and its sink; begins some before that."""

    def make(before):
        selection, sink, tracer = Selection("*"), Rows(), TracerProvider(shutdown_on_exit=False).get_tracer("test")
        operations = OpenOperations(selection, sink)

        def begin(name="audit recall", *, required=True, parent=None):
            context = None if parent is None else trace.set_span_in_context(parent)
            span = tracer.start_span(name, context, attributes={"audit.action": "recall"})
            row_id = operations.start(span, "recall", NO_SCOPE, None)
            if required:
                operations.note_begun(span, selection.capture(span, row_id)._replace(outcome="unknown"))
            return span

        kept = before(operations, begin)
        operations.after_fork()
        return operations, sink, kept

    return make


def test_an_operation_that_the_parent_had_begun_and_the_child_forgets_is_no_row_of_the_child(child):
    operations, sink, kept = child(lambda operations, begin: [begin()])
    kept.clear()
    gc.collect()
    operations.hand_on_orphans()
    operations.abandon()
    assert (len(operations), sink.submitted) == (0, [])


@pytest.mark.parametrize("required", [True, False])
def test_what_the_parents_operation_had_taken_in_is_no_row_of_the_child(child, required):
    def nest(operations, begin):
        outer = begin(required=required)
        operations.end(begin(required=False, parent=outer))
        return [outer]

    operations, sink, kept = child(nest)
    operations.abandon()
    kept.clear()
    gc.collect()
    operations.abandon()
    assert (len(operations), sink.submitted) == (0, [])


def test_what_a_child_does_inside_its_parents_operation_is_a_row_of_its_own(child):
    opened = []

    def keep(operations, begin):
        opened.append(begin)
        return [begin(required=False)]

    operations, sink, [outer] = child(keep)
    inner = opened[0](required=False, parent=outer)
    operations.end(inner)
    [row] = sink.submitted
    assert row.span_id == f"{inner.context.span_id:016x}"


def test_a_failed_part_of_what_must_leave_a_row_is_one_too_where_it_is_shut_down_in_between():
    selection, sink, tracer = Selection("*"), Rows(), TracerProvider(shutdown_on_exit=False).get_tracer("test")
    operations = OpenOperations(selection, sink)
    outer = tracer.start_span("audit forget", attributes={"audit.action": "forget"})
    begun = selection.capture(outer, operations.start(outer, "forget", NO_SCOPE, None))._replace(outcome="unknown")
    operations.note_begun(outer, begun)
    context = trace.set_span_in_context(outer)
    failed = {"audit.action": "forget", "audit.outcome": "failure"}
    inner = tracer.start_span("audit forget", context, attributes=failed)
    operations.start(inner, "forget", NO_SCOPE, None)
    operations.end(inner)
    assert sink.submitted == []
    operations.abandon()
    assert [row.outcome for row in sink.submitted] == ["failure"]
    outer.set_attribute("audit.outcome", "success")
    operations.end(outer)
    assert [row.outcome for row in sink.submitted][1:] == ["success"]


def test_an_operation_that_the_parent_had_forgotten_is_no_row_of_the_child(child):
    def forget(operations, begin):
        begin()
        gc.collect()
        assert len(operations) == 0

    operations, sink, _ = child(forget)
    operations.hand_on_orphans()
    assert sink.submitted == []


def test_an_operation_that_the_parent_had_begun_and_the_child_ends_is_a_row_of_the_child(child):
    operations, sink, [span] = child(lambda operations, begin: [begin()])
    operations.abandon()
    operations.end(span)
    assert [captured.action for captured in sink.submitted] == ["recall"]


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
