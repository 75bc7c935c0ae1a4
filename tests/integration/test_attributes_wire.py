"""`docs/attributes.md` says what the wire is: its example leaves the row that it shows, and its tables are so."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode
from psycopg.rows import dict_row

from astrocyte_otel_audit import Normalizer, attributes, audit_operation, audit_scope
from astrocyte_otel_audit.attributes import unflatten
from astrocyte_otel_audit.configure import _MIN_ATTRIBUTE_LENGTH, _MIN_ATTRIBUTES
from astrocyte_otel_audit.pipeline.captured import _NORMALIZER
from astrocyte_otel_audit.pipeline.surroundings import _TRANSPORTS, ACTOR_KEYS
from astrocyte_otel_audit.record import AuditRecord, record_id
from astrocyte_otel_audit.storable import MAX_PAYLOAD_BYTES, MAX_TEXT
from astrocyte_otel_audit.testing import AuditLog, InMemoryAuditTable, record_audit

DOCUMENT = (Path(__file__).parents[2] / "docs" / "attributes.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```(\w+)\n(.*?)```", DOCUMENT, re.DOTALL))
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE))


def table(section):
    """The rows of the first table of a section, each a list of cells without the backticks around them."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    return [[re.sub(r"^`(.*)`$", r"\1", cell) for cell in line[2:-2].split(" | ")] for line in lines[1:]]


@pytest.fixture
def emitter(provider):
    """A tracer of somebody else's instrumentation scope."""
    return provider.get_tracer("memory-service", "1.4.0")


@pytest.fixture
def log(audit):
    return AuditLog(audit(storage=InMemoryAuditTable(), spool_dir=False))


class TestTheExample:
    def test_leaves_the_row_that_is_shown(self, database):
        environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": database, "OTEL_SERVICE_NAME": "unknown_service"}
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", EXAMPLES["python"]],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "True\n", "")
        shown = json.loads(EXAMPLES["json"])
        with psycopg.connect(database, row_factory=dict_row) as connection:
            [row] = connection.execute("SELECT * FROM astrocyte_audit_log").fetchall()
        assert set(shown) == set(row)
        assert all(row[name] is not None for name, value in shown.items() if value == "…")
        assert {name: "…" if shown[name] == "…" else value for name, value in row.items()} == shown

    def test_is_the_same_in_javascript(self):
        def said(code):
            # Strings that are an attribute's key or value; an action or a bank is both languages' too.
            return set(re.findall(r'"([a-z][\w.%:-]*)"', code))

        python, javascript = said(EXAMPLES["python"]), said(EXAMPLES["js"])
        assert python == javascript
        assert {name for name in python if name.startswith(("audit.", "astrocyte."))} >= {
            "audit.action", "audit.outcome", "astrocyte.bank_id", "astrocyte.audit.request.filter.%empty",
        }  # fmt: skip

    def test_shows_every_column(self):
        assert list(json.loads(EXAMPLES["json"])) == list(AuditRecord._fields[:-1])


