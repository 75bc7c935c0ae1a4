"""`SpanMapping`: which spans of other libraries it takes, and what it reads from them."""

import enum
import re

import pytest
from opentelemetry.trace import SpanKind, Status, StatusCode

from astrocyte_otel_audit import AuditSpanExporter, ConfigurationError, SpanMapping, SpanPattern
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline.presets import PRESETS, resolve_mappings
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


def action_of(mapping, name):
    match = mapping.match_name(name)
    return None if match is None else mapping.action_of(match.groupdict().get("action"), {})


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
    assert action_of(SpanMapping(span_name=pattern), name) == action


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
    assert action_of(mapping, name) == ("chat" if matches else None)


@pytest.mark.parametrize(
    ("mapped", "kind", "matches"),
    [
        (None, SpanKind.CLIENT, True),
        (SpanKind.SERVER, SpanKind.SERVER, True),
        (SpanKind.SERVER, SpanKind.CLIENT, False),
        ("server", SpanKind.SERVER, True),
        ("server", SpanKind.INTERNAL, False),
        (["server", SpanKind.CONSUMER], SpanKind.CONSUMER, True),
        # A sampler may be asked without a kind, and then keeps the span.
        (SpanKind.SERVER, None, True),
    ],
)
def test_a_kind_narrows_the_mapping(mapped, kind, matches):
    assert SpanMapping(span_name="recall", action="recall", kind=mapped).has_kind(kind) is matches


@pytest.mark.parametrize(
    ("mapped", "scope", "matches"),
    [
        (None, "anything", True),
        (None, None, True),
        ("astrocyte", "astrocyte", True),
        ("astrocyte", "astrocyte.web", False),
        ("astrocyte", None, False),
        ("astrocyte*", "astrocyte.web", True),
        (["memory", "astrocyte"], "astrocyte", True),
        (["memory", "astrocyte"], "other", False),
    ],
)
def test_a_scope_narrows_the_mapping(mapped, scope, matches):
    assert SpanMapping(span_name="recall", action="recall", scope=mapped).has_scope(scope) is matches


@pytest.mark.parametrize(
    ("required", "absent", "attributes", "matches"),
    [
        (["memory.op"], (), {}, False),
        (["memory.op"], (), {"memory.op": ""}, True),
        ({"memory.op": "read"}, (), {"memory.op": "read"}, True),
        ({"memory.op": "read"}, (), {"memory.op": "reading"}, False),
        ({"memory.op": "read*"}, (), {"memory.op": "reading"}, True),
        ({"memory.op": ["read", "write"]}, (), {"memory.op": "write"}, True),
        ({"memory.op": ["read", "write"]}, (), {"memory.op": "erase"}, False),
        ({"memory.hits": 3}, (), {"memory.hits": 3}, True),
        ({"memory.hits": "4*"}, (), {"memory.hits": 404}, True),
        ({"memory.stored": False}, (), {"memory.stored": False}, True),
        ({"memory.stored": False}, (), {"memory.stored": True}, False),
        ({"memory.tags": "b"}, (), {"memory.tags": ["a", "b"]}, True),
        ({"memory.tags": "c"}, (), {"memory.tags": ["a", "b"]}, False),
        ({"a": "1", "b": "2"}, (), {"a": "1"}, False),
        ((), ["gen_ai.operation.name"], {"gen_ai.operation.name": "chat"}, False),
        ((), ["gen_ai.*"], {"gen_ai.operation.name": "chat"}, False),
        ((), "gen_ai.*", {"memory.op": "read"}, True),
        (["memory.op"], ["gen_ai.*"], {"memory.op": "read"}, True),
    ],
)
def test_attributes_that_have_to_be_there_or_absent_narrow_the_mapping(span, required, absent, attributes, matches):
    mapping = SpanMapping(span_name="memory.{action}", required=required, absent=absent)
    assert (record_of(span(**attributes), mapping) is not None) is matches


