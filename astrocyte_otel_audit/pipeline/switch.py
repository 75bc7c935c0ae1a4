"""`Switch`: the application's own say, by bank and tenant, in what is audited of what is allowed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from astrocyte_otel_audit.pipeline.captured import text_of
from astrocyte_otel_audit.pipeline.troubles import Troubles

_logger = logging.getLogger(__name__)

#: Says whether an action of a bank is audited; None for the default, which is that it is.
EnabledFor: TypeAlias = Callable[[str, str | None], bool | None]

_KEEP_SECONDS: Final = 60.0
_MAX_ANSWERS: Final = 4096
_MAX_LENGTH: Final = 256


class Switch:
    """Asks `enabled_for`, and remembers its answers for a minute. Thread-safe.

    A function that raises, or answers with something else than True, False or None, counts as one that doesn't know:
    an audit that fails open is on.

    Args:
        enabled_for: asked with an action that the allowlist allows and the bank, on the thread where the operation
            ends. It should not wait: what it has to read from elsewhere, it reads beforehand.
        clock: monotonic seconds.
    """

    def __init__(self, enabled_for: EnabledFor, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled_for = enabled_for
        self._clock = clock
        self._answers: dict[tuple[str, str | None, str | None], tuple[bool, float]] = {}
        self._troubles = Troubles(_logger, clock)
        #: How many times it has failed.
        self.failed = 0

    def is_on(self, action: str, bank_id: object, schema: str | None) -> bool:
        """Say whether an operation is to be audited. The tenant's schema is a part of the question, as it is asked."""
        bank = text_of(bank_id)
        question = (action, bank, schema)
        known, now = self._answers.get(question), self._clock()
        if known is not None and now - known[1] < _KEEP_SECONDS:
            return known[0]
        answer = self._ask(action, bank)
        if len(action) + len(bank or "") <= _MAX_LENGTH:  # names come from data
            if len(self._answers) >= _MAX_ANSWERS:
                self._answers.clear()
            self._answers[question] = (answer, now)
        return answer

    def _ask(self, action: str, bank: str | None) -> bool:
        try:
            answer = self._enabled_for(action, bank)
        except Exception as fault:
            return self._default(f"enabled_for failed ({type(fault).__qualname__})")
        if answer is None or isinstance(answer, bool):
            return answer is not False
        return self._default(f"enabled_for answered with a {type(answer).__qualname__}, not with True, False or None")

    def _default(self, trouble: str) -> bool:
        self.failed += 1
        self._troubles.report("enabled_for", f"{trouble}: what it was asked for is audited")
        return True
