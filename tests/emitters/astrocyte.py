"""Spans of an Astrocyte brain (0.22): every operation that it has a span for, and the ways in which they end.

``python -m tests.emitters.astrocyte`` prints them.
"""

from __future__ import annotations

import asyncio
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from astrocyte import Astrocyte
from astrocyte.errors import AccessDenied, ConfigError, LegalHoldActive, RateLimited
from astrocyte.policy import observability
from astrocyte.recall.proxy import reset_proxy_breakers
from astrocyte.testing.in_memory import InMemoryVectorStore, InMemoryWikiStore
from astrocyte.types import AstrocyteContext, SyncPushRecord
from opentelemetry.trace import TracerProvider

from tests.emitters.recording import environment, kept_tracer, print_spans
from tests.emitters.servers import serving

CALVIN = AstrocyteContext(principal="user:calvin")
EVE = AstrocyteContext(principal="user:eve")
TEXT = "Calvin likes dark roast coffee"

#: Astrocyte refuses to ask private addresses. This one (RFC 6598) is none, and no public network leads there: the
#: request goes to a proxy.
REMOTE = "http://100.64.0.1"


class FailingVectorStore(InMemoryVectorStore):
    """A vector store that is away for one bank."""

    async def search_similar(self, query_vector: Any, bank_id: str, *args: Any, **kwargs: Any) -> Any:
        if bank_id == "failing":
            raise ConnectionError(f"no answer for {TEXT}")
        return await super().search_similar(query_vector, bank_id, *args, **kwargs)

    async def store_vectors(self, items: Any) -> Any:
        if any(item.bank_id == "failing" for item in items):
            raise ConnectionError(f"no answer for {TEXT}")
        return await super().store_vectors(items)


CONFIG = {
    "llm_provider": "mock",
    "vector_store": f"{__name__}:FailingVectorStore",
    "document_store": "in_memory",
    "access_control": {"enabled": True, "default_policy": "deny"},
    "access_grants": [
        {"bank_id": "*", "principal": "user:calvin", "permissions": ["read", "write", "forget", "admin"]},
    ],
    "banks": {"crowded": {"homeostasis": {"rate_limits": {"retain_per_minute": 1}}}},
    "sources": {
        "answering": {"type": "proxy", "url": f"{REMOTE}/answering", "target_bank": "proxied"},
        "failing": {"type": "proxy", "url": f"{REMOTE}/failing", "target_bank": "proxied-failing"},
    },
}


def emit(tracer_provider: TracerProvider) -> None:
    """Use a brain; its spans go to the provider."""
    reset_proxy_breakers()
    with (
        kept_tracer(observability, tracer_provider, "astrocyte"),
        serving(_Remote) as proxy,
        environment(
            http_proxy=proxy, HTTP_PROXY=proxy, NO_PROXY="", no_proxy="", ASTROCYTE_PROXY_RECALL_DEADLINE_SECONDS="60"
        ),
    ):
        asyncio.run(_use(Astrocyte.from_config_dict(CONFIG)))


class _Remote(BaseHTTPRequestHandler):
    """Another memory service, as a proxy would reach it."""

    def do_GET(self) -> None:
        body = json.dumps({"hits": [{"text": TEXT, "score": 0.9}]}).encode()
        self.send_response(500 if "failing" in self.path else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


async def _use(brain: Astrocyte) -> None:
    await _succeed(brain)
    await _be_refused(brain)
    await _fail(brain)
    await _be_cancelled(brain)


async def _succeed(brain: Astrocyte) -> None:
    for bank in ("bank-1", "bank-2"):
        assert (await brain.retain(TEXT, bank, context=CALVIN)).stored
    assert (await brain.recall("coffee", "bank-1", context=CALVIN)).hits
    assert (await brain.recall("coffee", banks=["bank-1", "bank-2"], context=CALVIN)).hits
    assert not (await brain.recall("coffee", "empty", context=CALVIN)).hits
    await brain.reflect("coffee", "bank-1", context=CALVIN)
    await brain.reflect("coffee", banks=["bank-1", "bank-2"], context=CALVIN)
    assert (await brain.recall("coffee", "proxied", context=CALVIN)).hits
    pushed = [SyncPushRecord(id="memory-1", text=TEXT), SyncPushRecord(id="memory-2", text="")]
    results = await brain.push_records("bank-3", pushed, context=CALVIN)
    assert [result.status for result in results] == ["stored", "rejected"]
    brain.set_wiki_store(InMemoryWikiStore())
    await brain.compile("bank-1", scope="coffee", context=CALVIN)
    await brain.forget("bank-3", memory_ids=["memory-1"], context=CALVIN)
    await brain.forget("bank-2", scope="all", context=CALVIN)


async def _be_refused(brain: Astrocyte) -> None:
    assert not (await brain.retain("", "rejected", context=CALVIN)).stored
    # Some ask for access inside their span, and some before there is one.
    with pytest.raises(AccessDenied):
        await brain.retain(TEXT, "denied", context=EVE)
    with pytest.raises(AccessDenied):
        await brain.recall("coffee", "denied", context=EVE)
    with pytest.raises(AccessDenied):
        await brain.recall("coffee", banks=["denied", "bank-1"], context=EVE)
    with pytest.raises(AccessDenied):
        await brain.reflect("coffee", "denied", context=EVE)
    with pytest.raises(AccessDenied):
        await brain.forget("denied", scope="all", context=EVE)
    with pytest.raises(AccessDenied):
        await brain.push_records("denied", [SyncPushRecord(id="memory-3", text=TEXT)], context=EVE)
    with pytest.raises(AccessDenied):
        await brain.compile("denied", context=EVE)
    await brain.retain(TEXT, "crowded", context=CALVIN)
    with pytest.raises(RateLimited):
        await brain.retain(TEXT, "crowded", context=CALVIN)
    brain.set_legal_hold("held", "case-1", "a case")
    with pytest.raises(LegalHoldActive):
        await brain.forget("held", memory_ids=["memory-4"], context=CALVIN)


async def _fail(brain: Astrocyte) -> None:
    with pytest.raises(ConnectionError):
        await brain.retain(TEXT, "failing", context=CALVIN)
    with pytest.raises(ConfigError):
        await brain.recall("coffee", banks=["bank-1", "bank-2"], strategy="none-such", context=CALVIN)
    # A store or another service that can't be searched is no error to Astrocyte: nothing was found there.
    assert not (await brain.recall("coffee", "failing", context=CALVIN)).hits
    assert not (await brain.recall("coffee", "proxied-failing", context=CALVIN)).hits
    await brain.reflect("coffee", "failing", context=CALVIN)


async def _be_cancelled(brain: Astrocyte) -> None:
    entered = asyncio.Event()

    async def wait(event: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    brain.register_hook("on_recall", wait)
    task = asyncio.create_task(brain.recall("coffee", "cancelled", context=CALVIN))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    print_spans(emit)