class TestTheAttributes:
    @pytest.mark.parametrize(
        "value",
        [value for name, value in vars(attributes).items() if name.isupper() and not name.startswith("_")],
    )
    def test_every_constant_is_in_the_document(self, value):
        assert f"`{value}" in DOCUMENT

    def test_no_other_is_in_the_table(self):
        known = {value for name, value in vars(attributes).items() if name.isupper() and isinstance(value, str)}
        assert {row[0].removesuffix("<path>") for row in table("The attributes")} <= known

    def test_every_column_of_the_table_comes_from_somewhere(self):
        said = SECTIONS["The attributes"]
        assert [name for name in AuditRecord._fields[:18] if f"`{name}`" not in said] == []

    def test_an_action_that_comes_late_is_taken_without_a_receipt(self, emitter, log):
        with emitter.start_as_current_span("any name") as late:
            late.set_attribute("audit.action", "recall")
        with emitter.start_as_current_span("any name", attributes={"audit.action": "recall"}) as early:
            pass
        assert "audit.record.id" not in late.attributes
        assert [record.id for record in log.records][1] == early.attributes["audit.record.id"]

    def test_an_emitter_s_own_receipt_is_not_believed(self, emitter, log):
        given = {"audit.action": "recall", "audit.record.id": "mine"}
        with emitter.start_as_current_span("x", attributes=given) as span:
            pass
        assert log.one("recall").id == span.attributes["audit.record.id"] != "mine"

    def test_ids_are_text_and_the_rest_is_the_scope_s(self, emitter, log):
        with (
            audit_scope(actor_id="calvin", actor_type="user", transport="mcp", bank_id="other"),
            emitter.start_as_current_span("x", attributes={"audit.action": "recall", "astrocyte.bank_id": 7}),
        ):
            pass
        log.one("recall", bank_id="7", actor_id="calvin", actor_type="user", transport="mcp")

    def test_the_conventions_say_what_the_span_does_not(self, emitter, log):
        with emitter.start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
            span.set_attributes({"enduser.id": "calvin", "mcp.method.name": "tools/call"})
        log.one("recall", actor_id="calvin", transport="mcp")

    @pytest.mark.parametrize(
        ("key", "value", "transport"),
        [
            ("http.request.method", "GET", "http"),
            ("rpc.system", "grpc", "grpc"),
            ("messaging.system", "kafka", "kafka"),
            ("mcp.method.name", "tools/call", "mcp"),
        ],
    )
    @pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.CONSUMER])
    def test_the_span_of_the_request_says_what_that_does_not(self, emitter, log, key, value, transport, kind):
        request = {key: value, "user.id": "calvin"}
        with (
            emitter.start_as_current_span("request", kind=kind, attributes=request),
            emitter.start_as_current_span("step"),
            emitter.start_as_current_span("x", attributes={"audit.action": "recall"}),
        ):
            pass
        with emitter.start_as_current_span("x", kind=kind, attributes={"audit.action": "recall", **request}):
            pass
        assert [(one.actor_id, one.transport) for one in log.records] == [("calvin", transport)] * 2

    def test_every_attribute_of_the_conventions_that_is_read_is_in_the_document(self):
        read = [*ACTOR_KEYS, *(key for key, _ in _TRANSPORTS), attributes.ERROR_TYPE]
        assert [key for key in read if f"`{key}`" not in SECTIONS["The attributes"]] == []

    def test_baggage_says_who_acts_where_nobody_else_does(self):
        carried = otel_context.attach(baggage.set_baggage("user", "calvin"))
        try:
            with record_audit(actor_baggage=["user"]) as log:
                trace.get_tracer("any").start_span("x", attributes={"audit.action": "recall"}).end()
        finally:
            otel_context.detach(carried)
        log.one("recall", actor_id="calvin", metadata={"actor_source": "baggage"})

    def test_dropped_attributes_are_counted(self, audit):
        provider = TracerProvider(span_limits=SpanLimits(max_span_attributes=32), shutdown_on_exit=False)
        log = AuditLog(audit(storage=InMemoryAuditTable(), spool_dir=False, tracer_provider=provider))
        with provider.get_tracer("x").start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
            span.set_attributes({f"astrocyte.audit.request.key_{number}": number for number in range(40)})
            span.set_attributes({"audit.action": "recall", "audit.outcome": "success"})
        assert log.one("recall").metadata == {"dropped_attributes": span.dropped_attributes}
        provider.shutdown()


def in_the_row(flat):
    tree = {}
    for path, value in flat.items():
        unflatten(path, value, tree)
    return tree


def flat(payload, prefix=""):
    """What a payload is on the wire, by the document's words."""
    said = {}
    for key, value in payload.items():
        path = prefix + key.replace("%", "%25").replace(".", "%2E")
        if value == {}:
            said[f"{path}.%empty"] = True
        elif isinstance(value, dict):
            said |= flat(value, f"{path}.")
        else:
            said[path] = value
    return said


def nested(attributes_by_path):
    tree = {}
    for path, value in attributes_by_path.items():
        unflatten(path, tuple(value) if isinstance(value, list) else value, tree)
    return tree


@pytest.mark.parametrize(("path", "value", "payload"), table("Payloads as paths"))
def test_a_path_and_its_payload_are_as_the_table_says(path, value, payload):
    assert nested({path: json.loads(value)}) == json.loads(payload)
    assert flat(json.loads(payload)) == {path: json.loads(value)}


@pytest.mark.parametrize(("path", "value", "payload"), table("What becomes of payloads"))
def test_a_payload_of_another_emitter_becomes_what_the_table_says(emitter, log, path, value, payload):
    for given in ({path: json.loads(value)}, flat(json.loads(payload))):  # what was normalized before stays
        with emitter.start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
            span.set_attributes({attributes.REQUEST + path: value for path, value in given.items()})
        assert log.one("recall").request == json.loads(payload)
        log.clear()


def test_a_kept_text_is_kept_of_this_library_s_operations_only():
    with record_audit(normalizer=Normalizer(keep=["query"])) as log:
        with audit_operation("recall", request={"query": "two words"}):
            pass
        with trace.get_tracer("any").start_as_current_span("x", attributes={"audit.action": "reflect"}) as span:
            span.set_attribute("astrocyte.audit.request.query", "two words")
    assert log.one("recall").request == {"query": "two words"}
    assert log.one("reflect").request == {"query": {"length": 9}}


def outcome_of(emitter, log, status, **given):
    with emitter.start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
        span.set_status(Status(StatusCode[status]))
        span.set_attributes({name.replace("_", "."): value for name, value in given.items()})
    record = log.one("recall")
    log.clear()
    return record.outcome


