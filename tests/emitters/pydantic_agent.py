"""Spans of pydantic-ai: an agent with tools, on models that need no network.

``python -m tests.emitters.pydantic_agent`` prints them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.trace import TracerProvider
from pydantic_ai import Agent, ModelRetry, UnexpectedModelBehavior
from pydantic_ai.capabilities import Instrumentation
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.models.test import TestModel

from tests.emitters.recording import print_spans

TEXT = "Calvin likes dark roast coffee"
QUESTION = "What does Calvin like?"


def emit(tracer_provider: TracerProvider) -> None:
    """Run agents; their spans go to the provider."""
    asyncio.run(_run(InstrumentationSettings(tracer_provider=tracer_provider)))


async def _run(settings: InstrumentationSettings) -> None:
    agent = _agent(settings)
    await agent.run(QUESTION)
    async with agent.run_stream(QUESTION) as result:
        assert await result.get_output()

    failing = _agent(settings, recall=_broken)
    with pytest.raises(ConnectionError):
        await failing.run(QUESTION)

    insisting = _agent(settings, recall=_refusing)
    with pytest.raises(UnexpectedModelBehavior):
        await insisting.run(QUESTION)

    broken_model = Agent(FunctionModel(_no_answer), name="no-model", capabilities=[Instrumentation(settings)])
    with pytest.raises(ConnectionError):
        await broken_model.run(QUESTION)

    entered = asyncio.Event()

    async def wait(query: str) -> str:
        entered.set()
        await asyncio.Event().wait()
        return query

    task = asyncio.create_task(_agent(settings, recall=wait).run(QUESTION))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _agent(settings: InstrumentationSettings, recall: Any = None) -> Agent[None, str]:
    agent: Agent[None, str] = Agent(
        TestModel(seed=0),
        name="librarian",
        instructions="Answer in one sentence.",
        capabilities=[Instrumentation(settings)],
    )
    agent.tool_plain(recall or _found, name="recall")
    return agent


async def _found(query: str) -> list[str]:
    return [TEXT]


async def _broken(query: str) -> list[str]:
    raise ConnectionError(f"no answer for {TEXT}")


async def _refusing(query: str) -> list[str]:
    raise ModelRetry(f"ask otherwise than {TEXT}")


async def _no_answer(messages: Any, info: Any) -> Any:
    raise ConnectionError(f"no answer for {TEXT}")


if __name__ == "__main__":
    print_spans(emit)
