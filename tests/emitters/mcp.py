"""Spans of the Model Context Protocol: fastmcp 4, the official SDK alone, and Astrocyte's own server on fastmcp.

Client and server are in one process, and talk in memory, or by HTTP where that makes a difference.
``python -m tests.emitters.mcp`` prints the spans.
"""

from __future__ import annotations

import asyncio
from typing import Any

import mcp.client
import pytest
from astrocyte import Astrocyte
from astrocyte.config import AstrocyteConfig
from astrocyte.mcp import create_mcp_server
from astrocyte.policy import observability
from fastmcp import Client, Context, FastMCP
from fastmcp.exceptions import AuthorizationError, ToolError
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier
from fastmcp.server.middleware import Middleware
from mcp.server.mcpserver import MCPServer
from mcp.shared import _otel as mcp_telemetry
from mcp.shared.exceptions import MCPError
from opentelemetry.trace import TracerProvider

from tests.emitters.astrocyte import CALVIN, CONFIG, TEXT
from tests.emitters.recording import global_provider, kept_tracer, print_spans
from tests.emitters.servers import serving_asgi

#: What a caller over HTTP shows of itself.
TOKEN = "calvin-s-token"


def emit(tracer_provider: TracerProvider) -> None:
    """Use the servers; all spans go to the provider."""
    # fastmcp asks for the global provider at each span, the others once, when they are imported.
    with (
        global_provider(tracer_provider),
        kept_tracer(mcp_telemetry, tracer_provider, "mcp-python-sdk"),
        kept_tracer(observability, tracer_provider, "astrocyte"),
    ):
        asyncio.run(_use_fastmcp())
        asyncio.run(_use_fastmcp_over_http())
        asyncio.run(_use_official_sdk())
        asyncio.run(_use_astrocyte())


class _Gate(Middleware):
    """Turns one tool's callers away, before the tool is looked up."""

    async def on_call_tool(self, context: Any, call_next: Any) -> Any:
        if context.message.name == "guarded":
            raise AuthorizationError(f"not for calvin, who asked for {TEXT}")
        return await call_next(context)


def _fastmcp_server(entered: asyncio.Event, **arguments: Any) -> FastMCP:
    server: FastMCP = FastMCP("memory", middleware=[_Gate()], **arguments)

    @server.tool
    async def recall(query: str, limit: int = 3) -> list[str]:
        """Find memories."""
        return [TEXT][:limit]

    @server.tool
    async def answer(question: str, ctx: Context) -> Any:
        """Call another tool of this server."""
        return (await ctx.fastmcp.call_tool("recall", {"query": question})).structured_content

    @server.tool
    async def refuse() -> None:
        """Say that it failed, in its own words."""
        raise ToolError(f"refused: {TEXT}")

    @server.tool
    async def fail() -> None:
        """Fail without meaning to."""
        raise ValueError(f"broken by {TEXT}")

    @server.tool
    async def guarded() -> None:
        """Nobody may call it."""

    @server.tool
    async def wait() -> None:
        """Wait for ever."""
        entered.set()
        await asyncio.Event().wait()

    @server.resource("memory://bank-1/facts")
    async def facts() -> str:
        """All facts of a bank."""
        return TEXT

    @server.resource("memory://{bank}/profile")
    async def profile(bank: str) -> str:
        """What a bank is about."""
        return bank

    @server.prompt
    async def remember(topic: str) -> str:
        """Ask for what is known."""
        return f"What do you know about {topic}?"

    return server


async def _use_fastmcp() -> None:
    entered = asyncio.Event()
    async with Client(_fastmcp_server(entered)) as client:
        assert (await client.call_tool("recall", {"query": "coffee"})).data == [TEXT]
        await client.call_tool("answer", {"question": "coffee"})
        await client.list_tools()
        await client.read_resource("memory://bank-1/facts")
        await client.read_resource("memory://bank-2/profile")
        await client.get_prompt("remember", {"topic": "coffee"})
        for tool, arguments in (
            ("refuse", {}),
            ("fail", {}),
            ("guarded", {}),
            ("no-such-tool", {}),
            ("recall", {"limit": "many"}),
        ):
            with pytest.raises((ToolError, MCPError)):
                await client.call_tool(tool, arguments)
        # A tool's failure is an ordinary answer of the protocol: who asks for it as such gets no exception.
        assert (await client.call_tool("refuse", raise_on_error=False)).is_error
        with pytest.raises(MCPError):
            await client.read_resource("memory://bank-1/no-such-thing")
        await _cancel(client.call_tool("wait"), entered)


async def _use_fastmcp_over_http() -> None:
    """The server knows who asks, and its spans have a remote parent."""
    verifier = StaticTokenVerifier({TOKEN: {"client_id": "calvin", "scopes": ["memories:read"]}})
    app = _fastmcp_server(asyncio.Event(), auth=verifier).http_app(stateless_http=True)
    async with serving_asgi(app) as address:
        async with Client(f"{address}/mcp", auth=TOKEN) as client:
            await client.call_tool("recall", {"query": "coffee"})
            with pytest.raises(ToolError):
                await client.call_tool("fail")
        # Who isn't known gets no further than the HTTP server: there is no span of fastmcp's server.
        with pytest.raises(MCPError, match="error response"):
            async with Client(f"{address}/mcp", auth="another-token"):
                pass


async def _use_official_sdk() -> None:
    entered = asyncio.Event()
    server = MCPServer("memory")

    @server.tool()
    async def recall(query: str) -> str:
        """Find memories."""
        return TEXT

    @server.tool()
    async def fail() -> str:
        """Fail without meaning to."""
        raise ValueError(f"broken by {TEXT}")

    @server.tool()
    async def wait() -> str:
        """Wait for ever."""
        entered.set()
        await asyncio.Event().wait()
        return TEXT

    @server.resource("memory://bank-1/facts")
    async def facts() -> str:
        """All facts of a bank."""
        return TEXT

    async with mcp.client.Client(server) as client:
        await client.call_tool("recall", {"query": "coffee"})
        await client.list_tools()
        await client.read_resource("memory://bank-1/facts")
        assert (await client.call_tool("fail")).is_error
        assert (await client.call_tool("no-such-tool")).is_error
        with pytest.raises(MCPError):
            await client.read_resource("memory://bank-1/no-such-thing")
        await _cancel(client.call_tool("wait"), entered)


async def _use_astrocyte() -> None:
    """Astrocyte's server: its own spans are below those of fastmcp."""
    brain = Astrocyte.from_config_dict(CONFIG)
    config = AstrocyteConfig()
    config.mcp.default_bank_id = "bank-1"
    server = create_mcp_server(brain, config, astrocyte_context=CALVIN)
    async with Client(server) as client:
        await client.call_tool("memory_retain", {"content": TEXT})
        await client.call_tool("memory_recall", {"query": "coffee"})
        await client.call_tool("memory_recall", {"query": "coffee", "bank_id": "bank-2"})
        await client.call_tool("memory_reflect", {"query": "coffee"})


async def _cancel(call: Any, entered: asyncio.Event) -> None:
    task = asyncio.ensure_future(call)
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    print_spans(emit)
