"""How fast a backlog is written, against the limit: one COPY of the same rows into the same table."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime, timedelta

import psycopg

from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.postgres.encoding import COLUMNS
from astrocyte_otel_audit.record import AuditRecord, record_id

ROWS, BATCH, ROUNDS = 40_000, 2_048, 5
_START = datetime(2026, 1, 1, tzinfo=UTC)
_COPY = f"COPY astrocyte_audit_log ({', '.join(AuditRecord._fields[:COLUMNS])})"


def records(count: int, salt: int) -> list[AuditRecord]:
    """Return records of some 350 bytes, the size of a recall's."""
    made = []
    for number in range(count):
        started = _START + timedelta(milliseconds=number)
        trace_id, span_id = (salt << 64) + number + 1, number + 1
        made.append(
            AuditRecord(
                record_id(trace_id, span_id, number * 1_000_000), "recall", "http", f"bank-{number % 500}", started,
                started + timedelta(milliseconds=7), {"query": {"length": 42}, "top_k": 10},
                {"hits": {"count": 3, "ids": ["6bf7cd5c331f4baf", "54d96fda63e14613", "253454d968214027"]}}, {},
                "success", None, f"user-{number % 50}", "user", f"{trace_id:032x}", f"{span_id:016x}", None, True,
                "memory-service",
            )
        )  # fmt: skip
    return made


def measure(dsn: str) -> list[tuple[str, ...]]:
    table = AuditTable(OwnConnection(dsn))
    table.migrate()
    ours, theirs = [], []
    for round_ in range(ROUNDS):
        batch = records(ROWS, round_ + 1)
        _empty(dsn)
        begin = time.perf_counter()
        for first in range(0, ROWS, BATCH):
            table.append(batch[first : first + BATCH])
        ours.append(ROWS / (time.perf_counter() - begin))
        # Rendered before the clock starts: the limit is what Postgres takes, not what Python makes.
        with psycopg.connect(dsn) as connection, connection.cursor().copy(f"{_COPY} TO STDOUT") as out:
            rendered = b"".join(bytes(block) for block in out)
        _empty(dsn)
        begin = time.perf_counter()
        with psycopg.connect(dsn) as connection, connection.cursor().copy(f"{_COPY} FROM STDIN") as copy:
            copy.write(rendered)
        theirs.append(ROWS / (time.perf_counter() - begin))
    table.close()
    _empty(dsn)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return [
        (
            f"append, batches of {BATCH:,} / one COPY of {ROWS:,} rendered rows",
            f"{statistics.median(ours):,.0f} rows/s",
            f"{statistics.median(theirs):,.0f} rows/s",
            f"{ratio:.2f}",
            "≥ 0.5",
        )
    ]


def _empty(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE astrocyte_audit_log")
        connection.execute("CHECKPOINT")
