"""Operations under way: what is noted when a span starts, and how nested ones become a single row.

A decorated function around a library's own span of the same action is one operation to whoever reads the log.
The outermost span is its row; the inner one fills what that left empty.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan, Span
from opentelemetry.trace import SpanContext

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.pipeline.captured import Captured, filled, to_record
from astrocyte_otel_audit.pipeline.selection import is_suppressed
from astrocyte_otel_audit.record import NO_SCOPE, AuditRecord, ScopeDefaults, record_id

_Key: TypeAlias = tuple[int, int]


class _Reference(weakref.ref[Span]):
    """Notices a span that is forgotten without ever being ended, so that its entry goes too."""

    __slots__ = ("key",)
    key: _Key


class _Open(NamedTuple):
    """An operation that has started."""

    action: str
    #: The id of its row.
    id: str
    scope: ScopeDefaults
    schema: str | None
    #: Keeps the weak reference, and with it its callback, alive.
    reference: _Reference
    #: What it has taken in under ``"inner"``, or None there once it has ended. Whoever is first to call `setdefault`
    #: has it, so nothing can be taken in and lost, and no lock is needed, which garbage collection could run into.
    slot: dict[Literal["inner"], AuditRecord | None]

    def close(self) -> AuditRecord | None:
        """Take nothing in any more, and return what was taken in."""
        return self.slot.setdefault("inner", None)


class OpenOperations:
    """The audited spans that have started and not ended. Thread-safe; never grows past the spans that are alive."""

    def __init__(self) -> None:
        self._open: dict[_Key, _Open] = {}
        #: Taken in by an operation that was then forgotten.
        self._orphans: deque[AuditRecord] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def start(self, span: Span, action: str, scope: ScopeDefaults, schema: str | None) -> str:
        """Remember an operation by its span, and return the id of its row."""
        reference = _Reference(span, self._forget)
        context = span.get_span_context()
        reference.key = key = (context.trace_id, context.span_id)
        row = record_id(*key, span.start_time or 0)
        self._open[key] = _Open(action, row, scope, schema, reference, {})
        return row

    def end(self, span: ReadableSpan, capture: Callable[..., Captured | None]) -> list[AuditRecord]:
        """Close an operation and return what is to be written now.

        Args:
            span: the ended span.
            capture: `Selection.capture`.

        Returns:
            Nothing, where there is nothing to write or the enclosing operation has taken it in; the operation; or
            more, where an inner operation is one that its row would have hidden, or others were never ended.
        """
        rows = [*self.orphans()] if self._orphans else []
        started = self._open.pop(_key(span.context), None)
        if started is None:
            captured = capture(span)
            if captured is not None and attributes.ACTION not in captured.attributes and is_suppressed():
                captured = None  # not taken at its start, for the same reason
        else:
            captured = capture(span, started.id, None if started.scope is NO_SCOPE else started.scope, started.schema)
        record = None if captured is None else to_record(captured)
        if started is not None and (inner := started.close()) is not None:
            if record is None or _contradicts(record, inner):
                rows.append(inner)
            else:
                record = filled(record, inner)
        if record is not None and captured is not None:
            # One whose emitter was promised its row keeps its own, or it would vanish.
            promised = captured.attributes.get(attributes.REQUIRED) is True
            if promised or not self._is_taken_in(record, span.parent):
                rows.append(record)
        return rows

    def orphans(self) -> tuple[AuditRecord, ...]:
        """Hand over what was taken in by operations that will never end: rows of their own after all."""
        return tuple(self._orphans.popleft() for _ in range(len(self._orphans)))

    def abandon(self) -> tuple[AuditRecord, ...]:
        """Hand over all that was taken in by operations that have not ended yet."""
        inner = [started.slot.pop("inner", None) for started in list(self._open.values())]
        return (*self.orphans(), *(record for record in inner if record is not None))

    def after_fork(self) -> None:
        """Forget in a child what was taken in: it is the parent's."""
        for started in list(self._open.values()):
            started.slot.clear()
        self._orphans.clear()

    def _is_taken_in(self, record: AuditRecord, parent: SpanContext | None) -> bool:
        """Let the enclosing operation take this one in, if there is one of the same action, tenant and bank."""
        if parent is None or parent.is_remote:
            return False
        outer = self._open.get(_key(parent))
        if outer is None or outer.action != record.action or outer.schema != record.schema:
            return False
        # One row can speak for one inner operation: a second one, and another bank's, would vanish.
        if outer.slot or not _same(record.bank_id, _bank_of_open(outer)):
            return False
        return outer.slot.setdefault("inner", record) is record

    def _forget(self, reference: weakref.ref[Span]) -> None:
        if isinstance(reference, _Reference):
            forgotten = self._open.pop(reference.key, None)
            if forgotten is not None and (inner := forgotten.close()) is not None:
                self._orphans.append(inner)


def _contradicts(outer: AuditRecord, inner: AuditRecord) -> bool:
    """Say whether the outer row would hide that the inner one was another bank's, another actor's, or a failure."""
    hides_failure = inner.outcome == "failure" and outer.outcome != "failure"
    return hides_failure or not (_same(outer.bank_id, inner.bank_id) and _same(outer.actor_id, inner.actor_id))


def _bank_of_open(outer: _Open) -> object:
    span = outer.reference()
    found = (span.attributes or {}).get(attributes.BANK_ID) if span is not None else None
    return found if found is not None else outer.scope.bank_id


def _same(bank: object, other: object) -> bool:
    return bank is None or other is None or bank == other


def _key(context: SpanContext) -> _Key:
    return context.trace_id, context.span_id
