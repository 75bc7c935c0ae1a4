"""`configure_audit`: builds the pipeline, attaches it, and says what would leave the log empty."""

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from astrocyte_otel_audit import (
    AuditSampler,
    AuditSpanExporter,
    AuditSpanProcessor,
    ConfigurationError,
    Normalizer,
    RetentionPolicy,
    SpanMapping,
    attachment,
    audit_operation,
    audit_scope,
    audited,
    configure_audit,
    emit,
)
from astrocyte_otel_audit.configure import attached_to
from astrocyte_otel_audit.pipeline.replay import status
from astrocyte_otel_audit.postgres.sweep import Swept, Tenant
from tests.support import MemoryStorage

ROOT = Path(__file__).parents[2]

#: An SDK before 1.42 makes a tracer at every call and keeps none: nobody can reach one that was handed out.
_any = TracerProvider(shutdown_on_exit=False)
needs_kept_tracers = pytest.mark.skipif(
    _any.get_tracer("any") is not _any.get_tracer("any"), reason="this SDK does not keep its tracers"
)


@pytest.fixture
def dropping():
    """A provider that drops every trace."""
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def said(caplog):
    """The warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def rows_after(processor, storage):
    assert processor.force_flush(10_000)
    return [row.action for row in storage.records]


# Attaching.


def test_the_processor_is_returned_and_attached(provider, storage):
    processor = configure_audit(storage=storage, actions=["recall"], tracer_provider=provider)
    assert isinstance(processor, AuditSpanProcessor)
    assert attached_to(provider) == [processor]
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == ["recall"]


def test_another_provider_has_nothing_attached(provider, dropping, storage):
    configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert attached_to(dropping) == []
    assert attached_to(trace.ProxyTracerProvider()) == []


def test_the_providers_sampler_is_wrapped_with_the_same_actions_and_mappings(dropping, storage):
    mapping = SpanMapping(span_name="memory.{action}")
    configure_audit(storage=storage, actions=["recall"], mappings=[mapping], tracer_provider=dropping)
    assert isinstance(dropping.sampler, AuditSampler)
    assert dropping.sampler.delegate is ALWAYS_OFF
    assert dropping.sampler.selection.allowlist.actions == ("recall",)
    assert dropping.sampler.selection.mappings == (mapping,)


def test_a_sampler_that_wants_the_same_is_not_wrapped_again(storage):
    named = AuditSampler(ALWAYS_OFF, actions=["recall"])  # as OTEL_TRACES_SAMPLER names it
    provider = TracerProvider(sampler=named, shutdown_on_exit=False)
    configure_audit(storage=storage, actions=["recall"], tracer_provider=provider)
    assert provider.sampler is named
    configure_audit(storage=MemoryStorage(), actions=["retain"], tracer_provider=provider)
    assert provider.sampler.delegate is named
    provider.shutdown()


@pytest.mark.parametrize(("action", "is_said"), [("search", True), ("recall", False), ("{memory.operation}", False)])
def test_mappings_of_which_no_action_is_allowed_are_warned_of(storage, provider, said, action, is_said):
    mapping = SpanMapping(span_name="memory.search", action=action)
    configure_audit(storage=storage, actions=["recall"], mappings=[mapping], tracer_provider=provider)
    messages = [
        message for message in said() if "none of the mappings gives an action that actions=['recall']" in message
    ]
    assert bool(messages) is is_said


def test_a_tracer_of_ours_that_was_handed_out_before_gets_the_sampler(dropping, storage):
    @audited("recall", tracer_provider=dropping)
    def recall():
        return None

    recall()
    processor = configure_audit(storage=storage, actions="*", tracer_provider=dropping)
    recall()
    assert rows_after(processor, storage) == ["recall"]


@needs_kept_tracers
@pytest.mark.parametrize("scope", ["memory", None], ids=["of the mapping's scope", "of any scope"])
@pytest.mark.parametrize("arguments", [(), ("1.2",), ("1.2", "https://schema", {"a": 1})], ids=len)
def test_a_mapped_library_s_tracer_that_was_handed_out_before_gets_the_sampler(dropping, storage, scope, arguments):
    tracer = dropping.get_tracer("memory", *arguments)
    mapping = SpanMapping(span_name="memory.{action}", scope=scope)
    processor = configure_audit(storage=storage, actions="*", mappings=[mapping], tracer_provider=dropping)
    tracer.start_span("memory.recall").end()
    assert rows_after(processor, storage) == ["recall"]


def test_a_tracer_that_is_made_later_gets_the_sampler(dropping, storage):
    mapping = SpanMapping(span_name="memory.{action}")
    processor = configure_audit(storage=storage, actions="*", mappings=[mapping], tracer_provider=dropping)
    dropping.get_tracer("anything", "1.0").start_span("memory.recall").end()
    assert rows_after(processor, storage) == ["recall"]


@needs_kept_tracers
def test_a_tracer_whose_sampler_was_chosen_by_somebody_keeps_it(provider, storage):
    tracer = provider.get_tracer("memory")
    tracer.sampler = ALWAYS_OFF
    mapping = SpanMapping(span_name="memory.{action}", scope="memory")
    configure_audit(storage=storage, actions="*", mappings=[mapping], tracer_provider=provider)
    assert tracer.sampler is ALWAYS_OFF


def test_a_second_pipeline_gets_its_own_actions_from_tracers_that_were_handed_out(dropping):
    first, second = MemoryStorage(), MemoryStorage()
    one = configure_audit(storage=first, actions=["recall"], tracer_provider=dropping)
    with audit_operation("recall", tracer_provider=dropping):
        pass
    two = configure_audit(storage=second, actions=["retain"], tracer_provider=dropping)
    with audit_operation("retain", tracer_provider=dropping):
        pass
    assert attached_to(dropping) == [one, two]
    assert (rows_after(one, first), rows_after(two, second)) == (["recall"], ["retain"])


def test_a_provider_whose_sampler_cannot_be_wrapped_is_used_as_it_is_and_warned_of(storage, said):
    class Wrapper:
        """As another vendor's provider is: it takes processors, and keeps its sampler to itself."""

        def get_tracer(self, *arguments):
            return trace.ProxyTracer(*arguments)

        def add_span_processor(self, processor):
            self.processor = processor

    provider = Wrapper()
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert provider.processor is processor
    assert said() == [
        "The sampler of a " + Wrapper.__qualname__ + " can't be wrapped: audit spans that it drops are not audited."
    ]
    processor.shutdown()


