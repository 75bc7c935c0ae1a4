"""`SpanPattern`: which spans are meant, by what can be seen of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.captured import text_of

#: One, or several of which one has to match.
Names: TypeAlias = str | Sequence[str]
Kinds: TypeAlias = SpanKind | str | Sequence[SpanKind | str]
#: Attributes by their keys, or with what their values have to be.
Conditions: TypeAlias = Sequence[str] | Mapping[str, Any]

#: In a span's name, the word that is the action.
ACTION_WORD: Final = "{action}"
_WORD_PATTERN: Final = r"(?P<action>[A-Za-z0-9_-]+)"
_MAX_VALUE: Final = 1024
_KINDS: Final = {kind.name.lower(): kind for kind in SpanKind}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanPattern:
    """Says which spans are meant. Immutable.

    In names, scopes, keys and values ``*`` stands for anything, and every other character for itself. Where several
    are given, one has to match; where none is, every span does.

    Args:
        span_name: name of the span; ``{action}`` in it stands for one word.
        scope: name of the instrumentation scope, such as ``astrocyte``.
        kind: kind of the span, as a `SpanKind` or by its name, such as ``"server"``.
        required: attributes that have to be there: a list of keys, or a mapping of keys to values, such as
            ``{"gen_ai.operation.name": ["chat", "embeddings"]}``. A number or a boolean is compared by its text.
        absent: attributes that must not be there.
        root: whether it begins its trace; None for either.

    Raises:
        ConfigurationError: an argument that can't be used.
    """

    span_name: Names = "*"
    scope: Names | None = None
    kind: Kinds | None = None
    required: Conditions = ()
    absent: Names = ()
    root: bool | None = None
    _names: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)
    _scopes: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)
    _kinds: frozenset[SpanKind] = field(init=False, repr=False, compare=False)
    _required: tuple[tuple[str, tuple[re.Pattern[str], ...]], ...] = field(init=False, repr=False, compare=False)
    _absent: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = strings(self.span_name, "span_name", "a span's name, or several, with * and {action} as wildcards")
        if not names or any(name.count(ACTION_WORD) > 1 for name in names):
            raise ConfigurationError("span_name", "is empty, or holds {action} more than once")
        scopes = () if self.scope is None else strings(self.scope, "scope", "an instrumentation scope, or several")
        absent = strings(self.absent, "absent", "a list of attribute keys, such as ['gen_ai.operation.name']")
        if not (self.root is None or isinstance(self.root, bool)):
            raise ConfigurationError("root", "accepted is True, False or None")
        self._keep("_names", tuple(map(_name_pattern, names)))
        self._keep("_scopes", tuple(map(_pattern, scopes)))
        self._keep("_kinds", _kinds(self.kind))
        self._keep("_required", conditions(self.required, "required"))
        self._keep("_absent", tuple(map(_pattern, absent)))

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_conditional(self) -> bool:
        """Whether a span's name, kind and scope don't decide alone."""
        return bool(self._required or self._absent) or self.root is not None

    @property
    def scope_names(self) -> tuple[str, ...]:
        """The instrumentation scopes that are named in full."""
        scopes = () if self.scope is None else (self.scope,) if isinstance(self.scope, str) else self.scope
        return tuple(scope for scope in scopes if "*" not in scope)

    def match_name(self, span_name: str) -> re.Match[str] | None:
        """Return how a span's name matches, or None."""
        return next((match for pattern in self._names if (match := pattern.fullmatch(span_name))), None)

    def has_kind(self, kind: SpanKind | None) -> bool:
        """Say whether a kind is one that is meant; None, which a sampler may be asked with, may be any."""
        return not self._kinds or kind is None or kind in self._kinds

    def has_scope(self, scope: str | None) -> bool:
        """Say whether an instrumentation scope is one that is meant."""
        return not self._scopes or (scope is not None and any(one.fullmatch(scope) for one in self._scopes))

    def holds(self, span: ReadableSpan, span_attributes: Mapping[str, Any]) -> bool:
        """Say whether a span begins its trace, or not, and has the attributes, as is wanted."""
        if self.root is not None and self.root is not (span.parent is None):
            return False
        if not self.has_required(span_attributes):
            return False
        return not any(one.fullmatch(key) for one in self._absent for key in span_attributes)

    def has_required(self, span_attributes: Mapping[str, Any]) -> bool:
        """Say whether the required attributes are there."""
        return all(meets(span_attributes, key, values) for key, values in self._required)

    def matches(self, span: ReadableSpan) -> bool:
        """Say whether a span is one that is meant, as it is now."""
        scope = span.instrumentation_scope
        return (
            self.has_kind(span.kind)
            and self.has_scope(None if scope is None else scope.name)
            and self.match_name(span.name) is not None
            and self.holds(span, span.attributes or {})
        )


def strings(value: Any, source: str, accepted: str) -> tuple[str, ...]:
    """Return one string or a list of them as a tuple.

    Raises:
        ConfigurationError: anything else, or an empty string.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) and one for one in found):
        raise ConfigurationError(source, f"accepted is {accepted}")
    return tuple(found)


def conditions(value: Any, source: str) -> tuple[tuple[str, tuple[re.Pattern[str], ...]], ...]:
    """Return keys of attributes with patterns of their values; a key without any matches whatever its value is.

    Raises:
        ConfigurationError: neither a list of keys nor a mapping of keys to values.
    """
    accepted = "accepted is a list of attribute keys, or values by key, such as {'http.response.status_code': '4*'}"
    if not isinstance(value, Mapping):
        return tuple((key, ()) for key in strings(value, source, accepted.removeprefix("accepted is ")))
    found = []
    for key, wanted in value.items():
        values = wanted if isinstance(wanted, (list, tuple)) else (wanted,)
        if not isinstance(key, str) or not all(isinstance(one, (str, bool, int, float)) for one in values):
            raise ConfigurationError(source, accepted)
        found.append((key, tuple(_pattern(_text(one)) for one in values)))
    return tuple(found)


def meets(span_attributes: Mapping[str, Any], key: str, values: Iterable[re.Pattern[str]]) -> bool:
    """Say whether an attribute is there, and its value, or one of several, as one of some patterns wants it."""
    found = span_attributes.get(key)
    if found is None:
        return False
    texts = [_text(one) for one in (found if isinstance(found, (list, tuple)) else (found,))]
    wanted = tuple(values)
    return not wanted or any(one.fullmatch(text) for one in wanted for text in texts)


def _text(value: object) -> str:
    """Return a value as patterns see it: of a long text its beginning, so that no value makes a match slow."""
    if isinstance(value, bool):
        return str(value).lower()
    return (text_of(value) or "")[:_MAX_VALUE] if isinstance(value, (str, int, float)) else ""


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(re.escape("*"), ".*"), re.DOTALL)


def _name_pattern(text: str) -> re.Pattern[str]:
    return re.compile(_pattern(text).pattern.replace(re.escape(ACTION_WORD), _WORD_PATTERN), re.DOTALL)


def _kinds(given: Any) -> frozenset[SpanKind]:
    several = () if given is None else given if isinstance(given, (list, tuple)) else (given,)
    kinds = [_KINDS.get(kind) if isinstance(kind, str) else kind for kind in several]
    if not all(isinstance(kind, SpanKind) for kind in kinds):
        raise ConfigurationError(
            "kind", f"accepted is an opentelemetry.trace.SpanKind, or its name: {', '.join(_KINDS)}"
        )
    return frozenset(kind for kind in kinds if isinstance(kind, SpanKind))
