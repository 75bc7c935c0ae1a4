"""What each span said, when it started and when it ended: as JSON, and in the order in which they ended.

A sampler sees a span's first name and the attributes that it starts with, and nothing else. So each name and each
attribute is shown with the moment from which it is known.
"""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import TracerProvider as AnyTracerProvider

#: Drives one library, so that its spans go to that provider.
Emit = Callable[[AnyTracerProvider], None]


class SpanRecording(SpanProcessor):
    """Keeps what each span said at its start and at its end."""

    def __init__(self) -> None:
        #: One entry a span that has ended.
        self.spans: list[dict[str, Any]] = []
        self._started: dict[tuple[int, int], dict[str, Any]] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._traces: dict[int, int] = {}
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        parent = trace.get_current_span(parent_context)
        key = _key(span)
        with self._lock:
            self._traces.setdefault(key[0], len(self._traces) + 1)
            self._numbers[key] = len(self._numbers) + 1
            self._started[key] = {
                "span": span,
                "name": span.name,
                "attributes": _plain(span.attributes),
                "parent": self._parent(parent),
            }

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            self.spans.append(self._entry(span, ended=True))

    def add_unfinished(self) -> None:
        """Add spans that have started and not ended, as they are now."""
        with self._lock:
            for start in list(self._started.values()):
                self.spans.append(self._entry(start["span"], ended=False))

    def _entry(self, span: ReadableSpan, *, ended: bool) -> dict[str, Any]:
        key = _key(span)
        start = self._started.pop(key)
        first: dict[str, Any] = start["attributes"]
        last = _plain(span.attributes)
        scope = span.instrumentation_scope
        return {
            "number": self._numbers[key],
            "trace": self._traces[key[0]],
            "ended": ended,
            "scope": None if scope is None else scope.name,
            "scope_version": None if scope is None else scope.version,
            "name": span.name,
            "name_at_start": start["name"],
            "kind": span.kind.name,
            "parent": start["parent"],
            "links": len(span.links),
            "status": span.status.status_code.name,
            "status_description": span.status.description,
            "attributes_at_start": first,
            "attributes_set_later": {
                name: value for name, value in last.items() if name not in first or first[name] != value
            },
            "events": [{"name": event.name, "attributes": sorted(event.attributes or {})} for event in span.events],
        }

    def _parent(self, parent: trace.Span) -> dict[str, Any] | None:
        context = parent.get_span_context()
        if not context.is_valid:
            return None
        shown: dict[str, Any] = {
            "number": self._numbers.get((context.trace_id, context.span_id)),
            "is_remote": context.is_remote,
        }
        if isinstance(parent, ReadableSpan):
            scope = parent.instrumentation_scope
            shown |= {
                "name": parent.name,
                "scope": None if scope is None else scope.name,
                "kind": parent.kind.name,
                "has_ended": parent.end_time is not None,
            }
        return shown


def record(emit: Emit) -> list[dict[str, Any]]:
    """Run an emitter at 100 % sampling.

    Returns:
        One entry for each span, in the order in which they ended; last come those that never did.
    """
    recording = SpanRecording()
    provider = TracerProvider(
        sampler=ALWAYS_ON, resource=Resource.create({"service.name": "emitter"}), shutdown_on_exit=False
    )
    provider.add_span_processor(recording)
    emit(provider)
    gc.collect()  # some libraries end the span of an abandoned stream when the stream goes
    provider.shutdown()
    recording.add_unfinished()
    return recording.spans


def print_spans(emit: Emit) -> None:
    """Print an emitter's spans as JSON."""
    print(json.dumps(record(emit), indent=1, default=repr))


@contextmanager
def global_provider(provider: AnyTracerProvider) -> Iterator[None]:
    """Let libraries that ask for the global provider get this one, and refuse theirs.

    `set_tracer_provider` works once a process, and a test must leave nothing behind. A tracer that a library took
    before stays as it was: see `kept_tracer`.
    """
    once = trace._TRACER_PROVIDER_SET_ONCE
    before = trace._TRACER_PROVIDER, once._done
    trace._TRACER_PROVIDER, once._done = provider, True
    try:
        yield
    finally:
        trace._TRACER_PROVIDER, once._done = before


@contextmanager
def kept_tracer(module: ModuleType, provider: AnyTracerProvider, scope: str) -> Iterator[None]:
    """Replace the tracer that a library has kept as its module's `_tracer` since it was imported."""
    before = module._tracer
    module._tracer = provider.get_tracer(scope)
    try:
        yield
    finally:
        module._tracer = before


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables, or unset those that are None, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _key(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (attributes or {}).items()}
