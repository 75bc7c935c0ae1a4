"""A real Astrocyte brain, audited without a change to its code.

Needs the extra `demo`, and OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table.
"""

import asyncio

from astrocyte import Astrocyte

from astrocyte_otel_audit import audit_scope, configure_audit


async def main() -> None:
    brain = Astrocyte.from_config_dict(
        {"llm_provider": "mock", "vector_store": "in_memory", "document_store": "in_memory"}
    )
    async with audit_scope(actor_id="assistant", actor_type="service", transport="mcp"):
        await brain.retain("Calvin prefers dark mode", bank_id="user-calvin")
        await brain.recall("What does Calvin like?", bank_id="user-calvin")


if __name__ == "__main__":
    processor = configure_audit(actions="*", mappings=["astrocyte"], migrate=True)
    asyncio.run(main())
    print("all written:", processor.force_flush())
