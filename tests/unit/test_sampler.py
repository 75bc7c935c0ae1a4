"""`AuditSampler`: keeps audit spans recording, and leaves everything else to its delegate."""

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    DEFAULT_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind, TraceState

from astrocyte_otel_audit import AuditSampler, ConfigurationError, SpanMapping
from astrocyte_otel_audit.pipeline.sampler import sampler_of

STATE = TraceState([("vendor", "kept")])


class Fixed(Sampler):
    """Answers the same to everything, and remembers what it was asked."""

    def __init__(self, decision):
        self.decision = decision
        self.asked = []

    def should_sample(self, *question):
        self.asked.append(question)
        return SamplingResult(self.decision, {"from": "delegate"}, STATE)

    def get_description(self):
        return "Fixed"


def ask(sampler, name="anything", kind=SpanKind.INTERNAL, attributes=None, context=None):
    return sampler.should_sample(context, 1, name, kind, attributes, None, None)


AUDIT = {"audit.action": "recall", "astrocyte.bank_id": "b"}


def test_a_dropped_audit_span_is_recorded_with_the_callers_attributes_and_the_delegates_state():
    result = ask(AuditSampler(Fixed(Decision.DROP), actions=["recall"]), attributes=AUDIT)
    assert result.decision is Decision.RECORD_ONLY
    assert dict(result.attributes) == AUDIT
    assert result.trace_state is STATE


@pytest.mark.parametrize("decision", [Decision.RECORD_AND_SAMPLE, Decision.RECORD_ONLY])
def test_an_audit_span_that_the_delegate_keeps_is_as_the_delegate_says(decision):
    result = ask(AuditSampler(Fixed(decision), actions=["recall"]), attributes=AUDIT)
    assert (result.decision, dict(result.attributes)) == (decision, {"from": "delegate"})


@pytest.mark.parametrize("decision", list(Decision))
@pytest.mark.parametrize("attributes", [None, {}, {"http.route": "/"}, {"audit.action": "forget"}])
def test_every_other_span_is_as_the_delegate_says(decision, attributes):
    result = ask(AuditSampler(Fixed(decision), actions=["recall"]), attributes=attributes)
    assert (result.decision, dict(result.attributes), result.trace_state) == (decision, {"from": "delegate"}, STATE)


@pytest.mark.parametrize(
    ("actions", "attributes", "kept"),
    [
        ([], {"audit.action": "recall"}, False),
        (["recall"], {"audit.action": "recall"}, True),
        (["re*"], {"audit.action": "recall"}, True),
        ("*", {"audit.action": "recall"}, True),
        (["recall"], {"audit.action": "retain"}, False),
        # A required operation overrides the allowlist.
        ([], {"audit.action": "recall", "astrocyte.audit.required": True}, True),
        ([], {"audit.action": "recall", "astrocyte.audit.required": False}, False),
        ([], {"audit.action": "recall", "astrocyte.audit.required": "true"}, False),
        ([], {"astrocyte.audit.required": True}, False),
        # An action is a string, whatever another emitter thinks.
        ("*", {"audit.action": 7}, False),
    ],
)
def test_the_allowlist_says_which_audit_spans_are_kept(actions, attributes, kept):
    decision = ask(AuditSampler(ALWAYS_OFF, actions=actions), attributes=attributes).decision
    assert decision is (Decision.RECORD_ONLY if kept else Decision.DROP)


@pytest.mark.parametrize(
    ("name", "kind", "kept"),
    [
        ("memory.recall", SpanKind.CLIENT, True),
        ("memory.recall", SpanKind.INTERNAL, False),
        ("memory.forget", SpanKind.CLIENT, False),
        ("GET /", SpanKind.CLIENT, False),
    ],
)
def test_a_span_that_a_mapping_may_want_is_kept_before_its_scope_is_known(name, kind, kept):
    mapping = SpanMapping(span_name="memory.{action}", scope="memory", kind=SpanKind.CLIENT)
    sampler = AuditSampler(ALWAYS_OFF, actions=["recall"], mappings=[mapping])
    assert ask(sampler, name, kind).decision is (Decision.RECORD_ONLY if kept else Decision.DROP)


SUPPRESSED = otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True)


def test_a_span_of_an_instrumentation_that_is_suppressed_is_as_the_delegate_says():
    sampler = AuditSampler(ALWAYS_OFF, actions="*", mappings=[SpanMapping(span_name="*", action="sql")])
    assert ask(sampler, "SELECT").decision is Decision.RECORD_ONLY
    assert ask(sampler, "SELECT", context=SUPPRESSED).decision is Decision.DROP
    token = otel_context.attach(SUPPRESSED)
    try:
        assert ask(sampler, "SELECT").decision is Decision.DROP
    finally:
        otel_context.detach(token)


