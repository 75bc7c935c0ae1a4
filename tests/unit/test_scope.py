"""`audit_scope`: who acts, from where and for which tenant, said once for everything inside."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import TracerProvider

from astrocyte_otel_audit import AuditRecord, SpanMapping, audit_scope, audited
from astrocyte_otel_audit import audit_operation as audit_operation_globally

#: Every value of a scope, with the field of a record that it becomes.
FIELDS = ["actor_id", "actor_type", "transport", "bank_id", "schema"]
FULL = {
    "actor_id": "user-7",
    "actor_type": "user",
    "transport": "http",
    "bank_id": "bank-1",
    "schema": "tenant_a",
}
#: What a record says where nobody has said anything.
NOTHING = {"actor_id": None, "actor_type": None, "transport": "unknown", "bank_id": None, "schema": None}


@pytest.fixture
def audit_operation(provider: TracerProvider) -> Callable[..., Any]:
    return partial(audit_operation_globally, tracer_provider=provider)


@pytest.fixture
def recorded(audit, storage) -> Callable[[], list[AuditRecord]]:
    """Everything is audited, also what a memory engine's own spans say; the function returns all records so far."""
    processor = audit(storage=storage, mappings=[SpanMapping(span_name="engine.{action}", scope="engine")])

    def records() -> list[AuditRecord]:
        assert processor.force_flush()
        return storage.records

    return records


def said(record: AuditRecord) -> dict[str, str | None]:
    return {field: getattr(record, field) for field in FIELDS}


class TestAScope:
    def test_gives_all_that_it_says_to_an_operation_inside(self, audit_operation, recorded):
        with audit_scope(**FULL), audit_operation("recall"):
            pass
        assert [said(record) for record in recorded()] == [FULL]

    @pytest.mark.parametrize("field", FIELDS)
    def test_gives_no_more_than_it_says(self, audit_operation, recorded, field):
        with audit_scope(**{field: FULL[field]}), audit_operation("recall"):
            pass
        assert [said(record) for record in recorded()] == [{**NOTHING, field: FULL[field]}]

    async def test_may_be_async(self, audit_operation, recorded):
        async with audit_scope(**FULL):
            await asyncio.sleep(0)
            async with audit_operation("recall"):
                pass
        with audit_operation("recall"):
            pass
        assert [said(record) for record in recorded()] == [FULL, NOTHING]

    def test_gives_itself(self):
        scope = audit_scope()
        with scope as entered:
            assert entered is scope

    def test_reaches_decorated_functions(self, provider, recorded):
        @audited("recall", tracer_provider=provider)
        def recall():
            return None

        with audit_scope(**FULL):
            recall()
        assert [said(record) for record in recorded()] == [FULL]

    def test_ends_with_its_block_also_by_an_exception(self, audit_operation, recorded):
        with pytest.raises(LookupError), audit_scope(**FULL):
            raise LookupError
        with audit_operation("recall"):
            pass
        assert [said(record) for record in recorded()] == [NOTHING]

    def test_counts_where_an_operation_starts_and_for_all_that_its_body_does(self, audit_operation, provider, recorded):
        @audited("recall", tracer_provider=provider)
        def recall():
            yield
            with audit_operation("rank"):
                pass

        iterator = recall()
        with audit_scope(**FULL):
            next(iterator)
        assert list(iterator) == []
        assert [(record.action, said(record)) for record in recorded()] == [("rank", FULL), ("recall", FULL)]

    @pytest.mark.parametrize(
        ("given", "text"),
        [(UUID(int=7), str(UUID(int=7))), (7, "7"), (object(), "object")],
        ids=["uuid", "int", "object"],
    )
    @pytest.mark.parametrize("field", ["actor_id", "actor_type", "transport", "bank_id"])
    def test_reads_ids_as_text_whatever_they_are(self, audit_operation, provider, recorded, field, given, text):
        with audit_scope(**{field: given}):
            with audit_operation("recall"):
                pass
            with provider.get_tracer("engine").start_as_current_span("engine.retain"):
                pass
        assert [said(record) for record in recorded()] == [{**NOTHING, field: text}] * 2

    def test_takes_its_values_by_name_only(self):
        with pytest.raises(TypeError):
            audit_scope("user-7")


