"""`AuditRecord`, the row, and the rules that make it: its id and the defaults a scope gives it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple, TypeAlias

Outcome: TypeAlias = Literal["success", "failure", "unknown"]
OUTCOMES: Final[frozenset[str]] = frozenset({"success", "failure", "unknown"})
ActorType: TypeAlias = Literal["user", "service", "system"]

#: The column is NOT NULL upstream; a row whose emitter did not say reads so.
UNKNOWN_TRANSPORT: Final = "unknown"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_IDENTITY = struct.Struct(">QQQq")
_LOW_64 = (1 << 64) - 1
_INT64 = 1 << 63
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class AuditRecord(NamedTuple):
    """One audited operation: a row of the table, immutable.

    A tuple rather than a dataclass because a batch of rows is turned into one array a column,
    and because making one is on the caller's thread.
    """

    #: UUID version 8 as 36 lowercase characters, see `record_id`.
    id: str
    #: What was done: ``retain``, ``recall``, …
    action: str
    #: How it came in: ``http``, ``mcp``, ``system``, ``bench``, …; ``unknown`` where nobody said.
    transport: str
    #: Which memory bank; None for an operation on none.
    bank_id: str | None
    #: Start and end, UTC, microseconds. The end is None where it isn't known.
    started_at: datetime
    ended_at: datetime | None
    #: Normalized payloads: JSON objects without raw text, unless a setting keeps it.
    request: dict[str, Any] | None
    response: dict[str, Any] | None
    metadata: dict[str, Any]
    #: ``success``, ``failure`` or ``unknown``; None in rows that another writer made.
    outcome: str | None
    #: Class of the exception, on failure.
    error_type: str | None
    actor_id: str | None
    #: ``user``, ``service`` or ``system``.
    actor_type: str | None
    #: 32, 16 and 16 lowercase hex digits. The parent is None for a root span.
    trace_id: str | None
    span_id: str | None
    parent_span_id: str | None
    #: Whether the trace itself was sampled, and so can be looked at in a trace backend.
    sampled: bool | None
    #: ``service.name`` of the process that emitted the span.
    service_name: str | None
    #: The server's clock when the row was written; None until then.
    recorded_at: datetime | None = None
    #: Postgres schema of the tenant; None for the table's own default. Where the row lives, not a column.
    schema: str | None = None

    @property
    def duration_seconds(self) -> float | None:
        """Seconds from start to end, or None while there is no end."""
        return None if self.ended_at is None else (self.ended_at - self.started_at).total_seconds()


@dataclass(frozen=True, slots=True)
class ScopeDefaults:
    """What an `audit_scope` says about every operation inside it; None says nothing."""

    actor_id: str | None = None
    actor_type: str | None = None
    transport: str | None = None
    bank_id: str | None = None
    schema: str | None = None
    #: Who acts, as the caller asserts it in baggage: believed where nothing else says it.
    asserted_actor_id: str | None = None


NO_SCOPE: Final = ScopeDefaults()


def record_id(trace_id: int, span_id: int, start_ns: int) -> str:
    """Return the id of the row that a span becomes: the same span always gives the same id.

    UUID version 8 (RFC 9562, section 5.8): 48 bits of the start's milliseconds, so that new rows go to the right
    edge of the index, and 74 bits of BLAKE2b (RFC 7693, a digest of ten bytes) over trace id (16 bytes), span id (8
    bytes) and start in nanoseconds (8 bytes, signed), all big-endian. In hexadecimal: 12 digits of time, ``8``, the
    digest's digits 1-3, one of ``89ab`` by the last two bits of its 4th, and its digits 5-7 and 8-19. A retry, a replay
    or a second pipeline can therefore never make a second row, and nobody can make one that another's would vanish for.

    Args:
        trace_id: 128-bit trace id.
        span_id: 64-bit span id.
        start_ns: start of the span, nanoseconds since the epoch.
    """
    if not -_INT64 <= start_ns < _INT64:
        start_ns = 0  # no clock says so
    # Of the standard library's digests the one that costs least: OpenSSL's SHA-256 takes 3 µs more of every call.
    digest = blake2b(_IDENTITY.pack(trace_id >> 64, trace_id & _LOW_64, span_id, start_ns), digest_size=10).hexdigest()
    ms = f"{start_ns // 1_000_000 & 0xFFFFFFFFFFFF:012x}"
    return f"{ms[:8]}-{ms[8:]}-8{digest[:3]}-{_VARIANT[digest[3]]}{digest[4:7]}-{digest[7:19]}"


def datetime_from_ns(nanoseconds: int) -> datetime:
    """Return the UTC instant, cut to microseconds and to the years that a datetime can hold."""
    try:
        return _EPOCH + timedelta(0, 0, nanoseconds // 1000)
    except OverflowError:
        return (datetime.max if nanoseconds > 0 else datetime.min).replace(tzinfo=UTC)


def ns_from_datetime(instant: datetime) -> int:
    """Return nanoseconds since the epoch; a naive datetime is taken as UTC."""
    if instant.utcoffset() is None:
        instant = instant.replace(tzinfo=UTC)
    since = instant - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000
