"""The demo: a real Astrocyte brain and a pipeline of one's own, audited under a provider that samples 10 %."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from rich.console import Console

from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.emit import audit_operation, audit_scope, audited
from astrocyte_otel_audit.errors import AuditError
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.view.records import records_table

_BANK = "user-calvin"
_COLUMNS = ("started (UTC)", "action", "bank", "outcome", "duration", "actor", "trace")

#: No key, no network, no server: Astrocyte's own stand-ins for a language model and for its stores.
_BRAIN: dict[str, Any] = {
    "llm_provider": "mock",
    "vector_store": "in_memory",
    "document_store": "in_memory",
    "access_control": {"enabled": True, "default_policy": "deny"},
    "access_grants": [
        {"bank_id": _BANK, "principal": "agent:assistant", "permissions": ["read", "write", "forget", "admin"]}
    ],
}


@audited("classify")
async def classify(text: str, bank_id: str) -> dict[str, object]:  # noqa: ARG001 - audited, if not used
    """A pipeline function of one's own: nothing but the decorator makes it audited."""
    await asyncio.sleep(0.01)
    return {"label": "preference", "confidence": 0.93}


@audited("consolidate")
def consolidate(bank_id: str, memory_ids: list[str]) -> dict[str, object]:  # noqa: ARG001 - audited, if not used
    """Another one, and not async."""
    return {"merged": len(memory_ids)}


def run_demo(dsn: str, console: Console) -> None:
    """Run nine operations on the database and show their rows.

    Raises:
        AuditError: Astrocyte isn't installed, or the rows could not be written.
    """
    try:
        from astrocyte import Astrocyte
        from astrocyte.types import AstrocyteContext
    except ImportError:
        raise AuditError("the demo needs an extra: pip install 'astrocyte-otel-audit[demo]'") from None

    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(0.1)), resource=Resource.create({"service.name": "demo-memory-service"})
    )
    trace.set_tracer_provider(provider)
    processor = configure_audit(dsn=dsn, actions="*", mappings=["astrocyte"], migrate=True)
    brain = Astrocyte.from_config_dict(_BRAIN)

    console.print("Astrocyte runs: retain, recall, reflect, a rejected retain, a denied recall, forget …\n")
    try:
        trace_ids = asyncio.run(_operate(brain, AstrocyteContext))
        if not processor.force_flush(15_000):
            raise AuditError("the rows could not be written in time; the warnings above say why")
    finally:
        provider.shutdown()

    table = AuditTable(OwnConnection(dsn))
    records = [record for trace_id in trace_ids for record in table.search(trace_id=trace_id).records]
    table.close()
    kept = sum(record.sampled is True for record in records)
    console.print(records_table(records, _COLUMNS))
    console.print(
        f"\n{len(trace_ids)} operations, {len(records)} rows. The sampler kept the traces of {kept} of them; an audit "
        "row does not depend on it.\nNo row holds what was said: a text is stored as its length.",
        highlight=False,
    )


async def _operate(brain: Any, context_type: Any) -> list[str]:
    """Run the operations, each in a trace of its own as a service would, and return the trace ids."""
    assistant, stranger = context_type(principal="agent:assistant"), context_type(principal="agent:stranger")
    trace_ids: list[str] = []
    tracer = trace.get_tracer(__name__)

    @contextlib.contextmanager
    def request(actor: str) -> Any:
        caller = audit_scope(actor_id=actor, actor_type="service", transport="http")
        with caller, tracer.start_as_current_span("request") as span:
            trace_ids.append(f"{span.get_span_context().trace_id:032x}")
            yield

    with request("assistant"):
        await classify("I prefer dark mode", bank_id=_BANK)
    memory_ids: list[str] = []
    for text in ("Calvin prefers dark mode", "Calvin lives in Oslo"):
        with request("assistant"):
            stored = await brain.retain(text, bank_id=_BANK, context=assistant)
            memory_ids.append(stored.memory_id)
    with request("assistant"):
        # Around Astrocyte's own span of the same action: one operation, one row, with what is said here in it.
        async with audit_operation("recall", bank_id=_BANK, request={"query": "dark mode?", "top_k": 5}) as operation:
            found = await brain.recall("dark mode?", bank_id=_BANK, max_results=5, context=assistant)
            operation.response = {"hits": found.hits}
    with request("assistant"):
        await brain.reflect("What does Calvin like?", bank_id=_BANK, context=assistant)
    with request("assistant"):
        async with audit_operation("retain", bank_id=_BANK) as operation:
            rejected = await brain.retain("", bank_id=_BANK, context=assistant)
            if not rejected.stored:
                operation.outcome, operation.error_type = "failure", "rejected"
    with request("stranger"), contextlib.suppress(Exception):  # denied, as it should be; the row says so
        await brain.recall("dark mode?", bank_id=_BANK, context=stranger)
    with request("assistant"):
        consolidate(_BANK, memory_ids)
    with request("assistant"):
        await brain.forget(_BANK, memory_ids=memory_ids[:1], context=assistant)
    return trace_ids
