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
from astrocyte_otel_audit.pipeline.captured import Captured, as_str, exception_type, is_payload, normalized
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.record import NO_SCOPE, OUTCOMES, ScopeDefaults, record_id


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

    def action_of(
        self, span: ReadableSpan, span_attributes: Mapping[str, Any], parent_context: Context | None = None
    ) -> str | None:
        """Return the action of a span that starts now and is to be audited; None for every other span.

        Args:
            span: the span.
            span_attributes: of it; a plain copy is read many times faster than the SDK's view.
            parent_context: what it started in; the current context by default.
        """
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
        row_id: str | None = None,
        scope: ScopeDefaults | None = None,
        schema: str | None = None,
    ) -> Captured | None:
        """Return the facts of an ended span, or None if it isn't to be audited.

        Args:
            span: the ended span.
            row_id, scope, schema: what was noted when it started, if that was seen.
        """
        given = plain_attributes(span)
        action = given.get(attributes.ACTION)
        if type(action) is not str:
            action = as_str(action)
        mapping = None
        if action is not None:
            if not self._allows(action) and given.get(attributes.REQUIRED) is not True:
                return None
            bank_id = given.get(attributes.BANK_ID)
        else:
            found = self._mapped(span) if self.mappings else None
            if found is None:
                return None
            mapping, action = found
            bank_id = mapping.bank_of(given)
        if scope is None:
            scope = NO_SCOPE
        status = span.status.status_code
        outcome = given.get(attributes.OUTCOME)
        if type(outcome) is not str or outcome not in OUTCOMES:
            outcome = _outcome(as_str(outcome), status, mapping)
        error_type = given.get(attributes.ERROR_TYPE) if outcome == "failure" else None
        if error_type is None and status is StatusCode.ERROR and outcome == "failure":
            error_type = exception_type(span.events)
        context, parent, emitter = span.context, span.parent, span.instrumentation_scope
        start_ns, end_ns = span.start_time, span.end_time
        if type(start_ns) is not int:
            start_ns = 0
        transport = given.get(attributes.TRANSPORT) or scope.transport
        payload = {key: given[key] for key in filter(is_payload, given)}
        resource, service_name = self._service
        if span.resource is not resource:  # by identity: a resource's hash is a walk over all of it
            service_name = self._learn_service(span.resource)
        return Captured(
            row_id or record_id(context.trace_id, context.span_id, start_ns),
            action,
            schema,
            mapping.transport if transport is None and mapping is not None else transport,
            scope.bank_id if bank_id is None else bank_id,
            given.get(attributes.ACTOR_ID, scope.actor_id),
            given.get(attributes.ACTOR_TYPE, scope.actor_type),
            outcome,
            error_type,
            start_ns,
            end_ns if type(end_ns) is int else None,
            f"{context.trace_id:032x}",
            f"{context.span_id:016x}",
            None if parent is None else f"{parent.span_id:016x}",
            # Flags may carry the random bit too, so the bit is tested and not the number.
            context.trace_flags & 1 == 1,
            service_name,
            span.dropped_attributes,
            payload if emitter is not None and emitter.name == attributes.SCOPE_NAME else normalized(payload),
        )

    def _learn_service(self, resource: Resource) -> str | None:
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


def plain_attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return a copy of a span's attributes. The SDK's own are a view with a lock, and slow to ask what isn't there."""
    given: Any = span.attributes
    try:
        return given.copy()  # type: ignore[no-any-return]
    except AttributeError:
        return dict(given or ())


def _outcome(stated: str | None, status: StatusCode, mapping: SpanMapping | None) -> str:
    if stated is not None and stated in OUTCOMES:
        return stated
    if status is StatusCode.ERROR:
        return "failure"
    if status is StatusCode.OK:
        return "success"
    # An emitter of ours always states its outcome: without one, it is not known.
    return "unknown" if mapping is None else mapping.unset_outcome


def is_suppressed(context: Context | None = None) -> bool:
    """Say whether spans of instrumentations are not wanted in a context; None is the current one.

    The pipeline's own SQL runs in such a one. Were its spans audited, each write would cause the next. An operation
    that names its action itself isn't asked: it is no instrumentation's.
    """
    return bool(get_value(_SUPPRESS_INSTRUMENTATION_KEY, context))
