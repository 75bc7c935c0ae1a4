"""`audit_operation`: a block of code as one audited operation."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode, get_current_span

from astrocyte_otel_audit import (
    AuditEntry,
    AuditLogger,
    AuditRecord,
    AuditUnavailableError,
    Normalizer,
    __version__,
    audit_scope,
    audited,
    configure_audit,
)
from astrocyte_otel_audit import audit_operation as audit_operation_globally

TEXT = "Calvin's blood pressure is rising"


@pytest.fixture
def audit_operation(provider: TracerProvider) -> Callable[..., Any]:
    return partial(audit_operation_globally, tracer_provider=provider)


@pytest.fixture
def recorded(audit, storage) -> Callable[[], list[AuditRecord]]:
    """Everything is audited; the function returns all records so far."""
    processor = audit(storage=storage)

    def records() -> list[AuditRecord]:
        assert processor.force_flush()
        return storage.records

    return records


@pytest.fixture
def ended_spans(provider: TracerProvider) -> Callable[[], tuple[ReadableSpan, ...]]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


Block = Callable[[Any], None]
Run = Callable[[Any, Block], Awaitable[None]]


async def _with(operation: Any, block: Block) -> None:
    with operation as entered:
        assert entered is operation
        block(entered)


async def _async_with(operation: Any, block: Block) -> None:
    async with operation as entered:
        assert entered is operation
        block(entered)


@pytest.fixture(params=[_with, _async_with], ids=["with", "async with"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a block inside an operation, in one of the two ways that there are."""
    return request.param


