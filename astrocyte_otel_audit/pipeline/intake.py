"""The intake: takes operations on any thread and puts them into the backlog, or refuses and counts them."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection

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
        # Reentrant, as garbage collection may end an abandoned generator's operation on a thread that is in here.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._backlog = Backlog(self._spool, lock=self._lock, tailed=self._tailed)
        self._is_busy = False
        self._put_off: deque[tuple[Callable[[Captured], object], Captured]] = deque()
        self._counts: Counter[str] = Counter()
        self._troubles = Troubles(_logger, self._clock)

    def begin(self, captured: Captured) -> bool:
        """Put an operation that has begun on the disk, so that it leaves a row whatever happens.

        Returns:
            False where that can't be done; then nothing is promised.
        """
        with self._lock:
            return self._deadline is None and not self._is_busy and self._backlog.begin(captured)

    def hold(self, captured: Captured) -> None:
        """Put what is known so far of a row on the disk, so that it is one even if its operation never ends."""
        with self._lock:
            if self._is_busy:
                self._put_off.append((self.hold, captured))
            elif self._deadline is None:
                self._backlog.hold(captured)

    def release(self, row_id: str) -> None:
        """Forget what is held until a row is written."""
        with self._lock:
            self._backlog.release(row_id)

    def submit(self, captured: Captured) -> bool:
        """Accept an operation, or refuse and count it. Never raises, never waits for Postgres but where told to."""
        line = captured_frame(RECORD, captured)
        with self._lock:
            if self._is_busy:
                # On a thread that is in here already: a signal's handler, or garbage collection that ends an abandoned
                # generator's operation. In the middle of a write, another would take its place.
                self._put_off.append((self.submit, captured))
                return True
            if self._block_seconds and not self._backlog.has_room():
                self._wait_for_room(self._block_seconds)
            self._is_busy = True
            try:
                refusal = self._take_in(captured, line)
            finally:
                self._is_busy = False
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
        while True:
            try:
                method, captured = self._put_off.popleft()
            except IndexError:
                return
            method(captured)

    @abstractmethod
    def start(self) -> None:
        """Begin with whatever is to be done beside the callers."""

    @abstractmethod
    def flush(self, timeout_seconds: float) -> bool:
        """Say, within that time, whether every operation accepted before the call is in the table."""

    @abstractmethod
    def stop(self, timeout_seconds: float) -> int:
        """Refuse new operations, and return how many accepted ones are not in the table by then."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process."""

    # With the lock held.

    @abstractmethod
    def _accepted(self, unread: int) -> None:
        """An operation was accepted; so many wait to be read."""

    @abstractmethod
    def _wait_for_room(self, seconds: float) -> None:
        """Wait until there is room in the backlog, but no longer than that."""
