"""Spans of traceloop's instrumentation of OpenAI's client (``opentelemetry-instrumentation-openai``).

It captures messages unless it is told not to. ``python -m tests.emitters.traceloop_openai`` prints the spans.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from openai.resources.chat.completions import AsyncCompletions, Completions
from openai.resources.embeddings import AsyncEmbeddings, Embeddings
from openai.resources.responses import AsyncResponses, Responses
from opentelemetry.instrumentation.openai import OpenAIInstrumentor
from opentelemetry.trace import TracerProvider

from tests.emitters.openai_calls import make_calls
from tests.emitters.recording import print_spans

#: What the calls go through.
_RESOURCES = (Completions, AsyncCompletions, Embeddings, AsyncEmbeddings, Responses, AsyncResponses)


def emit(tracer_provider: TracerProvider) -> None:
    """Use OpenAI's client; the spans go to the provider."""
    with _instrumented(tracer_provider):
        make_calls()


@contextmanager
def _instrumented(tracer_provider: TracerProvider) -> Iterator[None]:
    # Its `uninstrument` leaves wrappers behind, which send to this provider for ever.
    before = [(resource, dict(vars(resource))) for resource in _RESOURCES]
    instrumentor = OpenAIInstrumentor()
    # Its models are configured in a way that pydantic has deprecated.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        instrumentor.instrument(tracer_provider=tracer_provider)
    try:
        yield
    finally:
        instrumentor.uninstrument()
        for resource, members in before:
            for name, member in members.items():
                if vars(resource)[name] is not member:
                    setattr(resource, name, member)


if __name__ == "__main__":
    print_spans(emit)
