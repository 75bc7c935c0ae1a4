"""`AuditSpanExporter`: its two doors, their sum inside stock processors, and what it is made of."""

import asyncio
import logging

import pytest
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExportResult
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from astrocyte_otel_audit import AuditSpanExporter, ConfigurationError, audited
from astrocyte_otel_audit.postgres import Appended, Fault, FaultClass
from tests.records import bare_record
from tests.support import MemoryStorage, unavailable

PASSWORD = "hunter2-planted"
NO_TABLE = Fault(FaultClass.PARK, "the table does not exist", "42P01")


@pytest.fixture
def exporter(storage):
    return AuditSpanExporter(storage=storage, actions=["recall"])


@pytest.fixture
def span(provider):
    """Makes an ended span, by default one that is audited."""

    def make(name="audit recall", **attributes):
        span = provider.get_tracer("test").start_span(name, attributes=attributes or {"audit.action": "recall"})
        span.end()
        return span

    return make


# The two doors.


def test_record_gives_the_record_of_an_allowlisted_span_and_none_of_any_other(exporter, span):
    assert exporter.record(span()).action == "recall"
    assert exporter.record(span(**{"audit.action": "retain"})) is None
    assert exporter.record(span("GET /", **{"http.route": "/"})) is None


def test_write_gives_the_records_to_the_storage_and_says_what_became_of_them(exporter, storage):
    storage.parked["a"] = NO_TABLE
    good, waiting = bare_record(0), bare_record(1, schema="a")
    appended = exporter.write([good, waiting])
    assert storage.records == [good]
    assert (appended.stored, appended.parked) == (1, {"a": (NO_TABLE, [waiting])})


def test_check_is_the_storages(exporter, storage):
    assert exporter.check() is None
    storage.fault = NO_TABLE
    assert exporter.check() is NO_TABLE


@pytest.mark.parametrize("door", ["write", "check"])
def test_instrumentation_is_suppressed_while_the_storage_is_used_and_not_after(exporter, storage, door):
    seen = []
    storage.before_append = lambda records: seen.append(is_instrumentation_enabled())
    storage.check = lambda: seen.append(is_instrumentation_enabled())
    exporter.write([bare_record()]) if door == "write" else exporter.check()
    assert (seen, is_instrumentation_enabled()) == ([False], True)


def test_an_instrumentation_that_does_not_ask_makes_spans_that_are_not_sampled(exporter, storage, provider):
    """As psycopg's did up to 0.51b0, with the SDK's default sampler."""
    seen = []
    storage.before_append = lambda records: seen.append(provider.get_tracer("psycopg").start_span("INSERT"))
    exporter.write([bare_record()])
    assert [span.is_recording() for span in seen] == [False]
    assert provider.get_tracer("psycopg").start_span("SELECT").is_recording()


def test_instrumentation_is_back_after_a_failure_too(exporter, storage):
    storage.before_append = unavailable
    assert exporter.export([]) is SpanExportResult.SUCCESS
    with pytest.raises(Exception, match="nothing listens there"):
        exporter.write([bare_record()])
    assert is_instrumentation_enabled()


# Inside stock processors.


def test_export_stores_the_audit_spans_and_leaves_the_others(exporter, storage, span):
    spans = [span(), span("GET /", **{"http.route": "/"}), span(**{"audit.action": "retain"}), span()]
    assert exporter.export(spans) is SpanExportResult.SUCCESS
    assert [record.action for record in storage.records] == ["recall", "recall"]


def test_export_of_nothing_to_audit_does_not_touch_the_storage(exporter, storage, span):
    assert exporter.export([span("GET /", **{"http.route": "/"})]) is SpanExportResult.SUCCESS
    assert storage.batches == []


def test_export_fails_where_the_storage_is_away_and_says_how_many_are_lost(exporter, storage, span, caplog):
    storage.before_append = unavailable
    assert exporter.export([span(), span()]) is SpanExportResult.FAILURE
    assert caplog.messages[-1] == (
        "2 audit records are lost, as a stock processor does not retry: nothing listens there"
    )


