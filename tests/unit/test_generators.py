"""`@audited` on generators: the operation is the iteration, and its span is current in the body and nowhere else."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer, get_current_span

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit import audited as audited_globally


@pytest.fixture
def audited(provider: TracerProvider) -> Callable[..., Any]:
    return partial(audited_globally, tracer_provider=provider)


@pytest.fixture
def recorded(audit, storage) -> Callable[[], list[AuditRecord]]:
    """Everything is audited; the function returns all records so far."""
    processor = audit(storage=storage)

    def records() -> list[AuditRecord]:
        assert processor.force_flush()
        return storage.records

    return records


@pytest.fixture
def tracer(provider: TracerProvider) -> Tracer:
    """The application's own tracer."""
    return provider.get_tracer("application")


@pytest.fixture
def parents(provider: TracerProvider) -> Callable[[], dict[str, str | None]]:
    """The names of all ended spans, each with the name of its parent."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def ended() -> dict[str, str | None]:
        spans = exporter.get_finished_spans()
        names = {span.context.span_id: span.name for span in spans}
        return {span.name: names[span.parent.span_id] if span.parent else None for span in spans}

    return ended


@pytest.fixture(autouse=True)
def _context_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test of this file may leak a span into its consumer, or detach what it did not attach."""
    before = get_current_span()
    yield
    assert get_current_span() is before
    assert "Failed to detach context" not in caplog.text


def summary(record: AuditRecord) -> tuple[Any, ...]:
    return record.outcome, record.error_type, record.response


def counted(count: int) -> dict[str, Any]:
    return {"item_count": count}


def left_after(count: int) -> dict[str, Any]:
    return {"item_count": count, "closed_early": True}


@audited_globally("recall")
def _of_the_module():
    yield


