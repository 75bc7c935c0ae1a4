"""Troubles: one clear message when something goes wrong, a reminder while it lasts, one when it is over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

#: A trouble that lasts is said again after this many seconds, so that it isn't only at the far end of a log.
_REMIND_SECONDS = 300.0


class Troubles:
    """Keeps a repeated failure from flooding the log. Thread-safe.

    Args:
        logger: receives the messages.
        clock: monotonic seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.RLock()  # reentrant: see Writer
        self._open: dict[Hashable, tuple[str, float]] = {}

    def report(self, topic: Hashable, message: str) -> None:
        """Warn, unless the same message of the same topic was said a short while ago."""
        now = self._clock()
        with self._lock:
            said, at = self._open.get(topic, ("", 0.0))
            if said == message and now - at < _REMIND_SECONDS:
                return
            self._open[topic] = (message, now)
        self._say(message)

    def clear(self, topic: Hashable, message: str) -> None:
        """Say that a trouble is over, if there was one."""
        if topic in self._open:
            with self._lock:
                self._open.pop(topic, None)
            self._say(message)

    def _say(self, message: str) -> None:
        with suppress(Exception):  # a log's handler that raises must not reach the application, or end the writer
            self._logger.warning("%s.", message)