class TestPrecedence:
    @pytest.mark.parametrize("field", ["actor_id", "actor_type", "transport", "bank_id"])
    def test_an_operation_s_own_value_wins_and_the_others_stay(self, audit_operation, recorded, field):
        with audit_scope(**FULL), audit_operation("recall", **{field: "own"}):
            pass
        assert [said(record) for record in recorded()] == [{**FULL, field: "own"}]

    @pytest.mark.parametrize("field", FIELDS)
    def test_an_inner_scope_s_value_wins_and_the_others_stay(self, audit_operation, recorded, field):
        with audit_scope(**FULL):
            with audit_scope(**{field: "inner"}), audit_operation("recall"):
                pass
            with audit_operation("recall"):
                pass
        assert [said(record) for record in recorded()] == [{**FULL, field: "inner"}, FULL]

    def test_none_in_an_inner_scope_says_nothing(self, audit_operation, recorded):
        with audit_scope(**FULL), audit_scope(**dict.fromkeys(FIELDS)), audit_operation("recall"):
            pass
        assert [said(record) for record in recorded()] == [FULL]


class TestAnInstance:
    def test_may_be_used_again(self, audit_operation, recorded):
        scope = audit_scope(**FULL)
        for _ in range(2):
            with scope, audit_operation("recall"):
                pass
            with audit_operation("recall"):
                pass
        assert [said(record) for record in recorded()] == [FULL, NOTHING] * 2

    def test_may_be_used_inside_itself(self, audit_operation, recorded):
        scope = audit_scope(actor_id="user-7")
        with scope:
            with audit_scope(actor_id="user-8"), scope, audit_operation("recall"):
                pass
            with audit_operation("recall"):
                pass
        with audit_operation("recall"):
            pass
        assert [record.actor_id for record in recorded()] == ["user-7", "user-7", None]


class TestTasksAndThreads:
    async def test_a_task_started_inside_inherits(self, audit_operation, recorded):
        async def work():
            with audit_operation("recall"):
                await asyncio.sleep(0)

        with audit_scope(**FULL):
            task = asyncio.create_task(work())
        await task
        assert [said(record) for record in recorded()] == [FULL]

    async def test_a_task_s_own_scope_stays_in_it(self, audit_operation, recorded):
        async def work(actor_id):
            with audit_scope(actor_id=actor_id):
                await asyncio.sleep(0)
                with audit_operation(actor_id):
                    await asyncio.sleep(0)

        with audit_scope(actor_id="user-0"):
            await asyncio.gather(work("user-1"), work("user-2"))
            with audit_operation("user-0"):
                pass
        assert sorted((record.action, record.actor_id) for record in recorded()) == [
            ("user-0", "user-0"),
            ("user-1", "user-1"),
            ("user-2", "user-2"),
        ]

    async def test_a_function_sent_to_a_thread_by_asyncio_inherits(self, audit_operation, recorded):
        def work():
            with audit_operation("recall"):
                pass

        with audit_scope(**FULL):
            await asyncio.to_thread(work)
        assert [said(record) for record in recorded()] == [FULL]

    def test_a_thread_inherits_with_a_copied_context_and_not_without(self, audit_operation, recorded):
        def work(action):
            with audit_operation(action):
                pass

        with ThreadPoolExecutor(1) as threads, audit_scope(**FULL):
            threads.submit(contextvars.copy_context().run, work, "with").result()
            threads.submit(work, "without").result()
        assert {record.action: said(record) for record in recorded()} == {"with": FULL, "without": NOTHING}


class TestSpansOfOtherLibraries:
    def test_take_what_they_leave_empty(self, provider, recorded):
        with audit_scope(**FULL), provider.get_tracer("engine").start_as_current_span("engine.recall"):
            pass
        assert [(record.action, said(record)) for record in recorded()] == [("recall", FULL)]

    def test_keep_the_bank_that_they_name(self, provider, recorded):
        with (
            audit_scope(**FULL),
            provider.get_tracer("engine").start_as_current_span(
                "engine.recall", attributes={"astrocyte.bank_id": "bank-of-engine"}
            ),
        ):
            pass
        assert [said(record) for record in recorded()] == [{**FULL, "bank_id": "bank-of-engine"}]

    def test_take_nothing_from_a_scope_that_began_after_them(self, provider, recorded):
        with provider.get_tracer("engine").start_as_current_span("engine.recall"), audit_scope(**FULL):
            pass
        assert [said(record) for record in recorded()] == [NOTHING]
