"""`configure_audit`: builds the pipeline, attaches it, and says what would leave the log empty."""

import asyncio
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
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


class Watched(TracerProvider):
    """Runs a function when a processor is attached, before or after."""

    before = after = staticmethod(lambda: None)

    def add_span_processor(self, processor):
        self.before()
        super().add_span_processor(processor)
        self.after()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ALWAYS_ON], ids=["dropping", "sampling"])
def test_an_operation_that_starts_meanwhile_is_audited_with_its_tenant_or_not_at_all(storage, moment, sampler):
    provider = Watched(sampler=sampler, shutdown_on_exit=False)
    meanwhile = audit_operation("recall", bank_id="bank-1", tracer_provider=provider)

    def start():
        with audit_scope(schema="tenant_a"):
            meanwhile.start()

    setattr(provider, moment, start)
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

    def add_span_processor(self, processor):
        if self.step == "processor":
            raise RuntimeError
        super().add_span_processor(processor)

    def get_tracer(self, *arguments, **named):
        if self.step == "tracer":
            raise RuntimeError
        return super().get_tracer(*arguments, **named)

    def __hash__(self):
        if self.step == "hash":
            raise TypeError
        return super().__hash__()


@pytest.mark.parametrize("step", ["processor", "sampler", "tracer", "hash"])
def test_a_set_up_that_fails_leaves_nothing_running(storage, step):
    provider, threads = Broken(step), threading.active_count()
    with pytest.raises((AttributeError, RuntimeError, TypeError)):
        configure_audit(storage=storage, actions="*", tracer_provider=provider)
    assert storage.closed
    assert threading.active_count() == threads
    provider.shutdown()


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


def test_no_global_provider_is_made_where_that_is_not_wanted_or_an_argument_is_wrong():
    assert run(
        """
        from opentelemetry import trace
        from opentelemetry.trace import ProxyTracerProvider
        from astrocyte_otel_audit import ConfigurationError, configure_audit
        from tests.support import MemoryStorage

        for arguments in [
            {"create_provider": False},
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
        "tracer_provider", "max_queue_size", "normalizer", "actions", "destination", "spool_keep_seconds", "writer",
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
