"""Operations under way: what is noted when a span starts, and how nested ones become a single row.

A decorated function around a library's own span of the same action is one operation to whoever reads the log.
The outermost span is its row; the inner one fills what that left empty.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan, Span
from opentelemetry.trace import SpanContext

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.pipeline.captured import Captured, filled, to_record
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


class OpenOperations:
    """The audited spans that have started and not ended. Thread-safe; never grows past the spans that are alive."""

    def __init__(self) -> None:
        self._open: dict[_Key, _Open] = {}
        self._inner: dict[_Key, AuditRecord] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def start(self, span: Span, action: str, scope: ScopeDefaults, schema: str | None) -> str:
        """Remember an operation by its span, and return the id of its row."""
        reference = _Reference(span, self._forget)
        context = span.get_span_context()
        reference.key = key = (context.trace_id, context.span_id)
        row = record_id(*key, span.start_time or 0)
        self._open[key] = _Open(action, row, scope, schema, reference)
        return row

    def end(self, span: ReadableSpan, capture: Callable[..., Captured | None]) -> tuple[Captured | AuditRecord, ...]:
        """Close an operation and return what is to be written now.

        Args:
            span: the ended span.
            capture: `Selection.capture`.

        Returns:
            Nothing, where there is nothing to write or the enclosing operation has taken it in; the operation; or
            two, where an inner operation turned out to be about another bank.
        """
        key = _key(span.context)
        with self._lock:
            started = self._open.pop(key, None)
            inner = self._inner.pop(key, None)
        if started is None:
            captured = capture(span)
        else:
            captured = capture(span, started.id, None if started.scope is NO_SCOPE else started.scope, started.schema)
        if captured is None:
            return () if inner is None else (inner,)
        if inner is not None and _same(_bank(captured), inner.bank_id):
            captured, inner = captured._replace(inner=inner), None
        parent = span.parent
        if parent is not None and not parent.is_remote and self._fold(_key(parent), captured):
            return () if inner is None else (inner,)
        return (captured,) if inner is None else (inner, captured)

    def after_fork(self) -> None:
        """Make the lock usable in a child: another thread may have held it at the fork."""
        self._lock = threading.Lock()

    def _fold(self, parent: _Key, captured: Captured) -> bool:
        """Let the enclosing operation take this one in, if there is one of the same action, tenant and bank."""
        with self._lock:
            outer = self._open.get(parent)
            if outer is None or outer.action != captured.action or outer.schema != captured.schema:
                return False
            earlier = self._inner.get(parent)
            # Where another bank was touched, that must not vanish in the outer row.
            outer_bank = _bank_of_open(outer) or (None if earlier is None else earlier.bank_id)
            if not _same(_bank(captured), outer_bank):
                return False
            record = to_record(captured)
            self._inner[parent] = record if earlier is None else filled(earlier, record)
            return True

    def _forget(self, reference: weakref.ref[Span]) -> None:
        if isinstance(reference, _Reference):
            self._open.pop(reference.key, None)
            self._inner.pop(reference.key, None)


def _bank(captured: Captured) -> object:
    if captured.bank_id is None and captured.scope is not None:
        return captured.scope.bank_id
    return captured.bank_id


def _bank_of_open(outer: _Open) -> object:
    span = outer.reference()
    found = (span.attributes or {}).get(attributes.BANK_ID) if span is not None else None
    return found if found is not None else outer.scope.bank_id


def _same(bank: object, other: object) -> bool:
    return bank is None or other is None or bank == other


def _key(context: SpanContext) -> _Key:
    return context.trace_id, context.span_id
