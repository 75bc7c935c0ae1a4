"""`SpanMapping`: how a span that another library emits becomes an audit record, without a change to that library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.trace import SpanKind

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.record import OUTCOMES, Outcome

_ACTION = "{action}"
#: What `{action}` stands for in a span name.
_ACTION_PATTERN = r"(?P<action>[A-Za-z0-9_-]+)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanMapping:
    """Says which spans of another library are audit operations, and where their parts are. Immutable.

    Mappings are tried in their order and the first that matches a span wins. A span that carries `audit.action`
    itself needs none.

    Args:
        span_name: name of the span; ``*`` stands for anything, ``{action}`` for the word that is the action.
        action: the action, where the name holds no ``{action}``.
        scope: name of the instrumentation scope, such as ``astrocyte``; None for any.
        kind: kind of the span; None for any.
        bank_id: attributes that may hold the bank, the first that is there wins.
        transport: the transport of all these operations, where no `audit_scope` gives one.
        unset_outcome: outcome of a span whose status was left unset.

    Raises:
        ConfigurationError: an argument that can't be used.
    """

    span_name: str
    action: str | None = None
    scope: str | None = None
    kind: SpanKind | None = None
    bank_id: Sequence[str] = (attributes.BANK_ID,)
    transport: str | None = None
    unset_outcome: Outcome = "success"
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.span_name, str) or not self.span_name:
            raise ConfigurationError("span_name", "accepted is a span's name, with * and {action} as wildcards")
        if self.span_name.count(_ACTION) > 1:
            raise ConfigurationError("span_name", "holds {action} more than once")
        if (_ACTION in self.span_name) == (self.action is not None) or self.action == "":
            raise ConfigurationError(
                "action", "accepted is either {action} in span_name, or an action here, and not both"
            )
        if not (self.scope is None or isinstance(self.scope, str)):
            raise ConfigurationError("scope", "accepted is the name of an instrumentation scope, such as 'astrocyte'")
        if not (self.kind is None or isinstance(self.kind, SpanKind)):
            raise ConfigurationError("kind", "accepted is an opentelemetry.trace.SpanKind")
        if not isinstance(self.bank_id, (list, tuple)) or not all(isinstance(key, str) for key in self.bank_id):
            raise ConfigurationError("bank_id", "accepted is a list of attribute keys, such as ['astrocyte.bank_id']")
        if self.unset_outcome not in OUTCOMES:
            raise ConfigurationError("unset_outcome", f"accepted is one of {', '.join(sorted(OUTCOMES))}")
        pattern = re.escape(self.span_name).replace(re.escape("*"), ".*").replace(re.escape(_ACTION), _ACTION_PATTERN)
        object.__setattr__(self, "_pattern", re.compile(pattern, re.DOTALL))

    def action_for_name(self, span_name: str, kind: SpanKind | None) -> str | None:
        """Return the action of a span of that name and kind, or None; what a sampler can know."""
        if self.kind is not None and kind is not None and kind is not self.kind:
            return None
        match = self._pattern.fullmatch(span_name)
        if match is None:
            return None
        return self.action if self.action is not None else match["action"]

    def action_for(self, span_name: str, kind: SpanKind | None, scope: str | None) -> str | None:
        """Return the action of a span of that name, kind and instrumentation scope, or None."""
        if self.scope is not None and scope != self.scope:
            return None
        return self.action_for_name(span_name, kind)

    def bank_of(self, span_attributes: Mapping[str, Any]) -> Any:
        """Return what the span says its bank is, or None."""
        return next((span_attributes[key] for key in self.bank_id if key in span_attributes), None)


#: Mappings by name. `astrocyte`: every operation of an Astrocyte brain (0.22), which names most spans after
#: itself but calls one plainly `compile`.
PRESETS: Final[Mapping[str, tuple[SpanMapping, ...]]] = {
    "astrocyte": (
        SpanMapping(span_name="astrocyte.{action}", scope="astrocyte", bank_id=("astrocyte.bank_id", "bank_id")),
        SpanMapping(span_name="compile", action="compile", scope="astrocyte", bank_id=("bank_id",)),
    ),
}


def resolve_mappings(mappings: Iterable[SpanMapping | str]) -> tuple[SpanMapping, ...]:
    """Return the mappings with the names of presets replaced by what they stand for.

    Raises:
        ConfigurationError: a name that is no preset, or a member that is no mapping.
    """
    resolved: list[SpanMapping] = []
    for mapping in mappings:
        if isinstance(mapping, SpanMapping):
            resolved.append(mapping)
        elif isinstance(mapping, str) and mapping in PRESETS:
            resolved.extend(PRESETS[mapping])
        else:
            shown = repr(mapping)[:80] if isinstance(mapping, str) else f"a {type(mapping).__name__}"
            raise ConfigurationError("mappings", f"holds {shown}; accepted are SpanMapping and {', '.join(PRESETS)}")
    return tuple(resolved)
