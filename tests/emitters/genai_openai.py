"""Spans of the official instrumentation of OpenAI's client, with messages captured, so that there is text to keep out.

``python -m tests.emitters.genai_openai`` prints them.
"""

from __future__ import annotations

from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
from opentelemetry.trace import TracerProvider

from tests.emitters.openai_calls import make_calls
from tests.emitters.recording import environment, print_spans


def emit(tracer_provider: TracerProvider) -> None:
    """Use OpenAI's client; the spans go to the provider."""
    with environment(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="span_only"):
        instrumentor = OpenAIInstrumentor()
        instrumentor.instrument(tracer_provider=tracer_provider)
        try:
            make_calls()
        finally:
            instrumentor.uninstrument()


if __name__ == "__main__":
    print_spans(emit)
