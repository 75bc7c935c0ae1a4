"""Mappings by name, and what a setting says about mappings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.pipeline.pattern import SpanPattern

_Pattern = TypeVar("_Pattern", bound=SpanPattern)

#: Every operation of an Astrocyte brain (0.22), which names most spans after itself but calls one plainly `compile`.
#: Of several banks it writes the first and how many more there are, as in ``a+1``: the row says how many in all.
_ASTROCYTE: Final = (
    SpanMapping(
        span_name="astrocyte.{action}",
        scope="astrocyte",
        bank_id=("astrocyte.bank_id", "bank_id"),
        metadata={"bank_count": "astrocyte.bank_count"},
    ),
    SpanMapping(span_name="compile", action="compile", scope="astrocyte", bank_id="bank_id"),
)

#: A call of a tool, where it is served: fastmcp 4 and the official SDK make spans of the same name at both ends.
_MCP_CALL: Final = SpanMapping(
    scope=("fastmcp", "mcp-python-sdk"),
    kind="server",
    required={"mcp.method.name": "tools/call"},
    action="tool.{gen_ai.tool.name}",
    transport="mcp",
    metadata={"server": "fastmcp.server.name", "session_id": "mcp.session.id"},
)
#: One that was turned away before its tool was looked up leaves its span's status unset, as a success does.
_MCP: Final = (_MCP_CALL, dataclasses.replace(_MCP_CALL, action="tool", unset_outcome="unknown"))

#: A Hindsight server (1.1). The span of a request is renamed after its operation, and knows how that ended; the one of
#: the same action inside says how much was asked for. Without a request, as over MCP, in a worker or on its engine,
#: that is all there is, and a recall that fails leaves its status unset. A reflection or consolidation recalls too.
_HINDSIGHT_OPERATION: Final = SpanMapping(
    scope="hindsight_api.tracing",
    span_name="hindsight.retain",
    action="retain",
    required=("hindsight.bank_id",),
    absent=("gen_ai.*",),
    not_inside=(SpanPattern(scope="hindsight_api.tracing", span_name="hindsight.reflect"),),
    bank_id=("hindsight.bank_id",),
    request={"max_tokens": "hindsight.max_tokens", "thinking_budget": "hindsight.thinking_budget"},
    unset_outcome="unknown",
)
_HINDSIGHT: Final = (
    SpanMapping(
        span_name="hindsight.{action}",
        kind="server",
        required=("hindsight.operation",),
        bank_id=("hindsight.bank_id",),
        failure_when={
            "error.type": "*",
            "http.response.status_code": ("4*", "5*"),
            "http.status_code": ("4*", "5*"),
        },
    ),
    dataclasses.replace(
        _HINDSIGHT_OPERATION,
        span_name="hindsight.recall",
        action="consolidation_recall",
        required={"hindsight.bank_id": "*", "hindsight.fact_types": "observation"},
        root=True,
    ),
    *(
        dataclasses.replace(_HINDSIGHT_OPERATION, span_name=f"hindsight.{action}", action=action)
        for action in ("retain", "recall", "reflect", "consolidation")
    ),
)

#: Whatever follows OpenTelemetry's semantic conventions for generative AI: they want the operation's name at the span's
#: start, and let everybody choose the span's own. Of messages, arguments and results nothing is taken.
_GEN_AI_OPERATION: Final = SpanMapping(
    action="{gen_ai.operation.name}",
    required=("gen_ai.operation.name",),
    absent=("mcp.method.name",),
    actor_id=("gen_ai.user",),
    request={
        "model": "gen_ai.request.model",
        "provider": ("gen_ai.provider.name", "gen_ai.system"),
        "max_tokens": "gen_ai.request.max_tokens",
        "stream": ("gen_ai.request.stream", "gen_ai.is_streaming"),
        "tool": "gen_ai.tool.name",
        "tool_call_id": "gen_ai.tool.call.id",
    },
    response={
        "model": "gen_ai.response.model",
        "id": "gen_ai.response.id",
        "finish_reasons": "gen_ai.response.finish_reasons",
        "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.aggregated_usage.input_tokens"),
        "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.aggregated_usage.output_tokens"),
    },
    metadata={"agent": "gen_ai.agent.name", "conversation_id": "gen_ai.conversation.id"},
    failure_when={"error.type": "*", "gen_ai.response.finish_reasons": "error"},
)
#: Some of traceloop's spans for OpenAI's client get that name later: those are kept by their own.
_GEN_AI: Final = (
    _GEN_AI_OPERATION,
    dataclasses.replace(_GEN_AI_OPERATION, scope="opentelemetry.instrumentation.openai*", span_name="openai.*"),
)

PRESETS: Final[Mapping[str, tuple[SpanMapping, ...]]] = {
    "astrocyte": _ASTROCYTE,
    "gen_ai": _GEN_AI,
    "hindsight": _HINDSIGHT,
    "mcp": _MCP,
}


def resolve_mappings(given: Iterable[SpanMapping | str | Mapping[str, Any]] | None = None) -> tuple[SpanMapping, ...]:
    """Return the mappings, with the names of presets replaced by what they stand for.

    Args:
        given: mappings, names of presets, or the arguments of a `SpanMapping` by name, as a file has them; by default
            what the environment says.

    Raises:
        ConfigurationError: a name that is no preset, a member that is no mapping, or an argument that can't be used.
    """
    setting = settings.SETTINGS["mappings"]
    source = setting.name if given is not None else setting.variables[0]
    resolved: list[SpanMapping] = []
    for position, mapping in enumerate(setting.resolve(given)):
        if isinstance(mapping, SpanMapping):
            resolved.append(mapping)
        elif isinstance(mapping, Mapping):
            resolved.append(_made(SpanMapping, mapping, f"{source}[{position}]"))
        elif isinstance(mapping, str) and mapping in PRESETS:
            resolved.extend(PRESETS[mapping])
        else:
            shown = settings.shown(mapping)
            close = difflib.get_close_matches(mapping, PRESETS, 1) if isinstance(mapping, str) else []
            raise ConfigurationError(
                source,
                f"holds {shown}; accepted are SpanMapping and {', '.join(PRESETS)}"
                + "".join(f" (did you mean {name!r}?)" for name in close),
            )
    return tuple(resolved)


def _made(kind: type[_Pattern], given: Mapping[str, Any], source: str) -> _Pattern:
    """Return a pattern or a mapping of arguments by name, those inside it too."""
    accepted = [each.name for each in dataclasses.fields(kind) if each.init]
    for key in given:
        if key not in accepted:
            close = difflib.get_close_matches(str(key), accepted, 1)
            hint = "".join(f"; did you mean {name!r}?" for name in close) or f"; accepted are {', '.join(accepted)}"
            raise ConfigurationError(source, f"has no key {str(key)[:80]!r}{hint}")
    arguments = dict(given)
    for key in ("inside", "not_inside"):
        if isinstance(around := given.get(key), (list, tuple)):
            arguments[key] = [
                _made(SpanPattern, one, f"{source}.{key}[{position}]") if isinstance(one, Mapping) else one
                for position, one in enumerate(around)
            ]
    try:
        return kind(**arguments)
    except ConfigurationError as error:
        if error.source.startswith(source):
            raise
        raise ConfigurationError(f"{source}.{error.source}", error.problem) from None