def test_export_fails_where_a_tenants_table_is_missing(exporter, storage, span, caplog):
    storage.parked[None] = NO_TABLE
    assert exporter.export([span()]) is SpanExportResult.FAILURE
    assert caplog.messages[-1].startswith("1 audit records are lost, as a stock processor does not retry: the table do")


def test_a_record_that_is_set_aside_is_kept_and_no_failure(exporter, storage, span):
    fault = Fault(FaultClass.SET_ASIDE, "no")
    storage.append = lambda records: Appended(set_aside=[(records[0], fault)])
    assert exporter.export([span()]) is SpanExportResult.SUCCESS


def test_a_span_that_cannot_become_a_record_does_not_take_its_batch_with_it(storage, span, caplog):
    exporter = AuditSpanExporter(storage=storage, actions="*")
    broken = ReadableSpan("audit recall", attributes={"audit.action": "recall"})  # it has no context
    assert exporter.export([span(), broken, span()]) is SpanExportResult.SUCCESS
    assert len(storage.records) == 2
    assert "a span could not become a record (AttributeError)." in caplog.messages


@pytest.mark.parametrize("stock", [SimpleSpanProcessor, BatchSpanProcessor])
def test_a_stock_processor_works_and_is_warned_of_once(exporter, storage, provider, stock, caplog):
    provider.add_span_processor(stock(exporter))

    @audited("recall", tracer_provider=provider)
    def recall():
        return {"hits": 3}

    for _ in range(3):
        recall()
        assert provider.force_flush()
    assert [record.response for record in storage.records] == [{"hits": 3}] * 3
    [warning] = [message for message in caplog.messages if "best-effort" in message]
    assert "configure_audit()" in warning


def test_a_stock_processors_shutdown_closes_the_storage(exporter, storage, provider):
    provider.add_span_processor(BatchSpanProcessor(exporter))
    provider.shutdown()
    assert storage.closed


def test_force_flush_is_true_since_nothing_waits_in_here(exporter):
    assert exporter.force_flush(1)


# The tenant's schema.


@pytest.mark.parametrize(
    ("answer", "schema"), [("tenant_a", "tenant_a"), ("", None), (None, None), (7, None), (b"tenant_a", None)]
)
def test_a_schema_function_gives_the_tenants_schema_or_the_default(storage, answer, schema):
    exporter = AuditSpanExporter(storage=storage, schema=lambda: answer)
    assert exporter.current_schema() == schema


def test_a_schema_function_that_fails_gives_the_default_schema_and_one_warning(storage, caplog):
    def tenant():
        raise LookupError("no tenant in the planted words")

    exporter = AuditSpanExporter(storage=storage, schema=tenant)
    assert [exporter.current_schema() for _ in range(100)] == [None] * 100
    assert caplog.messages == ["the schema function failed (LookupError): its records go to the default schema."]


# Where its records belong.


def test_its_destination_is_made_of_the_database_and_the_table_and_has_no_password_in_it():
    destinations = {
        AuditSpanExporter(dsn=dsn, table=table).destination
        for dsn in (f"postgresql://u:{PASSWORD}@h/a", f"postgresql://u:{PASSWORD}@h/b", "host=h2 dbname=a")
        for table in ("log", "log_2")
    }
    assert len(destinations) == 6
    assert PASSWORD not in str(destinations)
    assert AuditSpanExporter(dsn="host=h dbname=a", table="log").destination in destinations


@pytest.mark.parametrize("place", [{"dsn": "host=h"}, {"storage": MemoryStorage()}])
def test_a_destination_that_is_named_goes_before_the_one_that_is_made(place, monkeypatch):
    own = AuditSpanExporter(**place).destination
    assert AuditSpanExporter(**place, destination="here").destination == "here" != own
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DESTINATION", "there")
    assert AuditSpanExporter(**place).destination == "there"
    assert AuditSpanExporter(**place, destination="here").destination == "here"


def test_the_destination_of_another_storage_is_what_it_says_itself_or_its_class(storage):
    assert AuditSpanExporter(storage=storage).destination == "MemoryStorage"
    storage.destination = "a list"
    assert AuditSpanExporter(storage=storage).destination == "a list"


