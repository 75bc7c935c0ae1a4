"""The composition root: builds the pipeline from settings and attaches it to a tracer provider."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider
from opentelemetry.trace import ProxyTracerProvider, TracerProvider

from astrocyte_otel_audit import attachment, emit, settings
from astrocyte_otel_audit.attachment import Pipeline
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline import AuditSpanExporter, AuditSpanProcessor, SpanMapping, Storage
from astrocyte_otel_audit.pipeline.exporter import Elsewhere
from astrocyte_otel_audit.pipeline.spool import Fsync
from astrocyte_otel_audit.pipeline.switch import EnabledFor
from astrocyte_otel_audit.postgres import AuditTable, dsn_of_pool
from astrocyte_otel_audit.retention import Retention, resolve_retention

_logger = logging.getLogger(__name__)

_MIN_ATTRIBUTES = attachment.MIN_ATTRIBUTES
_MIN_ATTRIBUTE_LENGTH = attachment.MIN_ATTRIBUTE_LENGTH


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
    in the log what keeps it from writing. Call it early, but after a vendor's SDK that makes a tracer provider:
    nobody notes who acts in operations that have begun before, and before SDK 1.42 a tracer that another library has
    got already keeps the sampler it had.

    Once for each place: called again on the same provider for the same destination, table and schema, it returns the
    processor that works there, and warns of arguments that differ, which are ignored. Pipelines to different places
    work side by side, each with its own allowlist. Thread-safe.

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
        create_provider: make and set a global provider where there is none. False attaches to the one that somebody
            else sets later, as soon as it is set: what begins before isn't audited.
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
    arguments = locals()
    given = {name for name, value in arguments.items() if value is not None}
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
    in_effect = {
        **sizes,
        "dsn": hash(dsn),  # only to compare: no second place that holds a password
        "pool": pool,
        "actions": frozenset(exporter.selection.allowlist.actions),
        "mappings": exporter.selection.mappings,
        "actor_baggage": settings.resolve("actor_baggage", actor_baggage),
        "enabled_for": enabled_for,
        "migrate": settings.resolve("migrate", migrate),
        "retention": policy,
        "retention_dsn": hash(retention_dsn),
        "meter_provider": meter_provider,
    }
    kept_by_others = None if isinstance(exporter.storage, (AuditTable, Elsewhere)) else exporter.storage
    place = (
        exporter.destination, getattr(exporter.storage, "table", None), settings.resolve("schema", schema),
        kept_by_others,
    )  # fmt: skip
    with attachment.lock:
        provider = attachment.given_or_global(tracer_provider)
        pipeline = next((one for one in attachment.pipelines_of(provider) if one.place == place), None)
        if pipeline is not None:
            _warn_of_what_is_ignored(
                name for name, value in in_effect.items() if name in given and value != pipeline.settings[name]
            )
            if provider is None and create_provider:
                _make_provider()  # to which it attaches, as it waits for one
        else:
            processor = AuditSpanProcessor(exporter, retention=False, meter_provider=meter_provider, **sizes)
            pipeline = Pipeline(processor, place, in_effect, policy, retention_dsn)
            try:
                if provider is None and create_provider:
                    provider = _make_provider()
                if provider is None:
                    attachment.attach_once_there_is_one(pipeline)
                else:
                    attachment.attach(provider, pipeline)
            except BaseException:
                processor.shutdown()  # its thread runs already, and nobody else has it
                raise
        if normalizer is not None:
            _normalize_all_by(normalizer)
    return pipeline.processor


def attached_to(provider: TracerProvider) -> list[AuditSpanProcessor]:
    """Return the processors that `configure_audit` has attached to a provider, or that wait for the global one."""
    place = None if isinstance(provider, ProxyTracerProvider) else provider
    return [pipeline.processor for pipeline in attachment.pipelines_of(place)]


def _make_provider() -> SDKTracerProvider:
    provider = SDKTracerProvider()
    trace.set_tracer_provider(provider)
    _logger.info(
        "There was no tracer provider, so one was made and set. Make yours before configure_audit() to keep it."
    )
    return provider


def _warn_of_what_is_ignored(names: Iterable[str]) -> None:
    if ignored := ", ".join(sorted(names)):
        _logger.warning(
            "configure_audit() was called once more for a table that the tracer provider has a pipeline to. That stays "
            "as it is; ignored, as it has them differently: %s. Call it once, or name another table.", ignored,
        )  # fmt: skip


def _normalize_all_by(normalizer: Normalizer) -> None:
    before = emit.set_default_normalizer(normalizer)
    if before is not None and before != normalizer:
        _logger.warning(
            "A second configure_audit() has replaced the normalizer of the first one, for all operations: it is the "
            "process's. Give both the same Normalizer, or operations their own, as in @audited('recall', normalizer=…)."
        )


__all__ = ["attached_to", "configure_audit", "dsn_of_pool"]