@pytest.fixture
def built_in_normalizer(monkeypatch):
    """No normalizer was set yet, and the one that a test sets goes with it."""
    monkeypatch.setattr(emit.operation, "_default_normalizer", emit.operation._BUILT_IN)


@pytest.mark.usefixtures("built_in_normalizer")
def test_the_normalizer_becomes_the_default_one(provider, storage, said):
    processor = configure_audit(
        storage=storage, actions="*", tracer_provider=provider, normalizer=Normalizer(keep={"note"})
    )
    with audit_operation("recall", request={"note": "two words"}, tracer_provider=provider):
        pass
    assert processor.force_flush(10_000)
    assert storage.records[0].request == {"note": "two words"}
    assert said() == []


@pytest.mark.usefixtures("built_in_normalizer")
def test_another_normalizer_replaces_the_first_one_with_a_warning(provider, dropping, said):
    normalizer = Normalizer(keep={"note"})
    for another in (normalizer, None, normalizer):
        configure_audit(storage=MemoryStorage(), actions="*", tracer_provider=dropping, normalizer=another)
    assert said() == []
    configure_audit(storage=MemoryStorage(), actions="*", tracer_provider=provider, normalizer=Normalizer(strict=True))
    [warning] = said()
    assert "has replaced the normalizer of the first one" in warning


@pytest.fixture
def around_adding(monkeypatch):
    """Runs functions around the SDK's own way of adding a processor, which is what is called whatever overrides it."""
    steps = {"before": lambda: None, "after": lambda: None}
    add = TracerProvider.add_span_processor

    def added(provider, processor):
        steps["before"]()
        add(provider, processor)
        steps["after"]()

    monkeypatch.setattr(TracerProvider, "add_span_processor", added)
    return steps


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ALWAYS_ON], ids=["dropping", "sampling"])
def test_an_operation_that_starts_meanwhile_is_audited_with_its_tenant_or_not_at_all(
    storage, around_adding, moment, sampler
):
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    meanwhile = audit_operation("recall", bank_id="bank-1", tracer_provider=provider)

    def start():
        with audit_scope(schema="tenant_a"):
            meanwhile.start()

    around_adding[moment] = start
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
    meanwhile.finish()
    assert processor.force_flush(10_000)
    if (moment, sampler) != ("before", ALWAYS_ON):  # that one was an ordinary span when it started
        assert [row.schema for row in storage.records] == (["tenant_a"] if sampler is ALWAYS_ON else [])
    provider.shutdown()


class Broken(TracerProvider):
    """A provider that fails at one of the steps, once it is made."""

    def __init__(self, step):
        self.step = None
        super().__init__(shutdown_on_exit=False)
        self.step = step

    def __setattr__(self, name, value):
        if name == "sampler" and self.step == name:
            raise AttributeError(name)
        super().__setattr__(name, value)

    def get_tracer(self, *arguments, **named):
        if self.step == "tracer":
            raise RuntimeError
        return super().get_tracer(*arguments, **named)


@pytest.mark.parametrize("step", ["processor", "sampler", "tracer"])
def test_a_set_up_that_fails_leaves_nothing_running(storage, around_adding, step):
    def fail():
        raise RuntimeError

    if step == "processor":
        around_adding["before"] = fail
    provider, threads = Broken(step), threading.active_count()
    with pytest.raises((AttributeError, RuntimeError)):
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert storage.closed
    assert threading.active_count() == threads
    assert attached_to(provider) == []
    provider.shutdown()