@pytest.mark.parametrize(("root", "rows"), [(None, ["a", "b"]), (True, ["a"]), (False, ["b"])])
def test_a_span_that_begins_its_trace_is_told_from_one_that_does_not(provider, root, rows):
    mapping = SpanMapping(span_name="memory.{action}", root=root)
    tracer = provider.get_tracer("memory")
    with tracer.start_as_current_span("memory.a") as outer, tracer.start_as_current_span("memory.b") as inner:
        pass
    found = [record_of(span, mapping) for span in (outer, inner)]
    assert [record.action for record in found if record is not None] == rows


class Operation(str, enum.Enum):  # noqa: UP042 - unlike a StrEnum, its str() is its name
    READ = "read"

    def __str__(self):
        raise AssertionError("asked for its own idea of itself")


def test_a_value_out_of_an_enum_of_strings_is_that_string():
    attributes = {"memory.op": Operation.READ}
    mapping = SpanMapping(action="{memory.op}", required={"memory.op": "read"}, failure_when={"memory.op": "r*"})
    assert mapping.has_required(attributes)
    assert mapping.action_of(None, attributes) == "read"
    assert mapping.outcome_of(StatusCode.UNSET, attributes) == ("failure", "read")


def test_a_mapping_that_does_not_fit_leaves_the_span_to_the_next(span):
    first = SpanMapping(span_name="memory.recall", action="search", required=["memory.index"])
    second = SpanMapping(span_name="memory.{action}")
    assert record_of(span(), first, second).action == "recall"
    assert record_of(span(**{"memory.index": "a"}), first, second).action == "search"


@pytest.mark.parametrize(
    ("action", "attributes", "expected"),
    [
        ("tool.{gen_ai.tool.name}", {"gen_ai.tool.name": "search"}, "tool.search"),
        ("{gen_ai.operation.name}", {"gen_ai.operation.name": "chat"}, "chat"),
        ("{a}.{b}", {"a": 1, "b": True}, "1.True"),
        # What could be a text, or a name without end, doesn't become an action.
        ("tool.{gen_ai.tool.name}", {"gen_ai.tool.name": "where do I live?"}, "tool.unknown"),
        ("tool.{gen_ai.tool.name}", {"gen_ai.tool.name": "x" * 1000}, "tool.unknown"),
        ("tool.{gen_ai.tool.name}", {"gen_ai.tool.name": ["a", "b"]}, "tool.unknown"),
    ],
)
def test_an_action_is_made_of_attributes(span, action, attributes, expected):
    assert record_of(span("call", **attributes), SpanMapping(action=action)).action == expected


def test_an_action_goes_through_the_allowlist_as_it_was_made(span):
    mapping = SpanMapping(action="tool.{gen_ai.tool.name}")
    assert record_of(span(**{"gen_ai.tool.name": "search"}), mapping, actions=["tool.s*"]).action == "tool.search"
    assert record_of(span(**{"gen_ai.tool.name": "erase"}), mapping, actions=["tool.s*"]) is None


def test_without_the_attribute_that_names_its_action_a_span_is_left_to_the_next_mapping(span):
    named = SpanMapping(action="{memory.op}")
    assert record_of(span(), named) is None
    assert record_of(span(), named, SpanMapping(span_name="memory.{action}")).action == "recall"


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


@pytest.mark.parametrize(
    ("failure_when", "attributes", "outcome", "error"),
    [
        (("error.type",), {"error.type": "timeout"}, "failure", "timeout"),
        ((), {"error.type": "timeout"}, "success", None),
        ({"http.response.status_code": ["4*", "5*"]}, {"http.response.status_code": 422}, "failure", "422"),
        ({"http.response.status_code": ["4*", "5*"]}, {"http.response.status_code": 200}, "success", None),
        ({"memory.stored": False}, {"memory.stored": False}, "failure", "False"),
        ({"memory.reason": "*"}, {"memory.reason": "it says where I live"}, "failure", None),
    ],
)
def test_attributes_say_that_it_failed_where_the_status_says_nothing(span, failure_when, attributes, outcome, error):
    mapping = SpanMapping(span_name="memory.{action}", failure_when=failure_when)
    record = record_of(span(**attributes), mapping)
    assert (record.outcome, record.error_type) == (outcome, error)
    assert record_of(span(status=StatusCode.OK, **attributes), mapping).outcome == "success"


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


