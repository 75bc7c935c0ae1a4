"""Metrics: what the pipeline says of itself through OpenTelemetry's meters, at no cost to a call.

All but the duration are observed: a reader asks for them, and is told what `AuditSpanProcessor.stats` says then, of
each processor under its own name. The names under ``otel.sdk.`` are those of the semantic conventions for SDK metrics,
so that dashboards made for the stock processor show this one too.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter_provider

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit._version import __version__

_PROCESSOR: Final = "astrocyte_audit_span_processor"
_EXPORTER: Final = "astrocyte_audit_span_exporter"
_COMPONENT_NAME: Final = "otel.component.name"
_COMPONENT_TYPE: Final = "otel.component.type"
#: Why an operation left no row, by the name of its count.
_DROPPED: Final = {
    "refused_full": "queue_full",
    "refused_shutdown": "already_shutdown",
    "unreadable": "unreadable_span",
    "damaged": "damaged_spool",
    "lost": "lost",
}
#: What the conventions call the error of a span that was exported and not accepted.
_REJECTED: Final = {"set_aside": "rejected"}
#: Upper ends of the duration's buckets. An SDK's default ones are for milliseconds.
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Source(Protocol):
    """What is observed."""

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process."""


class _Seen(NamedTuple):
    """A source at the moment when a reader asks."""

    counts: Mapping[str, int]
    #: Operations that it holds in memory at most.
    capacity: int
    #: Its number among those of this process.
    number: int

    @property
    def waiting(self) -> int:
        return self.counts["waiting"] + self.counts.get("parked", 0)

    @property
    def labels(self) -> dict[str, str]:
        return _labels(self.number)

    def component(self, kind: str) -> dict[str, str]:
        return {_COMPONENT_TYPE: kind, _COMPONENT_NAME: f"{kind}/{self.number}"}


_Observe = Callable[[_Seen], Iterable[Observation]]


class _Sources:
    """What the instruments of one meter provider tell of: sources, for as long as they live. Thread-safe.

    Without a lock, which a fork could leave held: whatever happens to a dictionary here is one step of the interpreter.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Source, tuple[int, int]] = WeakKeyDictionary()

    def add(self, source: Source, capacity: int, number: int) -> None:
        self._known[source] = capacity, number

    def see(self) -> Iterator[_Seen]:
        for reference in self._known.keyrefs():  # a copy: others come and go meanwhile
            if (source := reference()) is not None:
                yield _Seen(source.stats(), *self._known[source])


_numbers = itertools.count()
#: By the identity of the provider: a vendor's, such as logfire's, may have no hash.
_sources_by_provider: dict[int, _Sources] = {}
#: Of those that were the global provider: first the API's stand-in, later the application's own.
_global_sources: list[_Sources] = []


class Metrics:
    """The instruments of one pipeline. Thread-safe.

    Args:
        meter_provider: makes them; the global one by default.
    """

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        self._provider = meter_provider if meter_provider is not None else get_meter_provider()
        self._number = next(_numbers)
        self._labels = _labels(self._number)
        self._meter = self._provider.get_meter(attributes.SCOPE_NAME, __version__)
        self._duration = self._meter.create_histogram(
            "audit.export.duration",
            "s",
            "How long one attempt to write a batch took.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )

    def attempted(self, seconds: float, error_type: str | None) -> None:
        """Note how long one attempt to write a batch took, and what kept it from being written."""
        error = {} if error_type is None else {attributes.ERROR_TYPE: error_type}
        self._duration.record(seconds, {**self._labels, **error})

    def observe(self, source: Source, capacity: int) -> None:
        """Let the source's counts be read, for as long as it lives.

        Args:
            source: the processor.
            capacity: operations that it holds in memory at most.
        """
        made = _Sources()
        sources = _sources_by_provider.setdefault(id(self._provider), made)
        sources.add(source, capacity, self._number)
        if sources is made:
            weakref.finalize(self._provider, _sources_by_provider.pop, id(self._provider), None).atexit = False
            _make_instruments(self._meter, made)
        if self._provider is get_meter_provider():
            if sources is made:
                _global_sources.append(made)
            # The stand-in's instruments become those of the provider that replaces it, which ignores any made later.
            for each in _global_sources.copy():
                each.add(source, capacity, self._number)


def _make_instruments(meter: Meter, sources: _Sources) -> None:
    """Make what is observed, once a provider: an SDK ignores the callbacks of whoever makes an instrument again."""

    def callback(observe: _Observe) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        def call(options: CallbackOptions) -> Iterable[Observation]:  # noqa: ARG001 - there is no waiting in here
            return [observation for seen in sources.see() for observation in observe(seen)]

        return [call]

    counter, level = meter.create_observable_counter, meter.create_observable_up_down_counter
    counter("audit.records.emitted", callback(_one("accepted")), "{record}", "Operations that were accepted.")
    counter("audit.records.exported", callback(_one("stored")), "{record}", "Records that are in the table.")
    counter("audit.records.rejected", callback(_one("set_aside")), "{record}", "Records that the table refused.")
    counter("audit.records.dropped", callback(_dropped), "{record}", "Operations without a row, by reason.")
    level("audit.queue.depth", callback(_depth), "{record}", "Accepted operations that are not settled.")
    level("audit.spool.bytes", callback(_one("spool_bytes")), "By", "Bytes of this process's spool.")
    level("otel.sdk.processor.span.queue.size", callback(_size), "{span}", "Spans that wait to be exported.")
    level("otel.sdk.processor.span.queue.capacity", callback(_capacity), "{span}", "Spans the queue holds in memory.")
    counter("otel.sdk.processor.span.processed", callback(_processed), "{span}", "Spans that are done with.")
    counter("otel.sdk.exporter.span.exported", callback(_exported), "{span}", "Spans that were exported.")


def _one(name: str) -> _Observe:
    return lambda seen: [Observation(seen.counts[name], seen.labels)] if name in seen.counts else []


def _depth(seen: _Seen) -> Iterable[Observation]:
    return [Observation(seen.waiting, seen.labels)]


def _dropped(seen: _Seen) -> Iterable[Observation]:
    for name, reason in _DROPPED.items():
        if name in seen.counts:
            yield Observation(seen.counts[name], {**seen.labels, "reason": reason})


def _size(seen: _Seen) -> Iterable[Observation]:
    return [Observation(seen.waiting, seen.component(_PROCESSOR))]


def _capacity(seen: _Seen) -> Iterable[Observation]:
    return [Observation(seen.capacity, seen.component(_PROCESSOR))]


def _processed(seen: _Seen) -> Iterable[Observation]:
    return _done(_PROCESSOR, seen, _DROPPED | _REJECTED)


def _exported(seen: _Seen) -> Iterable[Observation]:
    return _done(_EXPORTER, seen, _REJECTED)


def _done(kind: str, seen: _Seen, errors: Mapping[str, str]) -> Iterable[Observation]:
    """Observe what went well, which has no error's type, and what didn't, which has one."""
    labels = seen.component(kind)
    yield Observation(seen.counts["stored"], labels)
    for name, error in errors.items():
        if seen.counts.get(name):
            yield Observation(seen.counts[name], {**labels, attributes.ERROR_TYPE: error})


def _labels(number: int) -> dict[str, str]:
    return {_COMPONENT_NAME: f"{_PROCESSOR}/{number}"}