# Providers of others.


class Replacing(TracerProvider):
    """As a vendor's is whose first processor goes when another one is added."""

    def add_span_processor(self, processor):
        raise AssertionError("its own processor would go")


class Proxy(trace.TracerProvider):
    """As a vendor's is that is swapped beneath its tracers: no SDK class, and without a hash."""

    __hash__ = None

    def __init__(self, provider):
        self.provider = provider

    def get_tracer(self, *arguments, **named):
        return self.provider.get_tracer(*arguments, **named)

    def add_span_processor(self, processor):
        self.provider.add_span_processor(processor)


def test_only_the_sdk_adds_the_processor_whatever_the_provider_makes_of_adding(storage):
    provider = Replacing(shutdown_on_exit=False)
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == ["recall"]
    provider.shutdown()


@needs_kept_tracers
def test_a_proxy_is_attached_to_where_its_spans_are_made(dropping, storage):
    proxy = Proxy(dropping)
    tracer = proxy.get_tracer("memory")
    mapping = SpanMapping(span_name="memory.{action}")
    processor = configure_audit(storage=storage, actions="*", mappings=[mapping], tracer_provider=proxy)
    tracer.start_span("memory.recall").end()
    assert attached_to(proxy) == attached_to(dropping) == [processor]
    assert isinstance(dropping.sampler, AuditSampler)
    assert rows_after(processor, storage) == ["recall"]


def test_a_proxy_whose_provider_is_another_one_now_has_nothing_attached(provider, dropping, storage):
    proxy = Proxy(provider)
    configure_audit(storage=storage, actions="*", tracer_provider=proxy)
    proxy.provider = dropping
    assert attached_to(proxy) == []
    again = configure_audit(storage=storage, actions="*", tracer_provider=proxy)
    assert attached_to(proxy) == attached_to(dropping) == [again]


def test_a_provider_that_is_gone_leaves_nothing_behind(storage):
    provider = TracerProvider(shutdown_on_exit=False)
    configure_audit(storage=storage, actions="*", tracer_provider=provider).shutdown()
    key = id(provider)
    assert key in attachment._pipelines
    del provider
    gc.collect()
    assert key not in attachment._pipelines


# Called once more.


def said_of_calls(said):
    """The warnings, but for those that nothing listens there."""
    return [message for message in said() if "configure_audit" in message]


def test_called_again_for_the_same_place_it_returns_what_is_there_and_says_nothing(provider, storage, said):
    arguments = {"storage": storage, "actions": ["recall", "retain"], "tracer_provider": provider}
    sampler, threads = provider.sampler, threading.active_count()
    first = configure_audit(**arguments)
    wrapped, running = provider.sampler, threading.active_count()
    assert wrapped is not sampler
    assert running == threads + 1
    assert configure_audit(**{**arguments, "actions": ["retain", "recall"]}) is first
    assert configure_audit(storage=storage, tracer_provider=provider, create_provider=False) is first
    assert (provider.sampler, threading.active_count()) == (wrapped, running)
    assert attached_to(provider) == [first]
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(first, storage) == ["recall"]
    assert (first.stats()["accepted"], said()) == (1, [])


def test_called_again_with_other_settings_it_names_those_that_are_ignored(provider, said):
    dsn = "postgresql://writer:hunter2-planted@127.0.0.1:1/none"
    first = configure_audit(dsn=dsn, actions=["recall"], tracer_provider=provider, export_timeout_millis=50.0)
    again = configure_audit(
        dsn=dsn.replace("hunter2-planted", "hunter3-planted"), actions="*", migrate=False, max_queue_size=7,
        mappings=["astrocyte"], tracer_provider=provider,
    )  # fmt: skip
    assert again is first
    assert first.exporter.selection.allowlist.actions == ("recall",)
    [warning] = said_of_calls(said)
    assert "ignored, as it has them differently: actions, dsn, mappings, max_queue_size. Call it once" in warning
    assert "hunter" not in warning


@pytest.mark.parametrize(
    "other",
    [
        {"dsn": "postgresql://127.0.0.1:1/other"},
        {"dsn": "postgresql://127.0.0.1:2/none"},
        {"table": "other_log"},
        {"schema": "other"},
        {"destination": "other"},
    ],
    ids=lambda other: "".join(other),
)
def test_another_place_is_another_pipeline(provider, said, other):
    arguments = {
        "dsn": "postgresql://127.0.0.1:1/none", "actions": ["recall"], "tracer_provider": provider,
        "export_timeout_millis": 50.0,
    }  # fmt: skip
    first, second = configure_audit(**arguments), configure_audit(**{**arguments, **other})
    assert attached_to(provider) == [first, second]
    assert configure_audit(**{**arguments, **other}) is second
    assert said_of_calls(said) == []