def test_the_outcome_is_as_the_table_says(emitter, log):
    stated, *unstated = table("The outcome")
    for outcome in re.findall(r"\w+", stated[0]):
        for status in ("ERROR", "OK", "UNSET"):
            assert outcome_of(emitter, log, status, audit_outcome=outcome) == outcome
    assert [status for _, status, _ in unstated] == ["ERROR", "OK", "unset"]
    for _, status, outcome in unstated:
        assert outcome_of(emitter, log, status.upper()) == outcome
        assert outcome_of(emitter, log, status.upper(), audit_outcome="finished") == outcome


def test_the_class_of_an_error_is_that_of_the_last_event_where_none_is_stated(emitter, log):
    with pytest.raises(TimeoutError), emitter.start_as_current_span("x", attributes={"audit.action": "recall"}):
        raise TimeoutError("a secret")
    assert log.one("recall", outcome="failure", error_type="TimeoutError")
    assert "secret" not in str(log.records)


def test_the_worked_example_of_an_id_is_right():
    example = dict(table("The id of the row"))
    trace_id, span_id, start_ns = example["trace id"], example["span id"], int(example["start, ns"])
    said = bytes.fromhex(trace_id + span_id) + start_ns.to_bytes(8, "big", signed=True)
    digest = hashlib.blake2b(said, digest_size=10).hexdigest()
    milliseconds = f"{start_ns // 1_000_000:012x}"
    assert (example["bytes"], example["digest"], example["milliseconds"]) == (said.hex(), digest, milliseconds)
    d = ["", *digest]  # counted from 1, as there
    variant = "89ab"[int(d[4], 16) & 3]
    digits = milliseconds + "8" + "".join(d[1:4]) + variant + "".join(d[5:8]) + "".join(d[8:20])
    assert example["id"].replace("-", "") == digits
    assert example["id"] == record_id(int(trace_id, 16), int(span_id, 16), start_ns)


def test_the_id_of_a_row_is_computed_so(emitter, log):
    with emitter.start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
        pass
    record = log.one("recall")
    assert record.id == record_id(int(record.trace_id, 16), int(record.span_id, 16), span.start_time)


def test_a_required_operation_has_its_receipt_and_is_not_asked_for_its_action():
    with record_audit(actions=["recall"]) as log:
        tracer = trace.get_tracer("any")
        required = {"audit.action": "forget", "astrocyte.audit.required": True}
        with tracer.start_as_current_span("x", attributes=required) as span:
            assert "audit.record.id" in span.attributes
        with tracer.start_as_current_span("x", attributes={"audit.action": "forget"}) as span:
            assert "audit.record.id" not in span.attributes
    log.one("forget")


def test_the_limits_are_those_of_the_code(emitter, log):
    limits = dict(table("Limits"))
    assert limits["characters of `action`, `bank_id`, `transport`, `actor_id`, `actor_type`, `error_type`"].startswith(
        f"{MAX_TEXT};"
    )
    assert limits["nesting of a payload"] == f"{attributes._MAX_SEGMENTS} segments"
    assert limits["attributes of one payload, from another emitter"].startswith(f"{_NORMALIZER._max_attributes};")
    assert limits["bytes of one payload as JSON"].startswith(f"{MAX_PAYLOAD_BYTES};")
    assert limits["attributes of a span"].endswith(f"; {_MIN_ATTRIBUTES} are needed")
    assert limits["characters of a value"].endswith(f"; {_MIN_ATTRIBUTE_LENGTH} are needed")
    with emitter.start_as_current_span("x", attributes={"audit.action": "recall"}) as span:
        span.set_attribute("astrocyte.bank_id", "b" * 600)
        span.set_attribute("astrocyte.audit.request.ratio", float("nan"))
        span.set_attribute("audit.actor.id", "a\x00b")
    log.one("recall", bank_id="b" * 512, request={"ratio": "nan"}, actor_id="a\ufffdb")


def test_a_part_of_an_operation_fills_what_that_left_empty(emitter, log):
    def operation(**given):
        named = {"audit.action": "recall", "astrocyte.bank_id": "b"}
        return emitter.start_as_current_span("x", attributes={**named, **given})

    with operation(**{"audit.outcome": "success"}), operation(**{"astrocyte.transport": "mcp"}):
        pass
    log.one("recall", transport="mcp", outcome="success", parent_span_id=None)
    assert len(log.records) == 1
    log.clear()
    others = {"audit.outcome": "failure"}, {"audit.actor.id": "calvin"}, {"astrocyte.audit.required": True}
    for other in others:
        with operation(**{"audit.outcome": "success", "audit.actor.id": "assistant"}), operation(**other):
            pass
        assert len(log.records) == 2
        log.clear()
