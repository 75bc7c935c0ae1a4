"""The wire: attribute keys of an audit span, and the codec between nested payloads and flat attributes.

A payload such as ``{"query": {"length": 12}}`` travels as ``astrocyte.audit.request.query.length = 12``,
because flat scalars are what every SDK keeps and every trace UI can search. In a segment, ``.`` is
written ``%2E`` and ``%`` is written ``%25``; a last segment of ``%empty`` stands for an empty object, which has no
attribute value of its own. So the round trip is exact.
"""

from __future__ import annotations

from typing import Any, Final

#: Instrumentation scope of the spans that `emit` makes.
SCOPE_NAME: Final = "astrocyte_otel_audit"
#: A span of ours is called ``audit <action>``.
SPAN_NAME_PREFIX: Final = "audit "

# The names under ``audit.`` follow OTEP 0267, the draft of OpenTelemetry audit logging.
RECORD_ID: Final = "audit.record.id"
ACTION: Final = "audit.action"
OUTCOME: Final = "audit.outcome"
ACTOR_ID: Final = "audit.actor.id"
ACTOR_TYPE: Final = "audit.actor.type"
#: OpenTelemetry semantic convention: the class of the error, on failure.
ERROR_TYPE: Final = "error.type"
#: Astrocyte's own key.
BANK_ID: Final = "astrocyte.bank_id"
TRANSPORT: Final = "astrocyte.transport"
REQUIRED: Final = "astrocyte.audit.required"
REQUEST: Final = "astrocyte.audit.request."
RESPONSE: Final = "astrocyte.audit.response."
METADATA: Final = "astrocyte.audit.metadata."

#: Key in the OpenTelemetry context under which `audit_scope` keeps its `ScopeDefaults`.
SCOPE_CONTEXT_KEY: Final = "astrocyte-otel-audit-scope"

#: Last segment of an empty object.
EMPTY: Final = "%empty"
#: A path deeper than this keeps its tail as one key: JSON encoders and jsonb both limit nesting.
_MAX_SEGMENTS = 16


def escape(segment: str) -> str:
    """Return a payload's key as it is written in an attribute's key."""
    return segment.replace("%", "%25").replace(".", "%2E") if "." in segment or "%" in segment else segment


def unflatten(path: str, value: Any, tree: dict[str, Any]) -> None:
    """Put one flat attribute back into its nested payload.

    Args:
        path: the attribute's key without its prefix.
        value: the attribute's value; a tuple becomes a list, as JSON knows no tuple.
        tree: the payload so far, changed in place. Where another emitter sent both ``a`` and ``a.b``,
            the value of ``a`` is kept under the empty key of the object ``a``: nothing is lost.
    """
    if isinstance(value, tuple):
        value = list(value)
    if "." not in path and "%" not in path and path not in tree:
        tree[path] = value
        return
    *parents, leaf = path.split(".", _MAX_SEGMENTS - 1)
    if leaf == EMPTY:
        if not parents:
            return
        value, leaf = {}, parents.pop()
    for segment in parents:
        segment = _unescape(segment)
        child = tree.get(segment)
        if not isinstance(child, dict):
            child = {"": child} if segment in tree else {}
            tree[segment] = child
        tree = child
    leaf = _unescape(leaf)
    occupant = tree.get(leaf)
    if isinstance(occupant, dict) and occupant:
        if value != {}:
            occupant[""] = value
    elif value != {} or leaf not in tree:  # an empty object has nothing that could be lost
        tree[leaf] = value


def _unescape(segment: str) -> str:
    return segment.replace("%2E", ".").replace("%25", "%") if "%" in segment else segment
