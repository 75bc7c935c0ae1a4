"""Which ended spans become records, and what of a span goes into its record."""

import enum
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from astrocyte_otel_audit import SpanMapping
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.segment import RECORD, captured_frame, frames, parse_captured
from astrocyte_otel_audit.pipeline.selection import Chance, Selection, plain_attributes
from astrocyte_otel_audit.record import ScopeDefaults, record_id

OURS, THEIRS = InstrumentationScope("astrocyte_otel_audit"), InstrumentationScope("gateway.js")
TRACE, SPAN, PARENT = 0x0123456789ABCDEF0123456789ABCDEF, 0xFEDCBA9876543210, 0x1
START = 1_700_000_000_123_456_789


def context(span_id=SPAN, flags=1):
    return SpanContext(TRACE, span_id, is_remote=False, trace_flags=TraceFlags(flags))


def ended(
    attributes=None,
    *,
    action="recall",
    status=StatusCode.UNSET,
    start=START,
    end=START + 2_000_000,
    flags=1,
    **changes,
):
    """An ended span of ours, as the SDK hands it on; of another library's, without an action."""
    return ReadableSpan(**{
        "name": "audit recall",
        "context": context(flags=flags),
        "parent": context(PARENT),
        "resource": Resource({"service.name": "memory"}),
        "instrumentation_scope": OURS,
        "attributes": {**({} if action is None else {"audit.action": action}), **(attributes or {})},
        "status": Status(status),
        "start_time": start,
        "end_time": end,
        **changes,
    })  # fmt: skip


def record_of(span, selection=None, **noted):
    captured = (selection or Selection("*")).capture(span, **noted)
    return None if captured is None else to_record(captured)


def is_expected(selection, span, parent_context=None):
    return selection.expects(span, plain_attributes(span), parent_context) is not Chance.NONE


def test_a_span_becomes_a_record_with_its_identity_its_times_and_its_service():
    record = record_of(ended())
    assert record.id == record_id(TRACE, SPAN, START)
    assert (record.trace_id, record.span_id, record.parent_span_id) == (f"{TRACE:032x}", f"{SPAN:016x}", f"{1:016x}")
    assert record.started_at == datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)
    assert record.duration_seconds == 0.002
    assert record.service_name == "memory"


def test_every_attribute_of_the_wire_has_its_place_in_the_record():
    record = record_of(
        ended({
            "audit.outcome": "failure",
            "audit.actor.id": "alice",
            "audit.actor.type": "user",
            "error.type": "TimeoutError",
            "astrocyte.bank_id": "b",
            "astrocyte.transport": "mcp",
            "astrocyte.audit.request.query.length": 12,
            "astrocyte.audit.response.ids": ("a", "b"),
            "astrocyte.audit.metadata.model": "mock",
            "http.route": "/recall",
        })
    )  # fmt: skip
    assert (record.action, record.outcome, record.error_type) == ("recall", "failure", "TimeoutError")
    assert (record.actor_id, record.actor_type, record.bank_id, record.transport) == ("alice", "user", "b", "mcp")
    assert record.request == {"query": {"length": 12}}
    assert record.response == {"ids": ["a", "b"]}
    assert record.metadata == {"model": "mock"}


def test_what_nobody_said_is_none_and_the_transport_reads_unknown():
    record = record_of(ended(parent=None))
    assert record.transport == "unknown"
    assert (record.bank_id, record.actor_id, record.actor_type, record.request, record.response) == (None,) * 5
    assert (record.parent_span_id, record.error_type, record.metadata) == (None, None, {})


@pytest.mark.parametrize(
    ("actions", "attributes", "selected"),
    [
        ((), {}, False),
        ("*", {}, True),
        (("recall",), {}, True),
        (("re?all", "x"), {}, True),
        (("RECALL",), {}, False),
        (("retain",), {}, False),
        ((), {"astrocyte.audit.required": True}, True),
        ((), {"astrocyte.audit.required": 1}, False),
        ("*", {"audit.action": 7}, False),
        ("*", {"audit.action": None}, False),
    ],
)
def test_the_allowlist_decides_alike_at_the_start_and_at_the_end(actions, attributes, selected):
    selection, span = Selection(actions), ended(attributes)
    assert selection.may_audit(span.name, span.kind, span.attributes) is selected
    assert is_expected(selection, span) is selected
    assert (selection.capture(span) is not None) is selected


class Action(str, enum.Enum):  # noqa: UP042 - unlike a StrEnum, its str() is its name
    RECALL = "recall"


