"""`record_audit`: a pipeline for the length of one test, and every operation's way into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.environment_variables import OTEL_SDK_DISABLED
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace import Span, Tracer
from opentelemetry.util._once import Once

from astrocyte_otel_audit import emit, settings
from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline import SpanMapping
from astrocyte_otel_audit.pipeline.switch import EnabledFor
from astrocyte_otel_audit.testing.log import AuditLog
from astrocyte_otel_audit.testing.table import InMemoryAuditTable


@contextmanager
def record_audit(
    *,
    actions: Iterable[str] = "*",
    mappings: Iterable[SpanMapping | str | Mapping[str, Any]] = (),
    enabled_for: EnabledFor | None = None,
    actor_baggage: Iterable[str] = (),
    schema: str | Callable[[], str] = settings.DEFAULT_SCHEMA,
    normalizer: Normalizer | None = None,
) -> Iterator[AuditLog]:
    """Record every allowed operation of this process inside a ``with`` block, without Postgres.

    For the block the global tracer provider is a private one with a pipeline into an `InMemoryAuditTable`; what was
    there before, a provider, a normalizer or none, is there again after it. Blocks may be in one another. Not for two
    threads at once: there is one global provider.

    What doesn't come from the global provider isn't seen: an operation with a ``tracer_provider`` of its own, and
    tracers that other libraries have got from a provider that was set before.

    Args:
        actions, mappings, enabled_for, actor_baggage, schema: as in `configure_audit`, but for their environment
            variables, which don't count.
        normalizer: what of a payload may be stored; the process's by default.

    Raises:
        ConfigurationError: an argument that can't be used.
    """
    normalizer_before = emit.default_normalizer()
    provider = _private_provider()
    # A child process that the test has left may still write there.
    with TemporaryDirectory(prefix="audit-log-", ignore_cleanup_errors=True) as spool_dir:
        try:
            processor = configure_audit(
                storage=InMemoryAuditTable(),
                actions=actions,
                mappings=mappings,
                enabled_for=enabled_for,
                actor_baggage=actor_baggage,
                schema=schema,
                retention=False,
                normalizer=normalizer,
                tracer_provider=provider,
                writer="thread",
                destination="memory",
                spool_dir=spool_dir,  # where there is none, no operation that is required runs
                spool_fsync="never",
                spool_keep_seconds=0,
                meter_provider=NoOpMeterProvider(),
            )
            with _global(provider):
                yield AuditLog(processor)
        finally:
            provider.shutdown()
            emit.set_default_normalizer(normalizer_before)


def _private_provider() -> _PrivateProvider:
    """Return a provider that works where tests run with OTEL_SDK_DISABLED=true, which it reads when it is made."""
    disabled = os.environ.pop(OTEL_SDK_DISABLED, None)
    try:
        return _PrivateProvider(sampler=DEFAULT_ON, shutdown_on_exit=False)
    finally:
        if disabled is not None:
            os.environ[OTEL_SDK_DISABLED] = disabled


@contextmanager
def _global(provider: TracerProvider) -> Iterator[None]:
    """Make a provider the global one for a block.

    `set_tracer_provider` works once a process, so there is no public way. For the block that once is over: an
    application that sets its own provider when it starts is told that there is one, as in any second test.
    """
    before = trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE
    over = Once()
    over.do_once(lambda: None)
    trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = provider, over
    emit.renew_tracers()
    try:
        yield
    finally:
        trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = before
        emit.renew_tracers()


class _PrivateProvider(TracerProvider):
    """Hands out tracers that outlive it."""

    def get_tracer(self, *arguments: Any, **named: Any) -> Tracer:
        """Return a tracer of whichever provider is the global one when it makes a span."""
        return _FollowingTracer(arguments, named)

    def own_tracer(self, *arguments: Any, **named: Any) -> Tracer:
        """Return a tracer of this provider."""
        return super().get_tracer(*arguments, **named)


class _FollowingTracer(Tracer):
    """Makes spans of the global provider of the moment.

    A library that has its tracer from the API before a provider is set looks it up once, and keeps for the life of the
    process what it has found: here that must be no provider that is gone after the test.
    """

    def __init__(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._arguments = arguments
        self._named = named

    def start_span(self, *arguments: Any, **named: Any) -> Span:
        """Start a span, as `Tracer.start_span`."""
        return self._tracer().start_span(*arguments, **named)

    def start_as_current_span(self, *arguments: Any, **named: Any) -> Any:
        """Start a span and make it current, as `Tracer.start_as_current_span`."""
        return self._tracer().start_as_current_span(*arguments, **named)

    def _tracer(self) -> Tracer:
        provider = trace.get_tracer_provider()
        get = provider.own_tracer if isinstance(provider, _PrivateProvider) else provider.get_tracer
        return get(*self._arguments, **self._named)
