"""`enrich_astrocyte`: what an Astrocyte brain answered, and who asked it, in the rows of its operations."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from opentelemetry import context as otel_context

from astrocyte_otel_audit.attributes import SCOPE_CONTEXT_KEY
from astrocyte_otel_audit.emit.operation import AuditOperation
from astrocyte_otel_audit.emit.scope import as_text, current_scope
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.record import ScopeDefaults

_logger = logging.getLogger(__name__)

_Method: TypeAlias = Callable[..., Awaitable[Any]]
_Arguments: TypeAlias = Mapping[str, Any]

#: Held while a brain's methods are replaced.
_lock = threading.Lock()
#: Attribute of a wrapper. `functools.wraps` copies it, so it is seen below wrappers of others too.
_MARK: Final = "_astrocyte_otel_audit_enrichment"
#: Attribute of a brain that has our hooks: Astrocyte has no way to take one away.
_HOOKED: Final = "_astrocyte_otel_audit_hooked"
#: Key in the OpenTelemetry context of the operation under way, for hooks.
_OPERATION_KEY: Final = otel_context.create_key("astrocyte-otel-audit-enriched")

#: What Astrocyte takes for a bank's id. Anything else may be text, and Astrocyte refuses it before it has a span.
_BANK_ID: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,254}")
#: How the texts begin with which Astrocyte says why it stored nothing. They quote what they refuse, so none is kept.
_REFUSALS: Final = (
    ("Content is empty", "empty_content"),
    ("No content after chunking", "empty_content"),
    ("Content too long", "content_too_long"),
    ("Content exceeds maximum size", "content_too_long"),
    ("Content type", "content_type"),
    ("Too many tags", "too_many_tags"),
    ("Rejected by MIP routing rule", "routing_rule"),
    ("Bank flagged as noisy", "noisy_bank"),
    ("Provider unavailable", "provider_unavailable"),
)
_REFUSED: Final = "rejected"
#: By the kind of a principal. Astrocyte's `team` is none of ours.
_ACTOR_TYPES: Final = {"user": "user", "service": "service", "agent": "service", "system": "system"}


def enrich_astrocyte(brain: object) -> Callable[[], None]:
    """Make each call of a brain's methods an audited operation that says what was answered, and to whom.

    Astrocyte's spans end before its answers are known outside, and its hooks get neither the answer nor the caller,
    and don't fire where it refuses. So the methods that have a span, `retain`, `recall`, `reflect`, `forget`, `compile`
    and `push_records` (action ``sync_push``), are wrapped on this one brain: a call is a span of ours, with Astrocyte's
    own directly inside it, and the two are one row. Nothing is set on any other span. Two hooks are registered for what
    only hooks say: the bank that a rule routed a `retain` to, and the kinds of personal data that were found.

    A row gets the counts and ids of the answer, the principal of the `AstrocyteContext` as its actor, and tenant and
    `on_behalf_of` as metadata. The principal wins over `audit_scope`. A `retain` that stored nothing is a ``failure``
    whose error type is a token, such as ``empty_content``; one whose content is there already is none. Whatever
    can't be read of a call is left out: the call goes on, and nothing is raised into it.

    Args:
        brain: an Astrocyte brain. To enrich it twice is to enrich it once.

    Returns:
        A function that undoes it, and may be called again. What can't be taken away, a hook and a method that somebody
        else has wrapped since, does nothing any more.

    Raises:
        ConfigurationError: an object with none of these methods, or with one that isn't async.
    """
    with _lock:
        methods = {name: getattr(brain, name) for name in _OPERATIONS if hasattr(brain, name)}
        if not methods or not all(map(inspect.iscoroutinefunction, methods.values())):
            accepted = "accepted is an Astrocyte brain, whose methods are async"
            raise ConfigurationError("brain", f"got a {type(brain).__name__}; {accepted}")
        for method in methods.values():
            known = getattr(method, _MARK, None)
            if isinstance(known, _Enrichment) and known.is_of(brain):
                return known.undo
        return _Enrichment(brain, methods).undo


@dataclass(frozen=True, slots=True)
class _Operation:
    """What is told of a method.

    Args:
        action: of its rows.
        arguments: those that are the request; of tags only how many.
        answer: makes the response of a result.
        refusal: makes the error type of a result that is a failure though nothing was raised; None of any other.
    """

    action: str
    arguments: tuple[str, ...]
    answer: Callable[[Any], dict[str, object]]
    refusal: Callable[[Any], str | None] | None = None


class _Enrichment:
    """The wrappers on one brain."""

    def __init__(self, brain: object, methods: Mapping[str, _Method]) -> None:
        self._brain = brain
        self._active = True
        #: The wrappers, with what stood in the brain's own dictionary before.
        self._wrappers: dict[str, tuple[_Method, Any]] = {}
        own = vars(brain)
        for name, method in methods.items():
            wrapper = self._wrap(method, _OPERATIONS[name])
            self._wrappers[name] = (wrapper, own.get(name))
            setattr(brain, name, wrapper)
        register_hook = getattr(brain, "register_hook", None)
        if register_hook is not None and not hasattr(brain, _HOOKED):
            for event in ("on_retain", "on_pii_detected"):
                register_hook(event, _heard)
            setattr(brain, _HOOKED, True)

    def is_of(self, brain: object) -> bool:
        """Say whether a brain is enriched by this one now."""
        return self._active and self._brain is brain

    def undo(self) -> None:
        """Give the methods back."""
        with _lock:
            own = vars(self._brain)
            for name, (wrapper, before) in self._wrappers.items():
                if own.get(name) is not wrapper:
                    continue  # somebody else's is around it, or it has been given back
                if before is None:
                    delattr(self._brain, name)
                else:
                    setattr(self._brain, name, before)
            self._active = False

    def _wrap(self, method: _Method, kind: _Operation) -> _Method:
        parameters = inspect.signature(method).parameters.values()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = [each.name for each in parameters if each.kind in by_position]
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

        @functools.wraps(method)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return await method(*args, **kwargs)
            operation, scope = _begin(kind, {**defaults, **dict(zip(positional, args, strict=False)), **kwargs})
            # Astrocyte's own spans take the actor from the scope: said twice in two ways, it would be two rows.
            context = otel_context.set_value(SCOPE_CONTEXT_KEY, scope)
            token = otel_context.attach(otel_context.set_value(_OPERATION_KEY, operation, context))
            try:
                with operation:
                    result = await method(*args, **kwargs)
                    _describe(kind, operation, result)
                    return result
            finally:
                otel_context.detach(token)

        setattr(wrapper, _MARK, self)
        return wrapper


def _begin(kind: _Operation, arguments: _Arguments) -> tuple[AuditOperation, ScopeDefaults]:
    """Return the operation of a call, not yet started, and the scope that it runs in; never raises."""
    # A bank that isn't named here is for Astrocyte to say, and not for the scope.
    scope = replace(current_scope(), bank_id=None)
    try:
        request = {name: arguments.get(name) for name in kind.arguments}
        request["tag_count"] = len(arguments["tags"]) if arguments.get("tags") else None
        context = arguments.get("context")
        metadata = {}
        if context is not None:
            scope = _called_by(context, scope)
            metadata = {
                "tenant_id": getattr(context, "tenant_id", None),
                "on_behalf_of": _name_of(getattr(context, "on_behalf_of", None)),
            }
        bank_id = _bank_of(arguments)
        return AuditOperation(kind.action, bank_id=bank_id, request=request, metadata=metadata), scope
    except Exception as fault:
        _not_told("call", kind.action, fault)
        return AuditOperation(kind.action), scope


def _describe(kind: _Operation, operation: AuditOperation, result: Any) -> None:
    """Let an operation say what the answer was; never raises."""
    try:
        operation.response = kind.answer(result)
        refusal = None if kind.refusal is None else kind.refusal(result)
        if refusal is not None:
            operation.outcome, operation.error_type = "failure", refusal
    except Exception as fault:
        _not_told("answer", kind.action, fault)


def _heard(event: Any) -> None:
    """Let the operation under way say what only an event of Astrocyte's says; never raises."""
    operation = otel_context.get_value(_OPERATION_KEY)
    if not isinstance(operation, AuditOperation):
        return
    try:
        if event.type == "on_pii_detected":
            known: Any = operation.metadata.get("pii_types", ())
            found = sorted({*event.data["pii_types"].split(","), *known})
            operation.metadata |= {"pii_types": found, "pii_action": event.data["action"]}
        elif operation.bank_id not in (None, event.bank_id):
            operation.metadata["routed_to"] = event.bank_id
    except Exception as fault:
        _not_told("event", operation.action, fault)


