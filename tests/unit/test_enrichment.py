"""`enrich_astrocyte` on real brains: what a call gives to its caller, and what to the log."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from astrocyte import Astrocyte
from astrocyte.errors import ConfigError
from astrocyte.policy import observability
from astrocyte.testing.in_memory import InMemoryEngineProvider, InMemoryVectorStore, InMemoryWikiStore
from astrocyte.types import ActorIdentity, AstrocyteContext, RetainResult, SyncPushRecord
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from astrocyte_otel_audit import AuditRecord, ConfigurationError, audit_scope, audited, enrich_astrocyte
from astrocyte_otel_audit.attributes import SCOPE_NAME
from astrocyte_otel_audit.emit import operation

TEXT = "Calvin likes dark roast coffee"
CALVIN = AstrocyteContext(principal="user:calvin", tenant_id="acme")
CONFIG: dict[str, Any] = {"llm_provider": "mock", "vector_store": "in_memory", "document_store": "in_memory"}


@pytest.fixture
def emitted(provider: TracerProvider, monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """The provider that Astrocyte's own spans and ours go to, as the global one in an application."""
    monkeypatch.setattr(observability, "_tracer", provider.get_tracer("astrocyte"))
    monkeypatch.setattr(operation, "_tracer", provider.get_tracer(SCOPE_NAME))
    return provider


@pytest.fixture
def recorded(audit, storage, provider, request) -> Callable[[], list[AuditRecord]]:
    """Everything is audited, Astrocyte's own spans too; the function returns all records so far."""
    processor = audit(storage=storage, mappings=["astrocyte"])
    request.getfixturevalue("emitted")  # a tracer keeps the sampler that it was made with

    def records() -> list[AuditRecord]:
        assert processor.force_flush()
        return storage.records

    return records


@pytest.fixture
def brain() -> Astrocyte:
    return Astrocyte.from_config_dict(CONFIG)


class TestABrain:
    async def test_has_the_methods_that_it_had(self, brain):
        before = {name: inspect.signature(getattr(brain, name)) for name in ("retain", "recall", "reflect", "forget")}
        enrich_astrocyte(brain)
        for name, signature in before.items():
            method = getattr(brain, name)
            assert inspect.iscoroutinefunction(method)
            assert inspect.signature(method) == signature
            assert (method.__name__, method.__doc__) == (name, getattr(Astrocyte, name).__doc__)

    async def test_gives_its_own_results_and_raises_its_own_errors(self, brain, recorded):
        result = RetainResult(stored=True, memory_id="m-1")

        async def retain(content, bank_id):
            return result

        brain.retain = retain
        enrich_astrocyte(brain)
        assert await brain.retain(TEXT, "bank-1") is result
        with pytest.raises(ConfigError, match="Either bank_id or banks"):
            await brain.recall(TEXT)
        with pytest.raises(TypeError, match="bank_id"):
            await brain.forget()
        outcomes = [(row.action, row.bank_id, row.outcome, row.error_type) for row in recorded()]
        assert outcomes == [
            ("retain", "bank-1", "success", None),
            ("recall", None, "failure", "astrocyte.errors.ConfigError"),
            ("forget", None, "failure", "TypeError"),
        ]

    async def test_is_enriched_once(self, brain, recorded):
        undo = enrich_astrocyte(brain)
        enriched = brain.retain
        assert enrich_astrocyte(brain) == undo
        assert brain.retain is enriched
        await brain.retain(TEXT, "bank-1")
        assert len(recorded()) == 1

    async def test_is_enriched_once_under_a_wrapper_of_others(self, brain):
        undo = enrich_astrocyte(brain)
        brain.retain = theirs = functools.wraps(brain.retain)(functools.partial(brain.retain))
        assert enrich_astrocyte(brain) == undo
        assert brain.retain is theirs

    async def test_has_its_methods_back_once_that_is_undone(self, brain, recorded):
        undo = enrich_astrocyte(brain)
        undo()
        undo()
        assert {"retain", "recall", "reflect", "forget", "compile", "push_records"}.isdisjoint(vars(brain))
        await brain.retain(TEXT, "bank-1", context=CALVIN)
        [row] = recorded()  # of Astrocyte's own span, which says neither
        assert (row.actor_id, row.response) == (None, None)

    async def test_has_back_what_somebody_else_had_put_there(self, brain):
        brain.retain = theirs = functools.wraps(brain.retain)(functools.partial(brain.retain))
        enrich_astrocyte(brain)()
        assert brain.retain is theirs

    async def test_leaves_a_wrapper_of_others_where_it_is_and_does_nothing_below_it(self, brain, recorded):
        undo = enrich_astrocyte(brain)
        below, calls = brain.retain, []

        async def theirs(*args, **kwargs):
            calls.append(args)
            return await below(*args, **kwargs)

        brain.retain = theirs
        undo()
        assert brain.retain is theirs
        assert (await brain.retain(TEXT, "bank-1", context=CALVIN)).stored
        assert len(calls) == 1
        assert [row.response for row in recorded()] == [None]

    async def test_can_be_enriched_again(self, brain, recorded):
        for _ in range(3):
            undo = enrich_astrocyte(brain)
            undo()
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1")
        assert [row.response["stored"] for row in recorded()] == [True]
        assert len(brain._hook_manager._hooks["on_retain"]) == 1, "Astrocyte can't take hooks away"

    async def test_is_not_another_brain(self, brain, recorded):
        other = Astrocyte.from_config_dict(CONFIG)
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1")
        await other.retain(TEXT, "bank-2")
        assert [(row.bank_id, row.response is None) for row in recorded()] == [("bank-1", False), ("bank-2", True)]

    def test_is_what_is_accepted(self):
        class NotAsync:
            def recall(self, query):
                """Look nothing up."""

        for wrong in (NotAsync(), object(), None, "brain"):
            with pytest.raises(ConfigurationError, match="brain: got a"):
                enrich_astrocyte(wrong)


