"""Selection: which spans are audit operations."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

# The public helper is in a package that the SDK does not need; every instrumentation reads this key.
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, get_value
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.allowlist import Allowlist
from astrocyte_otel_audit.memo import Memo
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline.captured import Captured, as_str, exception_type, is_payload, normalized
from astrocyte_otel_audit.pipeline.mapping import SpanMapping, first_of
from astrocyte_otel_audit.pipeline.surroundings import (
    ACTOR_KEYS,
    ENTRY_KINDS,
    Surroundings,
    mcp_transport_of,
    transport_of,
)
from astrocyte_otel_audit.pipeline.switch import Switch
from astrocyte_otel_audit.record import NO_SCOPE, OUTCOMES, ScopeDefaults, record_id

#: Says of an actor that nobody has authenticated it.
_ACTOR_SOURCE: Final = attributes.METADATA + "actor_source"


class Chance(enum.Enum):
    """What can be known of a span at its start about whether it will become a record."""

    NONE = enum.auto()
    #: Its name, kind and scope would do; what else has to be there may come later.
    POSSIBLE = enum.auto()
    CERTAIN = enum.auto()


# As globals: looking a member up on its enum costs much at every span (CPython 3.11).
_NONE, _POSSIBLE, _CERTAIN = Chance


class _Around(NamedTuple):
    transport: str | None
    actor_id: Any


class Selection:
    """The allowlist and the mappings, as one decision. Thread-safe.

    Args:
        actions: the allowlist; see `Allowlist`.
        mappings: spans without `audit.action` that are audited too.
        normalizer: what of mapped values may be stored.
        actor_baggage: keys of OpenTelemetry baggage that are believed when they say who acts.
        switch: says whether an allowed action of a bank is audited; None for always.
    """

    def __init__(
        self,
        actions: Iterable[str],
        mappings: Iterable[SpanMapping] = (),
        *,
        normalizer: Normalizer | None = None,
        actor_baggage: Iterable[str] = (),
        switch: Switch | None = None,
    ) -> None:
        self.allowlist = Allowlist(actions)
        self.mappings = tuple(mappings)
        self.switch = switch
        self.actor_baggage = tuple(actor_baggage)
        patterns = [pattern for mapping in self.mappings for pattern in (*mapping.inside, *mapping.not_inside)]
        self.surroundings = Surroundings(keeps_parents=bool(patterns))
        self._patterns_around = tuple(patterns)
        self._normalizer = Normalizer() if normalizer is None else normalizer
        self._allows = self.allowlist.allows
        self._service: tuple[Resource | None, str | None] = (None, None)
        self._kept_for = Memo(self._find_kept_for)
        self._candidates = Memo(self._find_candidates)

    @property
    def maps_in_vain(self) -> bool:
        """Whether there are mappings, and none can give an action that is allowed."""
        given = [mapping.action for mapping in self.mappings]
        return bool(given) and not any("{" in action or self._allows(action) for action in given)

    def wants_as(self, other: Selection) -> bool:
        """Say whether a sampler keeps the same spans for another one."""
        return (self.allowlist.actions, self.mappings) == (other.allowlist.actions, other.mappings)

    def may_audit(
        self,
        span_name: str,
        kind: SpanKind | None,
        span_attributes: Mapping[str, Any] | None,
        parent_context: Context | None = None,
    ) -> bool:
        """Say whether a span about to start may become a record, or be looked up by one: what a sampler has to keep.

        Generous, since a sampler sees no scope and many libraries set attributes later.
        """
        if span_attributes:
            action = as_str(span_attributes.get(attributes.ACTION))
            if action is not None:
                return self._allows(action) or span_attributes.get(attributes.REQUIRED) is True
        if kind in ENTRY_KINDS:
            return bool(self.allowlist.actions)
        if not self.mappings:
            return False
        mappings, is_looked_up = self._kept_for[span_name, kind]
        keeps = (
            is_looked_up
            or any(mapping.may_fit(span_attributes or {}) for mapping in mappings)
            or (bool(self._patterns_around) and _is_kept(get_current_span(parent_context)))
        )
        return keeps and not is_suppressed(parent_context)

    def expects(
        self, span: ReadableSpan, span_attributes: Mapping[str, Any], parent_context: Context | None = None
    ) -> Chance:
        """Say whether a span that starts now will become a record.

        Args:
            span: the span.
            span_attributes: of it; a plain copy is read many times faster than the SDK's view.
            parent_context: what it started in; the current context by default.
        """
        action = as_str(span_attributes.get(attributes.ACTION))
        if action is not None:
            return _CERTAIN if self._allows(action) or span_attributes.get(attributes.REQUIRED) is True else _NONE
        if not self.mappings:
            return _NONE
        candidates = self._candidates_of(span)
        if not candidates:
            # The span of a request is often given another name, once it is known what is asked for.
            scope = span.instrumentation_scope
            is_renamed = span.kind in ENTRY_KINDS and any(
                mapping.has_kind(span.kind) and mapping.has_scope(None if scope is None else scope.name)
                for mapping in self.mappings
            )
            return _POSSIBLE if is_renamed else _NONE
        if is_suppressed(parent_context):
            return _NONE
        mapping, word = candidates[0]
        if mapping.is_conditional or mapping.looks_around or (action := mapping.action_of(word, {})) is None:
            return _POSSIBLE
        return _CERTAIN if self._allows(action) else _NONE

    def mapped_action_of(self, span: ReadableSpan, live: Span | None = None) -> str | None:
        """Return what a mapping says a span's action is, as it is now and whether or not it is allowed, or None.

        Args:
            span: the span.
            live: the same one, as it was seen to start, if it was.
        """
        found = self._mapped(span, plain_attributes(span), live)
        return None if found is None else found[1]

    def capture(
        self,
        span: ReadableSpan,
        row_id: str | None = None,
        scope: ScopeDefaults | None = None,
        schema: str | None = None,
        live: Span | None = None,
    ) -> Captured | None:
        """Return the facts of an ended span, or None if it isn't to be audited.

        Args:
            span: the ended span.
            row_id, scope, schema, live: what was noted when it started, if that was seen.
        """
        given = plain_attributes(span)
        action = given.get(attributes.ACTION)
        if type(action) is not str:
            action = as_str(action)
        mapping = None
        if action is not None:
            bank_id = given.get(attributes.BANK_ID)
        else:
            found = self._mapped(span, given, live) if self.mappings else None
            if found is None:
                return None
            mapping, action = found
            bank_id = mapping.bank_of(given)
        if scope is None:
            scope = NO_SCOPE
        if bank_id is None:
            bank_id = scope.bank_id
        if not self._is_wanted(action, bank_id, schema) and given.get(attributes.REQUIRED) is not True:
            return None
        status = span.status.status_code
        outcome, reason = given.get(attributes.OUTCOME), None
        if type(outcome) is not str or outcome not in OUTCOMES:
            outcome = as_str(outcome)
            if outcome not in OUTCOMES:
                outcome, reason = _outcome_of(status) if mapping is None else mapping.outcome_of(status, given)
        error_type = given.get(attributes.ERROR_TYPE, reason) if outcome == "failure" else None
        if error_type is None and status is StatusCode.ERROR and outcome == "failure":
            error_type = exception_type(span.events)
        context, parent, emitter = span.context, span.parent, span.instrumentation_scope
        start_ns, end_ns = span.start_time, span.end_time
        if type(start_ns) is not int:
            start_ns = 0
        payload = {key: given[key] for key in filter(is_payload, given)}
        is_ours = emitter is not None and emitter.name == attributes.SCOPE_NAME
        if not is_ours:
            payload = normalized(payload)
            if mapping is not None:
                payload = {**mapping.payload_of(given, self._normalizer, action), **payload}
        transport = given.get(attributes.TRANSPORT) or scope.transport
        actor_id = given.get(attributes.ACTOR_ID, scope.actor_id)
        if transport is None or actor_id is None:
            entry = self.surroundings.entry_of(context.trace_id)
            if mapping is not None or entry is not None or not is_ours:  # else there is nobody else who could say it
                around = self._around(span, given, mapping, entry)
                transport = transport or around.transport
                actor_id = around.actor_id if actor_id is None else actor_id
            if actor_id is None and scope.asserted_actor_id is not None:
                actor_id, payload[_ACTOR_SOURCE] = scope.asserted_actor_id, "baggage"
        resource, service_name = self._service
        if span.resource is not resource:  # by identity: a resource's hash is a walk over all of it
            service_name = self._learn_service(span.resource)
        return Captured(
            row_id or record_id(context.trace_id, context.span_id, start_ns),
            action,
            schema,
            transport,
            bank_id,
            actor_id,
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
            payload,
        )

    def _is_wanted(self, action: str, bank_id: object, schema: str | None) -> bool:
        return self._allows(action) and (self.switch is None or self.switch.is_on(action, bank_id, schema))

    def _around(
        self, span: ReadableSpan, given: Mapping[str, Any], mapping: SpanMapping | None, entry: ReadableSpan | None
    ) -> _Around:
        """Return what a span's own emitter doesn't say as an audited one: by its mapping, or by its request's span."""
        served = plain_attributes(entry) if entry is not None else given if span.kind in ENTRY_KINDS else {}
        transport = None if mapping is None else mapping.transport_of(given)
        actor_id = None if mapping is None else mapping.actor_of(given)
        if actor_id is None and (actor_id := first_of(given, ACTOR_KEYS)) is None:
            actor_id = first_of(served, ACTOR_KEYS)
        return _Around(transport or mcp_transport_of(given) or transport_of(served), actor_id)

    def _learn_service(self, resource: Resource) -> str | None:
        found = resource.attributes.get("service.name")
        name = found if isinstance(found, str) else None
        self._service = (resource, name)
        return name

    def _find_kept_for(self, question: tuple[str, SpanKind | None]) -> tuple[tuple[SpanMapping, ...], bool]:
        """Return what a sampler keeps a span for: the mappings that may take it, and whether others look it up."""
        span_name, kind = question
        mappings = []
        for mapping in self.mappings:
            match = mapping.match_name(span_name) if mapping.has_kind(kind) else None
            if match is not None:
                action = mapping.action_of(match.groupdict().get("action"), {})
                if action is None or self._allows(action):
                    mappings.append(mapping)
        looked_up = (one.has_kind(kind) and one.match_name(span_name) is not None for one in self._patterns_around)
        return tuple(mappings), any(looked_up)

    def _candidates_of(self, span: ReadableSpan) -> tuple[tuple[SpanMapping, str | None], ...]:
        scope = span.instrumentation_scope
        return self._candidates[span.name, span.kind, None if scope is None else scope.name]

    def _find_candidates(
        self, question: tuple[str, SpanKind, str | None]
    ) -> tuple[tuple[SpanMapping, str | None], ...]:
        """Return the mappings that may take a span, each with the word of its name that is the action."""
        name, kind, scope = question
        return tuple(
            (mapping, match.groupdict().get("action"))
            for mapping in self.mappings
            if mapping.has_kind(kind) and mapping.has_scope(scope) and (match := mapping.match_name(name)) is not None
        )

    def _mapped(
        self, span: ReadableSpan, given: Mapping[str, Any], live: Span | None
    ) -> tuple[SpanMapping, str] | None:
        for mapping, word in self._candidates_of(span):
            if mapping.fits(span, given, self.surroundings.around(live)):
                action = mapping.action_of(word, given)
                if action is not None:
                    return mapping, action
        return None


def plain_attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return a copy of a span's attributes. The SDK's own are a view with a lock, and slow to ask what isn't there."""
    given: Any = span.attributes
    try:
        return given.copy()  # type: ignore[no-any-return]
    except AttributeError:
        return dict(given or ())


def _outcome_of(status: StatusCode) -> tuple[str, None]:
    if status is StatusCode.ERROR:
        return "failure", None
    # An emitter of ours always states its outcome: without one, it is not known.
    return ("success" if status is StatusCode.OK else "unknown"), None


def _is_kept(parent: object) -> bool:
    """Say whether a span is recorded that is not sampled: then what is inside it is too, or nobody could look up."""
    return (
        isinstance(parent, ReadableSpan)
        and parent.kind not in ENTRY_KINDS
        and parent.end_time is None
        and not parent.context.trace_flags & 1
    )


def is_suppressed(context: Context | None = None) -> bool:
    """Say whether spans of instrumentations are not wanted in a context; None is the current one.

    The pipeline's own SQL runs in such a one. Were its spans audited, each write would cause the next. An operation
    that names its action itself isn't asked: it is no instrumentation's.
    """
    return bool(get_value(_SUPPRESS_INSTRUMENTATION_KEY, context))