def test_payload_keys_are_taken_by_name_and_pass_the_normalizer(span):
    mapping = SpanMapping(
        span_name="memory.{action}",
        request={"query": "memory.query", "top_k": "memory.k", "api_key": "memory.key", "gone": "memory.gone"},
        response=["memory.ids"],
        metadata={"model": ["gen_ai.response.model", "gen_ai.request.model"], "where": "memory.where"},
    )
    attributes = {
        "memory.query": "where do I live?", "memory.k": 5, "memory.key": "sk-1", "memory.ids": ["m-1", "m-2"],
        "gen_ai.request.model": "gpt-4o-mini", "memory.where": "a house by the sea", "memory.other": "not asked for",
    }  # fmt: skip
    record = record_of(span(**attributes), mapping)
    assert record.request == {"query": {"length": 16}, "top_k": 5, "api_key": "[redacted]"}
    assert record.response == {"memory.ids": ["m-1", "m-2"]}
    assert record.metadata == {"model": "gpt-4o-mini", "where": {"length": 18}}


def test_the_pipelines_normalizer_says_what_of_a_mapped_value_may_be_stored(span):
    mapping = SpanMapping(span_name="memory.{action}", request={"query": "memory.query", "place": "memory.place"})
    exporter = AuditSpanExporter(
        storage=MemoryStorage(), actions="*", mappings=[mapping],
        normalizer=Normalizer(keep=["recall:query"], drop=["place"]),
    )  # fmt: skip
    record = exporter.record(span(**{"memory.query": "where do I live?", "memory.place": "here"}))
    assert record.request == {"query": "where do I live?"}


def test_a_redacted_key_shows_that_there_was_something_and_not_what(span):
    mapping = SpanMapping(
        span_name="memory.{action}", request={"user": "memory.user", "k": "memory.k"}, redact=["user"]
    )
    assert record_of(span(**{"memory.user": "calvin", "memory.k": 5}), mapping).request == {
        "user": "[redacted]",
        "k": 5,
    }
    assert record_of(span(**{"memory.k": 5}), mapping).request == {"k": 5}


def test_what_a_hook_has_put_on_the_span_goes_before_what_the_mapping_takes(span):
    mapping = SpanMapping(span_name="memory.{action}", response={"hits": "memory.hits"})
    said = span(**{"memory.hits": 2, "astrocyte.audit.response.hits": 3, "astrocyte.audit.response.kept": 1})
    assert record_of(said, mapping).response == {"hits": 3, "kept": 1}


