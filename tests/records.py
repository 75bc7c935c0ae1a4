"""Audit records for tests: a full one that differs from every other, and the smallest that the table takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit.record import record_id

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
