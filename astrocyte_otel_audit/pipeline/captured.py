"""What is captured of a span when it ends, as the spool keeps it, and the record that is made of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.memo import Memo
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.record import UNKNOWN_TRANSPORT, AuditRecord, datetime_from_ns

_PAYLOADS: Final = (attributes.REQUEST, attributes.RESPONSE, attributes.METADATA)
#: For payloads of other emitters. What a span can hold, it leaves standing: the span has limits of its own.
_NORMALIZER: Final = Normalizer(max_depth=16, max_attributes=1024)


class Captured(NamedTuple):
    """The facts of one audit span: plain data that JSON can hold, independent of the span.

    Made on the caller's thread, in as little time as can be; whatever can wait is done in `to_record`, which is called
    where it is read again. What another emitter said stands here as it did: `Any` is whatever a span can hold.
    """

    #: The id of the row to be.
    id: str
    action: str
    schema: str | None
    transport: Any
    bank_id: Any
    actor_id: Any
    actor_type: Any
    outcome: str
    #: Class of the error, on failure.
    error_type: Any
    #: Nanoseconds since the epoch; the end is None where it isn't known.
    start_ns: int
    end_ns: int | None
    #: Lowercase hex digits.
    trace_id: str | None
    span_id: str | None
    parent_span_id: str | None
    sampled: bool | None
    service_name: str | None
    #: Attributes that the SDK has dropped; any of them may have been ours.
    dropped: int
    #: Attributes of the request, the response and the metadata. They may be stored: each has passed a normalizer.
    payload: dict[str, Any]
    #: The id of a row that will not be, as this one says what it would have said.
    replaces: str | None = None


def to_record(captured: Captured) -> AuditRecord:
    """Return the record of a captured span."""
    payloads: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    for key, value in captured.payload.items():
        if (route := _route[key]) is not None:
            attributes.unflatten(route[1], value, payloads[route[0]])
    request, response, metadata = payloads
    if captured.dropped:
        metadata["dropped_attributes"] = captured.dropped  # the payload may be incomplete
    # By position: twenty keywords would cost as much as all the rest.
    return AuditRecord(
        captured.id,
        captured.action or "unknown",
        text_of(captured.transport) or UNKNOWN_TRANSPORT,
        text_of(captured.bank_id),
        datetime_from_ns(captured.start_ns),
        None if captured.end_ns is None else datetime_from_ns(captured.end_ns),
        request or None,
        response or None,
        metadata,
        captured.outcome,
        text_of(captured.error_type),
        text_of(captured.actor_id),
        text_of(captured.actor_type),
        captured.trace_id,
        captured.span_id,
        captured.parent_span_id,
        captured.sampled,
        captured.service_name,
        None,
        captured.schema,
    )


def filled(outer: Captured, inner: Captured) -> Captured:
    """Return the outer one, with the inner one's parts where it is empty. Outcome and times are the outer's own."""
    said = set(map(_entry_of, outer.payload))
    return outer._replace(
        transport=inner.transport if outer.transport in (None, UNKNOWN_TRANSPORT) else outer.transport,
        bank_id=outer.bank_id if outer.bank_id is not None else inner.bank_id,
        payload={**{k: v for k, v in inner.payload.items() if _entry_of(k) not in said}, **outer.payload},
        dropped=outer.dropped + inner.dropped,
        error_type=outer.error_type or (inner.error_type if outer.outcome == "failure" else None),
        actor_id=outer.actor_id if outer.actor_id is not None else inner.actor_id,
        actor_type=outer.actor_type if outer.actor_type is not None else inner.actor_type,
    )


def contradicts(outer: Captured, inner: Captured) -> bool:
    """Say whether the outer row would hide that the inner one was another bank's, another actor's, or a failure."""
    hides_failure = inner.outcome == "failure" and outer.outcome != "failure"
    return hides_failure or not (same(outer.bank_id, inner.bank_id) and same(outer.actor_id, inner.actor_id))


def same(bank: object, other: object) -> bool:
    """Say whether two may be the same, where one that nobody named may be any."""
    return bank is None or other is None or bank == other


def exception_type(events: Any) -> object:
    """Return the class that the last exception event names, or None."""
    for event in reversed(events):
        if event.name == "exception":
            found: Mapping[str, Any] = event.attributes or {}
            return found.get("exception.type")
    return None


def as_str(value: object) -> str | None:
    """Return a string, out of an enum of strings too, which some SDKs keep; None for anything else."""
    if type(value) is str:
        return value
    return str.__str__(value) if isinstance(value, str) else None


def _find_route(key: str) -> tuple[int, str] | None:
    found = ((position, key[len(prefix) :]) for position, prefix in enumerate(_PAYLOADS) if key.startswith(prefix))
    return next(found, None)


#: Which payload an attribute belongs to, and its path in there.
_route = Memo(_find_route)


#: Whether an attribute belongs to a payload.
is_payload = Memo[str, bool](lambda key: key.startswith(_PAYLOADS)).__getitem__


def _entry_of(key: str) -> tuple[int, str] | None:
    """Return which entry of which payload an attribute is a part of."""
    route = _route[key]
    return None if route is None else (route[0], route[1].partition(".")[0])


def normalized(payload: dict[str, Any]) -> dict[str, Any]:
    """Return what may be stored of another emitter's payload; one of ours was normalized where it was made.

    What passed these rules before stays as it is, but for a date and the like under a key that holds text: as a string
    it can't be told from text.
    """
    trees: tuple[dict[str, Any], ...] = ({}, {}, {})
    for key, value in payload.items():
        if (route := _route[key]) is not None:
            attributes.unflatten(route[1], value, trees[route[0]])
    normal: dict[str, Any] = {}
    for prefix, tree in zip(_PAYLOADS, trees, strict=True):
        normal.update(_NORMALIZER.attributes(tree, prefix))
    return normal


def text_of(value: object) -> str | None:
    """Return what a row says of an id, whatever the span holds; None for none."""
    if value is None or type(value) is str:
        return value
    # Another emitter's idea of an id. What Postgres can't store of it is the encoder's concern.
    if isinstance(value, (int, float)):
        return str(value)
    return as_str(value) if isinstance(value, str) else type(value).__name__