class TestTheRecord:
    async def test_has_what_was_given(self, audit_operation, recorded, run):
        operation = audit_operation(
            "consolidate",
            bank_id="bank-1",
            transport="system",
            actor_id="user-7",
            actor_type="user",
            request={"top_k": 5},
            metadata={"attempt": 1},
        )
        await run(operation, lambda operation: None)
        [record] = recorded()
        assert (record.action, record.bank_id, record.transport) == ("consolidate", "bank-1", "system")
        assert (record.actor_id, record.actor_type) == ("user-7", "user")
        assert (record.request, record.response, record.metadata) == ({"top_k": 5}, None, {"attempt": 1})
        assert (record.outcome, record.error_type) == ("success", None)

    async def test_has_what_is_set_inside_the_block(self, audit_operation, recorded, run):
        def block(operation):
            operation.response = {"merged": 4}
            operation.metadata["attempt"] = 2
            operation.bank_id = "bank-1"
            operation.transport = "http"
            operation.actor_id = "user-7"
            operation.actor_type = "user"
            operation.outcome = "unknown"

        await run(audit_operation("consolidate"), block)
        [record] = recorded()
        assert (record.bank_id, record.transport) == ("bank-1", "http")
        assert (record.actor_id, record.actor_type) == ("user-7", "user")
        assert (record.request, record.response, record.metadata) == (None, {"merged": 4}, {"attempt": 2})
        assert record.outcome == "unknown"

    @pytest.mark.parametrize(
        ("given", "inside", "field"),
        [
            ({"bank_id": "before"}, {"bank_id": "after"}, "bank_id"),
            ({"transport": "before"}, {"transport": "after"}, "transport"),
            ({"actor_id": "before"}, {"actor_id": "after"}, "actor_id"),
            ({"actor_type": "service"}, {"actor_type": "user"}, "actor_type"),
            ({"request": {"top_k": 5}}, {"request": {"top_k": 9}}, "request"),
            ({"request": {"top_k": 5, "depth": 2}}, {"request": None}, "request"),
            ({"metadata": {"attempt": 1}}, {"metadata": {"tries": 2}}, "metadata"),
        ],
    )
    def test_takes_what_is_replaced_inside_the_block(self, audit_operation, recorded, given, inside, field):
        with audit_operation("consolidate", **given) as operation:
            for name, value in inside.items():
                setattr(operation, name, value)
        assert getattr(recorded()[0], field) == inside[field]

    def test_shows_arguments_as_they_were_at_the_start(self, audit_operation, recorded):
        request = {"options": {"top_k": 5}, "ids": ["m-1"]}
        with audit_operation("recall", request=request):
            request["options"]["top_k"] = 99
            request["ids"].append("m-2")
            request["late"] = True
        assert recorded()[0].request == {"options": {"top_k": 5}, "ids": ["m-1"]}

    def test_shows_the_response_as_it_is_at_the_end(self, audit_operation, recorded):
        with audit_operation("recall") as operation:
            operation.response = {"hits": 1}
            operation.response["hits"] = 2
        operation.response["hits"] = 3
        assert recorded()[0].response == {"hits": 2}

    def test_leaves_the_caller_s_own_payloads_alone(self, audit_operation, recorded):
        request, metadata = {"query": TEXT}, {"attempt": 1}
        with audit_operation("recall", request=request, metadata=metadata) as operation:
            operation.metadata["rank"] = 2
        assert (request, metadata) == ({"query": TEXT}, {"attempt": 1})
        assert recorded()[0].metadata == {"attempt": 1, "rank": 2}

    def test_holds_no_text(self, audit_operation, recorded):
        with audit_operation("recall", request={"query": TEXT}, metadata={"note": TEXT}) as operation:
            operation.response = [{"id": "m-1", "text": TEXT}]
        [record] = recorded()
        assert TEXT not in repr(record)
        assert record.request == {"query": {"length": len(TEXT)}}
        assert record.response == {"count": 1, "ids": ["m-1"]}

    def test_holds_the_text_that_its_own_normalizer_keeps(self, audit_operation, recorded):
        with audit_operation("recall", request={"query": "what is due?"}, normalizer=Normalizer(keep=["query"])):
            pass
        assert recorded()[0].request == {"query": "what is due?"}

    @pytest.mark.parametrize(
        ("given", "text"), [(UUID(int=7), str(UUID(int=7))), (7, "7"), (object(), "object"), (True, "bool")]
    )
    def test_has_ids_as_text_whatever_they_are(self, audit_operation, recorded, given, text):
        ids = {"bank_id": given, "transport": given, "actor_id": given, "actor_type": given}
        with audit_operation("recall", **ids):
            pass
        [record] = recorded()
        assert {name: getattr(record, name) for name in ids} == dict.fromkeys(ids, text)

    def test_has_the_bank_s_id_as_the_same_text_from_wherever_it_comes(
        self, audit_operation, provider, recorded, ended_spans
    ):
        audit_here = partial(audited, "recall", tracer_provider=provider)
        audit_here()(lambda bank_id: None)(1)
        audit_here()(lambda bank_id=1: None)()
        audit_here(bank_id=lambda arguments: arguments["bank"])(lambda bank: None)(1)
        list(audit_here()(lambda bank_id: (yield))(1))
        with audit_operation("recall", bank_id=1):
            pass
        with audit_operation("recall") as operation:
            operation.bank_id = 1
        with audit_scope(bank_id=1), audit_operation("recall"):
            pass
        AuditLogger(pool_getter=lambda: None, enabled=True, tracer_provider=provider).log(
            AuditEntry(action="recall", transport="http", bank_id=1)
        )
        assert [record.bank_id for record in recorded()] == ["1"] * 8
        assert [span.attributes["astrocyte.bank_id"] for span in ended_spans()] == ["1"] * 8

    @pytest.mark.parametrize("action", [None, "", 5, ["recall"]])
    def test_without_a_usable_action_says_so(self, audit_operation, recorded, action):
        with audit_operation(action):
            pass
        assert [record.action for record in recorded()] == ["unknown"]

    @pytest.mark.parametrize("metadata", [5, "a note", [1, 2], object()])
    def test_takes_metadata_of_any_type(self, audit_operation, recorded, metadata):
        with audit_operation("recall", metadata=metadata):
            pass
        assert list(recorded()[0].metadata) == ["value"] or recorded()[0].metadata == {"value": {"length": 6}}


