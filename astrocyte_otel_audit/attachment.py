"""Attaching a pipeline to a tracer provider, whoever makes it: one that is there, or the global one once it is set."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider
from opentelemetry.trace import NoOpTracer, ProxyTracerProvider, TracerProvider

from astrocyte_otel_audit import attributes, emit
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.errors import AuditError, ConfigurationError
from astrocyte_otel_audit.pipeline import AuditSampler, AuditSpanProcessor
from astrocyte_otel_audit.pipeline.selection import Selection
from astrocyte_otel_audit.retention import RetentionPolicy

_logger = logging.getLogger(__name__)

#: A record has up to 11 attributes of its own; below these limits a record, or an id in it, would be cut.
MIN_ATTRIBUTES: Final = 32
MIN_ATTRIBUTE_LENGTH: Final = 128

#: Held while a pipeline is looked for, made and attached, so that two threads don't make it twice. Whoever is in here
#: may come in again: a provider that is set attaches what waits.
lock = threading.RLock()


def _after_fork() -> None:
    global lock
    lock = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Pipeline(NamedTuple):
    """A processor, and what it was made of."""

    processor: AuditSpanProcessor
    #: Where its records go: two pipelines of one place on one provider would do the same work twice.
    place: object
    #: What is in effect, by the names of the arguments of `configure_audit`.
    settings: Mapping[str, Any]
    policy: RetentionPolicy | None
    retention_dsn: str | None


#: By the identity of the provider that makes the spans: a vendor's may have no hash.
_pipelines: dict[int, list[Pipeline]] = {}
#: What attaches to the global provider once there is one.
_waiting: list[Pipeline] = []


def given_or_global(given: TracerProvider | None) -> Any:
    """Return the provider to attach to; None where it is to be the global one, and that isn't set yet.

    A vendor's may be a proxy whose spans an SDK's own makes, at `provider`, as logfire's is: then that one.

    Raises:
        ConfigurationError: one that takes no span processors.
    """
    provider = given if given is not None else trace.get_tracer_provider()
    if given is None and isinstance(provider, ProxyTracerProvider):
        return None
    if not hasattr(provider, "add_span_processor"):
        raise ConfigurationError(
            "tracer_provider",
            f"got a {type(provider).__module__}.{type(provider).__qualname__}, which takes no span processors; "
            "accepted is an opentelemetry.sdk.trace.TracerProvider",
        )
    return _maker_of_spans(provider)


def pipelines_of(provider: Any) -> list[Pipeline]:
    """Return the pipelines that work on a provider, or for None those that wait for the global one."""
    found = _waiting if provider is None else _pipelines.get(id(_maker_of_spans(provider)), ())
    return [pipeline for pipeline in found if not pipeline.processor.is_shut_down]


def attach(provider: Any, pipeline: Pipeline) -> None:
    """Attach a pipeline to a provider, around its sampler, also where its tracers are in use already.

    What the provider exports stays as it is: audit spans that its own sampler drops are recorded, and not sampled.
    """
    processor, selection = pipeline.processor, pipeline.processor.exporter.selection
    # In this order: a span that only the sampler has seen would be kept for a processor that missed its start, and so
    # its tenant.
    _add(provider, processor)
    _wrap_sampler(provider, selection)
    emit.renew_tracers()
    _warn_of_what_leaves_the_log_empty(provider, selection)
    if pipeline.policy is not None:  # not before: its runs are spans of this provider
        processor.start_retention(pipeline.policy, dsn=pipeline.retention_dsn, tracer_provider=provider)
    if id(provider) not in _pipelines:
        weakref.finalize(provider, _pipelines.pop, id(provider), None).atexit = False
    _pipelines[id(provider)] = [*pipelines_of(provider), pipeline]


def attach_once_there_is_one(pipeline: Pipeline) -> None:
    """Attach a pipeline to the global provider as soon as one is set, before what sets it goes on."""
    _watch()
    _waiting.append(pipeline)
    _logger.warning(
        "There is no tracer provider yet. The audit attaches to the global one as soon as it is set; nothing that "
        "begins before is audited, and nothing at all if none is ever set."
    )
    _attach_what_waits()  # another thread may have set one meanwhile


@functools.cache
def _watch() -> None:
    """Look at every provider that is set from now on.

    By a private name: whoever has imported the public function before has it already, and the private one is what
    every way ends in, OTEL_PYTHON_TRACER_PROVIDER too.
    """
    set_provider = getattr(trace, "_set_tracer_provider", None)
    if set_provider is None:
        raise ConfigurationError(
            "create_provider", "there is no tracer provider yet, and this opentelemetry-api does not say when one is "
            "set; accepted is True, or a call once yours is set",
        )  # fmt: skip

    @functools.wraps(set_provider)
    def set_and_attach(*arguments: Any, **named: Any) -> None:
        set_provider(*arguments, **named)
        _attach_what_waits()

    trace._set_tracer_provider = set_and_attach


def _attach_what_waits() -> None:
    with lock:
        waiting = pipelines_of(None)
        if not waiting:
            return
        try:
            provider = given_or_global(None)
            if provider is None:
                return
        except ConfigurationError as error:
            provider, refusal = None, error
        _waiting.clear()
        for pipeline in waiting:
            try:
                if provider is None:
                    raise refusal
                attach(provider, pipeline)
                _logger.info("The audit is attached to the tracer provider that was set.")
            except Exception as fault:  # it would reach whoever sets the provider
                reason = fault if isinstance(fault, AuditError) else type(fault).__qualname__
                _logger.error("Nothing is audited: the tracer provider that was set can't be used: %s", reason)
                pipeline.processor.shutdown()


def _maker_of_spans(provider: Any) -> Any:
    inner = getattr(provider, "provider", None)
    is_proxy = not isinstance(provider, SDKTracerProvider) and isinstance(inner, SDKTracerProvider)
    return inner if is_proxy else provider


def _add(provider: Any, processor: AuditSpanProcessor) -> None:
    # A vendor's own method may do more than add: Phoenix's shuts its exporter down.
    if isinstance(provider, SDKTracerProvider):
        SDKTracerProvider.add_span_processor(provider, processor)
    else:
        provider.add_span_processor(processor)


def _wrap_sampler(provider: Any, selection: Selection) -> None:
    sampler = getattr(provider, "sampler", None)
    if sampler is None:
        _logger.warning(
            "The sampler of a %s can't be wrapped: audit spans that it drops are not audited.",
            type(provider).__qualname__,
        )
        return
    if isinstance(sampler, AuditSampler) and sampler.selection.wants_as(selection):
        return  # OTEL_TRACES_SAMPLER names it, or another pipeline wants the same
    wrapped = AuditSampler(sampler, actions=selection.allowlist.actions, mappings=selection.mappings)
    provider.sampler = wrapped
    # A tracer takes its provider's sampler when it is made. Since SDK 1.42 the provider keeps it for the next caller,
    # and has no public way to ask for all that it keeps: those of scopes that are known can be had in any case.
    kept = getattr(provider, "_tracers", None)
    tracers = list(kept.values()) if isinstance(kept, dict) else []
    tracers.append(provider.get_tracer(attributes.SCOPE_NAME, __version__))
    tracers += [provider.get_tracer(scope) for mapping in selection.mappings for scope in mapping.scope_names]
    for tracer in tracers:
        if getattr(tracer, "sampler", None) is sampler:
            tracer.sampler = wrapped


def _warn_of_what_leaves_the_log_empty(provider: Any, selection: Selection) -> None:
    if not selection.allowlist.actions:
        _logger.warning(
            "Nothing is audited: the allowlist is empty. Name actions, as in configure_audit(actions=['retain', "
            "'recall']) or OTEL_ASTROCYTE_AUDIT_ACTIONS=retain,recall, or take '*' for all."
        )
    elif selection.maps_in_vain:
        _logger.warning(
            "No span of others is audited: none of the mappings gives an action that actions=%s allows.",
            [*selection.allowlist.actions],
        )
    if isinstance(provider.get_tracer(attributes.SCOPE_NAME, __version__), NoOpTracer):
        _logger.warning(
            "Nothing is audited: the tracer provider makes no spans. If OTEL_SDK_DISABLED=true is set, unset it; to "
            "keep traces from being exported, set OTEL_TRACES_SAMPLER=always_off instead, which the audit doesn't mind."
        )
    limits = getattr(provider, "_span_limits", None)  # there is no public way to ask
    count, length = (getattr(limits, name, None) for name in ("max_span_attributes", "max_span_attribute_length"))
    if count is not None and count < MIN_ATTRIBUTES:
        _logger.warning(
            "Spans may have only %d attributes, so audit records will be cut: set "
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT to %d or more.", count, MIN_ATTRIBUTES,
        )  # fmt: skip
    if length is not None and length < MIN_ATTRIBUTE_LENGTH:
        _logger.warning(
            "Attribute values are cut at %d characters, so audit records will be cut: set "
            "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT to %d or more.", length, MIN_ATTRIBUTE_LENGTH,
        )  # fmt: skip