def _not_told(part: str, action: str, fault: Exception) -> None:
    # Without the message: it may quote what was said.
    _logger.warning(
        "The %s of %r can't be read (%s): its audit record lacks it.", part, action, type(fault).__qualname__
    )


def _bank_of(arguments: _Arguments) -> str | None:
    """Return the bank as Astrocyte writes it: of several the first, and how many more, as in ``a+1``."""
    banks: Sequence[Any] = arguments.get("banks") or [arguments.get("bank_id")]
    if not all(isinstance(bank, str) and _BANK_ID.fullmatch(bank) for bank in banks):
        return None
    first = as_text(banks[0])
    return first if len(banks) == 1 else f"{first}+{len(banks) - 1}"


def _called_by(context: Any, scope: ScopeDefaults) -> ScopeDefaults:
    """Return a scope with the caller as its actor, found as Astrocyte does: the context's actor, else its principal."""
    principal = _name_of(getattr(context, "actor", None)) or context.principal
    if not principal:
        return scope
    principal = as_text(principal)
    kind, separator, name = principal.partition(":")
    actor_type = _ACTOR_TYPES.get(kind) if separator else None
    if actor_type is not None and (scope.actor_id, scope.actor_type) == (name, actor_type):
        return scope  # the same one, as authentication knows them: an actor has one name in the log
    return replace(scope, actor_id=principal, actor_type=actor_type)


