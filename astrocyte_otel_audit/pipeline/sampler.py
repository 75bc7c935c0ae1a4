"""`AuditSampler`: keeps audit spans recording where the trace's own sampler drops them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    DEFAULT_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.mapping import SpanMapping
from astrocyte_otel_audit.pipeline.presets import resolve_mappings
from astrocyte_otel_audit.pipeline.selection import Selection

#: The SDK's own samplers, by the names that OTEL_TRACES_SAMPLER has for them.
_SAMPLERS: Final[Mapping[str, Sampler]] = {
    "always_on": ALWAYS_ON,
    "always_off": ALWAYS_OFF,
    "parentbased_always_on": DEFAULT_ON,
    "parentbased_always_off": DEFAULT_OFF,
}
_RATIOS: Final = ("traceidratio", "parentbased_traceidratio")


class AuditSampler(Sampler):
    """Lets a delegate decide, and turns its DROP of an audit span into RECORD_ONLY.

    The span then reaches `AuditSpanProcessor` while the trace stays unsampled: nothing more is exported to the trace
    backend than before. It must be the outermost sampler, as a `ParentBased` around it is not asked for child
    spans. Thread-safe.

    Args:
        delegate: the sampler that decides about traces; by default the SDK's, parent-based always-on.
        actions: the allowlist, as in `configure_audit`; by default that of the environment.
        mappings: mappings or preset names, as in `configure_audit`; by default those of the environment.

    Raises:
        ConfigurationError: an argument that can't be used.
    """

    def __init__(
        self,
        delegate: Sampler | None = None,
        *,
        actions: Iterable[str] | None = None,
        mappings: Iterable[SpanMapping | str | Mapping[str, Any]] | None = None,
    ) -> None:
        if delegate is not None and not hasattr(delegate, "should_sample"):
            raise ConfigurationError("delegate", f"got a {type(delegate).__name__}; accepted is a Sampler")
        self.delegate: Sampler = delegate if delegate is not None else DEFAULT_ON
        self._selection = Selection(settings.resolve("actions", actions), resolve_mappings(mappings))

    @property
    def selection(self) -> Selection:
        """The allowlist and mappings that it keeps spans for."""
        return self._selection

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Return the delegate's decision, or RECORD_ONLY in place of DROP for an audit span."""
        result = self.delegate.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        try:
            keep = result.decision is Decision.DROP and self._selection.may_audit(
                name, kind, attributes, parent_context
            )
        except Exception:  # a name or attributes that no span should have: the application started it all the same
            keep = False
        # A dropping sampler returns no attributes, and the span takes the result's: hand on the caller's.
        return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state) if keep else result

    def get_description(self) -> str:
        """Return a description that names the delegate's."""
        return f"AuditSampler{{{self.delegate.get_description()}}}"


def sampler_of(argument: str | None = None) -> AuditSampler:
    """Return the sampler of ``OTEL_TRACES_SAMPLER=astrocyte_audit``.

    Args:
        argument: ``OTEL_TRACES_SAMPLER_ARG``: who decides about traces, by the name that OTEL_TRACES_SAMPLER has, with
            its ratio where it has one, such as ``parentbased_traceidratio=0.1``. By default the SDK's.

    Raises:
        ConfigurationError: no such sampler. The SDK logs that, and goes on with its default.
    """
    name, _, ratio = (argument or "parentbased_always_on").strip().partition("=")
    if name in _SAMPLERS and not ratio:
        return AuditSampler(_SAMPLERS[name])
    try:
        if name in _RATIOS:
            sampler = TraceIdRatioBased(float(ratio or 1.0))
            return AuditSampler(sampler if name == _RATIOS[0] else ParentBased(sampler))
    except ValueError:  # no number, or none from 0 to 1
        pass
    raise ConfigurationError(
        "OTEL_TRACES_SAMPLER_ARG",
        f"got {settings.shown(argument)}; accepted is one of {', '.join((*_SAMPLERS, *_RATIOS))}, the last two with a "
        "ratio from 0 to 1, as in parentbased_traceidratio=0.1",
    )
