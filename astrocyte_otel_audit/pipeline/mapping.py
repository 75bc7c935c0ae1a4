"""`SpanMapping`: how a span that another library emits becomes an audit record, without a change to that library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.normalize import REDACTED, Normalizer
from astrocyte_otel_audit.payload_values import TOKEN
from astrocyte_otel_audit.pipeline.captured import text_of
from astrocyte_otel_audit.pipeline.pattern import (
    ACTION_WORD,
    Conditions,
    Names,
    SpanPattern,
    conditions,
    meets,
    strings,
)
from astrocyte_otel_audit.record import OUTCOMES, Outcome

#: Attributes that are taken by their own keys, or by the payload's keys; of several the first that is there.
Payload: TypeAlias = Sequence[str] | Mapping[str, Names]

_PLACEHOLDER: Final = re.compile(r"\{([^{}]+)\}")
_UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanMapping(SpanPattern):
    """Says which spans of another library are audit operations, and where their parts are. Immutable.

    Mappings are tried in their order and the first that matches a span wins. A span that carries `audit.action`
    itself needs none. Beside the arguments of `SpanPattern`, which say what spans are meant:

    Args:
        action: the action. ``{action}`` in it stands for the word of `span_name`, any other name in braces for the
            value of that attribute: ``"tool.{gen_ai.tool.name}"``. Without that attribute the mapping doesn't match.
            By default ``{action}``.
        inside: patterns of spans around it in this process, of which one has to match.
        not_inside: patterns of spans around it in this process, of which none may match: so that an operation is one
            row, however many spans it makes. What is around a span is seen where `AuditSpanProcessor` is.
        bank_id: attributes that may hold the bank, the first that is there wins.
        actor_id: attributes that may hold who acts, where no `audit_scope` says it.
        transport: the transport of all these operations, where no `audit_scope` gives one; with attributes in braces as
            in `action`. By default that of the request around them.
        request, response, metadata: attributes that are taken into the row's payloads: a list of keys, or a mapping of
            the payload's keys to an attribute, or to several, of which the first that is there wins. They pass the
            normalizer, and nothing else of the span is taken.
        redact: keys of those payloads that are stored as ``[redacted]``, whatever they hold.
        failure_when: attributes that make it a failure where the status of the span was left unset, with values as in
            `required`.
        unset_outcome: outcome of any other span whose status was left unset.

    Raises:
        ConfigurationError: an argument that can't be used.
    """

    action: str = ACTION_WORD
    inside: Sequence[SpanPattern] = ()
    not_inside: Sequence[SpanPattern] = ()
    bank_id: Names = (attributes.BANK_ID,)
    actor_id: Names = ()
    transport: str | None = None
    request: Payload = ()
    response: Payload = ()
    metadata: Payload = ()
    redact: Names = ()
    failure_when: Conditions = (attributes.ERROR_TYPE,)
    unset_outcome: Outcome = "success"
    _bank_keys: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _actor_keys: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: By the attribute's prefix in our own spans: the payload's keys and the attributes that they are taken from.
    _payloads: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = field(
        init=False, repr=False, compare=False
    )
    _failures: tuple[tuple[str, tuple[re.Pattern[str], ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        SpanPattern.__post_init__(self)
        names = (self.span_name,) if isinstance(self.span_name, str) else self.span_name
        if not isinstance(self.action, str) or not self.action:
            raise ConfigurationError("action", "accepted is an action, with {action} or attributes in braces")
        if any((ACTION_WORD in name) != (ACTION_WORD in self.action) for name in names):
            raise ConfigurationError(
                "action", "accepted is {action} in every span_name, or an action of its own here, and not both"
            )
        for source in ("inside", "not_inside"):
            patterns = getattr(self, source)
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(one, SpanPattern) for one in patterns):
                raise ConfigurationError(source, "accepted is a list of SpanPattern")
            self._keep(source, tuple(patterns))
        if not (self.transport is None or (isinstance(self.transport, str) and self.transport)):
            raise ConfigurationError("transport", "accepted is a transport, such as 'mcp'")
        keys = "a list of attribute keys, such as ['astrocyte.bank_id']"
        self._keep("_bank_keys", strings(self.bank_id, "bank_id", keys))
        self._keep("_actor_keys", strings(self.actor_id, "actor_id", keys))
        payloads = (
            (attributes.REQUEST, _payload(self.request, "request")),
            (attributes.RESPONSE, _payload(self.response, "response")),
            (attributes.METADATA, _payload(self.metadata, "metadata")),
        )
        self._keep("_payloads", tuple((prefix, pairs) for prefix, pairs in payloads if pairs))
        known = {key for _, pairs in payloads for key, _ in pairs}
        for key in strings(self.redact, "redact", "a list of payload keys"):
            if key not in known:
                raise ConfigurationError("redact", f"holds {key!r}, which is no key of request, response or metadata")
        self._keep("_failures", conditions(self.failure_when, "failure_when"))
        if self.unset_outcome not in OUTCOMES:
            raise ConfigurationError("unset_outcome", f"accepted is one of {', '.join(sorted(OUTCOMES))}")

    @property
    def looks_around(self) -> bool:
        """Whether it asks what spans are around one."""
        return bool(self.inside or self.not_inside)

    def action_of(self, word: str | None, span_attributes: Mapping[str, Any]) -> str | None:
        """Return the action of a span that matches, or None where an attribute that names it isn't there.

        Args:
            word: what `{action}` stands for in the span's name.
            span_attributes: of the span.
        """
        return word if self.action == ACTION_WORD else _filled(self.action, {"action": word, **span_attributes})

    def may_fit(self, span_attributes: Mapping[str, Any]) -> bool:
        """Say whether a span of the right name and kind may be meant, of which a sampler knows this much.

        Many libraries set attributes later, so the name decides. Where that may be any, the required attributes have
        to be there at the start, or every span would be kept.
        """
        return self.span_name != "*" or self.has_required(span_attributes)

    def fits(self, span: ReadableSpan, span_attributes: Mapping[str, Any], around: Iterable[ReadableSpan]) -> bool:
        """Say whether a span of the right name, kind and scope is meant.

        Args:
            span: the span.
            span_attributes: of it.
            around: the spans around it in this process, the innermost first; only asked for where that matters.
        """
        if not self.holds(span, span_attributes):
            return False
        if not self.looks_around:
            return True
        spans = tuple(around)
        if any(pattern.matches(span) for pattern in self.not_inside for span in spans):
            return False
        return not self.inside or any(pattern.matches(span) for pattern in self.inside for span in spans)

    def bank_of(self, span_attributes: Mapping[str, Any]) -> Any:
        """Return what the span says its bank is, or None."""
        return first_of(span_attributes, self._bank_keys)

    def actor_of(self, span_attributes: Mapping[str, Any]) -> Any:
        """Return who the span says acts, or None."""
        return first_of(span_attributes, self._actor_keys)

    def transport_of(self, span_attributes: Mapping[str, Any]) -> str | None:
        """Return the transport that the mapping gives, or None."""
        return None if self.transport is None else _filled(self.transport, span_attributes)

    def outcome_of(self, status: StatusCode, span_attributes: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return the outcome by a span's status, and by its attributes where that is unset.

        Returns:
            The outcome, and what made it a failure, where that is an attribute with a short value.
        """
        if status is not StatusCode.UNSET:
            return ("failure" if status is StatusCode.ERROR else "success"), None
        for key, values in self._failures:
            if meets(span_attributes, key, values):
                return "failure", _token(span_attributes[key])
        return self.unset_outcome, None

    def payload_of(self, span_attributes: Mapping[str, Any], normalizer: Normalizer, action: str) -> dict[str, Any]:
        """Return the attributes of the payloads, normalized."""
        normal: dict[str, Any] = {}
        for prefix, pairs in self._payloads:
            found = {key: first_of(span_attributes, names) for key, names in pairs}
            hidden = {key: REDACTED for key, value in found.items() if value is not None and key in self.redact}
            normal.update(normalizer.attributes({**found, **hidden}, prefix, action))
        return normal


def first_of(span_attributes: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first attribute that is there, or None."""
    return next((span_attributes[key] for key in keys if key in span_attributes), None)


def _payload(value: Any, source: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    accepted = "a list of attribute keys, or such keys by those of the payload, as in {'model': 'gen_ai.request.model'}"
    if isinstance(value, Mapping):
        keys = strings([*value], source, accepted)
        return tuple((key, strings(value[key], source, accepted)) for key in keys)
    return tuple((key, (key,)) for key in strings(value, source, accepted))


def _filled(template: str, values: Mapping[str, Any]) -> str | None:
    """Return a template with values in place of what is in braces; None where one isn't there."""
    names = _PLACEHOLDER.findall(template)
    if any(values.get(name) is None for name in names):
        return None
    return _PLACEHOLDER.sub(lambda found: _token(values[found[1]]) or _UNKNOWN, template)


def _token(value: object) -> str | None:
    """Return a value that is short and no text."""
    text = text_of(value) if isinstance(value, (str, int, float)) else None
    return text if text is not None and TOKEN.fullmatch(text) else None
