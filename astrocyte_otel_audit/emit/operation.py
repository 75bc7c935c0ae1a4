"""`AuditOperation`: one audited operation as one span, from its start to its outcome."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import Token
from itertools import islice
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.emit.scope import as_text, current_scope
from astrocyte_otel_audit.errors import AuditUnavailableError
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.payload_values import MAX_SCANNED, type_name
from astrocyte_otel_audit.record import NO_SCOPE, OUTCOMES, Outcome, ScopeDefaults

_logger = logging.getLogger(__name__)
# A proxy until a provider is set, so operations may be defined before telemetry is set up.
_tracer = trace.get_tracer(attributes.SCOPE_NAME, __version__)
#: Those of providers that were given: asking for a tracer costs as much as a span.
_tracers: WeakKeyDictionary[TracerProvider, Tracer] = WeakKeyDictionary()
_BUILT_IN = Normalizer()
_default_normalizer = _BUILT_IN
#: Key that stands for a payload which a normalizer could not read; its value is the class of the error.
UNREADABLE: Final = "[unreadable]"
_FAILED = Status(StatusCode.ERROR)


def default_normalizer() -> Normalizer:
    """Return the normalizer of all operations that don't bring their own."""
    return _default_normalizer


def set_default_normalizer(normalizer: Normalizer) -> Normalizer | None:
    """Replace the normalizer of all operations that don't bring their own; `configure_audit` calls this.

    Returns:
        The one that was set before; None if it was the built-in one.
    """
    global _default_normalizer
    before, _default_normalizer = _default_normalizer, normalizer
    return None if before is _BUILT_IN else before


def renew_tracers() -> None:
    """Ask for tracers anew; `configure_audit` calls this, as a tracer may keep the sampler that it was made with."""
    global _tracer, _tracers
    _tracers = WeakKeyDictionary()  # not cleared: another thread may be about to add an old one
    _tracer = trace.get_tracer(attributes.SCOPE_NAME, __version__)


def _tracer_of(provider: TracerProvider | None) -> Tracer:
    """Return the tracer for a provider's audit spans, the global provider's for None."""
    if provider is None:
        return _tracer
    kept = _tracers
    try:
        return kept[provider]
    except KeyError:
        tracer = kept[provider] = provider.get_tracer(attributes.SCOPE_NAME, __version__)
        return tracer
    except TypeError:  # one that can't be a key
        return provider.get_tracer(attributes.SCOPE_NAME, __version__)


def error_type(kind: type[BaseException]) -> str:
    """Return the class name as the semantic convention wants it: qualified, unless it is a builtin."""
    module, name = kind.__module__, kind.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


