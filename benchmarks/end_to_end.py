"""The rate that is sustained from the call to the row, against the logger that this project's interface comes from.

The peer is Astrocyte's own `AuditLogger` on an `AsyncConnectionPool` of four: a task, an INSERT and a commit an entry.
All log the same entries from one event loop that yields once every ten entries, as under a burst of requests, and the
clock stops when the last row is in the table. Ours is measured with the writer beside the process, and with the thread
in it, which shares the interpreter with that loop.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from astrocyte.audit import AuditEntry as PeerEntry
from astrocyte.audit import AuditLogger as PeerLogger
from opentelemetry.sdk.trace import TracerProvider
from psycopg_pool import AsyncConnectionPool

from astrocyte_otel_audit import AuditEntry, AuditLogger, configure_audit

OURS, PEERS, ROUNDS = 10_000, 2_000, 3


async def _log(log: Callable[[Any], None], entry: type[Any], count: int) -> None:
    for number in range(count):
        log(
            entry(
                action="recall",
                transport="http",
                bank_id=f"bank-{number % 500}",
                request={"query": {"length": 42}, "top_k": 10},
                response={"hits": 3},
            )
        )
        if number % 10 == 0:
            await asyncio.sleep(0)


class _Ours:
    """A service that has been running for a while: its first record is in the table."""

    def __init__(self, database: str, **arguments: Any) -> None:
        self._database = database
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._processor = configure_audit(actions="*", tracer_provider=self._provider, **arguments)
        self._logger = AuditLogger(pool_getter=lambda: None, enabled=True, tracer_provider=self._provider)
        self.measure(1)

    def measure(self, count: int) -> float:
        begin = time.perf_counter()
        asyncio.run(_log(self._logger.log, AuditEntry, count))
        if not self._processor.force_flush(60_000):
            raise RuntimeError("not all rows arrived")
        rate = count / (time.perf_counter() - begin)
        _empty(self._database, count)
        return rate

    def close(self) -> None:
        self._provider.shutdown()


@contextmanager
def _writer_beside(dsn: str, spool: str) -> Iterator[None]:
    command = [sys.executable, "-m", "astrocyte_otel_audit", "writer", "--spool-dir", spool]
    environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": dsn}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def _peers(dsn: str) -> float:
    async def run() -> float:
        async with AsyncConnectionPool(dsn, min_size=4, max_size=4, open=False, timeout=300) as pool:
            await pool.wait()
            logger = PeerLogger(pool_getter=lambda: pool, enabled=True, allowed_actions=["recall"])
            begin = time.perf_counter()
            await _log(logger.log, PeerEntry, PEERS)
            await asyncio.gather(*(task for task in asyncio.all_tasks() if "_safe_write" in repr(task.get_coro())))
            return PEERS / (time.perf_counter() - begin)

    return asyncio.run(run())


def measure(dsn: str) -> list[tuple[str, ...]]:
    rounds = []
    with tempfile.TemporaryDirectory() as directory, _writer_beside(dsn, directory):
        own_thread, beside = _Ours(dsn, dsn=dsn), _Ours(dsn, writer="external", spool_dir=directory)
        for _ in range(ROUNDS):
            rounds.append((own_thread.measure(OURS), beside.measure(OURS), _peers(dsn)))
            _empty(dsn, PEERS)
        own_thread.close()
        beside.close()
    return [
        (
            f"entry to row, {how} / a task, INSERT and commit each",
            f"{statistics.median(rates[mine] for rates in rounds):,.0f} rows/s",
            f"{statistics.median(rates[2] for rates in rounds):,.0f} rows/s",
            f"{statistics.median(rates[mine] / rates[2] for rates in rounds):.1f}",
            aim,
        )
        for how, mine, aim in (("writer beside the process", 1, "≥ 5"), ("writer's thread in it", 0, "–"))
    ]


def _empty(dsn: str, count: int) -> None:
    """Empty the table, after making sure that it holds as many rows as it should."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone()
        if found != (count,):
            raise RuntimeError(f"{found} rows are there, and not {count}")
        connection.execute("TRUNCATE astrocyte_audit_log")
