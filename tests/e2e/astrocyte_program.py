"""An application on Astrocyte, as its own process: Astrocyte's tracer is the global provider's.

Usage: ``python astrocyte_program.py DSN RATIO``, where RATIO is the share of traces that is sampled.
"""

import asyncio
import sys
from contextlib import suppress

from astrocyte import Astrocyte
from astrocyte.errors import AccessDenied, RateLimited
from astrocyte.types import AstrocyteContext
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from astrocyte_otel_audit import audit_scope, audited, configure_audit

ANN = AstrocyteContext(principal="user:ann")
EVE = AstrocyteContext(principal="user:eve")
TEXT = "Calvin likes dark roast coffee"

CONFIG = {
    "llm_provider": "mock",
    "vector_store": "in_memory",
    "document_store": "in_memory",
    "access_control": {"enabled": True, "default_policy": "deny"},
    "access_grants": [
        {"bank_id": "*", "principal": "user:ann", "permissions": ["read", "write", "forget", "admin"]},
    ],
    "banks": {"crowded": {"homeostasis": {"rate_limits": {"retain_per_minute": 1}}}},
}


async def plain_calls(brain: Astrocyte) -> None:
    """Astrocyte alone: what its own spans say."""
    for bank in ("bank-1", "bank-2"):
        await brain.retain(TEXT, bank, context=ANN)
    assert not (await brain.retain("", "rejected", context=ANN)).stored
    assert (await brain.recall("coffee", "bank-1", context=ANN)).hits
    assert (await brain.recall("coffee", banks=["bank-1", "bank-2"], context=ANN)).hits
    await brain.reflect("coffee", "bank-1", context=ANN)
    with suppress(AccessDenied):
        await brain.retain(TEXT, "denied", context=EVE)
    with suppress(AccessDenied):
        await brain.recall("coffee", "denied", context=EVE)
    with suppress(AccessDenied):
        await brain.forget("denied", scope="all", context=EVE)
    await brain.retain(TEXT, "crowded", context=ANN)
    with suppress(RateLimited):
        await brain.retain(TEXT, "crowded", context=ANN)
    await brain.forget("bank-1", memory_ids=["no-such-memory"], context=ANN)


async def decorated_calls(brain: Astrocyte) -> None:
    """The application's own functions around Astrocyte's."""

    async def count_hits(event) -> None:
        # Hooks run inside Astrocyte's span, and can add to it.
        trace.get_current_span().set_attribute("astrocyte.audit.metadata.hits", event.data["result_count"])

    brain.register_hook("on_recall", count_hits)

    @audited("recall", response=lambda result: {"memories": len(result.hits)})
    async def recall(query, bank_id, context):
        return await brain.recall(query, bank_id=bank_id, context=context)

    @audited("retain")
    async def retain(content, bank_id):
        return await brain.retain(content, bank_id, context=ANN)

    @audited("answer", bank_id="answered")
    async def answer(query):
        return await brain.recall(query, bank_id="bank-2", context=ANN)

    await recall("coffee", "bank-2", ANN)
    with suppress(AccessDenied):
        await recall("coffee", "denied", EVE)
    await retain("", "rejected")
    await answer("coffee")


async def main() -> None:
    brain = Astrocyte.from_config_dict(CONFIG)
    with audit_scope(actor_id="user:ann", actor_type="user", transport="mcp"):
        with audit_scope(transport="bench"):
            await plain_calls(brain)
        with audit_scope(transport="http"):
            await decorated_calls(brain)


if __name__ == "__main__":
    dsn, ratio = sys.argv[1:]
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(float(ratio))), resource=Resource.create({"service.name": "memory"})
    )
    trace.set_tracer_provider(provider)
    configure_audit(dsn=dsn, actions="*", mappings=["astrocyte"])
    asyncio.run(main())
    provider.shutdown()
