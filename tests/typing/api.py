"""How the public API is used, for the type checker: checked with `mypy --strict`, never run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, assert_type

from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Sampler
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import astrocyte_otel_audit
from astrocyte_otel_audit import (
    AuditEntry,
    AuditError,
    AuditLogger,
    AuditRecord,
    AuditSampler,
    AuditSpanExporter,
    AuditSpanProcessor,
    AuditUnavailableError,
    ConfigurationError,
    Normalizer,
    SpanMapping,
    SpanPattern,
    audit_operation,
    audit_scope,
    audited,
    configure_audit,
    enrich_astrocyte,
    get_default_audit_logger,
    set_default_audit_logger,
)


class Action(StrEnum):
    RETAIN = "retain"


# A name that is not there is an error, although the others are imported late.
misspelt = astrocyte_otel_audit.audit_operations  # type: ignore[attr-defined]


# A decorated function keeps its signature.


@audited("recall")
def sync(query: str, bank_id: str, *, top_k: int = 10) -> list[str]:
    return [query, bank_id][:top_k]


@audited("recall")
async def coroutine(query: str, bank_id: str, *, top_k: int = 10) -> list[str]:
    return [query, bank_id][:top_k]


@audited("recall")
def generator(query: str) -> Generator[str, int, bool]:
    received = yield query
    return received > 0


@audited("recall")
def iterator(query: str) -> Iterator[str]:
    yield query


@audited("recall")
async def async_generator(query: str) -> AsyncGenerator[str, int]:
    yield query


@audited("recall")
async def async_iterator(query: str) -> AsyncIterator[str]:
    yield query


class Service:
    @audited(Action.RETAIN)
    def method(self, query: str) -> int:
        return len(query)

    @audited("retain")
    async def async_method(self, query: str) -> int:
        return len(query)

    @audited("retain")
    def generator_method(self, query: str) -> Iterator[str]:
        yield query

    @audited("retain")
    async def async_generator_method(self, query: str) -> AsyncIterator[str]:
        yield query

    @classmethod
    @audited("retain")
    def class_method(cls, query: str) -> type[Service]:
        return cls

    @staticmethod
    @audited("retain")
    def static_method(query: str) -> int:
        return len(query)


async def calls() -> None:
    assert_type(sync("q", "b", top_k=1), list[str])
    await assert_type(coroutine("q", "b", top_k=1), Coroutine[Any, Any, list[str]])
    assert_type(await coroutine("q", "b"), list[str])
    assert_type(generator("q"), Generator[str, int, bool])
    assert_type(iterator("q"), Iterator[str])
    assert_type(async_generator("q"), AsyncGenerator[str, int])
    assert_type([item async for item in async_iterator("q")], list[str])

    service = Service()
    assert_type(service.method("q"), int)
    assert_type(Service.method(service, "q"), int)
    assert_type(await service.async_method("q"), int)
    assert_type(list(service.generator_method("q")), list[str])
    assert_type([item async for item in service.async_generator_method("q")], list[str])
    assert_type(Service.class_method("q"), type[Service])
    assert_type(Service.static_method("q"), int)

    # A wrong call is an error, as if the function were not decorated; an ignore that isn't needed is one too.
    sync("q")  # type: ignore[call-arg]
    sync("q", "b", limit=1)  # type: ignore[call-arg]
    sync(1, "b")  # type: ignore[arg-type]
    await coroutine("q")  # type: ignore[call-arg]
    service.method(1)  # type: ignore[arg-type]
    Service.static_method(1)  # type: ignore[arg-type]


# A signature can be asked for, and passed on.
asked_for: Callable[[str, str], list[str]] = sync
awaited: Callable[[str, str], Awaitable[list[str]]] = coroutine


# Every form of every argument.


def arguments_to_payload(arguments: Mapping[str, Any]) -> Mapping[str, object]:
    return {"top_k": arguments["top_k"]}


def result_to_payload(result: list[str]) -> object:
    return {"hits": len(result)}


def arguments_to_bank(arguments: Mapping[str, Any]) -> str | None:
    return None


@audited("recall", bank_id="bank-1", transport="http", request=True, response=True)
@audited("recall", bank_id=arguments_to_bank, request=arguments_to_payload, response=result_to_payload)
@audited("recall", bank_id=lambda arguments: arguments["bank"], response=lambda result: len(result))
@audited("recall", request=["top_k"], response=False)
@audited("recall", request=("top_k", "depth"))
@audited("recall", request={"top_k"})
@audited("recall", request=False, required=True, normalizer=Normalizer(strict=True))
@audited("recall", tracer_provider=TracerProvider())
def everything(bank: str, top_k: int, depth: int) -> list[str]:
    return [bank] * top_k * depth


audited()  # type: ignore[call-arg]
audited("recall", bank="bank-1")  # type: ignore[call-arg]
audited(None)  # type: ignore[arg-type]
audited("recall", request=5)  # type: ignore[arg-type]
audited("recall", response=["hits"])  # type: ignore[arg-type]
audited("recall", bank_id=5)  # type: ignore[arg-type]


# Operations and scopes.


async def blocks() -> None:
    with audit_operation("retain", bank_id="bank-1", request={"content": "…"}, metadata={"attempt": 1}) as operation:
        assert_type(operation.record_id, str | None)
        operation.response = {"stored": True}
        operation.response = ["any", "payload"]
        operation.metadata["rank"] = 2
        operation.outcome = "failure"
        operation.error_type = "rejected"
        operation.bank_id = "bank-2"
        operation.outcome = "failed"  # type: ignore[assignment]
    async with audit_operation("retain", required=True, actor_id="user-7", actor_type="user") as operation:
        operation.request = {"top_k": 5}

    with audit_scope(actor_id="user-7", actor_type="user", transport="http", bank_id="bank-1", schema="tenant_a"):
        pass
    async with audit_scope(transport="mcp") as scope:
        assert_type(scope, audit_scope)

    both: AbstractContextManager[audit_operation] = audit_operation("retain")
    both_async: AbstractAsyncContextManager[audit_operation] = audit_operation("retain")
    with both, audit_scope():
        pass
    async with both_async:
        pass


# The imperative interface, as code for upstream has it.


class Store:
    _pool: AsyncConnectionPool | None = None

    def schema(self) -> str:
        return "public"


async def imperative(store: Store, pool: ConnectionPool) -> None:
    log = AuditLogger(
        pool_getter=lambda: store._pool,
        schema_getter=lambda: store.schema(),
        enabled=True,
        allowed_actions=["retain", "recall", "classify"],
        retention_days=30,
        table="astrocyte_audit_log",
    )
    log.log(AuditEntry(action="recall", transport="bench", bank_id="bank-1", request={"top_k": 20}))
    async with log.log_with_timing(AuditEntry("recall", "bench")) as entry:
        assert_type(entry, AuditEntry)
        entry.response = {"hits": 3}
        entry.metadata["attempt"] = 1
        entry.outcome = "failure"
    with log.log_with_timing(AuditEntry("recall", "bench")) as entry:
        assert_type(entry.ended_at, datetime | None)
    assert_type(log.is_enabled("recall"), bool)
    log.start_retention_sweep()
    await log.stop_retention_sweep()
    set_default_audit_logger(log)
    assert_type(get_default_audit_logger(), AuditLogger)
    AuditLogger(pool_getter=lambda: pool)
    AuditLogger(enabled=True)  # type: ignore[call-arg]


# Setting up.


class MyExporter(AuditSpanExporter):
    pass


def set_up(provider: TracerProvider, pool: ConnectionPool, meters: MeterProvider) -> None:
    assert_type(configure_audit(), AuditSpanProcessor)
    processor = configure_audit(
        dsn="postgresql://localhost/app",
        actions=["retain", "recall.*"],
        mappings=["astrocyte", SpanMapping(span_name="engine.{action}", scope="engine", bank_id=["engine.bank"])],
        schema=lambda: "tenant_a",
        table="astrocyte_audit_log",
        migrate=True,
        normalizer=Normalizer(keep=["query"], hash_key=b"0123456789abcdef"),
        tracer_provider=provider,
        create_provider=False,
        writer="thread",
        destination="memories",
        spool_dir="/var/lib/audit",
        spool_max_bytes=1 << 20,
        spool_fsync="always",
        spool_keep_seconds=60,
        on_full="block",
        on_full_timeout_millis=100,
        max_queue_size=1024,
        schedule_delay_millis=100,
        max_export_batch_size=512,
        export_timeout_millis=1000,
        meter_provider=meters,
    )
    configure_audit(pool=pool, actions="*")
    configure_audit(writer="external", destination="memories", spool_dir=Path("spool"), actions="*")
    configure_audit(spool_dir=False, spool_keep_seconds=0.5)
    configure_audit(writer="process")  # type: ignore[arg-type]
    configure_audit(spool_dir=True)  # type: ignore[arg-type]
    configure_audit(spool_fsync="sometimes")  # type: ignore[arg-type]
    configure_audit(on_full="wait")  # type: ignore[arg-type]
    configure_audit(destination=Path("memories"))  # type: ignore[arg-type]
    configure_audit(meter_provider=provider)  # type: ignore[arg-type]
    assert_type(processor.force_flush(timeout_millis=1000), bool)
    assert_type(processor.stats(), dict[str, int])
    processor.shutdown()

    sampler: Sampler = AuditSampler(actions=["retain"], mappings=["astrocyte"])
    exporter: SpanExporter = AuditSpanExporter(dsn="postgresql://localhost/app", actions="*")
    parts = TracerProvider(sampler=sampler)
    parts.add_span_processor(
        AuditSpanProcessor(AuditSpanExporter(pool=pool, actions=["retain"], destination="memories"))
    )
    AuditSpanProcessor(MyExporter(), writer="external", spool_keep_seconds=0.0, meter_provider=meters)
    AuditSpanProcessor(exporter)  # type: ignore[arg-type]
    AuditSpanProcessor(MyExporter(), writer="none")  # type: ignore[arg-type]
    parts.add_span_processor(BatchSpanProcessor(exporter))


def read(record: AuditRecord) -> None:
    assert_type(record.action, str)
    assert_type(record.bank_id, str | None)
    assert_type(record.started_at, datetime)
    assert_type(record.request, dict[str, Any] | None)
    assert_type(record.metadata, dict[str, Any])
    assert_type(record.sampled, bool | None)
    assert_type(record.duration_seconds, float | None)
    record.action = "another"  # type: ignore[misc]


def errors() -> None:
    try:
        configure_audit()
    except ConfigurationError as refused:
        assert_type(refused.source, str)
        wrong_value: ValueError = refused
        of_ours: AuditError = refused
        raise wrong_value from of_ours
    except AuditUnavailableError:
        pass


# Spans of others: patterns and mappings, and what a deployment says of them.

reflect = SpanPattern(span_name="memory.reflect", scope=["memory"], kind="internal", root=None)
mapping = SpanMapping(
    span_name=["memory.recall", "memory.search"],
    action="recall",
    required={"memory.op": ["read", "search"]},
    not_inside=[reflect],
    bank_id="memory.bank",
    request={"top_k": ("memory.limit", "memory.k")},
    response=["memory.hits"],
    failure_when=["error.type"],
    unset_outcome="unknown",
)


def enabled_for(action: str, bank_id: str | None) -> bool | None:
    return None


configure_audit(mappings=[mapping, "gen_ai", {"span_name": "memory.{action}"}], enabled_for=enabled_for)
configure_audit(actor_baggage=["enduser.id"])
SpanMapping(unset_outcome="perhaps")  # type: ignore[arg-type]
undo: Callable[[], None] = enrich_astrocyte(object())
