"""What a sweep costs: 1 M expired of 2 M rows, deleted in batches and dropped as partitions, beside a writer.

The writer appends one small batch after another all the while; how long each takes is measured for a while before
anything is swept, and during the sweep. Its longest one is the longest lock that anybody has seen.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.postgres.conversion import convert
from astrocyte_otel_audit.postgres.partitions import make_ahead
from astrocyte_otel_audit.postgres.sweep import AuditSweeper
from astrocyte_otel_audit.retention import RetentionPolicy
from benchmarks.append import records

#: Months that are expired, and those that are not.
EXPIRED, KEPT, ROWS_A_MONTH = 6, 6, 166_667
NOW = datetime(2026, 7, 1, tzinfo=UTC)
_QUIET_SECONDS = 10.0
#: To 1 January: half of the months.
_POLICY = RetentionPolicy(days=181)
_FILL = """
INSERT INTO astrocyte_audit_log (id, action, transport, bank_id, started_at, ended_at, request, response, metadata,
    outcome, actor_id, actor_type, trace_id, span_id, sampled, service_name)
SELECT gen_random_uuid(), 'recall', 'http', 'bank-' || n %% 500, %(begin)s + n * %(step)s, %(begin)s + n * %(step)s,
    '{"query": {"length": 42}, "top_k": 10}', '{"hits": {"count": 3}}', '{}', 'success', 'user-' || n %% 50, 'user',
    md5(n::text), left(md5(n::text), 16), true, 'memory-service'
FROM generate_series(1, %(rows)s) AS n
"""


class _Writer:
    """Appends while others work, and notes how many seconds each append took."""

    def __init__(self, dsn: str) -> None:
        self._table = AuditTable(OwnConnection(dsn))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []

    def _run(self) -> None:
        batch = 0
        while not self._ended.is_set():
            batch += 1
            rows = [
                record._replace(started_at=NOW + timedelta(seconds=batch), ended_at=None)
                for record in records(16, 1_000_000 + batch)
            ]
            began = time.perf_counter()
            self._table.append(rows)
            self.seconds.append(time.perf_counter() - began)
            self._ended.wait(0.005)

    @contextmanager
    def working(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()
            self._table.close()


def _fill(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for month in range(EXPIRED + KEPT):
            begin = datetime(2025, 7 + month, 1, tzinfo=UTC) if month < 6 else datetime(2026, month - 5, 1, tzinfo=UTC)
            step = timedelta(days=27) / ROWS_A_MONTH
            connection.execute(_FILL, {"begin": begin, "step": step, "rows": ROWS_A_MONTH})
        connection.execute("VACUUM ANALYZE astrocyte_audit_log")
        connection.execute("CHECKPOINT")


def _wal(connection: psycopg.Connection) -> int:
    [(position,)] = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    return int(position)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]


def _seconds_of_nothing(sweeper: AuditSweeper) -> float:
    began = time.perf_counter()
    swept = sweeper.sweep("public", RetentionPolicy(days=3_650).cutoffs(NOW), batch_size=_POLICY.batch_size)
    if swept.rows or swept.faults:
        raise RuntimeError(f"{swept}")
    return time.perf_counter() - began


def _measure(name: str, prepare: Callable[[str], None]) -> tuple[str, ...]:
    directory = Path(tempfile.mkdtemp(prefix="audit-bench-"))
    try:
        with embedded_postgres(directory) as dsn:
            table = AuditTable(OwnConnection(dsn))
            table.migrate()
            table.close()
            prepare(dsn)
            sweeper = AuditSweeper(OwnConnection(dsn), statement_timeout_seconds=300)
            nothing = min(_seconds_of_nothing(sweeper) for _ in range(5))
            writer = _Writer(dsn)
            with psycopg.connect(dsn, autocommit=True) as connection, writer.working():
                first = len(writer.seconds)
                time.sleep(_QUIET_SECONDS)
                last, before = len(writer.seconds), _wal(connection)
                began = time.perf_counter()
                swept = sweeper.sweep("public", _POLICY.cutoffs(NOW), batch_size=_POLICY.batch_size)
                seconds, written = time.perf_counter() - began, _wal(connection) - before
                quiet, during = writer.seconds[first:last], writer.seconds[last:]
            sweeper.close()
            if swept.rows != EXPIRED * ROWS_A_MONTH or swept.faults:
                raise RuntimeError(f"{swept}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return (
        name,
        f"{swept.rows:,}",
        f"{seconds:.1f} s",
        f"{written / 1e6:,.1f} MB",
        f"{max(during) * 1e3:.0f} ms",
        f"{_p99(quiet) * 1e3:.1f} ms",
        f"{_p99(during) * 1e3:.1f} ms" if len(during) > 100 else "–",
        f"{nothing * 1e3:.0f} ms",
    )


def _partitioned(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        convert(connection, settings.DEFAULT_SCHEMA, settings.DEFAULT_TABLE, "month")
        begin = datetime(2025, 7, 1, tzinfo=UTC)
        make_ahead(connection, settings.DEFAULT_SCHEMA, settings.DEFAULT_TABLE, begin, ahead=EXPIRED + KEPT + 1)
    _fill(dsn)


def main() -> None:
    """Measure both layouts, and print a table."""
    logging.disable(logging.WARNING)
    table = Table(title=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}")
    for column in (
        "layout",
        "rows gone",
        "time",
        "WAL",
        "longest append",
        "p99 before",
        "p99 during",
        "nothing expired",
    ):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for name, prepare in LAYOUTS.items():
        table.add_row(*_measure(name, prepare))
    Console(width=130).print(table)


LAYOUTS: dict[str, Callable[[str], None]] = {"plain": _fill, "partitioned by month": _partitioned}

if __name__ == "__main__":
    main()
