"""Code that was written for `astrocyte.audit`: the same names, from another package."""

import asyncio
import os

from psycopg_pool import AsyncConnectionPool

from astrocyte_otel_audit import AuditEntry, AuditLogger, get_default_audit_logger, set_default_audit_logger


async def recall(query: str, bank_id: str) -> int:
    entry = AuditEntry(action="recall", transport="http", bank_id=bank_id, request={"query": query, "top_k": 20})
    async with get_default_audit_logger().log_with_timing(entry) as timed:
        timed.response = {"n_results": 18}
    return 18


async def main() -> None:
    async with AsyncConnectionPool(os.environ["OTEL_ASTROCYTE_AUDIT_DSN"], open=False) as pool:
        set_default_audit_logger(
            AuditLogger(pool_getter=lambda: pool, enabled=True, allowed_actions=["recall", "retain"])
        )
        await recall("What does Calvin like?", "user-calvin")


if __name__ == "__main__":
    asyncio.run(main())  # the provider's own shutdown, at exit, writes what waits
