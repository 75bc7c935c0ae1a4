"""`@audited`: what a decorated call gives to its caller, and what to the log."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import gc
import inspect
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import NoOpTracerProvider, get_current_span

import astrocyte_otel_audit
from astrocyte_otel_audit import AuditRecord, AuditUnavailableError, ConfigurationError, Normalizer, audit_scope
from astrocyte_otel_audit import audited as audited_globally

SECRET_TEXT = "Calvin's blood pressure is rising"


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


class TestACallBecomesARecord:
    def test_of_a_sync_function(self, audited, recorded):
        @audited("recall", transport="http")
        def recall(bank_id, query, top_k):
            return {"hits": 3}

        assert recall("bank-1", SECRET_TEXT, top_k=5) == {"hits": 3}

        [record] = recorded()
        assert (record.action, record.bank_id, record.transport) == ("recall", "bank-1", "http")
        assert (record.outcome, record.error_type) == ("success", None)
        assert record.request == {"query": {"length": len(SECRET_TEXT)}, "top_k": 5}
        assert record.response == {"hits": 3}
        assert record.ended_at is not None
        assert record.ended_at >= record.started_at

    async def test_of_an_async_function(self, audited, recorded):
        @audited("recall")
        async def recall(bank_id, top_k):
            await asyncio.sleep(0)
            return {"hits": top_k}

        assert await recall("bank-1", 5) == {"hits": 5}

        [record] = recorded()
        assert (record.action, record.bank_id, record.outcome) == ("recall", "bank-1", "success")
        assert (record.request, record.response) == ({"top_k": 5}, {"hits": 5})

    def test_with_the_result_itself_and_not_a_copy(self, audited, recorded):
        result = object()
        assert audited("recall")(lambda: result)() is result

    def test_without_the_text_of_arguments_and_result(self, audited, recorded):
        @audited("reflect")
        def reflect(query, context):
            return {"answer": SECRET_TEXT, "sources": [{"id": "m-1", "text": SECRET_TEXT}]}

        reflect(SECRET_TEXT, {"notes": [SECRET_TEXT]})
        assert SECRET_TEXT not in repr(recorded())

    def test_with_text_that_a_normalizer_of_its_own_keeps(self, audited, recorded):
        @audited("recall", normalizer=Normalizer(keep=["query"]))
        def recall(query):
            return None

        recall("what is due?")
        assert recorded()[0].request == {"query": "what is due?"}

    def test_called_what_an_enum_of_strings_says(self, audited, recorded):
        class Action(enum.StrEnum):
            RETAIN = "retain"

        audited(Action.RETAIN)(lambda: None)()
        assert [record.action for record in recorded()] == ["retain"]

    def test_only_if_the_action_is_allowed(self, audit, audited, storage):
        processor = audit(storage=storage, actions=["retain"])
        assert audited("recall")(lambda: 7)() == 7
        assert audited("retain")(lambda: 8)() == 8
        assert processor.force_flush()
        assert [record.action for record in storage.records] == ["retain"]

    def test_even_if_not_allowed_where_the_audit_is_required(self, audit, audited, storage):
        processor = audit(storage=storage, actions=["retain"])
        assert audited("forget", required=True)(lambda: 7)() == 7
        assert processor.force_flush()
        assert [record.action for record in storage.records] == ["forget"]

    async def test_of_its_own_where_many_tasks_run_at_once(self, audited, recorded):
        @audited("recall")
        async def recall(bank_id):
            await asyncio.sleep(0)
            return {"bank": bank_id}

        await asyncio.gather(*(recall(f"bank-{number}") for number in range(50)))
        assert sorted(record.bank_id for record in recorded()) == sorted(f"bank-{number}" for number in range(50))
        assert all(record.response == {"bank": record.bank_id} for record in recorded())

    def test_of_its_own_where_many_threads_run_at_once(self, audited, recorded):
        @audited("recall")
        def recall(bank_id):
            return {"bank": bank_id}

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(recall, (f"bank-{number}" for number in range(200))))
        assert sorted(record.bank_id for record in recorded()) == sorted(f"bank-{number}" for number in range(200))
        assert all(record.response == {"bank": record.bank_id} for record in recorded())


def _service(audited: Callable[..., Any]) -> Any:
    class Service:
        @audited("recall")
        def method(self, top_k):
            return top_k

        @audited("recall")
        async def async_method(self, top_k):
            return top_k

        @classmethod
        @audited("recall")
        def class_method(cls, top_k):
            return top_k

        @audited("recall")
        @classmethod
        def class_method_inside(cls, top_k):
            return top_k

        @staticmethod
        @audited("recall")
        def static_method(top_k):
            return top_k

        @audited("recall")
        @staticmethod
        def static_method_inside(top_k):
            return top_k

    return Service


class TestMethods:
    @pytest.mark.parametrize(
        "name", ["method", "class_method", "class_method_inside", "static_method", "static_method_inside"]
    )
    def test_are_audited_without_the_object_they_are_called_on(self, audited, recorded, name):
        assert getattr(_service(audited)(), name)(3) == 3
        [record] = recorded()
        assert record.request == {"top_k": 3}
        assert record.outcome == "success"

    @pytest.mark.parametrize("name", ["class_method", "class_method_inside", "static_method", "static_method_inside"])
    def test_may_be_called_on_the_class(self, audited, recorded, name):
        assert getattr(_service(audited), name)(top_k=3) == 3
        assert [record.request for record in recorded()] == [{"top_k": 3}]

    async def test_may_be_async(self, audited, recorded):
        assert await _service(audited)().async_method(3) == 3
        assert [record.request for record in recorded()] == [{"top_k": 3}]

    def test_may_be_called_unbound(self, audited, recorded):
        service = _service(audited)
        assert service.method(service(), top_k=3) == 3
        assert [record.request for record in recorded()] == [{"top_k": 3}]


def _plain(query_id, top_k=10):
    return None


def _with_none_as_default(top_k=None):
    return None


def _positional_only(query_id, /, top_k):
    return None


def _keyword_only(*, top_k, limit=2):
    return None


def _rest(top_k, *ids):
    return None


def _options(top_k, **options):
    return None


class TestTheRequest:
    @pytest.mark.parametrize(
        ("function", "args", "kwargs", "request_"),
        [
            (_plain, ("q-1",), {}, {"query_id": "q-1", "top_k": 10}),
            (_plain, ("q-1", 5), {}, {"query_id": "q-1", "top_k": 5}),
            (_plain, (), {"top_k": 5, "query_id": "q-1"}, {"query_id": "q-1", "top_k": 5}),
            (_with_none_as_default, (), {}, None),
            (_with_none_as_default, (4,), {}, {"top_k": 4}),
            (_positional_only, ("q-1", 5), {}, {"query_id": "q-1", "top_k": 5}),
            (_keyword_only, (), {"top_k": 5}, {"top_k": 5, "limit": 2}),
            (_rest, (5,), {}, {"top_k": 5}),
            (_rest, (5, "m-1", "m-2"), {}, {"top_k": 5, "ids": ["m-1", "m-2"]}),
            (_options, (5,), {"depth": 2, "fast": True}, {"top_k": 5, "depth": 2, "fast": True}),
        ],
    )
    def test_holds_all_arguments_by_name_with_defaults(self, audited, recorded, function, args, kwargs, request_):
        audited("recall")(function)(*args, **kwargs)
        assert [record.request for record in recorded()] == [request_]

    @pytest.mark.parametrize(
        ("choice", "request_"),
        [
            (True, {"top_k": 5, "depth": 2}),
            (False, None),
            (["top_k"], {"top_k": 5}),
            (("depth", "no_such_argument"), {"depth": 2}),
            ({"top_k", "bank_id"}, {"top_k": 5, "bank_id": "bank-1"}),
            ((), None),
            (lambda arguments: {"sum": arguments["top_k"] + arguments["depth"]}, {"sum": 7}),
            (lambda arguments: {"bank": arguments["bank_id"]}, {"bank": "bank-1"}),
            (lambda arguments: None, None),
            (lambda arguments: arguments["no_such_argument"], {"error": "KeyError"}),
        ],
    )
    def test_can_be_chosen(self, audited, recorded, choice, request_):
        @audited("recall", request=choice)
        def recall(bank_id, top_k, depth):
            return "done"

        assert recall("bank-1", 5, 2) == "done"
        assert [record.request for record in recorded()] == [request_]
        assert [record.outcome for record in recorded()] == ["success"]

    def test_shows_arguments_as_they_came(self, audited, recorded):
        @audited("recall")
        def recall(options):
            options["top_k"] = 99

        recall({"top_k": 5})
        assert recorded()[0].request == {"options": {"top_k": 5}}


class TestTheResponse:
    @pytest.mark.parametrize(
        ("choice", "response"),
        [
            (True, {"hits": 3}),
            (False, None),
            (lambda result: {"found": result["hits"] > 0}, {"found": True}),
            (lambda result: None, None),
            (lambda result: result["no_such_key"], {"error": "KeyError"}),
        ],
    )
    def test_can_be_chosen(self, audited, recorded, choice, response):
        @audited("recall", response=choice)
        def recall():
            return {"hits": 3}

        assert recall() == {"hits": 3}
        assert [record.response for record in recorded()] == [response]
        assert [record.outcome for record in recorded()] == ["success"]

    async def test_can_be_chosen_of_an_async_function(self, audited, recorded):
        @audited("recall", response=lambda result: {"found": result > 0})
        async def recall():
            return 3

        assert await recall() == 3
        assert recorded()[0].response == {"found": True}

    @pytest.mark.parametrize(
        ("result", "response"),
        [
            (None, None),
            (3, {"value": 3}),
            (SECRET_TEXT, {"length": len(SECRET_TEXT)}),
            ([{"id": "m-1"}, {"id": "m-2"}], {"count": 2, "ids": ["m-1", "m-2"]}),
        ],
    )
    def test_describes_any_result(self, audited, recorded, result, response):
        audited("recall")(lambda: result)()
        assert recorded()[0].response == response


class TestTheBank:
    @pytest.mark.parametrize(
        ("chosen", "argument", "in_scope", "bank"),
        [
            (None, None, None, None),
            (None, None, "of-scope", "of-scope"),
            (None, "of-argument", None, "of-argument"),
            (None, "of-argument", "of-scope", "of-argument"),
            ("literal", "of-argument", "of-scope", "literal"),
            (lambda arguments: arguments["bank_id"] + "-x", "of-argument", "of-scope", "of-argument-x"),
            (lambda arguments: None, "of-argument", "of-scope", "of-scope"),
            (lambda arguments: arguments["no_such_argument"], "of-argument", "of-scope", "of-scope"),
            (lambda arguments: arguments["no_such_argument"], "of-argument", None, None),
        ],
    )
    def test_is_the_decorators_or_the_arguments_or_the_scopes(
        self, audited, recorded, chosen, argument, in_scope, bank
    ):
        @audited("recall", bank_id=chosen)
        def recall(bank_id=None):
            return "done"

        with audit_scope(bank_id=in_scope):
            assert recall(argument) == "done"
        assert [(record.bank_id, record.outcome) for record in recorded()] == [(bank, "success")]

    def test_may_be_a_default_of_the_function(self, audited, recorded):
        @audited("recall")
        def recall(bank_id="of-default"):
            return None

        recall()
        assert recorded()[0].bank_id == "of-default"

    def test_stays_in_the_request_where_it_is_not_the_record_s_bank(self, audited, recorded):
        @audited("merge", bank_id="literal")
        def merge(bank_id):
            return None

        merge("bank-1")
        assert recorded()[0].request == {"bank_id": "bank-1"}


class Outer:
    class InnerError(Exception):
        """Has a qualified name."""


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nobody may ask for my message")

    __repr__ = __str__


def _group(message: str) -> BaseException:
    return ExceptionGroup(message, [ValueError(message)])


ERRORS = [
    pytest.param(ValueError, "ValueError", id="builtin"),
    pytest.param(KeyError, "KeyError", id="builtin whose text is quoted"),
    pytest.param(Outer.InnerError, f"{__name__}.Outer.InnerError", id="nested class"),
    pytest.param(asyncio.QueueEmpty, "asyncio.queues.QueueEmpty", id="of a library"),
    pytest.param(HostileError, f"{__name__}.HostileError", id="hostile"),
    pytest.param(_group, "ExceptionGroup", id="group"),
]
EXITS = [
    pytest.param(KeyboardInterrupt, "KeyboardInterrupt", id="interrupt"),
    pytest.param(SystemExit, "SystemExit", id="exit"),
]


class TestAnException:
    @pytest.mark.parametrize(("make", "name"), [*ERRORS, *EXITS])
    def test_reaches_the_caller_and_is_recorded_by_its_class_alone(self, audited, recorded, make, name):
        error = make(SECRET_TEXT)

        @audited("retain")
        def retain(bank_id):
            raise error

        with pytest.raises(type(error)) as caught:
            retain("bank-1")

        assert caught.value is error
        assert (error.__cause__, error.__context__) == (None, None)
        [record] = recorded()
        assert (record.outcome, record.error_type) == ("failure", name)
        assert (record.bank_id, record.response) == ("bank-1", None)
        assert SECRET_TEXT not in repr(record)

    @pytest.mark.parametrize(("make", "name"), ERRORS)
    async def test_of_an_async_function_does_too(self, audited, recorded, make, name):
        error = make(SECRET_TEXT)

        @audited("retain")
        async def retain():
            raise error

        with pytest.raises(type(error)) as caught:
            await retain()
        assert caught.value is error
        assert [(record.outcome, record.error_type) for record in recorded()] == [("failure", name)]

    async def test_that_cancels_is_a_failure(self, audited, recorded):
        entered = asyncio.Event()

        @audited("recall")
        async def recall():
            entered.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(recall())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(record.outcome, record.error_type) for record in recorded()] == [
            ("failure", "asyncio.exceptions.CancelledError")
        ]

    async def test_of_a_timeout_around_it_is_a_cancellation_to_it(self, audited, recorded):
        @audited("recall")
        async def recall(deadline):
            deadline.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as deadline:
                await recall(deadline)
        assert [record.error_type for record in recorded()] == ["asyncio.exceptions.CancelledError"]


class TestAWrongCall:
    @pytest.mark.parametrize(
        ("args", "kwargs", "request_"),
        [
            ((), {}, {"top_k": 10}),
            ((1, 2, 3), {}, {"query_id": 1, "top_k": 2}),
            ((1,), {"unknown": 3}, {"query_id": 1, "top_k": 10, "unknown": 3}),
            ((1,), {"query_id": 2}, {"query_id": 2, "top_k": 10}),
        ],
        ids=["too few", "too many", "unknown name", "twice"],
    )
    def test_raises_what_the_function_raises_and_is_a_failure(self, audited, recorded, args, kwargs, request_):
        with pytest.raises(TypeError) as plain:
            _plain(*args, **kwargs)
        with pytest.raises(TypeError) as decorated:
            audited("recall")(_plain)(*args, **kwargs)
        assert str(decorated.value) == str(plain.value)
        assert [(r.outcome, r.error_type, r.request) for r in recorded()] == [("failure", "TypeError", request_)]


class TestTraces:
    async def test_tasks_inherit_the_parent(self, audited, recorded):
        @audited("extract")
        async def extract():
            return None

        @audited("retain")
        async def retain():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(extract())
                tasks.create_task(extract())

        await retain()
        [outer] = (record for record in recorded() if record.action == "retain")
        inner = [record for record in recorded() if record.action == "extract"]
        assert [record.parent_span_id for record in inner] == [outer.span_id] * 2
        assert {record.trace_id for record in inner} == {outer.trace_id}
        assert outer.parent_span_id is None

    def test_threads_inherit_the_parent_with_its_context(self, audited, recorded):
        @audited("extract")
        def extract():
            return None

        @audited("retain")
        def retain():
            with ThreadPoolExecutor(1) as threads:
                threads.submit(contextvars.copy_context().run, extract).result()

        retain()
        inner, outer = recorded()
        assert (inner.action, inner.parent_span_id) == ("extract", outer.span_id)

    def test_the_span_is_current_in_the_body_and_only_there(self, audited, recorded):
        @audited("recall")
        def recall():
            return get_current_span().get_span_context()

        before = get_current_span()
        context = recall()
        assert get_current_span() is before
        assert f"{context.span_id:016x}" == recorded()[0].span_id

    def test_the_span_is_not_current_after_an_exception(self, audited, recorded):
        @audited("recall")
        def recall():
            raise ValueError

        before = get_current_span()
        with pytest.raises(ValueError):
            recall()
        assert get_current_span() is before


class TestACoroutineFromAPlainFunction:
    @pytest.fixture
    def recall(self, audited):
        async def body(top_k):
            assert get_current_span().is_recording()
            await asyncio.sleep(0)
            if top_k < 0:
                raise LookupError
            return {"hits": top_k}

        @audited("recall")
        def recall(top_k):
            return body(top_k)

        return recall

    async def test_is_one_operation_until_it_has_been_awaited(self, recall, recorded):
        before = get_current_span()
        awaitable = recall(3)
        assert inspect.iscoroutine(awaitable)
        assert get_current_span() is before
        assert recorded() == []
        assert await awaitable == {"hits": 3}
        assert get_current_span() is before
        [record] = recorded()
        assert (record.outcome, record.request, record.response) == ("success", {"top_k": 3}, {"hits": 3})

    async def test_fails_as_it_does(self, recall, recorded):
        with pytest.raises(LookupError):
            await asyncio.create_task(recall(-1))
        assert [(record.outcome, record.error_type) for record in recorded()] == [("failure", "LookupError")]

    def test_may_be_refused_by_the_plain_part(self, audited, recorded):
        @audited("recall")
        def recall():
            raise LookupError

        with pytest.raises(LookupError):
            recall()
        assert [record.outcome for record in recorded()] == ["failure"]

    async def test_may_be_cancelled(self, audited, recorded):
        waits = asyncio.Event()

        async def body():
            waits.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(audited("recall")(lambda: body())())
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(record.outcome, record.error_type) for record in recorded()] == [
            ("failure", "asyncio.exceptions.CancelledError")
        ]

    def test_that_is_never_awaited_has_an_unknown_outcome(self, recall, recorded):
        with pytest.warns(RuntimeWarning, match=r"body' was never awaited"):
            recall(3)
        [record] = recorded()
        assert (record.outcome, record.request, record.response) == ("unknown", {"top_k": 3}, None)
        assert record.ended_at is not None

    async def test_may_be_cancelled_before_it_has_begun(self, recall, recorded):
        task = asyncio.create_task(recall(3))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0)  # the loop, too, has a reference to it until then
        gc.collect()
        assert [record.outcome for record in recorded()] == ["unknown"]

    async def test_gives_any_other_awaitable_as_it_is(self, audited, recorded):
        task = asyncio.ensure_future(asyncio.sleep(0))
        assert audited("recall")(lambda: task)() is task
        assert [record.outcome for record in recorded()] == ["success"]
        await task


def _sync():
    """Say what it does."""


async def _coroutine():
    """Say what it does."""


def _generator():
    """Say what it does."""
    yield


async def _async_generator():
    """Say what it does."""
    yield


class TestTheDecoratedFunction:
    @pytest.mark.parametrize("function", [_sync, _coroutine, _generator, _async_generator, _options, _positional_only])
    def test_looks_like_the_function(self, audited, function):
        decorated = audited("recall")(function)
        assert decorated is not function
        assert decorated.__wrapped__ is function
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(decorated, name) == getattr(function, name)
        assert inspect.signature(decorated) == inspect.signature(function)
        for kind in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            assert kind(decorated) == kind(function)

    def test_may_be_decorated_again(self, audited, recorded):
        decorated = audited("outer")(audited("inner")(_plain))
        decorated("q-1")
        assert [(record.action, record.request) for record in recorded()] == [
            ("inner", {"query_id": "q-1", "top_k": 10}),
            ("outer", {"query_id": "q-1", "top_k": 10}),
        ]

    def test_may_be_a_partial(self, audited, recorded):
        assert audited("recall")(partial(_plain, "q-1"))(5) is None
        assert recorded()[0].outcome == "success"

    async def test_may_be_a_partial_of_an_async_function(self, audited, recorded):
        async def fail(number):
            await asyncio.sleep(0)
            raise LookupError

        decorated = audited("recall")(partial(fail, 5))
        assert inspect.iscoroutinefunction(decorated)
        with pytest.raises(LookupError):
            await decorated()
        assert [record.error_type for record in recorded()] == ["LookupError"]

    async def test_may_be_a_callable_object_of_any_kind(self, audited, recorded):
        class Sync:
            def __call__(self, top_k):
                return {"hits": top_k}

        class Async:
            async def __call__(self, top_k):
                await asyncio.sleep(0)
                return {"hits": top_k}

        class Generator:
            def __call__(self, top_k):
                yield from range(top_k)

        class AsyncGenerator:
            async def __call__(self, top_k):
                for number in range(top_k):
                    yield number

        assert audited("recall")(Sync())(3) == {"hits": 3}
        assert await audited("recall")(Async())(3) == {"hits": 3}
        assert list(audited("recall")(Generator())(3)) == [0, 1, 2]
        assert [number async for number in audited("recall")(AsyncGenerator())(3)] == [0, 1, 2]
        assert [record.request for record in recorded()] == [{"top_k": 3}] * 4
        assert [record.response for record in recorded()] == [{"hits": 3}] * 2 + [{"item_count": 3}] * 2

    def test_may_be_written_in_c(self, audited, recorded):
        assert audited("count")(sum)([1, 2]) == 3
        assert recorded()[0].response == {"value": 3}


class TestARefusedDecoration:
    @pytest.mark.parametrize(
        ("arguments", "source"),
        [
            ({"action": ""}, "action"),
            ({"action": "  "}, "action"),
            ({"action": None}, "action"),
            ({"request": "top_k"}, "request"),
            ({"request": b"top_k"}, "request"),
            ({"request": 5}, "request"),
            ({"request": None}, "request"),
            ({"response": ["hits"]}, "response"),
            ({"response": "hits"}, "response"),
            ({"response": None}, "response"),
            ({"bank_id": 5}, "bank_id"),
            ({"bank_id": ["bank-1"]}, "bank_id"),
        ],
    )
    def test_names_the_argument(self, arguments, source):
        with pytest.raises(ConfigurationError) as refused:
            audited_globally(**{"action": "recall", **arguments})
        assert refused.value.source == source

    def test_explains_forgotten_parentheses(self):
        with pytest.raises(ConfigurationError, match=r"@audited\('retain'\)"):

            @audited_globally
            def retain():
                return None

    @pytest.mark.parametrize(
        "target", [Outer, property(_sync), 5, None], ids=["class", "property", "number", "nothing"]
    )
    def test_explains_what_can_be_decorated(self, target):
        with pytest.raises(ConfigurationError, match="a function or a method"):
            audited_globally("recall")(target)


class TestWithoutAPipeline:
    def test_the_function_works_and_nothing_is_normalized(self):
        class Unwanted(Normalizer):
            def attributes(self, payload, prefix="", action=""):
                raise AssertionError("a span that isn't recorded needs no payload")

        @audited_globally("recall", tracer_provider=NoOpTracerProvider(), normalizer=Unwanted())
        def recall(query):
            assert not get_current_span().is_recording()
            return {"hits": 3}

        assert recall(SECRET_TEXT) == {"hits": 3}

    def test_the_users_functions_are_called_all_the_same(self):
        seen: list[Any] = []

        @audited_globally(
            "recall",
            tracer_provider=NoOpTracerProvider(),
            bank_id=lambda arguments: seen.append(("bank", arguments["top_k"])),
            request=lambda arguments: seen.append(("request", arguments["top_k"])),
            response=lambda result: seen.append(("response", result)),
        )
        def recall(top_k):
            return "done"

        recall(5)
        assert seen == [("bank", 5), ("request", 5), ("response", "done")]

    @pytest.mark.parametrize("kind", ["sync", "coroutine", "generator", "async generator"])
    async def test_a_required_operation_is_refused_before_its_body(self, kind):
        ran: list[str] = []
        audited = partial(audited_globally, "forget", required=True, tracer_provider=NoOpTracerProvider())

        @audited()
        def sync():
            ran.append(kind)

        @audited()
        async def coroutine():
            ran.append(kind)

        @audited()
        def generator():
            ran.append(kind)
            yield

        @audited()
        async def async_generator():
            ran.append(kind)
            yield

        with pytest.raises(AuditUnavailableError, match="forget"):
            match kind:
                case "sync":
                    sync()
                case "coroutine":
                    await coroutine()
                case "generator":
                    next(generator())
                case "async generator":
                    await anext(async_generator())
        assert not ran

    def test_a_process_that_never_set_up_telemetry_runs_as_before(self):
        program = """