class TestAnAnswer:
    async def test_is_in_the_row_as_counts_and_ids(self, brain, recorded):
        enrich_astrocyte(brain)
        kept = await brain.retain(TEXT, "bank-1", tags=["drinks"], context=CALVIN)
        found = await brain.recall("coffee", "bank-1", max_results=3, context=CALVIN)
        told = await brain.reflect("coffee?", "bank-1", context=CALVIN)
        await brain.forget("bank-1", memory_ids=[kept.memory_id], reason="Calvin asked for it", context=CALVIN)
        retain, recall, reflect, forget = recorded()
        ids = {"count": 1, "ids": [kept.memory_id]}

        assert [hit.memory_id for hit in found.hits] == [kept.memory_id]
        assert retain.request == {"content": {"length": len(TEXT)}, "content_type": "text", "tag_count": 1}
        assert retain.response == {"stored": True, "deduplicated": False, "memory_id": kept.memory_id}
        assert recall.request == {"query": {"length": 6}, "max_results": 3}
        assert recall.response == {"hits": ids, "total_available": 1, "truncated": False}
        assert recall.metadata == {"tenant_id": "acme", "bank_count": 1}
        assert reflect.request == {"query": {"length": 7}}
        assert reflect.response == {"answer": {"length": len(told.answer)}, "sources": ids}
        assert forget.request == {
            "memory_ids": [kept.memory_id], "compliance": False, "reason": {"length": len("Calvin asked for it")},
        }  # fmt: skip
        assert forget.response == {"deleted_count": 1, "archived_count": 0}
        assert [text for text in ("Calvin", "coffee", "drinks") if text in str(recorded())] == []

    async def test_of_many_hits_is_their_number_and_the_first_ids(self, brain, recorded):
        enrich_astrocyte(brain)
        for number in range(20):
            await brain.push_records("bank-1", [SyncPushRecord(id=f"memory-{number}", text=f"{number} {TEXT}" * 9)])
        hits = (await brain.recall("coffee", "bank-1", max_results=20)).hits
        row = recorded()[-1]
        assert len(hits) == row.response["hits"]["count"] > 16
        assert row.response["hits"]["ids"] == [hit.memory_id for hit in hits[:16]]

    async def test_from_several_banks_says_from_which(self, brain, recorded):
        for bank in ("bank-1", "bank-2"):
            await brain.retain(f"{bank}: {TEXT}", bank)
        enrich_astrocyte(brain)
        hits = (await brain.recall("coffee", banks=["bank-1", "bank-2"])).hits
        await brain.reflect("coffee", banks=["bank-1", "bank-2"])
        await brain.recall("coffee", "bank-1", banks=["bank-2"])
        recall, reflect, narrow = recorded()[2:]
        assert len(hits) == 2
        for row in (recall, reflect):
            assert (row.bank_id, row.metadata["bank_count"]) == ("bank-1+1", 2)
            assert row.request["banks"] == ["bank-1", "bank-2"]
        assert recall.response["hits"]["count"] == reflect.response["sources"]["count"] == 2
        assert narrow.bank_id == "bank-2", "as Astrocyte decides it"

    async def test_of_a_push_and_of_a_compilation_is_in_the_row(self, brain, recorded):
        enrich_astrocyte(brain)
        brain.set_wiki_store(InMemoryWikiStore())
        pushed = [SyncPushRecord(id="memory-1", text=TEXT, tags=["drinks"]), SyncPushRecord(id="memory-2", text="")]
        await brain.push_records("bank-1", pushed, context=CALVIN)
        await brain.push_records("bank-1", pushed[1:], context=CALVIN)
        await brain.compile("bank-1", scope="drinks", context=CALVIN)
        push, refused, compiled = recorded()
        assert (push.action, push.bank_id, push.outcome) == ("sync_push", "bank-1", "success")
        assert push.request == {"records": {"count": 2, "ids": ["memory-1", "memory-2"]}}
        assert push.response == {"stored_count": 1, "rejected_count": 1, "memory_ids": ["memory-1"]}
        assert (refused.outcome, refused.error_type) == ("failure", "rejected")
        assert (compiled.action, compiled.response["pages_created"]) == ("compile", 1)
        assert {row.actor_id for row in recorded()} == {"user:calvin"}
        assert "drinks" not in str(recorded())

    async def test_says_what_only_an_event_says(self, recorded, tmp_path):
        rules = tmp_path / "mip.yaml"
        rules.write_text(
            "rules: [{name: to-team, match: {content_type: conversation}, action: {bank: team}}]", encoding="utf-8"
        )
        brain = Astrocyte.from_config_dict({**CONFIG, "mip_config_path": str(rules)})
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1", content_type="conversation")
        await brain.retain(f"{TEXT}: calvin@example.com", "bank-1")
        routed, personal = recorded()
        assert (routed.bank_id, routed.metadata) == ("bank-1", {"routed_to": "team"})
        assert personal.metadata == {"pii_types": ["email"], "pii_action": "redact"}