# What can't be used.


def refusal(**arguments):
    with pytest.raises(ConfigurationError) as refused:
        AuditSpanExporter(**arguments)
    return refused.value


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dsn", ""),
        ("dsn", 7),
        ("dsn", "postgresql://host/db?no_such_option=1"),
        ("dsn", "no such form"),
        ("actions", "recall"),
        ("actions", b"recall"),
        ("actions", ["recall", 7]),
        ("actions", [" "]),
        ("actions", 7),
        ("mappings", "astrocyte"),
        ("mappings", ["hindsite"]),
        ("mappings", [7]),
        ("schema", "my schema"),
        ("schema", "pg_catalog"),
        ("schema", 'a"b'),
        ("schema", 7),
        ("table", "a.b"),
        ("table", "t" * 45),
        ("migrate", "yes"),
        ("destination", ""),
        ("destination", "a b"),
        ("destination", "d" * 65),
        ("destination", 7),
        ("export_timeout_millis", 0),
        ("export_timeout_millis", float("nan")),
        ("pool", object()),
        ("pool", "postgresql://host/db"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(argument, value):
    place = {} if argument in ("dsn", "pool") else {"dsn": "postgresql://host/db"}
    refused = refusal(**{**place, argument: value})
    assert refused.source == argument
    assert str(refused).startswith(f"{argument}: ")
    assert "accepted " in str(refused) or "belong to Postgres" in str(refused)


@pytest.mark.parametrize("dsn", [f"postgresql://u:{PASSWORD}%zz@host/db", f"host=h password='{PASSWORD}", PASSWORD])
def test_a_dsn_that_cannot_be_parsed_is_not_quoted(dsn):
    refused = refusal(dsn=dsn)
    assert refused.source == "dsn"
    assert PASSWORD not in str(refused)
    assert refused.__cause__ is None
    assert refused.__suppress_context__


def test_a_place_to_write_to_is_needed_and_the_variable_is_named():
    refused = refusal(actions=["recall"])
    assert (refused.source, "OTEL_ASTROCYTE_AUDIT_DSN" in str(refused)) == ("dsn", True)


@pytest.mark.parametrize(
    "places", [{"dsn": "host=h", "storage": MemoryStorage()}, {"dsn": "host=h", "pool": 7}, {"pool": 7, "storage": 7}]
)
def test_two_places_to_write_to_are_one_too_many(places):
    assert "one of dsn, pool and storage" in str(refusal(**places))


async def test_an_async_pool_is_refused_with_the_way_out():
    pool = AsyncConnectionPool("host=h", open=False)
    refused = await asyncio.to_thread(refusal, pool=pool)
    assert refused.source == "pool"
    assert "AsyncConnectionPool" in str(refused)
    assert "give a dsn" in str(refused)


def test_a_pool_that_is_not_open_yet_is_accepted():
    AuditSpanExporter(pool=ConnectionPool("host=h", open=False))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OTEL_ASTROCYTE_AUDIT_SCHEMA", "my schema"),
        ("OTEL_ASTROCYTE_AUDIT_TABLE", "a.b"),
        ("OTEL_ASTROCYTE_AUDIT_MIGRATE", "perhaps"),
        ("OTEL_ASTROCYTE_AUDIT_DESTINATION", "a b"),
        ("OTEL_ASTROCYTE_AUDIT_EXPORT_TIMEOUT_MILLIS", "soon"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "-1"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    assert refusal(dsn="host=h").source == variable


def test_everything_may_come_from_the_environment(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", "host=h")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_ACTIONS", "recall, retain.*")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MAPPINGS", "astrocyte")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_SCHEMA", "tenant_a")
    exporter = AuditSpanExporter()
    assert exporter.selection.allowlist.actions == ("recall", "retain.*")
    assert {mapping.scope for mapping in exporter.selection.mappings} == {"astrocyte"}
    assert exporter.storage.schema == exporter.default_schema == "tenant_a"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