def test_another_provider_is_another_pipeline(provider, dropping, storage):
    first, second = (
        configure_audit(storage=storage, actions="*", tracer_provider=each) for each in (provider, dropping)
    )
    assert first is not second


def test_a_pipeline_that_is_shut_down_makes_room_for_another(provider, said):
    first, second = MemoryStorage(), MemoryStorage()
    arguments = {"actions": "*", "tracer_provider": provider, "destination": "here"}
    before = configure_audit(storage=first, **arguments)
    before.shutdown()
    assert attached_to(provider) == []
    after = configure_audit(storage=second, **arguments)
    assert attached_to(provider) == [after]


def test_threads_that_call_it_at_once_get_one_pipeline(provider, storage):
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(configure_audit, storage=storage, actions="*", tracer_provider=provider) for _ in range(8)]
        assert len({call.result() for call in calls}) == 1
    assert len(attached_to(provider)) == 1


def test_configuring_returns_at_once_while_nothing_listens(provider):
    processor = configure_audit(
        dsn="postgresql://127.0.0.1:1/none", actions="*", tracer_provider=provider, export_timeout_millis=50.0
    )
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert processor.stats()["waiting"] == 1


# The global provider.


def run(script):
    """Run a script in an interpreter of its own: a global provider can be set only once in each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_global_provider_is_made_where_there_is_none_and_the_log_says_so():
    assert run(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s")
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from astrocyte_otel_audit import audited, configure_audit
        from tests.support import MemoryStorage

        @audited("recall")
        def recall(): ...

        storage = MemoryStorage()
        processor = configure_audit(storage=storage, actions="*")
        assert type(trace.get_tracer_provider()) is TracerProvider
        recall()
        assert processor.force_flush()
        print(*[row.action for row in storage.records])
        """
    ) == ["astrocyte_otel_audit.configure", "recall"]


def test_a_global_provider_that_is_there_is_used():
    assert run(
        """
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
        from astrocyte_otel_audit import audited, configure_audit
        from tests.support import MemoryStorage

        @audited("recall")
        def recall(): ...

        mine = TracerProvider(sampler=ALWAYS_OFF)
        trace.set_tracer_provider(mine)
        storage = MemoryStorage()
        processor = configure_audit(storage=storage, actions="*")
        assert trace.get_tracer_provider() is mine
        recall()
        mine.shutdown()
        print(*[row.action for row in storage.records])
        """
    ) == ["recall"]


def test_a_global_provider_whose_tracers_are_in_use_already_is_wrapped_all_the_same():
    assert run(
        """
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
        from astrocyte_otel_audit import audit_operation, audited, configure_audit
        from tests.support import MemoryStorage

        @audited("recall")
        def recall(): ...

        @audited("recall", tracer_provider=trace.get_tracer_provider())
        def recall_by_proxy(): ...

        def everything():
            recall()
            recall_by_proxy()
            with audit_operation("retain"): ...

        everything()
        trace.set_tracer_provider(TracerProvider(sampler=ALWAYS_OFF))
        everything()
        storage = MemoryStorage()
        processor = configure_audit(storage=storage, actions="*")
        everything()
        assert processor.force_flush()
        print(*[row.action for row in storage.records])
        """
    ) == ["recall", "recall", "retain"]


def test_no_global_provider_is_made_where_an_argument_is_wrong():
    assert run(
        """
        from opentelemetry import trace
        from opentelemetry.trace import ProxyTracerProvider
        from astrocyte_otel_audit import ConfigurationError, configure_audit
        from tests.support import MemoryStorage

        for arguments in [
            {"max_queue_size": 0},
            {"normalizer": 7},
            {"actions": "recall"},
            {"destination": "a b"},
            {"spool_keep_seconds": -1},
            {"writer": "external"},
            {"writer": "external", "storage": None, "spool_dir": False},
            {"writer": "external", "storage": None, "spool_keep_seconds": 1},
        ]:
            try:
                configure_audit(**{"storage": MemoryStorage(), **arguments})
            except ConfigurationError as refused:
                print(refused.source)
            assert type(trace.get_tracer_provider()) is ProxyTracerProvider
        """
    ) == [
        "max_queue_size", "normalizer", "actions", "destination", "spool_keep_seconds", "writer",
        "spool_dir", "spool_keep_seconds",
    ]  # fmt: skip


def test_what_waits_is_written_when_the_interpreter_ends():
    assert run(
        """
        from astrocyte_otel_audit import audited, configure_audit
        from tests.support import MemoryStorage

        class Printing(MemoryStorage):
            def close(self):
                print(*[row.action for row in self.records])

        @audited("recall")
        def recall(): ...

        configure_audit(storage=Printing(), actions="*", schedule_delay_millis=3_600_000.0)
        recall()
        """
    ) == ["recall"]


# The global provider, set later.