class FailingVectorStore(InMemoryVectorStore):
    """A vector store that is away."""

    async def store_vectors(self, items: Any) -> Any:
        raise ConnectionError(f"no answer for {TEXT}")


class RefusingEngine(InMemoryEngineProvider):
    """An engine that has words of its own for what it does not store."""

    async def retain(self, request: Any) -> RetainResult:
        return RetainResult(stored=False, error=f"not today: {request.content}")


class TestARefusedRetain:
    @pytest.mark.parametrize(
        ("config", "arguments", "token"),
        [
            ({}, {"content": " "}, "empty_content"),
            ({"barriers": {"validation": {"max_content_length": 9}}}, {}, "content_too_long"),
            ({"homeostasis": {"retain_max_content_bytes": 9}}, {}, "content_too_long"),
            ({}, {"content_type": "Calvin's diary"}, "content_type"),
            ({}, {"tags": ["drinks"] * 101}, "too_many_tags"),
        ],
    )
    async def test_says_why_in_a_word(self, recorded, config, arguments, token):
        brain = Astrocyte.from_config_dict({**CONFIG, **config})
        enrich_astrocyte(brain)
        assert not (await brain.retain(**{"content": TEXT, "bank_id": "bank-1", **arguments})).stored
        [row] = recorded()
        assert (row.outcome, row.error_type) == ("failure", token)
        assert row.response == {"stored": False, "deduplicated": False}
        assert "Calvin" not in str(row)

    async def test_by_a_rule_says_so(self, recorded, tmp_path):
        rules = tmp_path / "mip.yaml"
        rules.write_text(
            "rules: [{name: none, match: {content_type: document}, action: {retain_policy: reject}}]", encoding="utf-8"
        )
        brain = Astrocyte.from_config_dict({**CONFIG, "mip_config_path": str(rules)})
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1", content_type="document")
        assert [row.error_type for row in recorded()] == ["routing_rule"]

    async def test_by_a_noisy_bank_says_so(self, recorded):
        noisy = {"noisy_bank": {"action": "reject", "min_avg_content_length": 1000}}
        brain = Astrocyte.from_config_dict({**CONFIG, "signal_quality": noisy})
        enrich_astrocyte(brain)
        for _ in range(100):
            result = await brain.retain(TEXT, "bank-1")
            if not (result.stored or result.deduplicated):
                break
        assert [row.error_type for row in recorded() if row.outcome == "failure"] == ["noisy_bank"]

    async def test_by_an_absent_store_says_so(self, recorded):
        breaker = {"failure_threshold": 1, "recovery_timeout_seconds": 3600}
        brain = Astrocyte.from_config_dict(
            {**CONFIG, "vector_store": f"{__name__}:FailingVectorStore", "escalation": {"circuit_breaker": breaker}}
        )
        enrich_astrocyte(brain)
        with pytest.raises(ConnectionError):
            await brain.retain(TEXT, "bank-1")
        assert not (await brain.retain(TEXT, "bank-1")).stored
        assert [row.error_type for row in recorded()] == ["ConnectionError", "provider_unavailable"]

    async def test_for_a_reason_that_nobody_knows_is_rejected(self, recorded):
        brain = Astrocyte.from_config_dict({"provider_tier": "engine"})
        brain.set_engine_provider(RefusingEngine())
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1")
        [row] = recorded()
        assert (row.outcome, row.error_type) == ("failure", "rejected")
        assert "Calvin" not in str(row)

    async def test_that_is_there_already_is_no_failure(self, brain, recorded):
        enrich_astrocyte(brain)
        for _ in range(2):
            result = await brain.retain(TEXT, "bank-1")
        assert result.deduplicated
        row = recorded()[-1]
        assert (row.outcome, row.error_type) == ("success", None)
        assert row.response == {"stored": False, "deduplicated": True}


