"""What an application asks of OpenAI's client, whichever library looks on, and how that ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import APIConnectionError, APIError, AsyncOpenAI, OpenAI, RateLimitError

from tests.emitters.openai_server import ModelService, model_service

MESSAGES: Any = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What does Calvin like?"},
]
TOOLS: Any = [{"type": "function", "function": {"name": "recall", "parameters": {"type": "object", "properties": {}}}}]


def make_calls() -> None:
    """Make all calls, against a service on this machine."""
    with model_service() as base_url:
        with OpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
            _ask(client)
            _fail(client)
        asyncio.run(_ask_asynchronously(base_url))


def _ask(client: OpenAI) -> None:
    chat = client.chat.completions
    chat.create(model="gpt-4o-mini", messages=MESSAGES, user="calvin")
    chat.create(model="gpt-4o-mini", messages=MESSAGES, tools=TOOLS)
    with chat.create(
        model="gpt-4o-mini", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        assert list(stream)
    with chat.create(model="gpt-4o-mini", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))  # and no more of it
    client.responses.create(model="gpt-4o-mini", input="What does Calvin like?")
    client.embeddings.create(model="text-embedding-3-small", input=["Calvin likes dark roast coffee"])


def _fail(client: OpenAI) -> None:
    with pytest.raises(APIError):
        client.chat.completions.create(model="failing", messages=MESSAGES)
    with pytest.raises(RateLimitError):
        client.chat.completions.create(model="crowded", messages=MESSAGES)
    with (
        client.chat.completions.create(model="cut-off", messages=MESSAGES, stream=True) as stream,
        pytest.raises(APIConnectionError),
    ):
        list(stream)
    with pytest.raises(APIError):
        client.embeddings.create(model="failing", input="Calvin likes dark roast coffee")


async def _ask_asynchronously(base_url: str) -> None:
    async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        await client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        async with await client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True) as stream:
            async for _ in stream:
                pass
        task = asyncio.create_task(client.chat.completions.create(model="waiting", messages=MESSAGES))
        await asyncio.to_thread(ModelService.asked.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
