"""The rate that is sustained from the call to the row, against the logger that this project's interface comes from.

The peer is Astrocyte's own `AuditLogger` on an `AsyncConnectionPool` of four: a task, an INSERT and a commit an entry.
Both sides log the same entries from one event loop that yields once every ten entries, as under a burst of requests,
and the clock stops when the last row is in the table.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
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


def _ours(dsn: str) -> float:
    provider = TracerProvider(shutdown_on_exit=False)
    processor = configure_audit(dsn=dsn, actions="*", tracer_provider=provider)
    logger = AuditLogger(pool_getter=lambda: None, enabled=True, tracer_provider=provider)
    begin = time.perf_counter()
    asyncio.run(_log(logger.log, AuditEntry, OURS))
    if not processor.force_flush(60_000):
        raise RuntimeError("not all rows arrived")
    rate = OURS / (time.perf_counter() - begin)
    provider.shutdown()
    return rate


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
    ours, peers = [], []
    for _ in range(ROUNDS):
        ours.append(_ours(dsn))
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE astrocyte_audit_log")
        peers.append(_peers(dsn))
        with psycopg.connect(dsn, autocommit=True) as connection:
            count = connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone()
            if count != (PEERS,):
                raise RuntimeError(f"the peer has written {count} of {PEERS} rows")
            connection.execute("TRUNCATE astrocyte_audit_log")
    ratio = statistics.median(a / b for a, b in zip(ours, peers, strict=True))
    return [
        (
            "entry to row, one event loop / a task, INSERT and commit each",
            f"{statistics.median(ours):,.0f} rows/s",
            f"{statistics.median(peers):,.0f} rows/s",
            f"{ratio:.1f}",
            "≥ 5",
        )
    ]