@pytest.mark.parametrize("selection", [Selection(["recall"]), Selection("*")])
def test_an_action_out_of_an_enum_of_strings_is_that_string(provider, selection):
    span = provider.get_tracer("theirs").start_span("x", attributes={"audit.action": Action.RECALL})
    assert selection.may_audit("x", None, {"audit.action": Action.RECALL})
    assert is_expected(selection, span)
    span.end()
    record = record_of(span, selection)
    assert (record.action, type(record.action)) == ("recall", str)


class Word(str, enum.Enum):  # noqa: UP042
    FAILURE = "failure"
    SERVICE = "service"


def test_what_else_is_out_of_an_enum_of_strings_is_that_string_too():
    record = record_of(ended({"audit.outcome": Word.FAILURE, "audit.actor.type": Word.SERVICE}))
    assert [(value, type(value)) for value in (record.outcome, record.actor_type)] == [
        ("failure", str), ("service", str),
    ]  # fmt: skip


def test_a_span_that_names_its_action_is_not_asked_for_a_mapping():
    selection = Selection(["mapped"], [SpanMapping(span_name="audit recall", action="mapped")])
    assert not is_expected(selection, ended())
    assert is_expected(selection, ended(action=None))
    assert record_of(ended(action=None), selection).action == "mapped"


@pytest.mark.parametrize(("flags", "sampled"), [(0, False), (1, True), (2, False), (3, True)])
def test_sampled_is_one_bit_of_the_trace_flags(flags, sampled):
    assert record_of(ended(flags=flags)).sampled is sampled


@pytest.mark.parametrize(
    ("stated", "status", "outcome"),
    [
        ("success", StatusCode.ERROR, "success"),
        ("unknown", StatusCode.OK, "unknown"),
        (None, StatusCode.OK, "success"),
        (None, StatusCode.ERROR, "failure"),
        # One of ours always states its outcome: where it doesn't, nobody knows.
        (None, StatusCode.UNSET, "unknown"),
        ("perhaps", StatusCode.UNSET, "unknown"),
        (True, StatusCode.ERROR, "failure"),
    ],
)
def test_the_outcome_is_what_the_span_states_or_else_its_status(stated, status, outcome):
    attributes = {} if stated is None else {"audit.outcome": stated}
    assert record_of(ended(attributes, status=status)).outcome == outcome


def test_an_error_type_is_kept_for_failures_only():
    attributes = {"error.type": "TimeoutError", "audit.outcome": "success"}
    assert record_of(ended(attributes)).error_type is None


def test_a_scope_fills_what_the_span_leaves_open_and_nothing_else():
    scope = ScopeDefaults("alice", "user", "http", "scope-bank", "tenant")
    open_, closed = (
        record_of(ended(attributes), scope=scope)
        for attributes in (
            {},
            {
                "audit.actor.id": "bob",
                "audit.actor.type": "service",
                "astrocyte.transport": "mcp",
                "astrocyte.bank_id": "own",
            },
        )
    )
    assert (open_.actor_id, open_.actor_type, open_.transport, open_.bank_id) == ("alice", "user", "http", "scope-bank")
    assert (closed.actor_id, closed.actor_type, closed.transport, closed.bank_id) == ("bob", "service", "mcp", "own")


@pytest.mark.parametrize(
    ("attribute", "scope", "transport"),
    [("mcp", "http", "mcp"), (None, "http", "http"), (None, None, "bench")],
)
def test_a_transport_is_the_spans_then_the_scopes_then_the_mappings(attribute, scope, transport):
    selection = Selection("*", [SpanMapping(span_name="audit {action}", transport="bench")])
    attributes = {"astrocyte.transport": attribute} if attribute else {}
    span = ended(attributes, action=None)
    assert record_of(span, selection, scope=ScopeDefaults(transport=scope)).transport == transport


def test_what_was_noted_at_the_start_goes_into_the_record():
    record = record_of(ended(), row_id="noted", schema="tenant_a")
    assert (record.id, record.schema) == ("noted", "tenant_a")


def test_dropped_attributes_are_said_since_any_of_them_may_have_been_of_the_record():
    provider = TracerProvider(span_limits=SpanLimits(max_span_attributes=3), shutdown_on_exit=False)
    span = provider.get_tracer("test").start_span("audit recall")
    span.set_attributes({f"app.{number}": number for number in range(5)} | {"audit.action": "recall"})
    span.end()
    assert record_of(span).metadata == {"dropped_attributes": 3}