def test_an_operation_that_names_its_action_is_kept_where_instrumentation_is_suppressed_too():
    sampler = AuditSampler(ALWAYS_OFF, actions="*")
    assert ask(sampler, attributes=AUDIT, context=SUPPRESSED).decision is Decision.RECORD_ONLY


def test_the_delegate_is_asked_exactly_what_the_sampler_was_asked():
    delegate = Fixed(Decision.DROP)
    question = ("context", 17, "name", SpanKind.CONSUMER, {"a": 1}, ("link",), STATE)
    AuditSampler(delegate, actions="*").should_sample(*question)
    assert delegate.asked == [question]


def test_the_default_delegate_is_the_sdks_own_default():
    assert AuditSampler().delegate is DEFAULT_ON


def test_the_description_names_the_delegate():
    assert AuditSampler(Fixed(Decision.DROP)).get_description() == "AuditSampler{Fixed}"


def test_two_samplers_nest_and_each_keeps_its_own_actions():
    sampler = AuditSampler(AuditSampler(ALWAYS_OFF, actions=["recall"]), actions=["retain"])
    decisions = [
        ask(sampler, attributes={"audit.action": action}).decision for action in ("recall", "retain", "forget")
    ]
    assert decisions == [Decision.RECORD_ONLY, Decision.RECORD_ONLY, Decision.DROP]
    assert sampler.get_description() == "AuditSampler{AuditSampler{AlwaysOffSampler}}"


@pytest.mark.parametrize(("delegate", "flag"), [(ALWAYS_OFF, False), (ALWAYS_ON, True)])
def test_a_kept_span_records_and_its_trace_stays_as_sampled_as_it_was(delegate, flag):
    provider = TracerProvider(sampler=AuditSampler(delegate, actions="*"), shutdown_on_exit=False)
    span = provider.get_tracer("test").start_span("audit recall", attributes=AUDIT)
    assert span.is_recording()
    assert dict(span.attributes) == AUDIT
    assert span.get_span_context().trace_flags.sampled is flag
    assert not provider.get_tracer("test").start_span("other").is_recording() or flag


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("delegate", {"delegate": ["recall"]}),
        ("actions", {"actions": "recall"}),
        ("actions", {"actions": [7]}),
        ("mappings", {"mappings": ["hindsite"]}),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(argument, arguments):
    with pytest.raises(ConfigurationError, match=f"^{argument}: .") as refused:
        AuditSampler(**arguments)
    assert refused.value.source == argument


@pytest.mark.parametrize("name", [None, 5, ["x"]])
def test_a_name_that_is_none_reaches_the_delegate_and_raises_nothing(name):
    sampler = AuditSampler(ALWAYS_OFF, actions="*", mappings=["astrocyte"])

    assert sampler.should_sample(None, 1, name).decision is Decision.DROP


def test_by_default_the_allowlist_is_the_environments(monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_ACTIONS", "recall")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MAPPINGS", "astrocyte")
    selection = AuditSampler().selection
    assert (selection.allowlist.actions, bool(selection.mappings)) == (("recall",), True)


@pytest.mark.parametrize(
    ("argument", "described"),
    [
        (None, DEFAULT_ON.get_description()),
        ("", DEFAULT_ON.get_description()),
        ("always_on", ALWAYS_ON.get_description()),
        (" always_off ", ALWAYS_OFF.get_description()),
        ("parentbased_always_on", DEFAULT_ON.get_description()),
        ("parentbased_always_off", DEFAULT_OFF.get_description()),
        ("traceidratio", TraceIdRatioBased(1.0).get_description()),
        ("traceidratio=0.25", TraceIdRatioBased(0.25).get_description()),
        ("parentbased_traceidratio=0.1", ParentBased(TraceIdRatioBased(0.1)).get_description()),
    ],
)
def test_the_environment_names_who_decides_about_traces(argument, described):
    assert sampler_of(argument).delegate.get_description() == described


@pytest.mark.parametrize(
    "argument", ["0.1", "jaeger_remote", "always_on=1", "traceidratio=often", "traceidratio=2", "traceidratio=-1"]
)
def test_what_no_sampler_is_called_is_refused_with_what_is_accepted(argument):
    with pytest.raises(ConfigurationError, match=r"OTEL_TRACES_SAMPLER_ARG.*parentbased_traceidratio=0\.1"):
        sampler_of(argument)
