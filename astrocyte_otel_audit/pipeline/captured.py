"""What is captured of a span, and the record that is made of it, on the thread that ends the span."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from opentelemetry.trace import StatusCode

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.memo import Memo
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.record import (
    NO_SCOPE,
    OUTCOMES,
    UNKNOWN_TRANSPORT,
    AuditRecord,
    ScopeDefaults,
    datetime_from_ns,
    record_id,
)

_PAYLOADS: Final = (attributes.REQUEST, attributes.RESPONSE, attributes.METADATA)
_AUDIT_PREFIX: Final = "astrocyte.audit."
#: How the keys begin that a record is made of. Other libraries' spans hold more: whole prompts, for one.
_WIRE: Final = (_AUDIT_PREFIX, "audit.", attributes.ERROR_TYPE, attributes.TRANSPORT)
#: For payloads of other emitters. What a span can hold, it leaves standing: the span has limits of its own.
_NORMALIZER: Final = Normalizer(max_depth=16, max_attributes=1024)


class Captured(NamedTuple):
    """The facts of one ended audit span: plain data, independent of the span."""

    action: str
    #: The bank as the span or its mapping has it.
    bank_id: Any
    #: What a mapping says of all its spans; None for a span that speaks for itself.
    transport: str | None
    #: Outcome of a span that states none and whose status is unset.
    unset_outcome: str
    #: Error's class from an exception event, for a span without `error.type`.
    exception_type: Any
    trace_id: int
    span_id: int
    parent_span_id: int | None
    trace_flags: int
    start_ns: int
    end_ns: int | None
    status: StatusCode
    service_name: str | None
    #: Attributes that the SDK has dropped; any of them may have been ours.
    dropped: int
    #: All of the span's that a record can need, and more only if the span is ours.
    attributes: dict[str, Any]
    #: Whether `emit` made the span, and so normalized its payloads.
    is_ours: bool
    # What was noted at the start, where it was seen:
    id: str | None = None
    scope: ScopeDefaults | None = None
    schema: str | None = None


def to_record(captured: Captured) -> AuditRecord:
    """Return the record of a captured span."""
    given = captured.attributes
    payloads: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    for key, value in given.items():
        if key.startswith(_AUDIT_PREFIX) and (route := _route[key]) is not None:
            attributes.unflatten(route[1], value, payloads[route[0]])
    request, response, metadata = payloads if captured.is_ours else map(_normalized, payloads)
    if captured.dropped:
        metadata["dropped_attributes"] = captured.dropped  # the payload may be incomplete
    outcome = _outcome(captured)
    error_type = given.get(attributes.ERROR_TYPE, captured.exception_type) if outcome == "failure" else None
    parent, scope = captured.parent_span_id, captured.scope or NO_SCOPE
    # By position: twenty keywords would cost as much as all the rest.
    return AuditRecord(
        captured.id or record_id(captured.trace_id, captured.span_id, captured.start_ns),
        captured.action or "unknown",
        _text(given.get(attributes.TRANSPORT)) or scope.transport or captured.transport or UNKNOWN_TRANSPORT,
        scope.bank_id if captured.bank_id is None else _text(captured.bank_id),
        datetime_from_ns(captured.start_ns),
        None if captured.end_ns is None else datetime_from_ns(captured.end_ns),
        request or None,
        response or None,
        metadata,
        outcome,
        _text(error_type),
        _text(given.get(attributes.ACTOR_ID, scope.actor_id)),
        _text(given.get(attributes.ACTOR_TYPE, scope.actor_type)),
        f"{captured.trace_id:032x}",
        f"{captured.span_id:016x}",
        None if parent is None else f"{parent:016x}",
        # Flags may carry the random bit too, so the bit is tested and not the number.
        captured.trace_flags & 1 == 1,
        captured.service_name,
        None,
        captured.schema,
    )


def filled(outer: AuditRecord, inner: AuditRecord) -> AuditRecord:
    """Return the outer record, with the inner one's parts where it is empty. Outcome and times are the outer's own."""
    return outer._replace(
        transport=inner.transport if outer.transport == UNKNOWN_TRANSPORT else outer.transport,
        bank_id=outer.bank_id if outer.bank_id is not None else inner.bank_id,
        request={**inner.request, **(outer.request or {})} if inner.request else outer.request,
        response={**inner.response, **(outer.response or {})} if inner.response else outer.response,
        metadata={**inner.metadata, **outer.metadata},
        error_type=outer.error_type or (inner.error_type if outer.outcome == "failure" else None),
        actor_id=outer.actor_id if outer.actor_id is not None else inner.actor_id,
        actor_type=outer.actor_type if outer.actor_type is not None else inner.actor_type,
    )


def _outcome(captured: Captured) -> str:
    stated = as_str(captured.attributes.get(attributes.OUTCOME))
    if stated is not None and stated in OUTCOMES:
        return stated
    if captured.status is StatusCode.ERROR:
        return "failure"
    return "success" if captured.status is StatusCode.OK else captured.unset_outcome


def _find_route(key: str) -> tuple[int, str] | None:
    found = ((position, key[len(prefix) :]) for position, prefix in enumerate(_PAYLOADS) if key.startswith(prefix))
    return next(found, None)


#: Which payload an attribute belongs to, and its path in there.
_route = Memo(_find_route)


def _normalized(payload: dict[str, Any]) -> dict[str, Any]:
    """Return what may be stored of another emitter's payload.

    What passed these rules before stays as it is, but for a date and the like under a key that holds text: as a string
    it can't be told from text.
    """
    return _NORMALIZER.payload(payload) or {}


def _text(value: object) -> str | None:
    if value is None or type(value) is str:
        return value
    # Another emitter's idea of an id. What Postgres can't store of it is the encoder's concern.
    if isinstance(value, (int, float)):
        return str(value)
    return as_str(value) if isinstance(value, str) else type(value).__name__


def as_str(value: object) -> str | None:
    """Return a string, out of an enum of strings too, which some SDKs keep; None for anything else."""
    if type(value) is str:
        return value
    return str.__str__(value) if isinstance(value, str) else None


_is_wire = Memo[str, bool](lambda key: key.startswith(_WIRE)).__getitem__


def wire_of(span_attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that a record can be made of."""
    return {key: span_attributes[key] for key in filter(_is_wire, span_attributes)}


def exception_type(events: Any) -> object:
    """Return the class that the last exception event names, or None."""
    for event in reversed(events):
        if event.name == "exception":
            found: Mapping[str, Any] = event.attributes or {}
            return found.get("exception.type")
    return None
