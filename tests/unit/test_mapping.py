"""`SpanMapping`: which spans of other libraries it takes, and what it reads from them."""

import re

import pytest
from opentelemetry.trace import SpanKind, Status, StatusCode

from astrocyte_otel_audit import AuditSpanExporter, ConfigurationError, SpanMapping
from astrocyte_otel_audit.pipeline.mapping import PRESETS, resolve_mappings
from tests.support import MemoryStorage


@pytest.fixture
def span(provider):
    """Makes an ended span, as a library would."""

    def make(name="memory.recall", scope="memory", kind=SpanKind.INTERNAL, status=None, error=None, **attributes):
        span = provider.get_tracer(scope).start_span(name, kind=kind)
        span.set_attributes(attributes)
        if error is not None:
            span.record_exception(error)
        if status is not None:
            span.set_status(Status(status))
        span.end()
        return span

    return make


def record_of(span, *mappings, actions="*"):
    exporter = AuditSpanExporter(storage=MemoryStorage(), actions=actions, mappings=mappings)
    return exporter.record(span)


@pytest.mark.parametrize(
    ("pattern", "name", "action"),
    [
        ("memory.{action}", "memory.recall", "recall"),
        ("memory.{action}", "memory.sync_push", "sync_push"),
        ("memory.{action}", "memory.re-index", "re-index"),
        ("memory.{action}", "memory.", None),
        ("memory.{action}", "memory.recall.inner", None),
        ("memory.{action}", "memory.recall now", None),
        ("memory.{action}", "my memory.recall", None),
        ("memory.{action}", "memory_recall", None),
        ("memory.{action}", "Memory.recall", None),
        ("{action}", "recall", "recall"),
        ("{action} *", "recall of 17 items", "recall"),
        ("* {action}", "POST /v1 retain", "retain"),
        ("memory.{action}.v*", "memory.recall.v2", "recall"),
    ],
)
def test_the_placeholder_stands_for_the_one_word_that_is_the_action(pattern, name, action):
    assert SpanMapping(span_name=pattern).action_for_name(name, None) == action


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("compile", "compile", True),
        ("compile", "compiled", False),
        ("compile", "recompile", False),
        ("chat *", "chat gpt-4o-mini", True),
        ("chat *", "chat ", True),
        ("chat *", "chat", False),
        ("*", "", True),
        ("*", "a\nname of two lines", True),
        ("a.c", "abc", False),
        ("a[bc]", "ab", False),
        ("a[bc]", "a[bc]", True),
        ("(a|b)+", "(a|b)+", True),
    ],
)
def test_a_star_stands_for_anything_and_every_other_character_for_itself(pattern, name, matches):
    mapping = SpanMapping(span_name=pattern, action="chat")
    assert mapping.action_for_name(name, None) == ("chat" if matches else None)


@pytest.mark.parametrize(
    ("mapped", "kind", "matches"),
    [
        (None, SpanKind.CLIENT, True),
        (SpanKind.SERVER, SpanKind.SERVER, True),
        (SpanKind.SERVER, SpanKind.CLIENT, False),
        # A sampler may be asked without a kind, and then keeps the span.
        (SpanKind.SERVER, None, True),
    ],
)
def test_a_kind_narrows_the_mapping(mapped, kind, matches):
    mapping = SpanMapping(span_name="recall", action="recall", kind=mapped)
    assert mapping.action_for_name("recall", kind) == ("recall" if matches else None)


@pytest.mark.parametrize(
    ("mapped", "scope", "matches"),
    [
        (None, "anything", True),
        (None, None, True),
        ("astrocyte", "astrocyte", True),
        ("astrocyte", "astrocyte.web", False),
        ("astrocyte", None, False),
    ],
)
def test_a_scope_narrows_the_mapping(mapped, scope, matches):
    mapping = SpanMapping(span_name="recall", action="recall", scope=mapped)
    assert mapping.action_for("recall", SpanKind.INTERNAL, scope) == ("recall" if matches else None)


def test_the_first_mapping_that_matches_wins(span):
    first = SpanMapping(span_name="memory.recall", action="search")
    second = SpanMapping(span_name="memory.{action}")
    assert record_of(span(), first, second).action == "search"
    assert record_of(span(), second, first).action == "recall"


def test_an_action_that_is_not_allowed_is_not_offered_to_the_next_mapping(span):
    private = SpanMapping(span_name="memory.recall", action="private")
    general = SpanMapping(span_name="memory.{action}")
    assert record_of(span(), private, general, actions=["recall"]) is None


def test_the_allowlist_holds_for_mapped_actions_too(span):
    mapping = SpanMapping(span_name="memory.{action}")
    assert record_of(span("memory.recall"), mapping, actions=["ret*"]) is None
    assert record_of(span("memory.retain"), mapping, actions=["ret*"]).action == "retain"


@pytest.mark.parametrize(
    ("status", "outcome"), [(StatusCode.ERROR, "failure"), (StatusCode.OK, "success"), (StatusCode.UNSET, "success")]
)
def test_the_status_is_the_outcome(span, status, outcome):
    assert record_of(span(status=status), SpanMapping(span_name="memory.{action}")).outcome == outcome


