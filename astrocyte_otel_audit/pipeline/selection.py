"""Selection: which spans are audit operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# The public helper is in a package that the SDK does not need; every instrumentation reads this key.
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, get_value
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.allowlist import Allowlist
from astrocyte_otel_audit.memo import Memo
from astrocyte_otel_audit.pipeline.captured import Captured, as_str, exception_type, wire_of
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.record import ScopeDefaults


class Selection:
    """The allowlist and the mappings, as one decision. Thread-safe.

    Args:
        actions: the allowlist; see `Allowlist`.
        mappings: spans without `audit.action` that are audited too.
    """

    def __init__(self, actions: Iterable[str], mappings: Iterable[SpanMapping] = ()) -> None:
        self.allowlist = Allowlist(actions)
        self.mappings = tuple(mappings)
        self._allows = self.allowlist.allows
        self._service: tuple[Resource | None, str | None] = (None, None)
        self._mapped_by_name = Memo(self._find_mapped_by_name)
        self._mapping_for = Memo(self._find_mapping)

    def may_audit(
        self,
        span_name: str,
        kind: SpanKind | None,
        span_attributes: Mapping[str, Any] | None,
        parent_context: Context | None = None,
    ) -> bool:
        """Say whether a span about to start may become a record: what a sampler has to keep.

        Generous, since a sampler sees no scope and many libraries set attributes later.
        """
        if span_attributes:
            action = as_str(span_attributes.get(attributes.ACTION))
            if action is not None:
                return self._allows(action) or span_attributes.get(attributes.REQUIRED) is True
        return bool(self.mappings) and self._mapped_by_name[span_name, kind] and not is_suppressed(parent_context)

    def action_of(self, span: ReadableSpan, parent_context: Context | None = None) -> str | None:
        """Return the action of a span that starts now and is to be audited; None for every other span."""
        span_attributes = span.attributes or {}
        action = as_str(span_attributes.get(attributes.ACTION))
        if action is not None:
            if self._allows(action) or span_attributes.get(attributes.REQUIRED) is True:
                return action
            return None
        found = self._mapped(span) if self.mappings else None
        return None if found is None or is_suppressed(parent_context) else found[1]

    def capture(
        self,
        span: ReadableSpan,
        record_id: str | None = None,
        scope: ScopeDefaults | None = None,
        schema: str | None = None,
    ) -> Captured | None:
        """Return the facts of an ended span, or None if it isn't to be audited.

        Args:
            span: the ended span.
            record_id, scope, schema: what was noted when it started, if that was seen.
        """
        given: Any = span.attributes
        # The SDK's attributes are a view with a lock; a plain copy is read many times faster.
        copy = getattr(given, "copy", None)
        plain: dict[str, Any] = dict(given or ()) if copy is None else copy()
        action = as_str(plain.get(attributes.ACTION))
        mapping = None
        if action is not None:
            if not self._allows(action) and plain.get(attributes.REQUIRED) is not True:
                return None
            bank_id = plain.get(attributes.BANK_ID)
        else:
            found = self._mapped(span) if self.mappings else None
            if found is None:
                return None
            mapping, action = found
            bank_id = mapping.bank_of(plain)
        emitter = span.instrumentation_scope
        is_ours = emitter is not None and emitter.name == attributes.SCOPE_NAME
        context, parent, status = span.context, span.parent, span.status.status_code
        start_ns, end_ns = span.start_time, span.end_time
        return Captured(
            action,
            bank_id,
            None if mapping is None else mapping.transport,
            # An emitter of ours always states its outcome: without one, it is not known.
            "unknown" if mapping is None else mapping.unset_outcome,
            exception_type(span.events) if status is StatusCode.ERROR else None,
            context.trace_id,
            context.span_id,
            None if parent is None else parent.span_id,
            context.trace_flags,
            start_ns if type(start_ns) is int else 0,
            end_ns if type(end_ns) is int else None,
            status,
            self._service_name(span.resource),
            span.dropped_attributes,
            plain if is_ours else wire_of(plain),
            is_ours,
            record_id,
            scope,
            schema,
        )

    def _service_name(self, resource: Resource) -> str | None:
        known, name = self._service
        if resource is not known:  # by identity: a resource's hash is a walk over all of it
            found = resource.attributes.get("service.name")
            name = found if isinstance(found, str) else None
            self._service = (resource, name)
        return name

    def _find_mapped_by_name(self, question: tuple[str, SpanKind | None]) -> bool:
        span_name, kind = question
        found = (mapping.action_for_name(span_name, kind) for mapping in self.mappings)
        return any(action is not None and self._allows(action) for action in found)

    def _mapped(self, span: ReadableSpan) -> tuple[SpanMapping, str] | None:
        scope = span.instrumentation_scope
        return self._mapping_for[span.name, span.kind, None if scope is None else scope.name]

    def _find_mapping(self, question: tuple[str, SpanKind, str | None]) -> tuple[SpanMapping, str] | None:
        name, kind, scope = question
        for mapping in self.mappings:
            action = mapping.action_for(name, kind, scope)
            if action is not None:
                return (mapping, action) if self._allows(action) else None
        return None


def is_suppressed(context: Context | None = None) -> bool:
    """Say whether spans of instrumentations are not wanted in a context; None is the current one.

    The pipeline's own SQL runs in such a one. Were its spans audited, each write would cause the next. An operation
    that names its action itself isn't asked: it is no instrumentation's.
    """
    return bool(get_value(_SUPPRESS_INSTRUMENTATION_KEY, context))