@pytest.mark.parametrize(
    ("start", "end", "started_at", "ended_at"),
    [
        (None, None, datetime(1970, 1, 1, tzinfo=UTC), None),
        (START, None, datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC), None),
        (0, "later", datetime(1970, 1, 1, tzinfo=UTC), None),
        (-(10**30), 10**30, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_times_that_are_no_times_do_not_lose_the_record(start, end, started_at, ended_at):
    record = record_of(ended(start=start, end=end))
    assert (record.started_at, record.ended_at) == (started_at, ended_at)


@pytest.mark.parametrize(
    ("value", "text"),
    [("b", "b"), (7, "7"), (0, "0"), (1.5, "1.5"), (True, "True"), (("a", "b"), "tuple")],
)
def test_an_id_of_another_type_is_kept_as_text(value, text):
    assert record_of(ended({"astrocyte.bank_id": value})).bank_id == text


def test_an_action_of_no_characters_reads_unknown():
    assert record_of(ended(action="")).action == "unknown"


def test_a_span_without_a_service_or_an_instrumentation_scope_is_audited_too():
    span = ended(action=None, name="recall", resource=Resource({}), instrumentation_scope=None)
    record = record_of(span, Selection("*", [SpanMapping(span_name="{action}")]))
    assert (record.action, record.service_name) == ("recall", None)


def test_a_service_name_that_is_no_text_is_left_out():
    odd = SimpleNamespace(attributes={"service.name": 7})
    assert record_of(ended(resource=odd)).service_name is None


def test_a_name_from_data_does_not_make_the_caches_grow_without_end():
    selection = Selection("*", [SpanMapping(span_name="memory.{action}")])
    for number in range(5000):
        selection.may_audit(f"memory.{number}", SpanKind.INTERNAL, None)
    assert len(selection._kept_for) <= 4096


PROMPT = "tell me all about " + "x" * 100_000
RAW = {"gen_ai.input.messages": PROMPT, "hindsight.query": PROMPT, "memory.bank": "b"}


def test_of_another_librarys_span_only_what_a_record_needs_is_kept():
    mapping = SpanMapping(span_name="memory.{action}", bank_id=["memory.bank"])
    wire = {
        "audit.outcome": "failure",
        "audit.actor.id": "alice",
        "error.type": "TimeoutError",
        "astrocyte.transport": "mcp",
        "astrocyte.audit.request.top_k": 3,
        "astrocyte.audit.required": True,
    }
    span = ended({**RAW, **wire}, action=None, name="memory.recall", instrumentation_scope=THEIRS)
    captured = Selection("*", [mapping]).capture(span)
    assert captured.payload == {"astrocyte.audit.request.top_k": 3}
    assert PROMPT not in captured_frame(RECORD, captured).decode()
    record = to_record(captured)
    assert (record.bank_id, record.outcome, record.error_type) == ("b", "failure", "TimeoutError")
    assert (record.actor_id, record.transport, record.request) == ("alice", "mcp", {"top_k": 3})


@pytest.mark.parametrize("emitter", [OURS, THEIRS], ids=["ours", "another's"])
def test_a_span_that_names_its_action_beside_raw_text_keeps_that_text_out_too(emitter):
    captured = Selection("*").capture(ended(RAW, instrumentation_scope=emitter))
    assert captured.payload == {}
    assert PROMPT not in captured_frame(RECORD, captured).decode()


@pytest.mark.parametrize("emitter", [OURS, THEIRS], ids=["ours", "another's"])
def test_what_is_captured_is_plain_data_that_says_the_same_once_the_spool_has_had_it(emitter):
    span = ended({
        "audit.outcome": "failure",
        "audit.actor.id": "alice",
        "audit.actor.type": Word.SERVICE,
        "error.type": "TimeoutError",
        "astrocyte.bank_id": 7,
        "astrocyte.transport": "mcp",
        "astrocyte.audit.request.query": "flu",
        "astrocyte.audit.request.query.length": 3,
        "astrocyte.audit.response.ids": ("m-1", "m-2"),
        "astrocyte.audit.response.score": 0.5,
        "astrocyte.audit.metadata.cached": False,
        "astrocyte.audit.metadata.options.%empty": True,
    }, instrumentation_scope=emitter)  # fmt: skip
    captured = Selection("*").capture(span, scope=ScopeDefaults(schema="elsewhere"), schema="tenant_a")
    [line] = frames(captured_frame(RECORD, captured))
    read = parse_captured(line.content)
    assert read._replace(payload={}) == captured._replace(payload={}, actor_type="service")
    assert to_record(read) == to_record(captured)


def test_each_span_has_the_service_of_its_own_resource():
    selection = Selection("*")
    web, worker = (Resource({"service.name": name}) for name in ("web", "worker"))
    services = [record_of(ended(resource=resource), selection).service_name for resource in (web, web, worker, web)]
    assert services == ["web", "web", "worker", "web"]


TEXT = "Calvin's blood pressure is rising"


@pytest.mark.parametrize("emitter", [THEIRS, None], ids=["another's", "nobody's"])
def test_payloads_of_another_emitter_pass_the_rules_of_what_may_be_stored(emitter):
    record = record_of(
        ended({
            "astrocyte.audit.request.filter": TEXT,
            "astrocyte.audit.request.query": "flu",
            "astrocyte.audit.request.nested.password": "hunter2",
            "astrocyte.audit.request.pin": 1234,
            f"astrocyte.audit.request.{TEXT}": True,
            "astrocyte.audit.response.ids": ("m-1", "m-2"),
            "astrocyte.audit.response.hits": (TEXT, "flu"),
            "astrocyte.audit.metadata.model": "gpt-4o-mini",
            "astrocyte.audit.metadata.key": "sk-Wn8vq2LpXz7TfKd4",
        }, instrumentation_scope=emitter)
    )  # fmt: skip
    assert record.request == {
        "filter": {"length": 33}, "query": {"length": 3}, "nested": {"password": "[redacted]"}, "pin": "[redacted]",
        "#4": True,
    }  # fmt: skip
    assert record.response == {"ids": ["m-1", "m-2"], "hits": {"count": 2}}
    assert record.metadata == {"model": "gpt-4o-mini", "key": {"length": 19}}


def test_payloads_of_another_emitter_that_asked_the_rules_are_as_it_sent_them():
    record = record_of(
        ended({
            "astrocyte.audit.request.query.length": 12,
            "astrocyte.audit.request.query.hash": "9f86d081884c7d659a2feaa0c55ad015",
            "astrocyte.audit.request.password": "[redacted]",
            "astrocyte.audit.request.messages.count": 3,
            "astrocyte.audit.request.messages.ids": ("m-1", "m-2"),
            "astrocyte.audit.request.a.b.c.d.e.length": 7,
            "astrocyte.audit.request.options.%empty": True,
            **{f"astrocyte.audit.metadata.k{number}": number for number in range(100)},
        }, instrumentation_scope=THEIRS)
    )  # fmt: skip
    assert record.request == {
        "query": {"length": 12, "hash": "9f86d081884c7d659a2feaa0c55ad015"},
        "password": "[redacted]",
        "messages": {"count": 3, "ids": ["m-1", "m-2"]},
        "a": {"b": {"c": {"d": {"e": {"length": 7}}}}},
        "options": {},
    }
    assert record.metadata == {f"k{number}": number for number in range(100)}


def test_what_a_span_of_ours_keeps_by_a_setting_stays():
    assert record_of(ended({"astrocyte.audit.request.filter": TEXT})).request == {"filter": TEXT}


def test_a_mapped_span_that_starts_where_instrumentation_is_suppressed_is_none_of_ours():
    selection = Selection("*", [SpanMapping(span_name="S*", action="sql")])
    span = ended(action=None, name="SELECT")
    suppressed = otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True)
    for context, taken in [(None, True), (otel_context.Context(), True), (suppressed, False)]:
        assert selection.may_audit("SELECT", SpanKind.CLIENT, {}, context) is taken
        assert is_expected(selection, span, context) is taken
    token = otel_context.attach(suppressed)
    try:
        assert not selection.may_audit("SELECT", SpanKind.CLIENT, {})
        assert not is_expected(selection, span)
    finally:
        otel_context.detach(token)


def test_an_operation_that_names_its_action_is_audited_where_instrumentation_is_suppressed_too():
    suppressed = otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True)
    assert Selection("*").may_audit("audit recall", None, {"audit.action": "recall"}, suppressed)
    assert is_expected(Selection("*"), ended(), suppressed)


def test_names_of_any_length_are_decided_on_and_not_kept():
    selection = Selection("*", [SpanMapping(span_name="memory.{action}")])
    name = "memory." + "x" * 1_000_000
    assert selection.may_audit(name, SpanKind.INTERNAL, None)
    span = ended(action=None, name=name, instrumentation_scope=THEIRS)
    assert selection.mapped_action_of(span) == "x" * 1_000_000
    key = "astrocyte.audit.request." + "y" * 1_000_000
    references = sys.getrefcount(name), sys.getrefcount(key)
    assert record_of(ended({key: 1}, action="x" * 1_000_000), selection).request == {"y" * 1_000_000: 1}
    assert (len(selection._kept_for), len(selection._candidates)) == (0, 0)
    assert (sys.getrefcount(name), sys.getrefcount(key)) == references
