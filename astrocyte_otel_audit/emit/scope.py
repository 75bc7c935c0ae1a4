"""`audit_scope`: who, from where and for which tenant, said once for everything inside."""

from __future__ import annotations

from contextvars import Token
from types import TracebackType
from typing import Self
from uuid import UUID

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from astrocyte_otel_audit.attributes import SCOPE_CONTEXT_KEY
from astrocyte_otel_audit.payload_values import type_name
from astrocyte_otel_audit.record import NO_SCOPE, ScopeDefaults


def current_scope(context: Context | None = None) -> ScopeDefaults:
    """Return the defaults that the innermost `audit_scope` gives; empty ones outside of any.

    Args:
        context: OpenTelemetry context to look into; the current one by default.
    """
    scope = otel_context.get_value(SCOPE_CONTEXT_KEY, context)
    return scope if isinstance(scope, ScopeDefaults) else NO_SCOPE


def as_text(value: object) -> str:
    """Return an id as text: a UUID or a number reads as such, a foreign object by the name of its type."""
    kind = type(value)  # not isinstance, which asks the object what it is
    if issubclass(kind, str):
        return str.__str__(value)
    if kind is UUID or (kind is int and value.bit_length() <= 208):  # type: ignore[attr-defined]
        return str(value)
    return type_name(value)


class audit_scope:  # noqa: N801 - used as a function, like contextlib's own
    """Defaults for every audit operation inside a ``with`` or ``async with`` block.

    They travel in the OpenTelemetry context: tasks started inside inherit them, spans of other libraries that
    are audited through a mapping take them too, and a worker thread does where the context is handed over.
    An operation's own argument wins over the scope, an inner scope over an outer one, value by value. One
    instance may be used many times, but not by two threads at once.

    Args:
        actor_id: who acts, as your authentication knows them.
        actor_type: ``user``, ``service`` or ``system``.
        transport: how the request came in, such as ``http`` or ``mcp``.
        bank_id: the memory bank.
        schema: Postgres schema of the tenant whose table gets the rows.
    """

    def __init__(
        self,
        *,
        actor_id: str | None = None,
        actor_type: str | None = None,
        transport: str | None = None,
        bank_id: str | None = None,
        schema: str | None = None,
    ) -> None:
        # As text already here: what a span of another library takes from a scope goes into its row as it is.
        given = (actor_id, actor_type, transport, bank_id, schema)
        self._own = ScopeDefaults(*(None if value is None else as_text(value) for value in given))
        self._tokens: list[Token[Context]] = []

    def __enter__(self) -> Self:
        own, outer = self._own, current_scope()
        merged = ScopeDefaults(
            own.actor_id if own.actor_id is not None else outer.actor_id,
            own.actor_type if own.actor_type is not None else outer.actor_type,
            own.transport if own.transport is not None else outer.transport,
            own.bank_id if own.bank_id is not None else outer.bank_id,
            own.schema if own.schema is not None else outer.schema,
        )
        self._tokens.append(otel_context.attach(otel_context.set_value(SCOPE_CONTEXT_KEY, merged)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        otel_context.detach(self._tokens.pop())

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)