class TestTheOutcome:
    @pytest.mark.parametrize(
        ("set_inside", "raised", "outcome", "error_type"),
        [
            ({}, None, "success", None),
            ({}, LookupError, "failure", "LookupError"),
            ({"outcome": "failure"}, None, "failure", None),
            ({"outcome": "failure", "error_type": "rejected"}, None, "failure", "rejected"),
            ({"error_type": "rejected"}, LookupError, "failure", "rejected"),
            ({"error_type": "rejected"}, None, "success", None),
            ({"outcome": "success"}, LookupError, "success", None),
            ({"outcome": "unknown"}, None, "unknown", None),
            ({"outcome": "unknown"}, LookupError, "unknown", None),
            ({"outcome": "failed"}, None, "unknown", None),
            ({"outcome": "SUCCESS"}, None, "unknown", None),
            ({"outcome": True}, None, "unknown", None),
            ({"outcome": ["failure"]}, LookupError, "unknown", None),
            ({"outcome": enum.StrEnum("Result", {"BAD": "failure"}).BAD}, None, "failure", None),
        ],
    )
    async def test_is_what_was_set_or_what_happened(
        self, audit_operation, recorded, run, set_inside, raised, outcome, error_type
    ):
        def block(operation):
            for name, value in set_inside.items():
                setattr(operation, name, value)
            if raised is not None:
                raise raised(TEXT)

        try:
            await run(audit_operation("forget"), block)
        except LookupError:
            assert raised is LookupError
        else:
            assert raised is None
        [record] = recorded()
        assert (record.outcome, record.error_type) == (outcome, error_type)
        assert type(record.outcome) is str
        assert TEXT not in repr(record)

    def test_that_can_t_be_warns_without_quoting_it(self, audit_operation, recorded, caplog):
        with audit_operation("forget") as operation:
            operation.outcome = TEXT
        assert "success, failure or unknown" in caplog.text
        assert TEXT not in caplog.text

    async def test_of_a_cancelled_block_is_failure(self, audit_operation, recorded):
        entered = asyncio.Event()

        async def work():
            async with audit_operation("consolidate"):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(record.outcome, record.error_type) for record in recorded()] == [
            ("failure", "asyncio.exceptions.CancelledError")
        ]

    def test_leaves_the_exception_as_it_was(self, audit_operation, recorded):
        error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt) as caught, audit_operation("forget"):
            raise error
        assert caught.value is error
        assert recorded()[0].error_type == "KeyboardInterrupt"


class TestTheReceipt:
    async def test_is_the_id_of_the_row(self, audit_operation, recorded, run):
        receipts = []
        operation = audit_operation("retain")
        assert operation.record_id is None
        await run(operation, lambda operation: receipts.append(operation.record_id))
        receipts.append(operation.record_id)
        assert receipts == [recorded()[0].id] * 2

    def test_is_there_although_the_trace_is_not_sampled(self, storage):
        provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
        with audit_operation_globally("retain", tracer_provider=provider) as operation:
            receipt = operation.record_id
        provider.shutdown()
        assert [(record.id, record.sampled) for record in storage.records] == [(receipt, False)]

    def test_is_none_where_the_action_is_not_allowed(self, audit, audit_operation, storage):
        audit(storage=storage, actions=["recall"])
        with audit_operation("retain") as operation:
            assert operation.record_id is None

    def test_is_none_where_there_is_no_pipeline(self, audit_operation):
        with audit_operation("retain") as operation:
            assert operation.record_id is None

    def test_is_none_where_there_is_no_provider(self):
        with audit_operation_globally("retain", tracer_provider=NoOpTracerProvider()) as operation:
            assert operation.record_id is None


class TestARequiredOperation:
    def _refused(self, operation: Any) -> str:
        """Enter an operation that has to be refused, and return the error's message."""
        with pytest.raises(AuditUnavailableError) as refused, operation:
            pytest.fail("the body ran")
        return str(refused.value)

    def test_runs_where_a_pipeline_takes_it(self, audit_operation, recorded):
        with audit_operation("forget", required=True):
            pass
        assert [record.outcome for record in recorded()] == ["success"]

    def test_overrides_the_allowlist(self, audit, audit_operation, storage):
        processor = audit(storage=storage, actions=[])
        with audit_operation("forget", required=True) as operation:
            assert operation.record_id is not None
        assert processor.force_flush()
        assert [record.action for record in storage.records] == ["forget"]

    def test_is_refused_without_a_pipeline(self, audit_operation):
        message = self._refused(audit_operation("forget", required=True))
        assert "'forget'" in message
        assert "configure_audit()" in message

    def test_is_refused_without_a_provider(self):
        self._refused(audit_operation_globally("forget", required=True, tracer_provider=NoOpTracerProvider()))

    def test_is_refused_after_the_shutdown(self, audit, audit_operation, storage):
        audit(storage=storage).shutdown()
        self._refused(audit_operation("forget", required=True))

    def test_is_refused_without_a_spool(self, audit, audit_operation, storage):
        processor = audit(storage=storage, spool_dir=False)
        self._refused(audit_operation("forget", required=True))
        with audit_operation("retain"):
            pass
        assert processor.force_flush()

    async def test_is_refused_in_an_async_block_too(self, audit_operation):
        with pytest.raises(AuditUnavailableError):
            async with audit_operation("forget", required=True):
                pytest.fail("the body ran")

    def test_leaves_a_failed_span_behind_and_not_a_current_one(self, audit_operation, ended_spans):
        before = get_current_span()
        self._refused(audit_operation("forget", required=True))
        assert get_current_span() is before
        [span] = ended_spans()
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "astrocyte_otel_audit.errors.AuditUnavailableError"


