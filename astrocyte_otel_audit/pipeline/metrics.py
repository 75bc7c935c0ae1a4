"""Metrics: what the pipeline says of itself through OpenTelemetry's meters, at no cost to a call.

All but the duration are observed: a reader asks for them, and is told what `AuditSpanProcessor.stats` says then. The
names under ``otel.sdk.`` are those of the semantic conventions for SDK metrics, so that dashboards made for the stock
processor show this one too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit._version import __version__

_PROCESSOR: Final = {
    "otel.component.type": "astrocyte_audit_span_processor",
    "otel.component.name": "astrocyte_audit_span_processor/0",
}
_EXPORTER: Final = {
    "otel.component.type": "astrocyte_audit_span_exporter",
    "otel.component.name": "astrocyte_audit_span_exporter/0",
}
#: Why an operation left no row, by the name of its count.
_DROPPED: Final = {
    "refused_full": "queue_full",
    "refused_shutdown": "already_shutdown",
    "unreadable": "unreadable_span",
    "damaged": "damaged_spool",
    "lost": "lost",
}
_Observe = Callable[[Mapping[str, int]], Iterable[Observation]]


class Source(Protocol):
    """What is observed."""

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process."""


class Metrics:
    """The instruments of one pipeline. Thread-safe.

    Args:
        meter_provider: makes them; the global one by default.
    """

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        provider = meter_provider if meter_provider is not None else get_meter_provider()
        self._meter = provider.get_meter(attributes.SCOPE_NAME, __version__)
        self._duration = self._meter.create_histogram(
            "audit.export.duration", "s", "How long one attempt to write a batch took."
        )

    def attempted(self, seconds: float, error_type: str | None) -> None:
        """Note how long one attempt to write a batch took, and what kept it from being written."""
        self._duration.record(seconds, {} if error_type is None else {attributes.ERROR_TYPE: error_type})

    def observe(self, source: Source, capacity: int) -> None:
        """Let the source's counts be read, for as long as it lives.

        Args:
            source: the processor.
            capacity: operations that it holds in memory at most.
        """
        reference = weakref.ref(source)

        def callback(observe: _Observe) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
            def call(options: CallbackOptions) -> Iterable[Observation]:  # noqa: ARG001 - there is no waiting in here
                found = reference()
                return () if found is None else observe(found.stats())

            return [call]

        counter, level = self._meter.create_observable_counter, self._meter.create_observable_up_down_counter
        counter("audit.records.emitted", callback(_one("accepted")), "{record}", "Operations that were accepted.")
        counter("audit.records.exported", callback(_one("stored")), "{record}", "Records that are in the table.")
        counter("audit.records.rejected", callback(_one("set_aside")), "{record}", "Records that the table refused.")
        counter("audit.records.dropped", callback(_dropped), "{record}", "Operations without a row, by reason.")
        level("audit.queue.depth", callback(_waiting), "{record}", "Accepted operations that are not settled.")
        level("audit.spool.bytes", callback(_one("spool_bytes")), "By", "Bytes of this process's spool.")
        level(
            "otel.sdk.processor.span.queue.size", callback(_waiting_of(_PROCESSOR)), "{span}",
            "Spans that wait to be exported.",
        )  # fmt: skip
        level(
            "otel.sdk.processor.span.queue.capacity",
            callback(lambda counts: [Observation(capacity, _PROCESSOR)]),  # noqa: ARG005
            "{span}",
            "Spans that the queue holds in memory.",
        )
        counter("otel.sdk.processor.span.processed", callback(_processed), "{span}", "Spans that are done with.")
        counter(
            "otel.sdk.exporter.span.exported",
            callback(_one("stored", _EXPORTER)),
            "{span}",
            "Spans that were exported.",
        )


def _one(name: str, labels: Mapping[str, str] | None = None) -> _Observe:
    return lambda counts: [Observation(counts[name], labels)] if name in counts else []


def _waiting(counts: Mapping[str, int]) -> Iterable[Observation]:
    return [Observation(counts["waiting"] + counts.get("parked", 0))]


def _waiting_of(labels: Mapping[str, str]) -> _Observe:
    return lambda counts: [Observation(counts["waiting"] + counts.get("parked", 0), labels)]


def _dropped(counts: Mapping[str, int]) -> Iterable[Observation]:
    return [Observation(counts[name], {"reason": reason}) for name, reason in _DROPPED.items() if name in counts]


def _processed(counts: Mapping[str, int]) -> Iterable[Observation]:
    yield Observation(counts["stored"], _PROCESSOR)
    for name, reason in _DROPPED.items():
        if counts.get(name):
            yield Observation(counts[name], {**_PROCESSOR, attributes.ERROR_TYPE: reason})
