"""Evidence: the span of what the pipeline does by itself, which becomes a row as an application's operation does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.record import Outcome, ScopeDefaults

_ACTOR: Final = "astrocyte-otel-audit"


class Evidence:
    """One audited operation of the pipeline's own. Never raises.

    It requires its row, so no allowlist or sampler passes over it, and it is on the disk before anything is done: a
    process that is killed in the middle leaves a row whose outcome is unknown.

    Args:
        tracer: returns the tracer of the provider that the processor is attached to.
        action: of the row.
        schema: whose table gets the row.
        parent: what it is part of.
        metadata: what is known now. Only numbers, instants, short texts and lists of them: nothing normalizes it.
        start_ns: when it began, if that is over.
    """

    def __init__(
        self,
        tracer: Callable[[], Tracer],
        action: str,
        *,
        schema: str,
        parent: Context,
        metadata: Mapping[str, Any],
        start_ns: int | None = None,
    ) -> None:
        self._vital: dict[str, Any] = {
            attributes.ACTION: action,
            attributes.REQUIRED: True,
            attributes.TRANSPORT: "system",
            attributes.ACTOR_ID: _ACTOR,
            attributes.ACTOR_TYPE: "system",
        }
        self._span: Span = trace.INVALID_SPAN
        try:
            self._span = tracer().start_span(
                attributes.SPAN_NAME_PREFIX + action,
                # The scope's schema goes before what a schema function would say on this thread.
                context=otel_context.set_value(attributes.SCOPE_CONTEXT_KEY, ScopeDefaults(schema=schema), parent),
                attributes={**self._vital, **_flat(metadata)},
                start_time=start_ns,
                record_exception=False,
                set_status_on_exception=False,
            )
        except Exception:  # somebody's sampler or processor; whoever asks whether it was taken says so
            self._span = trace.INVALID_SPAN
        #: What its parts are part of.
        self.context = trace.set_span_in_context(self._span, parent)

    @property
    def receipt(self) -> str | None:
        """The id of the row to be; None where no pipeline has promised one."""
        found = (getattr(self._span, "attributes", None) or {}).get(attributes.RECORD_ID)
        return found if isinstance(found, str) else None

    def end(self, outcome: Outcome, metadata: Mapping[str, Any], error_type: str | None = None) -> None:
        """Say what came of it.

        Args:
            outcome: of all.
            metadata: what is known beside what was at the start.
            error_type: class of the error or its SQLSTATE, on failure.
        """
        receipt, last = self.receipt, {**self._vital, attributes.OUTCOME: outcome}
        if receipt is not None:
            last[attributes.RECORD_ID] = receipt
        if error_type is not None:
            last[attributes.ERROR_TYPE] = error_type
        with suppress(Exception):  # somebody's span or processor
            if outcome == "failure":
                self._span.set_status(Status(StatusCode.ERROR))
            # An overflowing span drops its oldest attributes: what a record can't do without goes in last.
            self._span.set_attributes(_flat(metadata))
            self._span.set_attributes(last)
        with suppress(Exception):
            self._span.end()


def error_type(error: BaseException) -> str:
    """Return how an error is called on a span: by its SQLSTATE where it has one, else by its class."""
    sqlstate = getattr(error, "sqlstate", None)
    return sqlstate if isinstance(sqlstate, str) else type(error).__qualname__


def _flat(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes; a dot in a key makes an object. What is None or an empty list isn't said."""
    return {
        attributes.METADATA + key: _plain(value) for key, value in metadata.items() if value is not None and value != []
    }


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
