"""The intake: takes operations on any thread and puts them into the backlog, or refuses and counts them."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection
from functools import partial

from astrocyte_otel_audit.pipeline.backlog import Backlog
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.pipeline.segment import RECORD, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool
from astrocyte_otel_audit.pipeline.troubles import Troubles

_logger = logging.getLogger(__name__)


class Intake(ABC):
    """The caller's side of a `Writer` and of a `Handover`. Thread-safe.

    Args:
        spool: where accepted operations are kept until they are settled.
        block_seconds: how long a caller waits for room where there is none; 0 for not at all.
        tailed: destinations of other processes whose operations are taken as well.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        block_seconds: float = 0.0,
        tailed: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._tailed = tailed
        self._block_seconds = block_seconds
        self._clock = clock
        #: When draining ends, once `stop` was called. A fork of a process that is shut down is shut down too.
        self._deadline: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        #: Whether this thread has the lock, in which case it can't be waited for; as conditions find out.
        self._is_inside: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._changed = threading.Condition(self._lock)
        self._backlog = Backlog(self._spool, lock=self._lock, tailed=self._tailed)
        #: What has come up on a thread that was in here already, in the middle of a write: in a signal's handler, or as
        #: garbage collection has ended the operation of an abandoned generator.
        self._put_off: deque[Callable[[], object]] = deque()
        self._counts: Counter[str] = Counter()
        self._troubles = Troubles(_logger, self._clock)

    def begin(self, captured: Captured) -> bool:
        """Put an operation that has begun on the disk, so that it leaves a row whatever happens.

        Returns:
            False where that can't be done; then nothing is promised.
        """
        if self._is_inside():
            return False
        with self._lock:
            try:
                return self._deadline is None and self._backlog.begin(captured)
            finally:
                self._catch_up()

    def hold(self, captured: Captured) -> bool:
        """Put what is known so far of a row where an operation's own would be, in case that never ends.

        Returns:
            False where there is no room for it.
        """
        if self._is_inside():
            self._put_off.append(partial(self._backlog.hold, captured))
            return True
        with self._lock:
            try:
                # Once it is shut down, its operation is refused with it, or has its place.
                return self._deadline is not None or self._backlog.hold(captured)
            finally:
                self._catch_up()

    def release(self, row_id: str) -> None:
        """Forget what is held until a row is written."""
        if self._is_inside():
            self._put_off.append(partial(self._backlog.release, row_id))
            return
        with self._lock:
            self._backlog.release(row_id)

    def submit(self, captured: Captured) -> bool:
        """Accept an operation, or refuse and count it. Never raises, never waits for Postgres but where told to."""
        line = captured_frame(RECORD, captured)
        if self._is_inside():
            self._put_off.append(partial(self._take_in, captured, line))
            return True
        with self._lock:
            try:
                if self._block_seconds and not self._backlog.has_room():
                    self._wait_for_room(self._block_seconds)
                refusal = self._take_in(captured, line)
            finally:
                if self._put_off:
                    self._catch_up()
        if refusal is not None:  # without the lock, since a log's handlers have locks of their own
            self._troubles.report("refused", refusal)
        return refusal is None

    def has_room(self) -> bool:
        """Say whether a record submitted now would be accepted."""
        return self._deadline is None and (self._block_seconds > 0 or self._backlog.has_room())

    def count_unreadable(self) -> None:
        """Count an audit span that could not become a record."""
        with self._lock:
            self._counts["unreadable"] += 1

    def after_fork(self) -> None:
        """Begin anew in a forked child: what the parent accepted is the parent's to write."""
        self._backlog.after_fork()
        self._begin()

    def _take_in(self, captured: Captured, line: bytes) -> str | None:
        """Put an operation into the backlog, or count it and say why it is refused."""
        backlog = self._backlog
        if self._deadline is not None and not backlog.has_begun(captured.id):
            self._counts["refused_shutdown"] += 1
            return "new audit records are refused: the pipeline is shut down"
        if not backlog.append(captured, line):
            return f"new audit records are refused and counted in a gap record: {backlog.refusal}"
        self._accepted(backlog.unread)
        return None

    def _catch_up(self) -> None:
        """Do what was put off. With the lock held, and nothing else under way."""
        while self._put_off:
            self._put_off.popleft()()

    @abstractmethod
    def start(self) -> None:
        """Begin with whatever is to be done beside the callers."""

    def flush(self, timeout_seconds: float) -> bool:
        """Say, within that time, whether every operation accepted before the call is in the table.

        False at once in a signal's handler that has interrupted a call into here.
        """
        return not self._is_inside() and self._flush_now(timeout_seconds)

    def stop(self, timeout_seconds: float) -> int:
        """Refuse new operations, and return how many accepted ones are not safe by then.

        Harmless when repeated. In a signal's handler that has interrupted a call into here, it is done when that ends.
        """
        if self._is_inside():
            self._put_off.append(partial(self._stop_now, timeout_seconds))
            return self._left()
        return self._stop_now(timeout_seconds)

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process."""

    @abstractmethod
    def _flush_now(self, timeout_seconds: float) -> bool: ...

    @abstractmethod
    def _stop_now(self, timeout_seconds: float) -> int: ...

    @abstractmethod
    def _left(self) -> int:
        """Return how many accepted operations would not be safe if it ended now."""

    # With the lock held.

    @abstractmethod
    def _accepted(self, unread: int) -> None:
        """An operation was accepted; so many wait to be read."""

    @abstractmethod
    def _wait_for_room(self, seconds: float) -> None:
        """Wait until there is room in the backlog, but no longer than that."""
