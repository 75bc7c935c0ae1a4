"""The imperative interface, for code that was written for `astrocyte.audit`.

An entry becomes an audit span with the entry's own times, and the registered pipeline does the rest. Where a
logger is given a pool and no pipeline is registered, it sets one up from the pool's settings, as soon as the pool
is there: wiring written for upstream works as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import TracerProvider

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.allowlist import Allowlist
from astrocyte_otel_audit.configure import attached_to, configure_audit, dsn_of_pool
from astrocyte_otel_audit.emit import AuditOperation, audit_scope
from astrocyte_otel_audit.errors import AuditError, ConfigurationError
from astrocyte_otel_audit.pipeline import AuditSpanProcessor
from astrocyte_otel_audit.record import Outcome, ns_from_datetime
from astrocyte_otel_audit.retention import RetentionPolicy, resolve_retention

_logger = logging.getLogger(__name__)
#: One for all loggers, as they may share a provider; reentrant, as a handler of what is logged may be anyone's code.
_setting_up = threading.RLock()


def _after_fork() -> None:
    global _setting_up
    _setting_up = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass
class AuditEntry:
    """One operation to be logged. Its payloads are normalized when it is logged; later changes don't show."""

    action: str
    #: ``bench``, ``harness``, ``system``, ``http``, ``mcp``, …
    transport: str
    bank_id: str | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    ended_at: datetime | None = None
    request: Mapping[str, Any] | None = None
    response: Mapping[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    #: Beyond upstream: ``success`` unless an exception left the block, or this says otherwise.
    outcome: Outcome | None = None
    actor_id: str | None = None
    actor_type: str | None = None


class AuditLogger:
    """Logs entries as audit spans, from sync and async code, on any thread. Never raises, never waits for Postgres.

    Args:
        pool_getter: gives the application's psycopg pool, sync or async, or None while there is none yet. Only its
            connection settings are read: rows are written through a connection of the pipeline's own.
        schema_getter: gives the tenant's schema, on the thread that logs.
        enabled: off by default, as upstream.
        allowed_actions: actions or globs; None for all, an empty list for none.
        retention_days: days that records are kept, once `start_retention_sweep` is called; 0 or less for ever.
        table: name of the table.
        tracer_provider: in place of the global one.

    Raises:
        ConfigurationError: at construction, for an argument that can't be used.
    """

    def __init__(
        self,
        *,
        pool_getter: Callable[[], Any | None],
        schema_getter: Callable[[], str] | None = None,
        enabled: bool = False,
        allowed_actions: Iterable[str] | None = None,
        retention_days: int = -1,
        table: str = settings.DEFAULT_TABLE,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self._pool_getter = pool_getter
        self._schema_getter = schema_getter
        self._enabled = settings.boolean(enabled, "enabled")
        self._allowlist = Allowlist(
            ("*",) if allowed_actions is None else settings.actions(allowed_actions, "allowed_actions")
        )
        self._policy = _policy_of(retention_days)
        #: Whether expired records are wanted to be deleted; there may be no pipeline yet that can.
        self._is_sweeping = False
        self._table = settings.SETTINGS["table"].accept(table, "table")
        self._tracer_provider = tracer_provider
        self._set_up = False

    def is_enabled(self, action: str) -> bool:
        """Say whether an entry of that action would be logged."""
        return self._enabled and self._allowlist.allows(action if isinstance(action, str) else "unknown")

    def log(self, entry: AuditEntry) -> None:
        """Log an operation that is over. `ended_at` is now, unless the entry says otherwise."""
        try:
            if not self.is_enabled(entry.action):
                self._catch_up()
                return
            if entry.ended_at is None:
                entry.ended_at = datetime.now(UTC)
            with self._scope():
                operation = self._operation(entry, start_ns=_ns(entry.started_at))
                operation.start()
            _copy(entry, operation)
            operation.finish(end_ns=_ns(entry.ended_at))
        except Exception as fault:
            _not_logged(fault)

    def log_with_timing(self, entry: AuditEntry) -> _Timed:
        """Return a block, for ``with`` and ``async with``, that gives the entry, times it and logs it at its end.

        What the block sets on the entry is logged. An exception makes the outcome ``failure``, and goes on.
        """
        return _Timed(self, entry)

    def start_retention_sweep(self) -> None:
        """Have records deleted that are older than `retention_days`, also where this logger is not enabled.

        The pipeline does it, on a thread of its own, as soon as there is one. Harmless when repeated.
        """
        if self._policy is None:
            return
        self._is_sweeping = True
        if self._set_up:
            self._start_retention()
        else:
            self._ensure_pipeline()

    async def stop_retention_sweep(self) -> None:
        """Stop what `start_retention_sweep` has started; a batch that is under way ends first."""
        was_sweeping, self._is_sweeping = self._is_sweeping, False
        for pipeline in self._pipelines() if was_sweeping else ():
            if pipeline.retention is not None:
                await asyncio.to_thread(pipeline.retention.stop)

    def _catch_up(self) -> None:
        """Start the sweep, if it waits for a pipeline that can be made now: a disabled logger makes none otherwise."""
        if self._is_sweeping and not self._set_up:
            self._ensure_pipeline()

    def _start_retention(self) -> None:
        with _setting_up:
            pipelines = self._pipelines()
            tasks = [pipeline.retention for pipeline in pipelines if pipeline.retention is not None]
            for task in tasks:
                task.start()
            if pipelines and not tasks and self._policy is not None:
                ours = (one for one in pipelines if getattr(one.exporter.storage, "table", None) == self._table)
                try:
                    next(ours, pipelines[0]).start_retention(self._policy, tracer_provider=self._tracer_provider)
                except ConfigurationError as error:
                    _logger.error("No audit record will be deleted: %s", error)
        if tasks and all(task.policy != self._policy for task in tasks):
            _logger.warning(
                "The retention_days of this AuditLogger have no effect: its pipeline has a retention of its own."
            )

    def _operation(self, entry: AuditEntry, start_ns: int | None = None) -> AuditOperation:
        return AuditOperation(
            entry.action,
            bank_id=entry.bank_id,
            transport=entry.transport,
            # An entry made by upstream's class has no such fields.
            actor_id=getattr(entry, "actor_id", None),
            actor_type=getattr(entry, "actor_type", None),
            tracer_provider=self._tracer_provider,
            start_ns=start_ns,
        )

    def _scope(self) -> AbstractContextManager[Any]:
        self._ensure_pipeline()
        return nullcontext() if self._schema_getter is None else audit_scope(schema=self._schema())

    def _schema(self) -> str | None:
        try:
            return None if self._schema_getter is None else self._schema_getter()
        except Exception as fault:
            _logger.warning(
                "schema_getter failed (%s); the record goes to the default schema.", type(fault).__qualname__
            )
            return None

    def _ensure_pipeline(self) -> None:
        if self._set_up:
            return
        pool = None
        if not self._pipelines():
            try:
                pool = self._pool_getter()  # without the lock: it is anyone's code, and may wait for locks of its own
            except Exception as fault:
                _logger.warning("pool_getter failed (%s); it is asked again.", type(fault).__qualname__)
                return
            if pool is None:
                return  # not open yet; asked again at the next entry
        with _setting_up:
            if self._set_up:
                return
            pipelines = self._pipelines()
            if not pipelines:
                self._configure(pool)
            if self._is_sweeping:
                self._start_retention()
            self._set_up = True  # last: another thread that sees it goes on without the lock
        self._warn_of_differences(pipelines)

    def _pipelines(self) -> list[AuditSpanProcessor]:
        return attached_to(self._tracer_provider or trace.get_tracer_provider())

    def _configure(self, pool: object) -> None:
        try:
            configure_audit(
                dsn=dsn_of_pool(pool),
                actions=self._allowlist.actions if self._enabled else (),
                table=self._table,
                tracer_provider=self._tracer_provider,
            )
        except Exception as fault:
            reason = fault if isinstance(fault, AuditError) else type(fault).__qualname__
            _logger.error("No audit entry will be written: %s", reason)

    def _warn_of_differences(self, pipelines: Sequence[AuditSpanProcessor]) -> None:
        """Say where the settings of pipelines that were there already are in effect, and not this logger's own."""
        if not pipelines or not self._enabled:
            return
        exporters = [pipeline.exporter for pipeline in pipelines]
        allowlists = [exporter.selection.allowlist for exporter in exporters]
        # A glob counts as allowed where another one matches it as a text.
        missed = [action for action in self._allowlist.actions if not any(one.allows(action) for one in allowlists)]
        # What is no table has no name.
        tables = [getattr(exporter.storage, "table", self._table) for exporter in exporters]
        differences = []
        if missed:
            allowed = [action for one in allowlists for action in one.actions]
            differences.append(f"it does not write the actions {missed}, as it allows {allowed}")
        if self._table not in tables:
            differences.append(f"it writes to the table {tables[0]!r}, and not to {self._table!r}")
        if differences:
            _logger.warning(
                "The entries of this AuditLogger go to the audit pipeline that its tracer provider had already: %s. "
                "Give both the same settings, or this logger a tracer_provider of its own.",
                "; ".join(differences),
            )


class _Timed:
    """The block that `AuditLogger.log_with_timing` returns."""

    def __init__(self, logger: AuditLogger, entry: AuditEntry) -> None:
        self._logger = logger
        self._entry = entry
        self._block = ExitStack()

    def __enter__(self) -> AuditEntry:
        try:
            self._entry.started_at = datetime.now(UTC)
            self._logger._catch_up()
            if self._logger.is_enabled(self._entry.action):
                self._block.enter_context(self._logger._scope())
                operation = self._block.enter_context(self._logger._operation(self._entry))
                self._block.callback(_copy, self._entry, operation)  # the last one in is the first one called
        except Exception as fault:
            _not_logged(fault)
        return self._entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._entry.ended_at = datetime.now(UTC)
        except Exception as fault:
            _not_logged(fault)
        self._block.__exit__(kind, error, traceback)

    async def __aenter__(self) -> AuditEntry:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def _copy(entry: AuditEntry, operation: AuditOperation) -> None:
    try:
        for name in ("bank_id", "transport", "actor_id", "actor_type"):
            if (value := getattr(entry, name, None)) is not None:  # else the scope's stays
                setattr(operation, name, value)
        operation.request = entry.request
        operation.response = entry.response
        if entry.metadata:
            operation.metadata = entry.metadata
        operation.outcome = getattr(entry, "outcome", None)
    except Exception as fault:
        _not_logged(fault)


def _ns(instant: datetime) -> int | None:
    """Return nanoseconds since the epoch; None, which reads as now, for what is no instant."""
    return ns_from_datetime(instant) if isinstance(instant, datetime) else None


def _policy_of(days: object) -> RetentionPolicy | None:
    """Return what upstream's number of days means; what else a policy says, a floor too, is the environment's."""
    if type(days) is not int:
        raise ConfigurationError("retention_days", f"got {settings.shown(days)}; accepted is a number of days, or -1")
    try:
        return resolve_retention(days) if days > 0 else None
    except ConfigurationError as error:
        source = "retention_days" if error.source == "retention" else error.source
        raise ConfigurationError(source, error.problem) from None


def _not_logged(fault: Exception) -> None:
    # An entry of wrong types, which must not hurt the application. Without the message, which may quote a payload.
    _logger.warning("An audit entry could not be logged (%s).", type(fault).__qualname__)


_default: AuditLogger | None = None


def get_default_audit_logger() -> AuditLogger:
    """Return the process-wide logger: a disabled one, which does nothing, until another is set."""
    global _default
    if _default is None:
        _default = AuditLogger(pool_getter=lambda: None)
    return _default


def set_default_audit_logger(logger_instance: AuditLogger) -> None:
    """Make a logger the process-wide one."""
    global _default
    _default = logger_instance