class TestTheCaller:
    @pytest.mark.parametrize(
        ("context", "actor"),
        [
            (AstrocyteContext(principal="user:calvin"), ("user:calvin", "user")),
            (AstrocyteContext(principal="service:billing"), ("service:billing", "service")),
            (AstrocyteContext(principal="agent:assistant"), ("agent:assistant", "service")),
            (AstrocyteContext(principal="team:api"), ("team:api", None)),
            (AstrocyteContext(principal="calvin"), ("calvin", None)),
            (AstrocyteContext(principal="user"), ("user", None)),
            (
                AstrocyteContext("user:eve", actor=ActorIdentity(type="agent", id="assistant")),
                ("agent:assistant", "service"),
            ),
            (AstrocyteContext(principal=""), ("gateway", "system")),
            (None, ("gateway", "system")),
        ],
    )
    async def test_is_the_actor(self, brain, recorded, context, actor):
        enrich_astrocyte(brain)
        with audit_scope(actor_id="gateway", actor_type="system", transport="http", bank_id="bank-of-another"):
            await brain.recall("coffee", "bank-1", context=context)
        [row] = recorded()
        assert (row.actor_id, row.actor_type) == actor
        assert (row.transport, row.bank_id) == ("http", "bank-1")

    @pytest.mark.parametrize("known_as", [("calvin", "user"), ("assistant", "service")])
    async def test_keeps_the_name_that_authentication_gave(self, brain, recorded, known_as):
        principal = "user:calvin" if known_as[1] == "user" else "agent:assistant"
        enrich_astrocyte(brain)

        @audited("recall")
        async def recall(query, bank_id):
            return await brain.recall(query, bank_id, context=AstrocyteContext(principal=principal))

        with audit_scope(actor_id=known_as[0], actor_type=known_as[1]):
            await recall("coffee", "bank-1")
        [row] = recorded()  # another name would be another actor, and a row of its own
        assert (row.actor_id, row.actor_type) == known_as

    async def test_acts_for_somebody_in_a_tenant(self, brain, recorded):
        enrich_astrocyte(brain)
        calvin = ActorIdentity(type="user", id="calvin")
        context = AstrocyteContext(principal="agent:assistant", on_behalf_of=calvin, tenant_id="acme")
        await brain.recall("coffee", "bank-1", context=context)
        [row] = recorded()
        assert row.actor_id == "agent:assistant"
        assert row.metadata == {"tenant_id": "acme", "on_behalf_of": "user:calvin", "bank_count": 1}

    async def test_is_that_of_one_call_alone(self, brain, recorded):
        enrich_astrocyte(brain)
        with pytest.raises(ConfigError):
            await brain.recall("coffee", context=CALVIN)
        await brain.recall("coffee", "bank-1", context=CALVIN)
        await brain.recall("coffee", "bank-1")
        assert [row.actor_id for row in recorded()] == ["user:calvin", "user:calvin", None]

    async def test_may_leave_the_banks_to_astrocyte(self, recorded):
        brain = Astrocyte.from_config_dict(
            {
                **CONFIG,
                "identity": {"auto_resolve_banks": True},
                "access_control": {"enabled": True, "default_policy": "deny"},
                "access_grants": [
                    {"bank_id": bank, "principal": "user:calvin", "permissions": ["read"]} for bank in ("b-1", "b-2")
                ],
            }
        )
        enrich_astrocyte(brain)
        with audit_scope(bank_id="bank-of-another"):
            await brain.recall("coffee", context=CALVIN)
        assert [(row.bank_id, row.actor_id) for row in recorded()] == [("b-1+1", "user:calvin")]


