"""The composition root: builds the pipeline from settings and attaches it to a tracer provider."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider
from opentelemetry.trace import NoOpTracer, ProxyTracerProvider, TracerProvider

from astrocyte_otel_audit import attributes, emit, settings
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline import AuditSampler, AuditSpanExporter, AuditSpanProcessor, SpanMapping, Storage
from astrocyte_otel_audit.pipeline.exporter import Elsewhere
from astrocyte_otel_audit.pipeline.spool import Fsync
from astrocyte_otel_audit.pipeline.switch import EnabledFor
from astrocyte_otel_audit.postgres import dsn_of_pool
from astrocyte_otel_audit.retention import Retention, resolve_retention

_logger = logging.getLogger(__name__)

#: A record has up to 11 attributes of its own; below these limits a record, or an id in it, would be cut.
_MIN_ATTRIBUTES = 32
_MIN_ATTRIBUTE_LENGTH = 128

_attached: WeakKeyDictionary[Any, list[AuditSpanProcessor]] = WeakKeyDictionary()


def configure_audit(
    *,
    dsn: str | None = None,
    pool: object = None,
    storage: Storage | None = None,
    actions: Iterable[str] | None = None,
    mappings: Iterable[SpanMapping | str | Mapping[str, Any]] | None = None,
    enabled_for: EnabledFor | None = None,
    actor_baggage: Iterable[str] | None = None,
    schema: str | Callable[[], str] | None = None,
    table: str | None = None,
    migrate: bool | None = None,
    retention: Retention = None,
    retention_dsn: str | None = None,
    normalizer: Normalizer | None = None,
    tracer_provider: TracerProvider | None = None,
    create_provider: bool = True,
    writer: Literal["thread", "external"] | None = None,
    destination: str | None = None,
    spool_dir: str | os.PathLike[str] | Literal[False] | None = None,
    spool_max_bytes: int | None = None,
    spool_fsync: Fsync | None = None,
    spool_keep_seconds: float | None = None,
    on_full: Literal["drop", "block"] | None = None,
    on_full_timeout_millis: float | None = None,
    max_queue_size: int | None = None,
    schedule_delay_millis: float | None = None,
    max_export_batch_size: int | None = None,
    export_timeout_millis: float | None = None,
    meter_provider: MeterProvider | None = None,
) -> AuditSpanProcessor:
    """Set the audit up: the sampler around the provider's own, the processor, its exporter and the table.

    Returns at once, whether or not Postgres is there: the connection is made by the processor's thread, which says
    in the log what keeps it from writing. Call it once, early: nobody notes who acts in operations that have begun
    before, and before SDK 1.42 a tracer that another library has got already keeps the sampler it had.

    Args:
        dsn: connection string of the writer's role. Like every argument it falls back to its environment variable,
            ``OTEL_ASTROCYTE_AUDIT_DSN``.
        pool: a `psycopg_pool.ConnectionPool` in place of `dsn`.
        storage: what keeps the records, in place of a table in Postgres.
        actions: what is audited: actions or globs. Nothing by default, ``"*"`` for all.
        mappings: spans of other libraries that are audited too: presets by name, such as ``["astrocyte"]``, or
            `SpanMapping`, or its arguments by name. The first that matches a span wins.
        enabled_for: says of an allowed action and its bank whether it is audited: True, False, or None for the default,
            which is that it is. It is called on your threads and should not wait; its answers are kept for a minute.
            One that fails, and whatever is required, is audited.
        actor_baggage: keys of OpenTelemetry baggage that say who acts, where nothing else does. As anybody may have
            sent it, the row's metadata says ``actor_source: baggage``.
        schema: schema of the table, or a function to it that is called on the thread where an operation starts; the
            schema of an `audit_scope` goes first.
        table: name of the table.
        migrate: create or upgrade tables, and tenants' schemas, when a record needs them.
        retention: how long records are kept: a `RetentionPolicy`, or days, beside which the environment's other
            ``OTEL_ASTROCYTE_AUDIT_RETENTION_…`` hold; False to keep them for ever whatever the environment says. By
            default nothing is deleted, and nothing runs for it.
        retention_dsn: connection string of the role that deletes, if that isn't the writer's.
        normalizer: what of a payload may be stored; `Normalizer` has the defaults. It is the process's: operations
            don't know which pipeline will take them, so a second one replaces the first, with a warning.
        tracer_provider: where to attach; by default the global one.
        create_provider: make and set a global provider where there is none.
        writer: ``thread``, or ``external``: this process has no connection and no thread; the command
            `astrocyte-otel-audit writer` writes what is in the spool.
        destination: a name for where records go, the same for all that shall write each other's; by default made of
            the DSN, or ``default`` with an external writer.
        spool_dir, spool_max_bytes, spool_fsync, spool_keep_seconds, on_full, on_full_timeout_millis, max_queue_size,
        schedule_delay_millis, max_export_batch_size, export_timeout_millis, meter_provider: as in `AuditSpanProcessor`.

    Returns:
        The processor: `force_flush`, `stats` and `shutdown` are its own. The provider's shutdown is enough.

    Raises:
        ConfigurationError: an argument or variable that can't be used. Nothing was attached then.
    """
    if settings.resolve("writer", writer) == "external":
        if dsn is not None or pool is not None or storage is not None:
            raise ConfigurationError(
                "writer", "external writes through no connection of this process: leave out dsn, pool and storage"
            )
        storage = Elsewhere()
        destination = settings.resolve("destination", destination) or settings.DEFAULT_DESTINATION
    exporter = AuditSpanExporter(
        dsn=dsn, pool=pool, storage=storage, actions=actions, mappings=mappings, schema=schema, table=table,
        migrate=migrate, destination=destination, export_timeout_millis=export_timeout_millis, normalizer=normalizer,
        actor_baggage=actor_baggage, enabled_for=enabled_for,
    )  # fmt: skip
    policy = resolve_retention(retention)
    sizes: dict[str, Any] = {
        "writer": writer,
        "spool_dir": spool_dir,
        "spool_max_bytes": spool_max_bytes,
        "spool_fsync": spool_fsync,
        "spool_keep_seconds": spool_keep_seconds,
        "on_full": on_full,
        "on_full_timeout_millis": on_full_timeout_millis,
        "max_queue_size": max_queue_size,
        "schedule_delay_millis": schedule_delay_millis,
        "max_export_batch_size": max_export_batch_size,
        "export_timeout_millis": export_timeout_millis,
    }
    # Before a provider is made and set, which can't be taken back.
    sizes = {name: settings.resolve(name, size) for name, size in sizes.items()}
    if policy is not None:
        exporter.sweeper(retention_dsn)
    processor = AuditSpanProcessor(exporter, retention=False, meter_provider=meter_provider, **sizes)
    try:
        provider = _provider(tracer_provider, create=create_provider)
        if normalizer is not None:
            _normalize_all_by(normalizer)
        # In this order: a span that only the sampler has seen would be kept for a processor that missed its start,
        # and so its tenant.
        provider.add_span_processor(processor)
        _wrap_sampler(provider, exporter)
        emit.renew_tracers()
        _warn_of_what_leaves_the_log_empty(provider, exporter)
        if policy is not None:  # not before: its runs are spans of this provider
            processor.start_retention(policy, dsn=retention_dsn, tracer_provider=provider)
        _attached.setdefault(provider, []).append(processor)
    except BaseException:
        processor.shutdown()  # its thread runs already, and nobody else has it
        raise
    return processor


def attached_to(provider: TracerProvider) -> list[AuditSpanProcessor]:
    """Return the processors that `configure_audit` has attached to a provider."""
    return list(_attached.get(provider, ()))


def _provider(given: TracerProvider | None, *, create: bool) -> Any:
    provider = given if given is not None else trace.get_tracer_provider()
    if hasattr(provider, "add_span_processor"):
        return provider
    if given is not None or not create:
        raise ConfigurationError(
            "tracer_provider",
            f"got a {type(provider).__module__}.{type(provider).__qualname__}, which takes no span processors; "
            "accepted is an opentelemetry.sdk.trace.TracerProvider",
        )
    if not isinstance(provider, ProxyTracerProvider):
        raise ConfigurationError(
            "tracer_provider", f"the global one is a {type(provider).__qualname__}, which takes no span processors"
        )
    provider = SDKTracerProvider()
    trace.set_tracer_provider(provider)
    _logger.info(
        "There was no tracer provider, so one was made and set. Make yours before configure_audit() to keep it."
    )
    return provider


def _normalize_all_by(normalizer: Normalizer) -> None:
    before = emit.set_default_normalizer(normalizer)
    if before is not None and before != normalizer:
        _logger.warning(
            "A second configure_audit() has replaced the normalizer of the first one, for all operations: it is the "
            "process's. Give both the same Normalizer, or operations their own, as in @audited('recall', normalizer=…)."
        )


def _wrap_sampler(provider: Any, exporter: AuditSpanExporter) -> None:
    selection = exporter.selection
    sampler = getattr(provider, "sampler", None)
    if sampler is None:
        _logger.warning(
            "The sampler of a %s can't be wrapped: audit spans that it drops are not audited.",
            type(provider).__qualname__,
        )
        return
    wrapped = AuditSampler(sampler, actions=selection.allowlist.actions, mappings=selection.mappings)
    provider.sampler = wrapped
    # A tracer takes its provider's sampler when it is made. Since SDK 1.42 the provider keeps it for the next caller,
    # and has no public way to ask for all that it keeps: those of scopes that are known can be had in any case.
    kept = getattr(provider, "_tracers", None)
    tracers = list(kept.values()) if isinstance(kept, dict) else []
    tracers.append(provider.get_tracer(attributes.SCOPE_NAME, __version__))
    tracers += [provider.get_tracer(scope) for mapping in selection.mappings for scope in mapping.scope_names]
    for tracer in tracers:
        if getattr(tracer, "sampler", None) is sampler:
            tracer.sampler = wrapped


def _warn_of_what_leaves_the_log_empty(provider: Any, exporter: AuditSpanExporter) -> None:
    if not exporter.selection.allowlist.actions:
        _logger.warning(
            "Nothing is audited: the allowlist is empty. Name actions, as in configure_audit(actions=['retain', "
            "'recall']) or OTEL_ASTROCYTE_AUDIT_ACTIONS=retain,recall, or take '*' for all."
        )
    if isinstance(provider.get_tracer(attributes.SCOPE_NAME, __version__), NoOpTracer):
        _logger.warning(
            "Nothing is audited: the tracer provider makes no spans. If OTEL_SDK_DISABLED=true is set, unset it; to "
            "keep traces from being exported, set OTEL_TRACES_SAMPLER=always_off instead, which the audit doesn't mind."
        )
    limits = getattr(provider, "_span_limits", None)  # there is no public way to ask
    count, length = (getattr(limits, name, None) for name in ("max_span_attributes", "max_span_attribute_length"))
    if count is not None and count < _MIN_ATTRIBUTES:
        _logger.warning(
            "Spans may have only %d attributes, so audit records will be cut: set "
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT to %d or more.", count, _MIN_ATTRIBUTES,
        )  # fmt: skip
    if length is not None and length < _MIN_ATTRIBUTE_LENGTH:
        _logger.warning(
            "Attribute values are cut at %d characters, so audit records will be cut: set "
            "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT to %d or more.", length, _MIN_ATTRIBUTE_LENGTH,
        )  # fmt: skip


__all__ = ["attached_to", "configure_audit", "dsn_of_pool"]