class TestAnInstanceUsedAgain:
    async def test_is_another_operation(self, audit_operation, recorded, run):
        operation = audit_operation("retain", bank_id="bank-1", request={"top_k": 5})
        receipts = []
        for _ in range(2):
            await run(operation, lambda operation: receipts.append(operation.record_id))
        assert [record.id for record in recorded()] == receipts
        assert len(set(receipts)) == 2
        assert [record.request for record in recorded()] == [{"top_k": 5}] * 2

    def test_does_not_carry_over_what_the_last_block_set(self, audit_operation, recorded):
        operation = audit_operation("retain", bank_id="bank-1", metadata={"attempt": 1})
        with operation:
            operation.response, operation.outcome, operation.error_type = {"stored": 1}, "failure", "rejected"
            operation.bank_id, operation.actor_id = "bank-2", "user-7"
            operation.request = {"top_k": 5}
            operation.metadata["rank"] = 2
        with operation:
            pass
        first, second = recorded()
        assert (first.bank_id, first.response, first.metadata) == ("bank-2", {"stored": 1}, {"attempt": 1, "rank": 2})
        assert (second.bank_id, second.actor_id, second.metadata) == ("bank-1", None, {"attempt": 1})
        assert (second.request, second.response) == (None, None)
        assert (second.outcome, second.error_type) == ("success", None)

    def test_fails_with_the_error_of_its_own_block(self, audit_operation, recorded):
        operation = audit_operation("retain")
        for error in (LookupError, ValueError):
            with pytest.raises(error), operation:
                raise error
        assert [record.error_type for record in recorded()] == ["LookupError", "ValueError"]

    def test_belongs_to_the_scope_of_its_own_block(self, audit_operation, recorded):
        operation = audit_operation("retain")
        for actor in ("user-1", "user-2", None):
            with audit_scope(actor_id=actor), operation:
                pass
        assert [record.actor_id for record in recorded()] == ["user-1", "user-2", None]


class TestTheTracer:
    def test_has_the_sampler_of_its_provider_also_where_the_operation_was_made_or_run_before(self, storage):
        provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
        made = [audit_operation_globally("retain", tracer_provider=provider) for _ in range(2)]
        with made[0]:
            pass
        processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
        for operation in made:
            with operation:
                pass
        assert processor.force_flush()
        assert len(storage.records) == 2
        provider.shutdown()

    def test_may_be_that_of_a_provider_which_cannot_be_remembered(self, provider, recorded):
        class Wrapper:
            __slots__ = ()
            get_tracer = staticmethod(provider.get_tracer)

        with audit_operation_globally("retain", tracer_provider=Wrapper()):
            pass
        assert [record.action for record in recorded()] == ["retain"]