class TestConcurrency:
    async def test_leaves_to_each_call_its_own(self, brain, recorded):
        names = [f"user-{number}" for number in range(4)]
        for name in names:
            await brain.retain(f"{name}: {TEXT}", name)
        enrich_astrocyte(brain)
        all_inside = asyncio.Barrier(len(names))
        brain.register_hook("on_recall", lambda event: all_inside.wait())

        async def ask(name):
            return await brain.recall("coffee", name, context=AstrocyteContext(f"user:{name}", tenant_id=name))

        results = await asyncio.gather(*map(ask, names))
        rows = {row.bank_id: row for row in recorded()[len(names) :]}
        assert len(rows) == len(names)
        for name, result in zip(names, results, strict=True):
            assert (rows[name].actor_id, rows[name].metadata["tenant_id"]) == (f"user:{name}", name)
            assert rows[name].response["hits"]["ids"] == [hit.memory_id for hit in result.hits]

    async def test_says_of_a_cancelled_call_that_it_failed(self, brain, recorded):
        enrich_astrocyte(brain)
        entered = asyncio.Event()

        async def wait(event):
            entered.set()
            await asyncio.Event().wait()

        brain.register_hook("on_recall", wait)
        task = asyncio.create_task(brain.recall("coffee", "bank-1", context=CALVIN))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [row] = recorded()
        assert (row.outcome, row.error_type) == ("failure", "asyncio.exceptions.CancelledError")