def _name_of(actor: Any) -> str | None:
    return None if actor is None else f"{as_text(actor.type)}:{as_text(actor.id)}"


def _fields(*names: str) -> Callable[[Any], dict[str, object]]:
    """Return a function that takes these fields of a result."""
    return lambda result: {name: getattr(result, name) for name in names}


def _pushed(results: Sequence[Any]) -> dict[str, object]:
    counts = Counter(f"{result.status}_count" for result in results)
    return {**counts, "memory_ids": [result.id for result in results if result.status == "stored"]}


def _why_not_stored(result: Any) -> str | None:
    if result.stored or result.deduplicated:
        return None
    text = as_text(result.error)
    return next((token for beginning, token in _REFUSALS if text.startswith(beginning)), _REFUSED)


def _why_not_pushed(results: Sequence[Any]) -> str | None:
    return _REFUSED if results and all(result.status == "rejected" for result in results) else None


#: By the names of the methods. The rules of the normalizer hold for all of it: of texts only the length is kept.
_OPERATIONS: Final = {
    "retain": _Operation(
        "retain",
        ("content", "content_type"),
        _fields("stored", "deduplicated", "memory_id", "retention_action"),
        _why_not_stored,
    ),
    "recall": _Operation("recall", ("query", "banks", "max_results"), _fields("hits", "total_available", "truncated")),
    "reflect": _Operation("reflect", ("query", "banks"), _fields("answer", "sources", "confidence")),
    "forget": _Operation(
        "forget",
        ("memory_ids", "scope", "before_date", "compliance", "reason"),
        _fields("deleted_count", "archived_count"),
    ),
    "compile": _Operation(
        "compile",
        (),
        _fields("pages_created", "pages_updated", "tokens_used"),
        lambda result: "compile_failed" if result.error else None,
    ),
    "push_records": _Operation("sync_push", ("records",), _pushed, _why_not_pushed),
}