import logging
logging.basicConfig(level=logging.DEBUG)
logging.getLogger("psycopg").setLevel(logging.INFO)  # before 3.3 it says which implementations it lacks
from astrocyte_otel_audit import AuditEntry, audit_operation, audited, get_default_audit_logger

@audited("recall")
def recall(query):
    with audit_operation("rank") as operation:
        assert operation.record_id is None
    get_default_audit_logger().log(AuditEntry(action="recall", transport="http"))
    return "done"

print(recall("what is due?"))
"""
        finished = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "done\n", "")


class TestTheImport:
    def test_of_what_only_emits_loads_neither_the_sdk_nor_psycopg(self):
        program = """
import sys
import astrocyte_otel_audit
assert "opentelemetry" not in sys.modules
from astrocyte_otel_audit import audit_operation, audit_scope, audited
print([name for name in ("opentelemetry.sdk", "psycopg", "psycopg_pool", "orjson") if name in sys.modules])
"""
        finished = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "[]\n", "")

    def test_of_all_names_gives_them(self):
        program = """
import astrocyte_otel_audit
listed = dir(astrocyte_otel_audit)
assert listed == sorted(listed) and set(astrocyte_otel_audit.__all__) <= set(listed)
from astrocyte_otel_audit import *
assert all(name in globals() for name in astrocyte_otel_audit.__all__)
from astrocyte_otel_audit import logger, settings
assert AuditLogger is logger.AuditLogger
"""
        finished = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
        assert (finished.returncode, finished.stderr) == (0, "")

    def test_of_a_name_that_is_not_there_is_refused_as_ever(self):
        with pytest.raises(ImportError, match="cannot import name 'audit'"):
            from astrocyte_otel_audit import audit  # noqa: F401
        assert not hasattr(astrocyte_otel_audit, "audit")


class _RaisingSampler(Sampler):
    def should_sample(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(SECRET_TEXT)

    def get_description(self) -> str:
        return "raises"


class _RaisingProcessor(SpanProcessor):
    def __init__(self, moment: str) -> None:
        setattr(self, moment, self.fail)

    def fail(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(SECRET_TEXT)


class TestABrokenProvider:
    @pytest.mark.parametrize(("moment", "word"), [("on_start", "start"), ("on_end", "end")])
    def test_whose_processor_raises_does_not_disturb_the_call(self, audited, provider, caplog, moment, word):
        provider.add_span_processor(_RaisingProcessor(moment))
        before = get_current_span()
        assert audited("recall")(lambda: "done")() == "done"
        assert get_current_span() is before
        assert f"could not {word} (RuntimeError)" in caplog.text
        assert SECRET_TEXT not in caplog.text

    def test_whose_sampler_raises_does_not_disturb_the_call(self, caplog):
        provider = TracerProvider(sampler=_RaisingSampler(), shutdown_on_exit=False)
        assert audited_globally("recall", tracer_provider=provider)(lambda: "done")() == "done"
        assert "could not start (RuntimeError)" in caplog.text
        assert SECRET_TEXT not in caplog.text

    def test_keeps_the_exception_of_the_function(self, audited, provider):
        provider.add_span_processor(_RaisingProcessor("on_end"))
        error = ValueError("of the function")

        @audited("recall")
        def recall():
            raise error

        with pytest.raises(ValueError) as caught:
            recall()
        assert caught.value is error

    def test_still_hands_the_record_to_the_audit_that_comes_first(self, audited, audit, provider, storage):
        processor = audit(storage=storage)
        provider.add_span_processor(_RaisingProcessor("on_end"))
        audited("recall")(lambda: "done")()
        assert processor.force_flush()
        assert [record.outcome for record in storage.records] == ["success"]