LATER = """
    import logging, sys
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s:%(message).32s")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
    from opentelemetry.trace import set_tracer_provider
    from astrocyte_otel_audit import AuditLogger, SpanMapping, audited, configure_audit
    from astrocyte_otel_audit.configure import attached_to
    from tests.support import MemoryStorage

    library = trace.get_tracer("memory")

    @audited("recall")
    def recall(): ...

    storage = MemoryStorage()
    arguments = {"storage": storage, "actions": "*", "mappings": [SpanMapping(span_name="memory.{action}")]}
    processor = configure_audit(create_provider=False, **arguments)
    recall()

    def actions():
        assert processor.force_flush()
        return [row.action for row in storage.records]
"""


def run_later(script):
    return run(textwrap.dedent(LATER) + textwrap.dedent(script))


@pytest.mark.parametrize(
    "set_it",
    ["trace.set_tracer_provider(mine)", "set_tracer_provider(mine)"],
    ids=["as the module has it", "as it was imported before"],
)
def test_what_waits_attaches_to_the_provider_that_is_set_later_and_says_what_is_missed(set_it):
    said = run_later(
        f"""
        mine = TracerProvider(sampler=ALWAYS_OFF)
        {set_it}
        assert attached_to(mine) == [processor]
        recall()
        library.start_span("memory.retain").end()
        print(*actions())
        """
    )
    assert said[-2:] == ["recall", "retain"]
    assert " ".join(said[:-2]) == "WARNING:There is no tracer provider yet."


@needs_kept_tracers
def test_a_tracer_of_the_provider_that_is_set_later_may_have_been_handed_out_before():
    said = run_later(
        """
        mine = TracerProvider(sampler=ALWAYS_OFF)
        early = mine.get_tracer("memory", "1.2")
        trace.set_tracer_provider(mine)
        early.start_span("memory.forget").end()
        print(*actions())
        """
    )
    assert said[-1:] == ["forget"]


def test_what_waits_attaches_to_the_provider_that_a_variable_names():
    assert run_later(
        """
        import os
        os.environ["OTEL_PYTHON_TRACER_PROVIDER"] = "sdk_tracer_provider"
        mine = trace.get_tracer_provider()
        assert type(mine) is TracerProvider
        recall()
        print(*actions())
        """
    )[-1:] == ["recall"]


def test_what_waits_is_found_by_who_asks_again_and_attaches_to_what_that_one_makes():
    assert run_later(
        """
        assert attached_to(trace.get_tracer_provider()) == [processor]
        assert configure_audit(create_provider=False, **arguments) is processor
        assert configure_audit(**arguments) is processor
        mine = trace.get_tracer_provider()
        assert type(mine) is TracerProvider
        assert attached_to(mine) == [processor]
        recall()
        print(*actions())
        """
    )[-1:] == ["recall"]


def test_a_second_provider_changes_nothing():
    assert run_later(
        """
        logging.disable(logging.WARNING)
        mine, another = TracerProvider(), TracerProvider()
        trace.set_tracer_provider(mine)
        trace.set_tracer_provider(another)
        assert (attached_to(mine), attached_to(another)) == ([processor], [])
        recall()
        print(*actions())
        """
    )[-1:] == ["recall"]


def test_what_is_shut_down_before_attaches_to_nothing():
    run_later(
        """
        processor.shutdown()
        mine = TracerProvider()
        trace.set_tracer_provider(mine)
        recall()
        assert attached_to(mine) == []
        assert processor.stats()["refused_shutdown"] == 0
        """
    )


def test_two_wait_and_a_failure_of_one_is_in_the_log_and_reaches_nobody():
    said = run_later(
        """
        other = MemoryStorage()
        second = configure_audit(storage=other, actions=["recall"], create_provider=False)
        retiring = processor.exporter
        type(retiring).selection = property(lambda self: 1 / 0 if self is retiring else self.__dict__["selection"])
        mine = TracerProvider(sampler=ALWAYS_OFF)
        trace.set_tracer_provider(mine)
        assert storage.closed
        assert attached_to(mine) == [second]
        recall()
        assert second.force_flush()
        print(*[row.action for row in other.records])
        """
    )
    assert said[-1] == "recall"
    assert "ERROR:Nothing is audited:" in " ".join(said)


def test_a_provider_that_takes_no_processors_is_said_where_it_is_set_later():
    said = run_later(
        """
        trace.set_tracer_provider(trace.NoOpTracerProvider())
        assert storage.closed
        recall()
        """
    )
    assert "ERROR:Nothing is audited:" in " ".join(said)


def test_an_api_that_does_not_say_when_a_provider_is_set_is_refused():
    assert run(
        """
        from opentelemetry import trace
        del trace._set_tracer_provider
        from astrocyte_otel_audit import ConfigurationError, configure_audit
        from tests.support import MemoryStorage

        storage = MemoryStorage()
        try:
            configure_audit(storage=storage, actions="*", create_provider=False)
        except ConfigurationError as refused:
            print(refused.source, storage.closed)
        """
    ) == ["create_provider", "True"]


