"""An application on Astrocyte whose brain is enriched, as its own process.

Usage: ``python astrocyte_enriched_program.py DSN RATIO``, where RATIO is the share of traces that is sampled. Prints
what the brain answered, as JSON: the rows have to say the same.
"""

import asyncio
import json
import sys
from contextlib import suppress

from astrocyte import Astrocyte
from astrocyte.errors import AccessDenied, LegalHoldActive
from astrocyte.testing.in_memory import InMemoryVectorStore
from astrocyte.types import ActorIdentity, AstrocyteContext
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from astrocyte_otel_audit import audit_scope, audited, configure_audit, enrich_astrocyte

CALVIN = AstrocyteContext(principal="user:calvin", tenant_id="acme")
ASSISTANT = AstrocyteContext(
    principal="agent:assistant", on_behalf_of=ActorIdentity(type="user", id="calvin"), tenant_id="acme"
)
STRANGER = AstrocyteContext(principal="service:stranger")
TEXT = "Calvin likes dark roast coffee"
BANKS = ["bank-1", "bank-2"]


class FailingVectorStore(InMemoryVectorStore):
    """A vector store that is away for one bank."""

    async def store_vectors(self, items):
        if any(item.bank_id == "failing" for item in items):
            raise ConnectionError(f"no answer for {TEXT}")
        return await super().store_vectors(items)


CONFIG = {
    "llm_provider": "mock",
    "vector_store": f"{__name__}:FailingVectorStore",
    "document_store": "in_memory",
    "access_control": {"enabled": True, "default_policy": "deny"},
    "access_grants": [
        {"bank_id": "*", "principal": principal, "permissions": ["read", "write", "forget", "admin"]}
        for principal in ("user:calvin", "agent:assistant")
    ],
}


async def use(brain: Astrocyte) -> dict[str, object]:
    kept = [await brain.retain(f"{bank}: {TEXT}", bank, context=CALVIN) for bank in BANKS]
    await brain.retain("", "bank-1", context=CALVIN)
    recalled = await brain.recall("coffee", "bank-1", context=CALVIN)
    of_both = await brain.recall("coffee", banks=BANKS, context=ASSISTANT)
    reflected = await brain.reflect("coffee", "bank-1", context=CALVIN)
    of_both_reflected = await brain.reflect("coffee", banks=BANKS, context=CALVIN)
    forgotten = await brain.forget("bank-1", memory_ids=[kept[0].memory_id, "no-such-memory"], context=CALVIN)
    with suppress(AccessDenied):
        await brain.retain(TEXT, "bank-1", context=STRANGER)
    with suppress(AccessDenied):
        await brain.recall("coffee", banks=BANKS, context=STRANGER)
    with suppress(AccessDenied):
        await brain.forget("bank-1", scope="all", context=STRANGER)
    with suppress(AccessDenied):
        await brain.compile("bank-1", context=STRANGER)  # refused before Astrocyte has a span
    with suppress(ConnectionError):
        await brain.retain(TEXT, "failing", context=CALVIN)
    brain.set_legal_hold("held", "case-4711", "a case")
    with suppress(LegalHoldActive):
        await brain.forget("held", memory_ids=["memory-1"], context=CALVIN)

    @audited("recall")
    async def recall(query, bank_id):
        found = await brain.recall(query, bank_id, context=CALVIN)
        return {"answers": len(found.hits)}

    with audit_scope(actor_id="calvin", actor_type="user"):
        decorated = await recall("coffee", "bank-2")
    await recall("coffee", "bank-2")  # the gateway's, for Calvin: two who act
    at_once = await asyncio.gather(
        *(brain.recall("coffee", bank, context=AstrocyteContext("user:calvin", tenant_id=bank)) for bank in BANKS)
    )
    return {
        "kept": [each.memory_id for each in kept],
        "recalled": [hit.memory_id for hit in recalled.hits],
        "of_both": [hit.memory_id for hit in of_both.hits],
        "reflected": [hit.memory_id for hit in reflected.sources],
        "of_both_reflected": [hit.memory_id for hit in of_both_reflected.sources],
        "deleted": forgotten.deleted_count,
        "decorated": decorated["answers"],
        "at_once": [[hit.memory_id for hit in each.hits] for each in at_once],
    }


if __name__ == "__main__":
    dsn, ratio = sys.argv[1:]
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(float(ratio))))
    trace.set_tracer_provider(provider)
    configure_audit(dsn=dsn, actions="*", mappings=["astrocyte"])
    brain = Astrocyte.from_config_dict(CONFIG)
    enrich_astrocyte(brain)
    with audit_scope(actor_id="gateway", actor_type="service", transport="bench"):
        print(json.dumps(asyncio.run(use(brain))))
    provider.shutdown()
