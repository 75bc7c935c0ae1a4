"""A real Astrocyte brain whose rows say who asked, what came of it, and which memories it was about.

Needs the extra `demo`, and OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table.
"""

import asyncio

from astrocyte import Astrocyte
from astrocyte.types import AstrocyteContext

from astrocyte_otel_audit import configure_audit, enrich_astrocyte


async def main() -> None:
    brain = Astrocyte.from_config_dict(
        {"llm_provider": "mock", "vector_store": "in_memory", "document_store": "in_memory"}
    )
    undo = enrich_astrocyte(brain)  # once, where the brain is made; the calls stay as they are
    calvin = AstrocyteContext(principal="user:calvin", tenant_id="acme")
    kept = await brain.retain("Calvin prefers dark mode", bank_id="user-calvin", context=calvin)
    await brain.retain("", bank_id="user-calvin", context=calvin)  # nothing to store: a failure, empty_content
    await brain.recall("What does Calvin like?", bank_id="user-calvin", context=calvin)
    await brain.forget("user-calvin", memory_ids=[kept.memory_id], context=calvin)
    undo()


if __name__ == "__main__":
    processor = configure_audit(actions="*", mappings=["astrocyte"], migrate=True)
    asyncio.run(main())
    print("all written:", processor.force_flush())