# What can't be used.


@pytest.mark.parametrize("provider", [trace.NoOpTracerProvider(), trace.ProxyTracerProvider(), object(), "provider"])
def test_a_provider_that_takes_no_processors_is_refused(storage, provider):
    with pytest.raises(
        ConfigurationError, match=r"takes no span processors; accepted is an opentelemetry\.sdk"
    ) as refused:
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert refused.value.source == "tracer_provider"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dsn", "postgresql://user:hunter2-planted%zz@host/db"),
        ("dsn", None),
        ("pool", object()),
        ("actions", "recall"),
        ("actions", [7]),
        ("mappings", ["hindsite"]),
        ("schema", "my schema"),
        ("table", "pg_audit"),
        ("migrate", 1),
        ("normalizer", dict),
        ("writer", "somebody"),
        ("writer", True),
        ("destination", "a b"),
        ("destination", 7),
        ("spool_dir", True),
        ("spool_max_bytes", 0),
        ("spool_fsync", "sometimes"),
        ("spool_keep_seconds", -1),
        ("spool_keep_seconds", "long"),
        ("on_full", "wait"),
        ("on_full_timeout_millis", 0),
        ("max_queue_size", 0),
        ("max_export_batch_size", 0),
        ("schedule_delay_millis", -1),
        ("export_timeout_millis", 0),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_and_nothing_is_attached(provider, argument, value):
    place = {} if argument in ("dsn", "pool") else {"storage": MemoryStorage()}
    sampler = provider.sampler
    with pytest.raises(ConfigurationError, match=f"^{argument}: ") as refused:
        configure_audit(**{"tracer_provider": provider, **place, argument: value})
    assert "hunter2" not in str(refused.value)
    assert (attached_to(provider), provider.sampler) == ([], sampler)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("writer", {"dsn": "postgresql://user:hunter2-planted@host/db"}),
        ("writer", {"pool": ConnectionPool("host=h", open=False)}),
        ("writer", {"storage": MemoryStorage()}),
        ("destination", {"destination": "a b"}),
        ("spool_dir", {"spool_dir": False}),
        ("spool_dir", {"spool_dir": __file__}),
        ("spool_keep_seconds", {"spool_keep_seconds": 1}),
    ],
)
def test_what_an_external_writer_has_no_use_for_is_refused_and_nothing_is_attached(provider, argument, given):
    sampler = provider.sampler
    with pytest.raises(ConfigurationError, match=f"^{argument}: ") as refused:
        configure_audit(writer="external", actions="*", tracer_provider=provider, **given)
    assert refused.value.source == argument
    assert "hunter2" not in str(refused.value)
    assert (attached_to(provider), provider.sampler) == ([], sampler)


async def test_an_async_pool_is_refused(provider):
    pool = AsyncConnectionPool("host=h", open=False)
    with pytest.raises(ConfigurationError, match=r"^pool: got a psycopg_pool.*AsyncConnectionPool"):
        await asyncio.to_thread(configure_audit, pool=pool, tracer_provider=provider)


def test_a_variable_that_cannot_be_used_is_named(provider, storage, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "plenty")
    with pytest.raises(ConfigurationError, match=r"^OTEL_BSP_MAX_QUEUE_SIZE: got 'plenty'"):
        configure_audit(storage=storage, actions="*", tracer_provider=provider)


# Another process writes.


