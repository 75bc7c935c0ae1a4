"""Operations under way: what is noted when a span starts, and how nested ones become a single row.

A decorated function around a library's own span of the same action is one operation to whoever reads the log.
The outermost span is its row; the inner one fills what that left empty.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Protocol, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan, Span

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.pipeline.captured import Captured, contradicts, filled, same
from astrocyte_otel_audit.pipeline.selection import Selection, is_suppressed
from astrocyte_otel_audit.record import ScopeDefaults, record_id

_Key: TypeAlias = tuple[int, int]


class _Open(weakref.ref[Span]):
    """An operation that has started. Weak, so that a span which is forgotten without ever being ended goes too."""

    __slots__ = ("action", "begun", "id", "key", "schema", "scope", "taken_in")
    key: _Key
    #: As its emitter named it at the start, since an overflowing span drops its oldest attributes; None where a mapping
    #: has to say it.
    action: str | None
    #: The id of its row.
    id: str
    scope: ScopeDefaults
    schema: str | None
    #: What is on the disk of it, where it must leave a row.
    begun: Captured | None
    #: The one that it has taken in, or None in its place once it has ended. Whoever is first to call `setdefault` has
    #: it, so nothing can be taken in and lost, and no lock is needed, which garbage collection could run into.
    taken_in: dict[str, Captured | None]


class Sink(Protocol):
    """Where operations go that have ended."""

    def submit(self, captured: Captured) -> bool:
        """Take one that becomes a row."""

    def hold(self, captured: Captured) -> bool:
        """Take what is known so far of the row of an operation that has not ended yet, in case that never ends.

        Returns:
            False where there is no room for it.
        """

    def release(self, row_id: str) -> None:
        """Forget what is held until a row is written."""


class OpenOperations:
    """The audited spans that have started and not ended. Thread-safe; never grows past the spans that are alive.

    Args:
        selection: says what becomes a record, and of what action.
        sink: takes what has ended.
    """

    def __init__(self, selection: Selection, sink: Sink) -> None:
        self._selection = selection
        self._sink = sink
        self._open: dict[_Key, _Open] = {}
        #: What is known of operations that were then forgotten.
        self._orphans: deque[Captured] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def start(self, span: Span, action: str | None, scope: ScopeDefaults, schema: str | None) -> str:
        """Remember an operation by its span, and return the id of its row."""
        context = span.context
        started = _Open(span, self._forget)
        started.key = key = (context.trace_id, context.span_id)
        started.id = row_id = record_id(*key, span.start_time or 0)
        started.action = action
        started.scope = scope
        started.schema = schema
        started.begun = None
        started.taken_in = {}
        self._open[key] = started
        return row_id

    def note_begun(self, span: Span, begun: Captured) -> None:
        """Remember what is on the disk of an operation that must leave a row."""
        context = span.context
        if (started := self._open.get((context.trace_id, context.span_id))) is not None:
            started.begun = begun

    def end(self, span: ReadableSpan) -> None:
        """Close an operation and hand it on, unless there is nothing to write, or the one around it takes it in.

        More than one, where an inner operation is one that its row would have hidden, or others were never ended.
        """
        if self._orphans:
            self.hand_on_orphans()
        context = span.context
        started = self._open.pop((context.trace_id, context.span_id), None)
        if started is None:
            # Not taken at its start where instrumentation is suppressed, and not at its end for the same reason.
            names_its_action = attributes.ACTION in (span.attributes or ())
            captured = self._selection.capture(span) if names_its_action or not is_suppressed() else None
        else:
            captured = self._selection.capture(span, started.id, started.scope, started.schema, started())
            if (inner := started.taken_in.setdefault("", None)) is not None:
                if captured is None:
                    self._sink.submit(inner if started.begun else inner._replace(replaces=started.id))
                elif contradicts(captured, inner):
                    self._sink.submit(inner)
                else:
                    captured = filled(captured, inner)
        if captured is not None and (captured.parent_span_id is None or not self._is_taken_in(captured, span)):
            self._sink.submit(captured)

    def hand_on_orphans(self) -> None:
        """Hand on what is known of operations that will never end: rows after all."""
        for _ in range(len(self._orphans)):
            self._sink.submit(self._orphans.popleft())

    def abandon(self) -> None:
        """Hand on what is known of operations that have not ended. One that must leave a row still has its place."""
        self.hand_on_orphans()
        for started in list(self._open.values()):
            begun, inner = started.begun, started.taken_in.get("")
            if inner is None or not (begun is None or contradicts(begun, inner)):
                continue
            started.taken_in[""] = None
            self._sink.submit(inner._replace(id=started.id) if begun is None else inner)

    def after_fork(self) -> None:
        """Forget in a child what was taken in, and what is on the disk: it is the parent's, as are the rows to be.

        So nothing of the child's own is taken in any more: the parent's row would not say it.
        """
        for started in list(self._open.values()):
            started.begun = None
            started.taken_in = {"": None}
        self._orphans.clear()

    def _is_taken_in(self, captured: Captured, span: ReadableSpan) -> bool:
        """Let the enclosing operation take this one in, if there is one of the same action, tenant and bank."""
        parent = span.parent
        outer = None if parent is None or parent.is_remote else self._open.get((parent.trace_id, parent.span_id))
        if outer is None or outer.schema != captured.schema or self._action_of(outer) != captured.action:
            return False
        # One whose emitter was promised its row keeps its own, or it would vanish.
        if (span.attributes or {}).get(attributes.REQUIRED) is True:
            return False
        # One row can speak for one inner operation: a second one, and another bank's, would vanish.
        if outer.taken_in or not same(captured.bank_id, _bank_of_open(outer)):
            return False
        if outer.taken_in.setdefault("", captured) is not captured:
            return False
        if not self._sink.hold(captured._replace(id=outer.id, replaces=captured.id)):
            # With the process it would vanish: as a row of its own it is counted, where it is refused.
            outer.taken_in[""] = None
            return False
        if outer.key not in self._open:  # it has ended meanwhile, and its row waits for nothing
            self._sink.release(outer.id)
        return True

    def _action_of(self, outer: _Open) -> str | None:
        span = outer()
        if outer.action is not None or span is None:
            return outer.action
        return self._selection.mapped_action_of(span, span)

    def _forget(self, started: weakref.ref[Span]) -> None:
        forgotten = self._open.pop(started.key, None) if isinstance(started, _Open) else None
        if forgotten is None:
            return
        begun, inner = forgotten.begun, forgotten.taken_in.setdefault("", None)
        if begun is not None and inner is not None and contradicts(begun, inner):
            self._orphans += (begun, inner)
        elif begun is not None:
            self._orphans.append(begun if inner is None else filled(begun, inner))
        elif inner is not None:
            self._orphans.append(inner._replace(id=forgotten.id))


def _bank_of_open(outer: _Open) -> object:
    span = outer()
    found = (span.attributes or {}).get(attributes.BANK_ID) if span is not None else None
    return found if found is not None else outer.scope.bank_id