class TestSpansOfOthers:
    async def test_get_nothing(self, brain, emitted):
        exporter = InMemorySpanExporter()
        emitted.add_span_processor(SimpleSpanProcessor(exporter))
        enrich_astrocyte(brain)
        with emitted.get_tracer("application").start_as_current_span("request"):
            await brain.retain("", "bank-1", context=CALVIN)
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert spans["request"].attributes == {}
        assert spans["astrocyte.retain"].attributes == {"astrocyte.bank_id": "bank-1"}
        assert spans["astrocyte.retain"].parent == spans["audit retain"].context
        assert spans["audit retain"].attributes["audit.actor.id"] == "user:calvin"

    async def test_of_another_action_around_a_call_keep_a_row_of_their_own(self, brain, recorded):
        enrich_astrocyte(brain)

        @audited("answer", bank_id="answered", response=False)
        async def answer(query):
            await brain.recall(query, "bank-1", context=CALVIN)
            await brain.recall(query, "bank-2", context=CALVIN)

        await answer("coffee")
        *recalls, outer = recorded()
        assert (outer.action, outer.actor_id, outer.response, outer.metadata) == ("answer", None, None, {})
        assert [(row.bank_id, row.parent_span_id) for row in recalls] == [
            ("bank-1", outer.span_id), ("bank-2", outer.span_id),
        ]  # fmt: skip

    async def test_of_the_same_operation_are_one_row_with_it(self, brain, recorded):
        enrich_astrocyte(brain)

        @audited("recall", response=lambda result: {"memories": len(result.hits)})
        async def recall(query, bank_id):
            return await brain.recall(query, bank_id, context=CALVIN)

        await recall("coffee", "bank-1")
        [row] = recorded()
        assert row.parent_span_id is None
        assert (row.actor_id, row.actor_type) == ("user:calvin", "user")
        assert row.response == {"memories": 0, "hits": {"count": 0}, "total_available": 0, "truncated": False}

    async def test_without_the_preset_are_not_needed(self, brain, audit, storage, request):
        processor = audit(storage=storage)
        request.getfixturevalue("emitted")
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1", context=CALVIN)
        assert processor.force_flush()
        assert [(row.action, row.actor_id) for row in storage.records] == [("retain", "user:calvin")]


class Hostile:
    """Breaks whoever reads it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(TEXT)


class TestWhatCanNotBeRead:
    async def test_of_a_call_is_left_out_and_the_call_goes_on(self, brain, recorded, caplog):
        enrich_astrocyte(brain)
        assert (await brain.recall("coffee", "bank-1", context=Hostile())).hits == []
        [row] = recorded()
        assert (row.bank_id, row.outcome, row.request) == ("bank-1", "success", None)
        assert "The call of 'recall' can't be read (RuntimeError)" in caplog.text
        assert TEXT not in caplog.text

    async def test_of_an_answer_is_left_out_and_the_answer_given(self, brain, recorded, caplog):
        answer = Hostile()

        async def recall(query, bank_id):
            return answer

        brain.recall = recall
        enrich_astrocyte(brain)
        assert await brain.recall("coffee", "bank-1") is answer
        [row] = recorded()
        assert (row.outcome, row.request, row.response) == ("success", {"query": {"length": 6}}, None)
        assert "The answer of 'recall' can't be read (RuntimeError)" in caplog.text
        assert TEXT not in caplog.text

    async def test_of_an_event_is_left_out_and_the_call_goes_on(self, brain, recorded, caplog):
        async def retain(content, bank_id):
            await brain._hook_manager.fire("on_pii_detected", bank_id=bank_id, data=None)
            return RetainResult(stored=True)

        brain.retain = retain
        enrich_astrocyte(brain)
        await brain.retain(TEXT, "bank-1")
        [row] = recorded()
        assert (row.response["stored"], row.metadata) == (True, {})
        assert "The event of 'retain' can't be read (TypeError)" in caplog.text

    async def test_is_a_bank_that_is_none(self, brain, recorded):
        enrich_astrocyte(brain)
        for wrong in (TEXT, "", 7, ["bank-1"]):
            with pytest.raises((ConfigError, TypeError)):
                await brain.recall("coffee", wrong)
        with pytest.raises(ConfigError):
            await brain.recall("coffee", banks=["bank-1", TEXT])
        assert {row.bank_id for row in recorded()} == {None}
        assert TEXT not in str(recorded())


async def test_where_nothing_is_set_up_a_brain_is_what_it_was(brain):
    enrich_astrocyte(brain)
    stored = await brain.retain(TEXT, "bank-1", context=CALVIN)
    assert [hit.memory_id for hit in (await brain.recall("coffee", "bank-1")).hits] == [stored.memory_id]