class TestTheSpan:
    async def test_is_named_and_described_as_the_design_says(self, audit_operation, ended_spans, run):
        await run(audit_operation("retain", bank_id="bank-1", request={"a.b": {"top_k": 5}}), lambda operation: None)
        [span] = ended_spans()
        assert (span.name, span.kind) == ("audit retain", SpanKind.INTERNAL)
        assert (span.instrumentation_scope.name, span.instrumentation_scope.version) == (
            "astrocyte_otel_audit",
            __version__,
        )
        assert span.status.status_code is StatusCode.UNSET
        assert dict(span.attributes) == {
            "audit.action": "retain",
            "astrocyte.bank_id": "bank-1",
            "astrocyte.audit.request.a%2Eb.top_k": 5,
            "audit.outcome": "success",
        }

    async def test_of_a_failure_has_a_status_and_no_event(self, audit_operation, ended_spans, run):
        def block(operation):
            raise LookupError(TEXT)

        with pytest.raises(LookupError):
            await run(audit_operation("retain"), block)
        [span] = ended_spans()
        assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
        assert span.attributes["error.type"] == "LookupError"
        assert TEXT not in span.to_json()

    async def test_is_current_in_the_block_and_only_there(self, audit_operation, provider, ended_spans, run):
        def block(operation):
            with provider.get_tracer("application").start_as_current_span("inside"):
                pass

        before = get_current_span()
        await run(audit_operation("retain"), block)
        assert get_current_span() is before
        inside, audit_span = ended_spans()
        assert (inside.name, inside.parent) == ("inside", audit_span.context)

    async def test_is_not_current_after_an_exception(self, audit_operation, run):
        def block(operation):
            raise LookupError

        before = get_current_span()
        with pytest.raises(LookupError):
            await run(audit_operation("retain"), block)
        assert get_current_span() is before

    def test_keeps_what_a_record_needs_when_attributes_overflow(self, storage):
        provider = TracerProvider(span_limits=SpanLimits(max_span_attributes=8), shutdown_on_exit=False)
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
        request = {f"option_{number}": number for number in range(20)}
        with (
            pytest.raises(LookupError),
            audit_operation_globally(
                "retain", bank_id="bank-1", request=request, tracer_provider=provider
            ) as operation,
        ):
            receipt = operation.record_id
            raise LookupError
        provider.shutdown()
        [record] = storage.records
        assert (record.id, record.action, record.bank_id) == (receipt, "retain", "bank-1")
        assert (record.outcome, record.error_type) == ("failure", "LookupError")
        assert record.metadata["dropped_attributes"] > 0


class _Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(TEXT)

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError(TEXT)

    def __str__(self) -> str:
        raise RuntimeError(TEXT)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(TEXT)

    def __bool__(self) -> bool:
        raise RuntimeError(TEXT)

    __repr__ = __str__
    __hash__ = None  # type: ignore[assignment]


class TestNothingDisturbsTheBlock:
    @pytest.mark.parametrize(
        "name",
        ["request", "response", "metadata", "outcome", "error_type", "bank_id", "transport", "actor_id", "actor_type"],
    )
    def test_not_even_a_hostile_value(self, audit_operation, recorded, name):
        ran = False
        with audit_operation("retain") as operation:
            setattr(operation, name, _Hostile())
            ran = True
        assert ran
        [record] = recorded()
        assert (record.action, record.outcome) == ("retain", "unknown" if name == "outcome" else "success")

    def test_not_even_hostile_arguments(self, audit_operation, recorded):
        hostile = _Hostile()
        with audit_operation("retain", bank_id=hostile, transport=hostile, request=hostile, metadata=hostile):
            pass
        [record] = recorded()
        assert (record.action, record.outcome, record.bank_id) == ("retain", "success", "_Hostile")

    def test_not_even_a_normalizer_that_raises(self, audit_operation, recorded, caplog):
        class Broken(Normalizer):
            def attributes(self, payload, prefix="", action=""):
                raise RuntimeError(TEXT)

        with pytest.raises(LookupError), audit_operation("retain", bank_id="bank-1", normalizer=Broken()) as operation:
            raise LookupError
        assert operation.record_id is not None
        with audit_operation("recall", request=TEXT, metadata={"a": 1}, normalizer=Broken()) as operation:
            operation.response = {"hits": 3}
        failed, whole = recorded()
        assert (failed.bank_id, failed.outcome, failed.error_type) == ("bank-1", "failure", "LookupError")
        assert (whole.action, whole.outcome) == ("recall", "success")
        assert [whole.request, whole.response, whole.metadata] == [{"[unreadable]": "RuntimeError"}] * 3
        assert "'recall' could not be normalized (RuntimeError)" in caplog.text
        assert TEXT not in caplog.text

    def test_not_even_a_normalizer_that_gives_something_else(self, audit_operation, recorded):
        class Nested(Normalizer):
            def attributes(self, payload, prefix="", action=""):
                return None

        with audit_operation("retain", request={"top_k": 5}, normalizer=Nested()):
            pass
        assert [(record.outcome, record.request) for record in recorded()] == [
            ("success", {"[unreadable]": "TypeError"})
        ]

    @pytest.mark.parametrize("wrong", ["provider", 5, object()])
    def test_not_even_a_provider_that_is_none(self, caplog, wrong):
        with audit_operation_globally("retain", tracer_provider=wrong) as operation:
            operation.response = {"hits": 3}
        assert "could not start (AttributeError)" in caplog.text