class TestAGenerator:
    def test_is_one_record_with_the_number_of_its_items(self, audited, recorded):
        @audited("recall")
        def recall(bank_id, top_k):
            yield from range(top_k)

        assert list(recall("bank-1", 3)) == [0, 1, 2]
        [record] = recorded()
        assert (record.action, record.bank_id, record.request) == ("recall", "bank-1", {"top_k": 3})
        assert summary(record) == ("success", None, counted(3))

    def test_may_be_empty(self, audited, recorded):
        assert list(audited("recall")(lambda: (yield from ()))()) == []
        assert [summary(record) for record in recorded()] == [("success", None, counted(0))]

    def test_starts_with_the_first_item_asked_for(self, audit, audited, storage):
        processor = audit(storage=storage)

        @audited("recall")
        def recall():
            yield 1

        iterator = recall()
        assert processor.stats()["open"] == 0
        next(iterator)
        assert processor.stats()["open"] == 1
        assert list(iterator) == []
        assert processor.stats()["open"] == 0

    def test_that_is_never_started_is_no_operation(self, audit, audited, storage):
        processor = audit(storage=storage)

        @audited("recall")
        def recall():
            yield 1

        recall().close()
        assert processor.force_flush()
        assert storage.records == []
        assert processor.stats()["open"] == 0

    def test_that_is_closed_early_says_so_and_has_not_failed(self, audited, recorded):
        cleaned_up: list[bool] = []

        @audited("recall")
        def recall():
            try:
                yield from range(10)
            finally:
                cleaned_up.append(get_current_span().is_recording())

        iterator = recall()
        assert [next(iterator), next(iterator)] == [0, 1]
        iterator.close()
        assert cleaned_up == [True], "the body's clean-up is part of the operation"
        assert [summary(record) for record in recorded()] == [("success", None, left_after(2))]

    def test_that_a_loop_breaks_out_of_says_so(self, audited, recorded):
        @audited("recall")
        def recall():
            yield from range(10)

        for item in recall():
            if item == 4:
                break
        gc.collect()
        assert [summary(record) for record in recorded()] == [("success", None, left_after(5))]

    def test_that_is_forgotten_midway_is_recorded_when_it_is_collected(self, audited, recorded):
        @audited("recall")
        def recall():
            yield from range(10)

        iterator = recall()
        next(iterator)
        assert recorded() == []
        del iterator
        gc.collect()
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    def test_that_raises_has_failed(self, audited, recorded):
        error = LookupError("of the body")

        @audited("recall")
        def recall():
            yield 1
            raise error

        iterator = recall()
        next(iterator)
        with pytest.raises(LookupError) as caught:
            next(iterator)
        assert caught.value is error
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", counted(1))]
        assert list(iterator) == [], "as any generator that has raised, it is at its end"

    def test_may_handle_what_the_consumer_throws(self, audited, recorded):
        @audited("recall")
        def recall():
            try:
                yield 1
            except LookupError:
                yield "handled"
            yield 3

        iterator = recall()
        next(iterator)
        assert iterator.throw(LookupError("of the consumer")) == "handled"
        assert list(iterator) == [3]
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]

    def test_may_end_at_what_the_consumer_throws(self, audited, recorded):
        @audited("recall")
        def recall():
            with suppress(LookupError):
                yield 1

        iterator = recall()
        next(iterator)
        with pytest.raises(StopIteration):
            iterator.throw(LookupError("of the consumer"))
        assert [summary(record) for record in recorded()] == [("success", None, counted(1))]

    def test_fails_with_what_the_consumer_throws_and_it_does_not_handle(self, audited, recorded):
        @audited("recall")
        def recall():
            yield from range(10)

        iterator = recall()
        next(iterator)
        error = LookupError("of the consumer")
        with pytest.raises(LookupError) as caught:
            iterator.throw(error)
        assert caught.value is error
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", counted(1))]

    def test_may_turn_its_closing_into_an_ordinary_end(self, audited, recorded):
        @audited("recall")
        def recall():
            with suppress(GeneratorExit):
                yield 1

        iterator = recall()
        next(iterator)
        iterator.close()
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    def test_that_ignores_its_closing_is_told_so_as_any_other(self, audited, recorded):
        @audited("recall")
        def recall():
            with suppress(GeneratorExit):
                yield 1
            yield 2

        iterator = recall()
        next(iterator)
        with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
            iterator.close()
        assert list(iterator) == []
        assert [summary(record) for record in recorded()] == [("success", None, counted(2))]

    def test_that_fails_while_it_is_closed_has_failed(self, audited, recorded):
        @audited("recall")
        def recall():
            try:
                yield 1
            finally:
                raise LookupError("of the clean-up")

        iterator = recall()
        next(iterator)
        with pytest.raises(LookupError):
            iterator.close()
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", left_after(1))]

    def test_gets_what_the_consumer_sends(self, audited, recorded):
        @audited("recall")
        def recall():
            received = yield "ready"
            while received:
                received = yield received * 2

        iterator = recall()
        assert next(iterator) == "ready"
        assert [iterator.send(3), iterator.send(4)] == [6, 8]
        with pytest.raises(StopIteration):
            iterator.send(0)
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]

    def test_returns_its_value_to_a_delegating_generator(self, audited, recorded):
        @audited("recall")
        def recall():
            yield 1
            return "the end"

        def delegating():
            return (yield from recall())

        iterator = delegating()
        next(iterator)
        with pytest.raises(StopIteration) as stopped:
            next(iterator)
        assert stopped.value.value == "the end"
        assert [summary(record) for record in recorded()] == [("success", None, counted(1))]

    @pytest.mark.parametrize(
        ("choice", "response"),
        [
            (True, counted(3)),
            (False, None),
            (lambda count: {"pages": count // 2}, {"pages": 1}),
            (lambda count: {"pages": count // 0}, {"error": "ZeroDivisionError"}),
        ],
    )
    def test_has_the_response_that_is_chosen(self, audited, recorded, choice, response):
        @audited("recall", response=choice)
        def recall():
            yield from range(3)

        assert list(recall()) == [0, 1, 2]
        assert [summary(record) for record in recorded()] == [("success", None, response)]

    def test_called_wrongly_raises_at_the_call_and_is_no_operation(self, audited, recorded):
        @audited("recall")
        def recall(top_k):
            yield top_k

        with pytest.raises(TypeError, match="takes 1 positional argument but 3 were given"):
            recall(1, 2, 3)
        assert recorded() == []

    def test_is_called_in_every_way_that_a_function_is(self, audited, recorded):
        class Engine:
            @audited("recall")
            def recall(self, *, self_id, top_k=1):
                assert isinstance(self, Engine)
                yield top_k

            @classmethod
            @audited("recall")
            def of_class(cls, top_k):
                assert cls is Engine
                yield top_k

            @staticmethod
            @audited("recall")
            def static(top_k):
                yield top_k

        engine = Engine()
        iterators = [
            engine.recall(self_id=7),
            Engine.recall(engine, self_id=7),
            engine.of_class(1),
            Engine.static(1),
            partial(engine.recall, self_id=7)(),
        ]
        assert [list(iterator) for iterator in iterators] == [[1]] * 5
        assert [record.request["top_k"] for record in recorded()] == [1] * 5
        assert inspect.isgeneratorfunction(engine.recall)
        assert str(inspect.signature(engine.recall)) == "(*, self_id, top_k=1)"

    def test_is_copied_and_pickled_by_its_name(self):
        assert copy.deepcopy(_of_the_module) is _of_the_module
        assert pickle.loads(pickle.dumps(_of_the_module)) is _of_the_module

    def test_may_be_a_method(self, audited, recorded):
        class Service:
            @audited("recall")
            def recall(self, top_k):
                yield from range(top_k)

        assert list(Service().recall(2)) == [0, 1]
        assert [record.request for record in recorded()] == [{"top_k": 2}]

    def test_may_begin_in_one_thread_and_end_in_another(self, audited, recorded):
        @audited("recall")
        def recall():
            yield from range(3)

        iterator = recall()
        next(iterator)
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(list, iterator).result() == [1, 2]
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]


class TestTheSpanOfAGenerator:
    def test_is_current_in_the_body_and_not_in_the_consumer(self, audited, recorded):
        in_body = []

        @audited("recall")
        def recall():
            for item in range(3):
                in_body.append(get_current_span().get_span_context().span_id)
                yield item

        before = get_current_span()
        for _ in recall():
            assert get_current_span() is before
        assert get_current_span() is before
        assert [f"{span_id:016x}" for span_id in in_body] == [recorded()[0].span_id] * 3

    def test_is_the_parent_of_the_spans_that_the_body_makes(self, audited, recorded, tracer, parents):
        @audited("recall")
        def recall():
            with tracer.start_as_current_span("before"):
                pass
            yield 1
            with tracer.start_as_current_span("after"):
                pass

        for _ in recall():
            with tracer.start_as_current_span("of the consumer"):
                pass
        assert parents() == {
            "before": "audit recall",
            "after": "audit recall",
            "of the consumer": None,
            "audit recall": None,
        }

    def test_stays_out_of_the_consumer_when_the_body_opens_spans_around_an_item(self, audited, tracer, parents):
        @audited("recall")
        def recall():
            with tracer.start_as_current_span("around"):
                yield get_current_span()
                yield get_current_span()
            yield get_current_span()

        before = get_current_span()
        seen = []
        for span in recall():
            assert get_current_span() is before
            seen.append(span.name)
        assert seen == ["around", "around", "audit recall"]
        assert parents()["around"] == "audit recall"

    def test_stays_out_of_the_consumer_when_it_leaves_in_the_middle_of_the_body_s_span(self, audited, tracer, parents):
        @audited("recall")
        def recall():
            with tracer.start_as_current_span("around"):
                yield from range(10)

        before = get_current_span()
        iterator = recall()
        next(iterator)
        iterator.close()
        assert get_current_span() is before
        assert parents()["around"] == "audit recall"

    def test_leaves_the_consumer_s_own_spans_current(self, audited, tracer, parents):
        @audited("recall")
        def recall():
            while True:
                yield get_current_span().name

        iterator = recall()
        with tracer.start_as_current_span("first") as first:
            assert next(iterator) == "audit recall"
            assert get_current_span() is first
        with tracer.start_as_current_span("second") as second:
            assert next(iterator) == "audit recall"
            assert get_current_span() is second
            iterator.close()
            assert get_current_span() is second
        assert parents()["audit recall"] == "first"

    def test_is_not_mixed_up_with_that_of_a_generator_which_runs_in_turns(self, audited, tracer, parents):
        def body(name):
            with tracer.start_as_current_span(f"around {name}"):
                for item in range(3):
                    with tracer.start_as_current_span(f"{name} {item}"):
                        yield item

        first, second = audited("first")(body)("a"), audited("second")(body)("b")
        assert list(zip(first, second, strict=True)) == [(0, 0), (1, 1), (2, 2)]
        assert parents() == {
            "audit first": None,
            "around a": "audit first",
            **dict.fromkeys(("a 0", "a 1", "a 2"), "around a"),
            "audit second": None,
            "around b": "audit second",
            **dict.fromkeys(("b 0", "b 1", "b 2"), "around b"),
        }

    def test_is_the_parent_of_an_audited_generator_inside(self, audited, recorded):
        @audited("rank")
        def rank(items):
            yield from items

        @audited("recall")
        def recall():
            yield from rank(range(3))

        assert list(recall()) == [0, 1, 2]
        inner, outer = recorded()
        assert (inner.action, inner.parent_span_id) == ("rank", outer.span_id)
        assert [record.response for record in (inner, outer)] == [counted(3)] * 2

    def test_may_be_that_of_a_context_manager(self, audited, recorded):
        @contextmanager
        @audited("session")
        def session():
            yield get_current_span()

        before = get_current_span()
        with session() as span:
            assert span.name == "audit session"
            assert get_current_span() is before
        assert [summary(record) for record in recorded()] == [("success", None, counted(1))]


class TestAnAsyncGenerator:
    async def test_is_one_record_with_the_number_of_its_items(self, audited, recorded):
        @audited("recall")
        async def recall(bank_id, top_k):
            for item in range(top_k):
                await asyncio.sleep(0)
                yield item

        assert [item async for item in recall("bank-1", 3)] == [0, 1, 2]
        [record] = recorded()
        assert (record.action, record.bank_id, record.request) == ("recall", "bank-1", {"top_k": 3})
        assert summary(record) == ("success", None, counted(3))

    async def test_that_is_never_started_is_no_operation(self, audit, audited, storage):
        processor = audit(storage=storage)

        @audited("recall")
        async def recall():
            yield 1

        await recall().aclose()
        assert processor.force_flush()
        assert storage.records == []
        assert processor.stats()["open"] == 0

    async def test_that_is_closed_early_says_so_and_has_not_failed(self, audited, recorded):
        cleaned_up: list[bool] = []

        @audited("recall")
        async def recall():
            try:
                for item in range(10):
                    yield item
            finally:
                await asyncio.sleep(0)
                cleaned_up.append(get_current_span().is_recording())

        async with aclosing(recall()) as items:
            async for item in items:
                if item == 4:
                    break
        assert cleaned_up == [True], "the body's clean-up is part of the operation"
        assert [summary(record) for record in recorded()] == [("success", None, left_after(5))]

    def test_that_is_left_open_is_recorded_when_its_loop_ends(self, audited, recorded):
        @audited("recall")
        async def recall():
            for item in range(10):
                yield item

        iterator = recall()

        async def main():
            await anext(iterator)

        asyncio.run(main())
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    async def test_that_is_collected_midway_is_recorded(self, audited, recorded):
        finished = asyncio.Event()

        @audited("recall")
        async def recall():
            try:
                yield 1
            finally:
                finished.set()

        iterator = recall()
        await anext(iterator)
        del iterator
        gc.collect()
        await finished.wait()  # its loop closes it in a task of its own
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    async def test_that_raises_has_failed(self, audited, recorded):
        error = LookupError("of the body")

        @audited("recall")
        async def recall():
            yield 1
            raise error

        iterator = recall()
        await anext(iterator)
        with pytest.raises(LookupError) as caught:
            await anext(iterator)
        assert caught.value is error
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", counted(1))]

    async def test_may_handle_what_the_consumer_throws(self, audited, recorded):
        @audited("recall")
        async def recall():
            try:
                yield 1
            except LookupError:
                yield "handled"
            yield 3

        iterator = recall()
        await anext(iterator)
        assert await iterator.athrow(LookupError("of the consumer")) == "handled"
        assert [item async for item in iterator] == [3]
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]

    async def test_may_end_at_what_the_consumer_throws(self, audited, recorded):
        @audited("recall")
        async def recall():
            with suppress(LookupError):
                yield 1

        iterator = recall()
        await anext(iterator)
        with pytest.raises(StopAsyncIteration):
            await iterator.athrow(LookupError("of the consumer"))
        assert [summary(record) for record in recorded()] == [("success", None, counted(1))]

    async def test_fails_with_what_the_consumer_throws_and_it_does_not_handle(self, audited, recorded):
        @audited("recall")
        async def recall():
            yield 1

        iterator = recall()
        await anext(iterator)
        error = LookupError("of the consumer")
        with pytest.raises(LookupError) as caught:
            await iterator.athrow(error)
        assert caught.value is error
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", counted(1))]

    async def test_may_turn_its_closing_into_an_ordinary_end(self, audited, recorded):
        @audited("recall")
        async def recall():
            with suppress(GeneratorExit):
                yield 1

        iterator = recall()
        await anext(iterator)
        await iterator.aclose()
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    async def test_that_ignores_its_closing_is_told_so_as_any_other(self, audited, recorded):
        @audited("recall")
        async def recall():
            with suppress(GeneratorExit):
                yield 1
            yield 2

        iterator = recall()
        await anext(iterator)
        with pytest.raises(RuntimeError, match="async generator ignored GeneratorExit"):
            await iterator.aclose()
        assert [summary(record) for record in recorded()] == [("failure", "RuntimeError", left_after(1))]

    async def test_that_fails_while_it_is_closed_has_failed(self, audited, recorded):
        @audited("recall")
        async def recall():
            try:
                yield 1
            finally:
                raise LookupError("of the clean-up")

        iterator = recall()
        await anext(iterator)
        with pytest.raises(LookupError):
            await iterator.aclose()
        assert [summary(record) for record in recorded()] == [("failure", "LookupError", left_after(1))]

    async def test_gets_what_the_consumer_sends(self, audited, recorded):
        @audited("recall")
        async def recall():
            received = yield "ready"
            while received:
                received = yield received * 2

        iterator = recall()
        assert await anext(iterator) == "ready"
        assert [await iterator.asend(3), await iterator.asend(4)] == [6, 8]
        with pytest.raises(StopAsyncIteration):
            await iterator.asend(0)
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]

    async def test_that_is_cancelled_midway_has_failed(self, audited, recorded):
        waiting = asyncio.Event()

        @audited("recall")
        async def recall():
            yield 1
            waiting.set()
            await asyncio.Event().wait()
            yield 2

        async def consume():
            async for _ in recall():
                pass

        task = asyncio.create_task(consume())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [summary(record) for record in recorded()] == [
            ("failure", "asyncio.exceptions.CancelledError", counted(1))
        ]

    async def test_whose_consumer_is_cancelled_between_items_was_closed_early(self, audited, recorded):
        waiting = asyncio.Event()

        @audited("recall")
        async def recall():
            yield 1
            yield 2

        async def consume():
            async with aclosing(recall()) as items:
                async for _ in items:
                    waiting.set()
                    await asyncio.Event().wait()

        task = asyncio.create_task(consume())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [summary(record) for record in recorded()] == [("success", None, left_after(1))]

    async def test_called_wrongly_raises_at_the_call_and_is_no_operation(self, audited, recorded):
        @audited("recall")
        async def recall(top_k):
            yield top_k

        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            recall()
        assert recorded() == []

    async def test_may_give_each_item_to_another_task(self, audited, recorded, tracer, parents):
        @audited("recall")
        async def recall():
            for item in range(3):
                with tracer.start_as_current_span(f"item {item}"):
                    await asyncio.sleep(0)
                yield item

        iterator = recall()
        assert [await asyncio.create_task(anext(iterator)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)
        assert [summary(record) for record in recorded()] == [("success", None, counted(3))]
        assert parents() == {
            "audit recall": None,
            **dict.fromkeys(("item 0", "item 1", "item 2"), "audit recall"),
        }


class TestTheSpanOfAnAsyncGenerator:
    async def test_is_current_in_the_body_and_not_in_the_consumer(self, audited, recorded):
        in_body = []

        @audited("recall")
        async def recall():
            for item in range(3):
                in_body.append(get_current_span().get_span_context().span_id)
                await asyncio.sleep(0)
                yield item

        before = get_current_span()
        async for _ in recall():
            assert get_current_span() is before
        assert get_current_span() is before
        assert [f"{span_id:016x}" for span_id in in_body] == [recorded()[0].span_id] * 3

    async def test_is_the_parent_of_the_spans_that_the_body_and_its_tasks_make(self, audited, tracer, parents):
        async def work(name):
            with tracer.start_as_current_span(name):
                await asyncio.sleep(0)

        @audited("recall")
        async def recall():
            await work("before")
            yield 1
            await asyncio.gather(work("task a"), work("task b"))

        async for _ in recall():
            await work("of the consumer")
        assert parents() == {
            "audit recall": None,
            **dict.fromkeys(("before", "task a", "task b"), "audit recall"),
            "of the consumer": None,
        }

    async def test_stays_out_of_the_consumer_when_the_body_opens_spans_around_an_item(self, audited, tracer, parents):
        @audited("recall")
        async def recall():
            with tracer.start_as_current_span("around"):
                yield get_current_span()
                await asyncio.sleep(0)
                yield get_current_span()
            yield get_current_span()

        before = get_current_span()
        seen = []
        async for span in recall():
            assert get_current_span() is before
            seen.append(span.name)
        assert seen == ["around", "around", "audit recall"]
        assert parents()["around"] == "audit recall"

    async def test_stays_out_of_the_consumer_when_it_leaves_in_the_middle_of_the_body_s_span(
        self, audited, tracer, parents
    ):
        @audited("recall")
        async def recall():
            with tracer.start_as_current_span("around"):
                yield 1

        before = get_current_span()
        iterator = recall()
        await anext(iterator)
        await iterator.aclose()
        assert get_current_span() is before
        assert parents()["around"] == "audit recall"
