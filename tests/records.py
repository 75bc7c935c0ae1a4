"""Audit records for tests: a full one that differs from every other, and the smallest that the table takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit.attributes import METADATA, REQUEST, RESPONSE
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.record import ns_from_datetime, record_id

#: When the first record's operation started; each number is a second later.
BASE = datetime(2026, 3, 4, 5, 6, 7, 891011, tzinfo=UTC)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def full_record(number: int = 0, **changes: Any) -> AuditRecord:
    """Return a record that says something in every column; equal numbers give equal records."""
    started_at = BASE + timedelta(seconds=number)
    started_ns = (BASE - _EPOCH) // timedelta(microseconds=1) * 1000
    record = AuditRecord(
        id=record_id(trace_id=number, span_id=1, start_ns=started_ns),
        action="recall",
        transport="http",
        bank_id=f"bank-{number}",
        started_at=started_at,
        ended_at=started_at + timedelta(milliseconds=25),
        request={"query": {"length": 42}, "top_k": number},
        response={"hits": [f"memory-{number}"], "score": 0.25},
        metadata={"model": "mock", "cached": False},
        outcome="success",
        error_type=None,
        actor_id="alice",
        actor_type="user",
        trace_id=f"{number:032x}",
        span_id=f"{1:016x}",
        parent_span_id=f"{2:016x}",
        sampled=True,
        service_name="memory",
    )
    return record._replace(**changes)


def full_records(count: int, **changes: Any) -> list[AuditRecord]:
    """Return records numbered from 0, oldest first."""
    return [full_record(number, **changes) for number in range(count)]


def bare_record(number: int = 0, **changes: Any) -> AuditRecord:
    """Return a record that has None wherever the table allows it."""
    nothing = dict.fromkeys((
        "bank_id", "ended_at", "request", "response", "outcome", "error_type", "actor_id", "actor_type", "trace_id",
        "span_id", "parent_span_id", "sampled", "service_name",
    ))  # fmt: skip
    return full_record(number, **{"metadata": {}, **nothing, **changes})


def captured_of(record: AuditRecord, **changes: Any) -> Captured:
    """Return the operation whose record that is, but for what only the table knows."""
    payloads = ((REQUEST, record.request), (RESPONSE, record.response), (METADATA, record.metadata))
    captured = Captured(
        id=record.id,
        action=record.action,
        schema=record.schema,
        transport=record.transport,
        bank_id=record.bank_id,
        actor_id=record.actor_id,
        actor_type=record.actor_type,
        outcome=record.outcome or "unknown",
        error_type=record.error_type,
        start_ns=ns_from_datetime(record.started_at),
        end_ns=None if record.ended_at is None else ns_from_datetime(record.ended_at),
        trace_id=record.trace_id,
        span_id=record.span_id,
        parent_span_id=record.parent_span_id,
        sampled=record.sampled,
        service_name=record.service_name,
        dropped=0,
        payload={key: value for prefix, tree in payloads for key, value in _flat(tree or {}, prefix)},
    )
    return captured._replace(**changes)


def full_captured(number: int = 0, **changes: Any) -> Captured:
    """Return the operation of `full_record`; ``changes`` are a record's."""
    return captured_of(full_record(number, **changes))


def _flat(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return flat
