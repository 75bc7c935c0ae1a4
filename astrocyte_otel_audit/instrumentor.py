"""`AuditInstrumentor`: attaches the whole pipeline under `opentelemetry-instrument`, without a change to the code."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from opentelemetry.trace import TracerProvider

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline import AuditSpanProcessor

_logger = logging.getLogger(__name__)
#: What whoever runs instrumentors says to every one of them.
_FOR_ALL: Final = ("skip_dep_check", "raise_exception_on_conflict")
#: Without any of these, who has installed the package has not asked for an audit.
_ASKED_BY: Final = tuple(settings.PREFIX + name for name in ("DSN", "WRITER", "ACTIONS", "MAPPINGS"))


class AuditInstrumentor:
    """What the entry point ``opentelemetry_instrumentor`` names: it has an instrumentor's methods.

    It does nothing where neither an argument nor a variable asks for an audit. Never raises: what is wrong is said
    in one line, and the application starts all the same.
    """

    _processor: AuditSpanProcessor | None = None

    def instrument(self, tracer_provider: TracerProvider | None = None, **arguments: Any) -> None:
        """Attach the pipeline, once a process.

        Args:
            tracer_provider: where to attach; by default the global one. None is made.
            arguments: of `configure_audit`, as declarative configuration has them.
        """
        given = {name: value for name, value in arguments.items() if name not in _FOR_ALL}
        if AuditInstrumentor._processor is not None or not (given or any(map(os.environ.get, _ASKED_BY))):
            return
        try:
            AuditInstrumentor._processor = configure_audit(
                tracer_provider=tracer_provider, create_provider=False, **given
            )
        except (ConfigurationError, TypeError) as error:
            _logger.error("Nothing is audited: %s", error)

    def uninstrument(self, **arguments: Any) -> None:  # noqa: ARG002 - said to every instrumentor
        """Stop the pipeline, and write what waits. Harmless when repeated."""
        processor, AuditInstrumentor._processor = AuditInstrumentor._processor, None
        if processor is not None:
            processor.shutdown()
