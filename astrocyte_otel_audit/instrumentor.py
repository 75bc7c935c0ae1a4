"""`AuditInstrumentor`: attaches the whole pipeline under `opentelemetry-instrument`, without a change to the code."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline import AuditSpanProcessor
from astrocyte_otel_audit.retention import RetentionPolicy, policy_saying

_logger = logging.getLogger(__name__)
#: Name of the entry point, and so of the key in a configuration file.
NAME: Final = "astrocyte_audit"
#: What whoever runs all instrumentors says to every one of them; a configuration file's entry is told none of it.
_FOR_ALL: Final = ("skip_dep_check", "raise_exception_on_conflict")
#: Without any of these, who has installed the package has not asked for an audit.
_ASKED_BY: Final = tuple(settings.PREFIX + name for name in ("DSN", "WRITER", "ACTIONS", "MAPPINGS"))
_FILE_VARIABLE: Final = "OTEL_CONFIG_FILE"
#: The key on a line of YAML or JSON, before any comment.
_NAMED: Final = re.compile(rf"^(?:(?!(?<!\S)#).)*?\b{NAME}[\"']?\s*:", re.MULTILINE)


def _names_of(called: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(called).parameters)


class AuditInstrumentor:
    """What the entry point ``opentelemetry_instrumentor`` names: it has an instrumentor's methods.

    Where the file of ``OTEL_CONFIG_FILE`` names it, that file decides whether there is an audit, else the environment
    does. Never raises: what is wrong is said in one line, and the application starts all the same.
    """

    _processor: AuditSpanProcessor | None = None

    def instrument(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        **arguments: Any,
    ) -> None:
        """Attach the pipeline, once a process.

        Args:
            tracer_provider: where to attach; by default the global one. None is made.
            meter_provider: where its metrics go; by default the global one.
            arguments: of `configure_audit`, as declarative configuration has them: `retention` and `normalizer` may
                be the arguments of `RetentionPolicy` and `Normalizer` by name.
        """
        given = {name: value for name, value in arguments.items() if name not in _FOR_ALL}
        is_one_of_all = len(given) < len(arguments)
        file = _file_that_names_it()
        asked = any(map(os.environ.get, _ASKED_BY)) if file is None else not is_one_of_all
        if AuditInstrumentor._processor is not None or not (given or asked):
            return
        if file is not None and not hasattr(tracer_provider or trace.get_tracer_provider(), "add_span_processor"):
            _logger.error(
                "Nothing is audited: tracer_provider in %s: there is none to attach the audit to; accepted is one with "
                "at least one processor, such as {processors: [{batch: {exporter: {otlp_http: {}}}}]}", file,
            )  # fmt: skip
            return
        try:
            _check_names(given, _KEYS, also=[f"retention.{name}" for name in _names_of(RetentionPolicy)])
            for name, build in _BUILT.items():
                if isinstance(given.get(name), Mapping):
                    given[name] = build(given[name])
            AuditInstrumentor._processor = configure_audit(
                tracer_provider=tracer_provider, meter_provider=meter_provider, create_provider=False, **given
            )
        except ConfigurationError as error:
            _logger.error("Nothing is audited: %s", _said(error, file))
        except Exception as error:  # nobody foresaw it, and the other instrumentors are still to come
            _logger.error("Nothing is audited: the set-up failed (%s)", type(error).__qualname__)

    def uninstrument(self, **arguments: Any) -> None:  # noqa: ARG002 - said to every instrumentor
        """Stop the pipeline, and write what waits. Harmless when repeated."""
        processor, AuditInstrumentor._processor = AuditInstrumentor._processor, None
        if processor is not None:
            processor.shutdown()


def _file_that_names_it() -> str | None:
    """Return the path of the configuration file if it was read and has our key anywhere.

    Auto-instrumentation runs every instrumentor once more after the file was applied, those that the file has disabled
    too, and says nothing of the file to them.
    """
    path = os.environ.get(_FILE_VARIABLE)
    if not path or "opentelemetry.configuration" not in sys.modules:  # an SDK that knows no such files
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
    return path if _NAMED.search(text) else None


def _check_names(given: Iterable[str], accepted: Iterable[str], *, within: str = "", also: Iterable[str] = ()) -> None:
    for name in map(str, given):  # a number can be a key of a file's
        if name not in accepted:
            similar = difflib.get_close_matches(name, [*accepted, *also], n=1)
            meant = f"did you mean {within}{similar[0]}? " if similar else ""
            raise ConfigurationError(within + name, f"no such key; {meant}accepted are {', '.join(accepted)}")


def _policy(said: Mapping[str, Any]) -> RetentionPolicy:
    _check_names(said, _names_of(RetentionPolicy), within="retention.")
    accepted: dict[str, Any] = {"days": None}
    for name, value in said.items():
        if value is not None:
            accepted[name] = settings.SETTINGS[f"retention_{name}"].accept(value, f"retention.{name}")
    try:
        return policy_saying(accepted)
    except ConfigurationError as error:
        raise ConfigurationError(f"retention.{error.source}", error.problem) from None


def _normalizer(said: Mapping[str, Any]) -> Normalizer:
    _check_names(said, _names_of(Normalizer), within="normalizer.")
    try:
        return Normalizer(**{name: value for name, value in said.items() if value is not None})
    except ConfigurationError as error:
        raise ConfigurationError(f"normalizer.{error.source}", error.problem) from None


#: What makes an argument of a map of its own arguments.
_BUILT: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {"retention": _policy, "normalizer": _normalizer}
#: Arguments of `configure_audit` that a file can hold: the others are objects.
_KEYS: Final = tuple(name for name in _names_of(configure_audit) if name in settings.SETTINGS or name in _BUILT)


def _said(error: ConfigurationError, file: str | None) -> str:
    """Return what is wrong, with the file's name where the file is where it can be changed."""
    if file is None or error.source.startswith("OTEL_"):
        return str(error)
    return f"{NAME}.{error.source} in {file}: {error.problem}"
