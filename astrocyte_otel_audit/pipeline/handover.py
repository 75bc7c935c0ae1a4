"""The handover: operations go to the spool, and another process brings them to the table.

Nothing runs here but the callers: no thread, and no connection. `astrocyte-otel-audit writer` reads the segments while
they grow, clears away those it is done with, and says in a file how far it has come.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, read_acknowledged
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.pipeline.intake import Intake
from astrocyte_otel_audit.pipeline.spool import Spool

#: How often the spool is tended, by the calls that put something into it.
_TEND_SECONDS: Final = 1.0
#: How often is looked whether what is waited for has come.
_POLL_SECONDS: Final = 0.01
#: A writer that has said nothing for this long is missed.
MISSED_SECONDS: Final = 60.0
_logger = logging.getLogger(__name__)


class Handover(Intake):
    """Accepts operations on any thread, for another process to write. Thread-safe.

    Args:
        spool: on disk.
        block_seconds: how long a caller waits for room where there is none; 0 for not at all.
        clock: monotonic seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        block_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        super().__init__(spool, block_seconds=block_seconds, clock=clock)

    def _begin(self) -> None:
        super()._begin()
        self._tend_at = 0.0
        #: Whether all was written when it was stopped, and how many operations were in memory only.
        self._was_all = False
        self._lost = 0
        self._acknowledged = Acknowledged(0, 0, 0, 0)
        #: Since when something waits, or since when something of it was last written.
        self._waiting_since: float | None = None
        #: What is to be said to the log once nobody has the lock, since a log's handlers have locks of their own.
        self._unsaid: deque[Callable[[], None]] = deque()

    def submit(self, captured: Captured) -> bool:
        """Accept an operation, or refuse and count it. Never raises, never waits for Postgres."""
        taken = super().submit(captured)
        if self._unsaid:
            self._say()
        return taken

    def start(self) -> None:
        """Do nothing: there is nothing beside the callers."""

    def _flush_now(self, timeout_seconds: float) -> bool:
        """Wait until another process has written what is in the spool now.

        Returns:
            True only if every operation accepted before the call is in the table: no more, once one was set aside or
            can't be read. False at the timeout.
        """
        with self._lock:
            if self._deadline is not None:  # nobody says any more how far another process has come
                return self._was_all and not self._acknowledged.refused
            self._backlog.close_gap()
            goal = self._spool.end()
        deadline = self._clock() + timeout_seconds
        while not (is_there := self._look() >= goal) and self._clock() < deadline:
            self._sleep(_POLL_SECONDS)
        self._say()
        # What the disk did not take is in memory, where no other process finds it.
        return is_there and not self._spool.in_memory and not self._acknowledged.refused

    def _stop_now(self, timeout_seconds: float) -> int:  # noqa: ARG002 - nobody has to be waited for
        """Refuse new operations, and let go of the files: what was accepted is in them, unless the disk has failed.

        Returns:
            How many accepted operations the disk did not take: they are lost, and are said to be.
        """
        with self._lock:
            first, self._deadline = self._deadline is None, self._clock()
            if first:
                self._backlog.close_gap()
                self._lost = self._left()
                self._was_all = self._look() >= self._spool.end() and not self._lost
                self._backlog.close()
        self._say()
        if first and self._lost:
            _logger.error("%d audit records could not be put into the spool and are lost.", self._lost)
        return self._lost

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process, by the names of `Writer.stats`.

        `stored` and `set_aside`, with what can't be read, are what the writing process has said so far.
        """
        self._look()
        self._say()
        with self._lock:
            accepted, done = self._backlog.accepted, self._acknowledged
            return {
                "accepted": accepted,
                "waiting": max(0, accepted - done.stored - done.refused),
                "stored": done.stored,
                "set_aside": done.refused,
                "refused_full": self._backlog.refused,
                "refused_shutdown": self._counts["refused_shutdown"],
                "unreadable": self._counts["unreadable"],
                "spool_bytes": self._spool.bytes,
            }

    def _left(self) -> int:
        return self._spool.in_memory

    def _take_in(self, captured: Captured, line: bytes) -> str | None:
        if not self._backlog.has_room() and (now := self._clock()) >= self._tend_at:
            self._tend(now)  # others may have made room
        return super()._take_in(captured, line)

    def _accepted(self, unread: int) -> None:  # noqa: ARG002 - by another process
        now = self._clock()
        if now >= self._tend_at:
            self._tend(now)

    def _wait_for_room(self, seconds: float) -> None:
        deadline = self._clock() + seconds
        while not self._backlog.has_room() and self._clock() < deadline:
            self._tend(self._clock())
            self._changed.wait(_POLL_SECONDS)  # nobody notifies, but others may have the lock meanwhile

    def _tend(self, now: float) -> None:
        self._tend_at = now + _TEND_SECONDS
        for trouble in self._backlog.tend(adopting=False):
            self._unsaid.append(partial(self._troubles.report, "spool", trouble))
        if self._look() >= self._spool.end():
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > MISSED_SECONDS:
            missed = (
                "audit records wait in the spool, and no process has written any for a minute: run "
                "`astrocyte-otel-audit writer`, as this user, for the same spool and destination"
            )
            self._unsaid.append(partial(self._troubles.report, "writer", missed))

    def _look(self) -> tuple[int, int]:
        """Return how far another process has come: up to which segment, and which offset there."""
        path = self._spool.path
        said = None if path is None else read_acknowledged(path)
        if said is not None and said != self._acknowledged:
            self._acknowledged, self._waiting_since = said, None
            back = "audit records are being written again"
            self._unsaid.append(partial(self._troubles.clear, "writer", back))
        return self._acknowledged[:2]

    # Without the lock.

    def _say(self) -> None:
        while self._unsaid:
            with suppress(IndexError):  # another thread was first
                self._unsaid.popleft()()