class AuditOperation:
    """One operation, audited: a context manager for ``with`` and ``async with``.

    Leaving the block ends the span. The outcome is ``failure`` if an exception leaves it (its class is kept, its
    message isn't, since that can hold raw text), else ``success``, unless `outcome` was set. Nothing in here raises
    into the block or around it, but for `AuditUnavailableError` with ``required=True``. An instance belongs to
    one thread or task. Used for another block, it is another operation: what the last block set is forgotten.
    """

    # Defaults on the class: an operation is made for every call, and most of these are never touched.
    #: The result as the caller has it; normalized at the end.
    response: Mapping[str, object] | object | None = None
    #: ``success``, ``failure`` or ``unknown``; None lets the end of the block decide.
    outcome: Outcome | None = None
    #: Class of the error, where it isn't that of the exception that left the block.
    error_type: str | None = None
    _given: object = None
    _normal_request: dict[str, Any] | MappingProxyType[str, Any] = MappingProxyType({})
    _span: Span = trace.INVALID_SPAN
    _context: Context | None = None
    _token: Token[Context] | None = None
    _metadata: dict[str, object] | None = None
    _receipt: str | None = None
    _kept_open = False

    def __init__(
        self,
        action: str,
        *,
        bank_id: str | None = None,
        transport: str | None = None,
        actor_id: str | None = None,
        actor_type: str | None = None,
        request: Mapping[str, object] | object | None = None,
        metadata: Mapping[str, object] | None = None,
        required: bool = False,
        normalizer: Normalizer | None = None,
        tracer_provider: TracerProvider | None = None,
        start_ns: int | None = None,
    ) -> None:
        # An enum of strings is welcome; on the span, a string is a string.
        self.action = str.__str__(action) if isinstance(action, str) and action else "unknown"
        #: The bank, if it is only known inside the block.
        self.bank_id = bank_id
        self.transport = transport
        self.actor_id = actor_id
        self.actor_type = actor_type
        #: The arguments as the caller has them. Normalized at the start, so that what the body does to them doesn't
        #: show; or at the end, if the body assigns another payload.
        self.request: Mapping[str, object] | object | None = request
        if metadata is not None:
            self.metadata = metadata
        # For another block with the same instance.
        self._made_with = (bank_id, transport, actor_id, actor_type, request, metadata)
        self._required = required
        self._normalizer = normalizer
        self._tracer_provider = tracer_provider
        self._start_ns = start_ns

    @property
    def metadata(self) -> dict[str, object]:
        """Whatever else is worth keeping; normalized at the end."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    @metadata.setter
    def metadata(self, value: Mapping[str, object]) -> None:
        try:
            self._metadata = dict(islice(value.items(), MAX_SCANNED))
        except Exception:  # no mapping, or a hostile one: whatever it is, the normalizer describes it
            self._metadata = {"value": value}

    @property
    def record_id(self) -> str | None:
        """The id of the row to be, once a pipeline has taken the operation; None where none has."""
        return self._receipt

    def start(self) -> None:
        """Start the span, without making it current.

        Raises:
            AuditUnavailableError: the operation is required and no pipeline took it.
        """
        try:
            scope = current_scope()
            if scope is not NO_SCOPE:
                self._take_defaults(scope)
            initial: dict[str, Any] = {attributes.ACTION: self.action}
            if self.bank_id is not None:
                initial[attributes.BANK_ID] = as_text(self.bank_id)
            if self._required:
                initial[attributes.REQUIRED] = True
            self._span = _tracer_of(self._tracer_provider).start_span(
                attributes.SPAN_NAME_PREFIX + self.action,
                # Enough for samplers and processors to decide; the rest is set once, at the end.
                attributes=initial,
                start_time=self._start_ns,
                # An exception's message can hold raw text, and its __str__ can raise in the application's face.
                record_exception=False,
                set_status_on_exception=False,
            )
            # Only SDK spans can be read; the API's have no attributes to look at.
            receipt = (getattr(self._span, "attributes", None) or {}).get(attributes.RECORD_ID)
            self._receipt = receipt if isinstance(receipt, str) else None
            if self.request is not None and self._span.is_recording():
                normal: dict[str, Any] = {}
                self._add(normal, self.request, attributes.REQUEST)
                self._given, self._normal_request = self.request, normal
        except Exception as fault:
            self._span = trace.INVALID_SPAN
            _not_audited("start", self.action, fault)
        if self._required and self._receipt is None:
            unavailable = AuditUnavailableError(
                f"audit of {self.action!r} is required, but no audit pipeline took it: is configure_audit() called, is "
                "its AuditSampler in place, and does the pipeline still run?"
            )
            self.finish(unavailable)
            raise unavailable

    def finish(self, error: BaseException | None = None, end_ns: int | None = None) -> None:
        """End the span: write the payloads and, last, what a record can't do without.

        Args:
            error: the exception that left the block, if one did.
            end_ns: the end, nanoseconds since the epoch; now by default.
        """
        span = self._span
        try:
            if span.is_recording():
                self._describe(span, error)
        except Exception as fault:
            _not_audited("be described", self.action, fault)
        try:
            span.end(end_ns)
        except Exception as fault:
            _not_audited("end", self.action, fault)

    def _describe(self, span: Span, error: BaseException | None) -> None:
        if error is not None and self.error_type is None:
            self.error_type = error_type(type(error))
        outcome = "success" if error is None else "failure"
        if self.outcome is not None and (outcome := as_text(self.outcome)) not in OUTCOMES:
            _logger.warning("An audit outcome is success, failure or unknown; another value reads as unknown.")
            outcome = "unknown"
        if self.request is self._given:
            final = self._normal_request.copy()
        else:
            final = {}
            self._add(final, self.request, attributes.REQUEST)
        if self.response is not None:
            self._add(final, self.response, attributes.RESPONSE)
        if self._metadata:
            self._add(final, self._metadata, attributes.METADATA)
        final[attributes.OUTCOME] = outcome
        if outcome == "failure":
            span.set_status(_FAILED)
            if self.error_type is not None:
                final[attributes.ERROR_TYPE] = as_text(self.error_type)
        self._identify(final)
        span.set_attributes(final)
        if getattr(span, "dropped_attributes", 0):
            # An overflowing span drops its oldest attributes, and some of ours are as old as the span. What a
            # record can't do without goes in once more, last.
            vital = {attributes.ACTION: self.action, attributes.OUTCOME: outcome}
            self._identify(vital)
            if self._receipt is not None:
                vital[attributes.RECORD_ID] = self._receipt
            if attributes.ERROR_TYPE in final:
                vital[attributes.ERROR_TYPE] = final[attributes.ERROR_TYPE]
            span.set_attributes(vital)

    def keep_open(self) -> None:
        """Leave the span open when the block ends without an exception: `finish` is called later."""
        self._kept_open = True

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the span current for one piece of a body that runs in pieces, with what the last piece left current."""
        self._resume()
        try:
            yield
        finally:
            self._pause()

    def _resume(self) -> None:
        if self._span is not trace.INVALID_SPAN:  # else the body's own spans keep their parent
            context = self._context if self._context is not None else trace.set_span_in_context(self._span)
            self._token = otel_context.attach(context)

    def _pause(self) -> None:
        if self._token is not None:
            self._context = otel_context.get_current()
            otel_context.detach(self._token)
            self._token = None

    def __enter__(self) -> Self:
        if self._span is not trace.INVALID_SPAN:
            self._renew()
        self.start()
        self._resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pause()
        if error is not None or not self._kept_open:
            self.finish(error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _renew(self) -> None:
        self.bank_id, self.transport, self.actor_id, self.actor_type, self.request, metadata = self._made_with
        self.metadata = {} if metadata is None else metadata
        self.response = self.outcome = self.error_type = self._context = self._given = None
        self._normal_request = {}
        self._kept_open = False

    def _take_defaults(self, scope: ScopeDefaults) -> None:
        if self.bank_id is None:
            self.bank_id = scope.bank_id
        if self.transport is None:
            self.transport = scope.transport
        if self.actor_id is None:
            self.actor_id = scope.actor_id
        if self.actor_type is None:
            self.actor_type = scope.actor_type

    def _identify(self, known: dict[str, Any]) -> None:
        for key, value in (
            (attributes.BANK_ID, self.bank_id),
            (attributes.TRANSPORT, self.transport),
            (attributes.ACTOR_ID, self.actor_id),
            (attributes.ACTOR_TYPE, self.actor_type),
        ):
            if value is not None:
                known[key] = value if type(value) is str else as_text(value)
        if self._required:
            known[attributes.REQUIRED] = True

    def _add(self, known: dict[str, Any], payload: object, prefix: str) -> None:
        try:
            normalizer = _default_normalizer if self._normalizer is None else self._normalizer
            known.update(normalizer.attributes(payload, prefix, self.action))
        except Exception as fault:  # somebody's own subclass: the operation is audited, and says what is missing
            known[prefix + UNREADABLE] = type_name(fault)
            _logger.warning(
                "A payload of %r could not be normalized (%s): its record says %s in its place.",
                self.action,
                type(fault).__qualname__,
                UNREADABLE,
            )


def _not_audited(moment: str, action: str, fault: Exception) -> None:
    # Without the message or traceback: it comes from other people's samplers and processors, and may quote a payload.
    _logger.warning(
        "The audit span of %r could not %s (%s); the operation itself is not affected.",
        action,
        moment,
        type(fault).__qualname__,
    )


#: ``with audit_operation("retain", bank_id=…) as operation:``
audit_operation = AuditOperation