@pytest.fixture
def destinations(tmp_path):
    """Where the records of the processes in the spool belong."""
    return lambda: [process.destination for process in status(tmp_path / "astrocyte-otel-audit" / "spool")]


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ({}, {}, "default"),
        ({"destination": "here"}, {}, "here"),
        ({}, {"DESTINATION": "there"}, "there"),
        ({"destination": "here"}, {"DESTINATION": "there"}, "here"),
        ({}, {"DSN": "postgresql://host/db"}, "default"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_with_an_external_writer_records_are_in_the_spool_for_a_destination(
    provider, monkeypatch, destinations, by, arguments, variables, expected
):
    if by == "variable":
        variables, arguments = {**variables, "WRITER": "external"}, arguments
    else:
        arguments = {**arguments, "writer": "external"}
    for name, text in variables.items():
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_" + name, text)
    threads = set(threading.enumerate())
    processor = configure_audit(actions="*", tracer_provider=provider, **arguments)
    with audit_operation("recall", tracer_provider=provider) as operation:
        pass
    assert operation.record_id is not None
    assert not processor.force_flush(20)
    assert set(threading.enumerate()) <= threads
    assert (processor.exporter.destination, destinations()) == (expected, [expected])


def test_with_an_external_writer_a_configuration_that_is_right_says_nothing(provider, said):
    processor = configure_audit(writer="external", actions="*", tracer_provider=provider)
    with audit_operation("recall", required=True, tracer_provider=provider):
        pass
    processor.shutdown()
    assert said() == []


def test_a_variable_for_an_external_writer_refuses_what_has_a_connection_too(provider, storage, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "external")
    with pytest.raises(ConfigurationError, match=r"^writer: external writes through no connection of this process"):
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
    processor = configure_audit(writer="thread", storage=storage, actions="*", tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == ["recall"]


def test_a_named_destination_goes_before_the_one_that_is_made_of_the_dsn(provider, dropping, destinations):
    dsn = "postgresql://127.0.0.1:1/none"
    processors = [
        configure_audit(dsn=dsn, actions="*", tracer_provider=each, export_timeout_millis=50.0, **named)
        for each, named in ((provider, {"destination": "here"}), (dropping, {}))
    ]
    for each in (provider, dropping):
        with audit_operation("recall", tracer_provider=each):
            pass
    own, named = processors[1].exporter.destination, "here"
    assert own.endswith("/astrocyte_audit_log")
    assert sorted(destinations()) == sorted([own, named])


def test_processes_of_one_destination_write_what_is_in_each_others_spool(provider, dropping, storage):
    left = configure_audit(
        dsn="postgresql://127.0.0.1:1/none", destination="here", actions="*", tracer_provider=provider,
        export_timeout_millis=50.0,
    )  # fmt: skip
    with audit_operation("recall", tracer_provider=provider):
        pass
    left.shutdown()
    adopted = threading.Event()
    storage.before_append = lambda records: adopted.set()
    following = configure_audit(storage=storage, destination="here", actions="*", tracer_provider=dropping)
    assert adopted.wait(20)
    assert rows_after(following, storage) == ["recall"]


def test_the_meter_provider_is_the_one_that_is_given(provider, storage):
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    configure_audit(storage=storage, actions="*", tracer_provider=provider, meter_provider=meters)
    [resource] = reader.get_metrics_data().resource_metrics
    assert [scope.scope.name for scope in resource.scope_metrics] == ["astrocyte_otel_audit"]
    meters.shutdown()


# What would leave the log empty, or cut.


@pytest.mark.parametrize("actions", [None, [], ()])
def test_an_empty_allowlist_is_warned_of_once_with_what_to_do(provider, storage, said, actions):
    processor = configure_audit(storage=storage, actions=actions, tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == []
    [warning] = said()
    assert warning.startswith("Nothing is audited: the allowlist is empty.")
    assert "OTEL_ASTROCYTE_AUDIT_ACTIONS" in warning


def test_a_disabled_sdk_is_warned_of_once_with_what_to_do(storage, said, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = TracerProvider(shutdown_on_exit=False)
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == []
    [warning] = said()
    assert warning.startswith("Nothing is audited: the tracer provider makes no spans.")
    assert "OTEL_SDK_DISABLED" in warning
    provider.shutdown()


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_span_attributes": 31}, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ({"max_attributes": 31}, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ({"max_span_attributes": 32}, None),
        ({"max_span_attribute_length": 127}, "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
        ({"max_attribute_length": 127}, "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
        ({"max_span_attribute_length": 128}, None),
        ({}, None),
    ],
)
def test_limits_that_would_cut_records_are_warned_of_with_the_variable_to_set(storage, said, limits, named):
    provider = TracerProvider(span_limits=SpanLimits(**limits), shutdown_on_exit=False)
    configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert [named in warning for warning in said()] == ([True] if named else [])
    provider.shutdown()


def test_limits_from_the_environment_are_seen_too(storage, said, monkeypatch):
    monkeypatch.setenv("OTEL_ATTRIBUTE_COUNT_LIMIT", "8")
    provider = TracerProvider(shutdown_on_exit=False)
    configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert ["only 8 attributes" in warning for warning in said()] == [True]
    provider.shutdown()


def test_a_set_up_that_is_right_says_nothing(provider, storage, said):
    processor = configure_audit(storage=storage, actions=["recall"], tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert rows_after(processor, storage) == ["recall"]
    processor.shutdown()
    assert said() == []


def test_a_sampled_trace_stays_a_sampled_trace(storage):
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    configure_audit(storage=storage, actions="*", tracer_provider=provider)
    with audit_operation("recall", tracer_provider=provider):
        assert trace.get_current_span().get_span_context().trace_flags.sampled
    provider.shutdown()


# Retention.

NOWHERE = "postgresql://127.0.0.1:1/none"


class Sweeper:
    """Stands in for a database with five expired rows."""

    schema = "public"

    def __init__(self, expired=5):
        self.expired = expired

    def tenants(self, schemas=None):
        return [Tenant("public")]

    def last_run(self):
        return None

    def now(self):
        return datetime.now(UTC)

    def sweep(self, schema, cutoffs, **rest):
        rows, self.expired = self.expired, 0
        return Swept(schema, rows=rows)

    def close(self):
        pass


@pytest.fixture
def sweeper(monkeypatch):
    """What every exporter deletes by; it notes the connection strings that it is asked for by."""
    sweeper, asked = Sweeper(), []
    monkeypatch.setattr(AuditSpanExporter, "sweeper", lambda self, dsn=None: asked.append(dsn) or sweeper)
    sweeper.asked = asked
    return sweeper


@pytest.mark.parametrize("create", [ALWAYS_ON, ALWAYS_OFF], ids=["sampled", "not sampled"])
def test_a_run_of_the_retention_is_a_row_whatever_is_audited(storage, sweeper, create):
    provider = TracerProvider(sampler=create, shutdown_on_exit=False)
    processor = configure_audit(
        storage=storage,
        actions=[],
        tracer_provider=provider,
        retention=RetentionPolicy(days=30, jitter_seconds=0),
        retention_dsn="host=a",
    )
    deadline = time.monotonic() + 20
    while processor.stats()["retention_rows"] < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    provider.shutdown()
    [row] = storage.records
    assert (row.action, row.outcome, row.metadata["rows"]) == ("audit.retention", "success", 5)
    assert row.sampled is (create is ALWAYS_ON)
    assert set(sweeper.asked) == {"host=a"}


def test_without_a_retention_there_is_none(provider, storage):
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert processor.retention is None


@pytest.mark.parametrize("days", [30, RetentionPolicy(days=30), None], ids=["days", "a policy", "a variable"])
def test_a_retention_is_a_policy_or_days_or_the_environment_s(provider, storage, sweeper, monkeypatch, days):
    if days is None:
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS", "30")
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider, retention=days)
    assert processor.retention.policy == RetentionPolicy(days=30)
    assert processor.retention.is_started
    processor.shutdown()
    assert not processor.retention.is_started


def test_false_is_no_retention_whatever_the_environment_says(provider, storage, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS", "30")
    processor = configure_audit(storage=storage, actions="*", tracer_provider=provider, retention=False)
    assert processor.retention is None


@pytest.mark.parametrize("arguments", [{"storage": MemoryStorage()}, {"writer": "external"}], ids=["storage", "writer"])
def test_where_this_process_writes_to_no_database_the_retention_asks_for_one(provider, arguments, monkeypatch):
    monkeypatch.setattr(trace, "set_tracer_provider", lambda provider: pytest.fail("a provider was set"))
    with pytest.raises(ConfigurationError, match=r"^retention_dsn: no database to delete from.*_RETENTION_DSN$"):
        configure_audit(actions="*", retention=30, **arguments)
    processor = configure_audit(actions="*", retention=30, retention_dsn=NOWHERE, tracer_provider=provider, **arguments)
    assert processor.retention.is_started


def test_the_retention_has_the_writer_s_connection_string_and_names_but_not_its_connection():
    exporter = AuditSpanExporter(dsn="host=a dbname=b", schema="tenant_a", table="log")
    sweeper = exporter.sweeper()
    assert (sweeper.schema, sweeper.table) == ("tenant_a", "log")
    assert sweeper._connections.database == exporter.storage._connections.database
    assert sweeper._connections is not exporter.storage._connections


def test_the_retention_has_a_connection_string_of_its_own_where_one_is_given(monkeypatch):
    exporter = AuditSpanExporter(dsn="host=a dbname=b")
    by_argument = exporter.sweeper("host=c dbname=d")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DSN", "host=c dbname=d")
    databases = {each._connections.database for each in (by_argument, exporter.sweeper(), exporter.storage)}
    assert len(databases) == 2
    assert by_argument._connections.database == exporter.sweeper()._connections.database


def test_the_retention_has_the_lent_pool():
    exporter = AuditSpanExporter(pool=ConnectionPool("host=h", open=False))
    assert exporter.sweeper()._connections is exporter.storage._connections


def test_a_function_to_the_schema_leaves_the_retention_s_rows_in_the_default_one():
    assert AuditSpanExporter(dsn="host=a", schema=lambda: "tenant_a").sweeper().schema == "public"


@pytest.mark.parametrize(
    ("arguments", "variables", "source"),
    [
        ({"retention": 0}, {}, "retention"),
        ({"retention": "30"}, {}, "retention"),
        ({"retention": 30}, {"MINIMUM_DAYS": "hipaa"}, "retention"),
        ({}, {"DAYS": "soon"}, "OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS"),
        ({"retention": 30}, {"BATCH_SIZE": "0"}, "OTEL_ASTROCYTE_AUDIT_RETENTION_BATCH_SIZE"),
        ({"retention": 30, "retention_dsn": "host='"}, {}, "retention_dsn"),
    ],
    ids=str,
)
def test_a_retention_that_can_not_be_used_is_refused_before_anything_is_attached(
    provider, monkeypatch, arguments, variables, source
):
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_ASTROCYTE_AUDIT_RETENTION_{name}", value)
    with pytest.raises(ConfigurationError) as refused:
        configure_audit(dsn=NOWHERE, actions="*", tracer_provider=provider, **arguments)
    assert refused.value.source == source
    assert attached_to(provider) == []
