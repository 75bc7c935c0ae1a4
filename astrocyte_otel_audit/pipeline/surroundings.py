"""What is around an audited span in this process: the request that it serves, and the spans that it is inside of."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span
from opentelemetry.trace import SpanKind, get_current_span

#: Kinds of a span that stands for work which somebody else has asked for.
ENTRY_KINDS: Final = (SpanKind.SERVER, SpanKind.CONSUMER)
#: Attributes of the semantic conventions that say how a request came in, the nearest to the operation first, with what
#: that is called; None for the attribute's own value, such as ``grpc`` or ``kafka``.
_TRANSPORTS: Final[tuple[tuple[str, str | None], ...]] = (
    ("mcp.method.name", "mcp"),
    ("rpc.system", None),
    ("rpc.system.name", None),
    ("messaging.system", None),
    ("http.request.method", "http"),
    ("http.method", "http"),
)
#: Who acts, by the semantic conventions: set by a service on the span of a request that it has authenticated.
ACTOR_KEYS: Final = ("enduser.id", "user.id")


def mcp_transport_of(span_attributes: Mapping[str, Any]) -> str | None:
    """Return ``mcp`` for a span that says so of itself, whoever serves the request."""
    return "mcp" if "mcp.method.name" in span_attributes else None


def transport_of(span_attributes: Mapping[str, Any]) -> str | None:
    """Return how a request came in, as the semantic conventions have it on its span; None where nothing says it."""
    for key, name in _TRANSPORTS:
        if isinstance(found := span_attributes.get(key), str):
            return name or found
    return None


class _Entry(weakref.ref[Span]):
    """The span of a request that is being served. Weak, since one may be forgotten without ever being ended."""

    __slots__ = ("has_ended", "outer", "trace_id")
    trace_id: int
    #: The request of the same trace, in this process, that was being served when it came in.
    outer: _Entry | None
    has_ended: bool


class Surroundings:
    """The spans under way that audited ones look up. Thread-safe; never grows past the spans that are alive.

    Args:
        keeps_parents: whether a mapping looks at the spans around one.
    """

    def __init__(self, *, keeps_parents: bool) -> None:
        #: The youngest of each trace.
        self._entries: dict[int, _Entry] = {}
        self._parents: WeakKeyDictionary[Span, ReadableSpan] | None = WeakKeyDictionary() if keeps_parents else None

    def start(self, span: Span, parent_context: Context | None) -> None:
        """Note a span that starts."""
        if span.kind in ENTRY_KINDS:
            entry = _Entry(span, self._forget)
            entry.trace_id = trace_id = span.context.trace_id
            entry.outer, entry.has_ended = self._entries.get(trace_id), False
            self._entries[trace_id] = entry
        if self._parents is not None and isinstance(parent := get_current_span(parent_context), ReadableSpan):
            self._parents[span] = parent

    def end(self, span: ReadableSpan) -> None:
        """Forget a request that is served."""
        if span.kind not in ENTRY_KINDS:
            return
        entry = self._entries.get(span.context.trace_id)
        while entry is not None:
            live = entry()
            if live is not None and live.context.span_id == span.context.span_id:
                entry.has_ended = True
                break
            entry = entry.outer
        self._settle(span.context.trace_id)

    def entry_of(self, trace_id: int) -> ReadableSpan | None:
        """Return the span of the request that a trace's operations serve: the one that came in last, of several."""
        entry = self._entries.get(trace_id)
        while entry is not None:
            if not entry.has_ended and (span := entry()) is not None:
                return span
            entry = entry.outer
        return None

    def around(self, span: Span | None) -> Iterator[ReadableSpan]:
        """Yield the spans around one in this process, the innermost first."""
        found: Any = span
        while self._parents is not None and found is not None and (found := self._parents.get(found)) is not None:
            yield found

    def _forget(self, entry: weakref.ref[Span]) -> None:
        if isinstance(entry, _Entry):
            self._settle(entry.trace_id)

    def _settle(self, trace_id: int) -> None:
        """Let the trace's youngest request that is still being served be the one that is found first."""
        entry = first = self._entries.get(trace_id)
        while entry is not None and (entry.has_ended or entry() is None):
            entry = entry.outer
        if entry is None:
            self._entries.pop(trace_id, None)
        elif entry is not first:
            self._entries[trace_id] = entry