def test_an_actor_and_a_transport_are_taken_from_attributes(span):
    mapping = SpanMapping(
        span_name="memory.{action}", actor_id=["memory.user", "memory.agent"], transport="{memory.protocol}"
    )
    record = record_of(span(**{"memory.agent": "calvin", "memory.protocol": "mcp"}), mapping)
    assert (record.actor_id, record.transport) == ("calvin", "mcp")
    assert record_of(span(), mapping).transport == "unknown"


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


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("astrocite", r"holds 'astrocite'; accepted are SpanMapping and .*astrocyte.* \(did you mean 'astrocyte'\?\)$"),
        ("postgresql://ann:secret@h/d", "holds what looks like a connection string; accepted are .*astrocyte"),
        (7, "holds 7; accepted are .*astrocyte"),
        (None, "holds a NoneType; accepted are .*astrocyte"),
    ],
)
def test_a_member_that_is_no_mapping_is_refused_with_what_is_accepted(member, message):
    with pytest.raises(ConfigurationError, match=f"^mappings: {message}"):
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
        ("kind", {"span_name": "{action}", "kind": "sever"}),
        ("kind", {"span_name": "{action}", "kind": 1}),
        ("span_name", {"span_name": [], "action": "recall"}),
        ("action", {"span_name": ["memory.{action}", "memory"]}),
        ("action", {"span_name": "memory", "action": 7}),
        ("required", {"span_name": "{action}", "required": 7}),
        ("required", {"span_name": "{action}", "required": {"a": None}}),
        ("absent", {"span_name": "{action}", "absent": {"a": 1}}),
        ("root", {"span_name": "{action}", "root": 1}),
        ("inside", {"span_name": "{action}", "inside": ["memory"]}),
        ("not_inside", {"span_name": "{action}", "not_inside": SpanPattern()}),
        ("actor_id", {"span_name": "{action}", "actor_id": 7}),
        ("transport", {"span_name": "{action}", "transport": ""}),
        ("request", {"span_name": "{action}", "request": 7}),
        ("response", {"span_name": "{action}", "response": {"a": 7}}),
        ("metadata", {"span_name": "{action}", "metadata": {"": "a"}}),
        ("redact", {"span_name": "{action}", "request": ["a"], "redact": ["b"]}),
        ("failure_when", {"span_name": "{action}", "failure_when": 7}),
        ("bank_id", {"span_name": "{action}", "bank_id": [7]}),
        ("bank_id", {"span_name": "{action}", "bank_id": None}),
        ("unset_outcome", {"span_name": "{action}", "unset_outcome": "maybe"}),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(argument, arguments):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(argument)}: .") as refused:
        SpanMapping(**arguments)
    assert refused.value.source == argument


def test_a_mapping_is_written_out_as_a_file_has_it(span):
    written = {
        "span_name": "memory.{action}",
        "kind": "internal",
        "required": {"memory.op": ["read", "write"]},
        "not_inside": [{"span_name": "memory.reflect", "scope": "memory"}],
        "request": {"k": "memory.k"},
    }
    [mapping] = resolve_mappings([written])
    assert mapping == SpanMapping(**{**written, "not_inside": [SpanPattern(**written["not_inside"][0])]})
    assert record_of(span(**{"memory.op": "read", "memory.k": 5}), written).request == {"k": 5}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"spam_name": "x"}, r"^mappings\[1\]: has no key 'spam_name'; did you mean 'span_name'\?"),
        ({"_bank_keys": "x"}, r"^mappings\[1\]: has no key '_bank_keys'"),
        ({"zzz": "x"}, r"^mappings\[1\]: has no key 'zzz'; accepted are span_name, scope, kind"),
        ({"span_name": "x", "action": "y", "kind": "sever"}, r"^mappings\[1\]\.kind: accepted is .*server"),
        (
            {"span_name": "x", "action": "y", "inside": [{"span_name": "x"}, {"actions": "x"}]},
            r"^mappings\[1\]\.inside\[1\]: has no key 'actions'",
        ),
        (
            {"span_name": "x", "action": "y", "not_inside": [{"required": 7}]},
            r"^mappings\[1\]\.not_inside\[0\]\.required: ",
        ),
    ],
)
def test_a_mistake_in_a_written_out_mapping_is_named_by_its_place(written, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_mappings(["astrocyte", written])


def test_a_preset_that_the_environment_names_is_resolved_and_a_wrong_one_is_refused_by_its_variable(monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MAPPINGS", "mcp, gen_ai")
    assert resolve_mappings() == (*PRESETS["mcp"], *PRESETS["gen_ai"])
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MAPPINGS", "mcp,gen-ai")
    with pytest.raises(ConfigurationError, match=r"^OTEL_ASTROCYTE_AUDIT_MAPPINGS: holds 'gen-ai'.*'gen_ai'\?\)$"):
        resolve_mappings()