@pytest.mark.parametrize("outcome", ["success", "failure", "unknown"])
def test_an_unset_status_is_what_the_mapping_says(span, outcome):
    mapping = SpanMapping(span_name="memory.{action}", unset_outcome=outcome)
    assert record_of(span(), mapping).outcome == outcome
    assert record_of(span(status=StatusCode.OK), mapping).outcome == "success"


def test_a_stated_outcome_goes_before_the_status(span):
    stated = span(status=StatusCode.OK, **{"audit.outcome": "failure"})
    assert record_of(stated, SpanMapping(span_name="memory.{action}")).outcome == "failure"


def test_a_failure_takes_its_error_from_the_attribute_or_else_from_the_exception(span):
    mapping = SpanMapping(span_name="memory.{action}")
    raised = span(status=StatusCode.ERROR, error=KeyError("secret"))
    named = span(status=StatusCode.ERROR, error=KeyError("secret"), **{"error.type": "timeout"})
    assert record_of(raised, mapping).error_type == "KeyError"
    assert record_of(named, mapping).error_type == "timeout"


def test_an_exception_that_was_survived_is_no_error(span):
    survived = span(status=StatusCode.OK, error=KeyError("secret"))
    assert record_of(survived, SpanMapping(span_name="memory.{action}")).error_type is None


@pytest.mark.parametrize(
    ("keys", "attributes", "bank"),
    [
        (("astrocyte.bank_id", "bank_id"), {"bank_id": "b"}, "b"),
        (("astrocyte.bank_id", "bank_id"), {"bank_id": "b", "astrocyte.bank_id": "a"}, "a"),
        (("bank_id", "astrocyte.bank_id"), {"bank_id": "b", "astrocyte.bank_id": "a"}, "b"),
        (("astrocyte.bank_id",), {"bank_id": "b"}, None),
        ((), {"astrocyte.bank_id": "a"}, None),
        (("bank_id", "other"), {"bank_id": "", "other": "x"}, ""),
        (("bank_id",), {"bank_id": 7}, "7"),
    ],
)
def test_the_bank_is_the_first_attribute_that_is_there(span, keys, attributes, bank):
    mapping = SpanMapping(span_name="memory.{action}", bank_id=keys)
    assert record_of(span(**attributes), mapping).bank_id == bank


def test_raw_text_in_a_librarys_own_attributes_stays_out_of_the_record(span):
    wordy = span(**{"memory.query": "where do I live?", "gen_ai.input.messages": "hello"})
    record = record_of(wordy, SpanMapping(span_name="memory.{action}"))
    assert (record.request, record.response, record.metadata) == (None, None, {})


@pytest.mark.parametrize(
    ("name", "attributes", "action", "bank"),
    [
        ("astrocyte.retain", {"astrocyte.bank_id": "a"}, "retain", "a"),
        ("astrocyte.recall", {"astrocyte.bank_id": "a+1", "astrocyte.bank_count": 2}, "recall", "a+1"),
        ("astrocyte.proxy_recall", {"bank_id": "a"}, "proxy_recall", "a"),
        ("compile", {"bank_id": "a"}, "compile", "a"),
    ],
)
def test_the_astrocyte_preset_knows_astrocytes_spans(span, name, attributes, action, bank):
    record = record_of(span(name, "astrocyte", **attributes), "astrocyte")
    assert (record.action, record.bank_id) == (action, bank)


@pytest.mark.parametrize(("name", "scope"), [("compile", "a.compiler"), ("astrocyte.recall", "a.copycat")])
def test_the_astrocyte_preset_leaves_other_scopes_alone(span, name, scope):
    assert record_of(span(name, scope), "astrocyte") is None


def test_presets_are_replaced_by_their_mappings_in_place():
    own = SpanMapping(span_name="own", action="own")
    assert resolve_mappings([own, "astrocyte", own]) == (own, *PRESETS["astrocyte"], own)


@pytest.mark.parametrize(("member", "shown"), [("hindsite", "'hindsite'"), (7, "int"), (None, "NoneType")])
def test_a_member_that_is_no_mapping_is_refused_with_what_is_accepted(member, shown):
    with pytest.raises(ConfigurationError, match=f"^mappings: .*{shown}.*SpanMapping and astrocyte"):
        resolve_mappings([member])


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("span_name", {"span_name": ""}),
        ("span_name", {"span_name": 7, "action": "recall"}),
        ("span_name", {"span_name": "{action}.{action}"}),
        ("action", {"span_name": "recall"}),
        ("action", {"span_name": "recall", "action": ""}),
        ("action", {"span_name": "memory.{action}", "action": "recall"}),
        ("scope", {"span_name": "{action}", "scope": 7}),
        ("kind", {"span_name": "{action}", "kind": "server"}),
        ("bank_id", {"span_name": "{action}", "bank_id": "bank_id"}),
        ("bank_id", {"span_name": "{action}", "bank_id": [7]}),
        ("bank_id", {"span_name": "{action}", "bank_id": None}),
        ("unset_outcome", {"span_name": "{action}", "unset_outcome": "maybe"}),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(argument, arguments):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(argument)}: .") as refused:
        SpanMapping(**arguments)
    assert refused.value.source == argument
