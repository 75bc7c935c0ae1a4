"""An ASGI application whose lifespan writes what waits: uvicorn ends by SIGTERM, which runs no exit handlers.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set: uvicorn --app-dir examples/servers asgi:app --workers 2
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from astrocyte_otel_audit import audit_scope, audited, configure_audit

processor = configure_audit(actions=["recall"])


@audited("recall")
async def recall(query: str, bank_id: str) -> dict[str, object]:
    return {"hits": [{"id": "m-42", "text": "Calvin prefers dark mode"}]}


async def answer(request: Request) -> JSONResponse:
    with audit_scope(actor_id="calvin", actor_type="user", transport="http"):
        found = await recall("What does Calvin like?", request.path_params["bank_id"])
    return JSONResponse({**found, "process": os.getpid()})


@asynccontextmanager
async def lifespan(application: Starlette) -> AsyncIterator[None]:
    yield
    # Not shutdown(), which would refuse what a thread ends after this.
    await asyncio.to_thread(processor.force_flush, 10_000)


app = Starlette(routes=[Route("/{bank_id}", answer)], lifespan=lifespan)
