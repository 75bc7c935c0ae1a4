"""The writer: a thread that takes records out of the backlog and doesn't rest until each is in the table."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from astrocyte_otel_audit.pipeline.backlog import Backlog, MemoryBacklog, Operation
from astrocyte_otel_audit.pipeline.delivery import Delivered, Delivery
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.parking import Backoff, Numbered, Parking
from astrocyte_otel_audit.pipeline.troubles import Troubles

_logger = logging.getLogger(__name__)


class Writer:
    """Accepts records on any thread and writes them on its own. Thread-safe.

    Args:
        exporter: its `write` takes the batches.
        backlog: makes the queue in which records wait.
        capacity: records that may be accepted and not yet settled; parked ones may be half of them.
        batch_size: records in one call of `write`.
        delay_seconds: how long the first record of a batch waits for more.
        backoff: pauses while Postgres is away.
        parking: pauses between the attempts for a tenant whose table is missing.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        exporter: AuditSpanExporter,
        *,
        backlog: Callable[[], Backlog] = MemoryBacklog,
        capacity: int,
        batch_size: int,
        delay_seconds: float,
        backoff: Backoff = Backoff(0.1, 30.0),
        parking: Backoff = Backoff(1.0, 60.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exporter = exporter
        self._new_backlog = backlog
        self._capacity = capacity
        self._batch_size = batch_size
        self._delay = delay_seconds
        self._backoff = backoff
        self._parking_backoff = parking
        self._clock = clock
        #: When draining ends, once `stop` was called. A fork of a process that is shut down is shut down too.
        self._deadline: float | None = None
        self._begin()

    def _begin(self) -> None:
        # Reentrant, as garbage collection may end an abandoned generator's operation on a thread that is in here.
        self._changed = threading.Condition(threading.RLock())
        self._backlog = self._new_backlog()
        self._parking = Parking(self._parking_backoff)
        self._thread: threading.Thread | None = None
        #: Records accepted, taken out of the backlog, and done with, whatever became of them.
        self._accepted = self._taken = self._settled = 0
        self._in_flight: list[Numbered] = []
        self._oldest_since = 0.0
        #: Calls of `flush` so far, and those that wait now.
        self._flush = self._flushing = 0
        self._counts: Counter[str] = Counter()
        #: When parked tenants may hold up the others again.
        self._parked_rest_until = 0.0
        #: Set when records of parked tenants found no place and the log doesn't say so yet.
        self._overflowed = False
        #: Set when nothing is written any more, and when `stop` has stopped waiting for it.
        self._ended = self._given_up = False
        self._troubles = Troubles(_logger, self._clock)
        self._delivery = Delivery(self._exporter, self._troubles)

    def start(self) -> None:
        """Start the thread, which looks at the table at once: a mistake is reported before it delays a row."""
        with self._changed:
            self._start_thread()

    def submit(self, operation: Operation) -> bool:
        """Accept an operation, or refuse and count it. Never raises, never waits for Postgres."""
        with self._changed:
            refusal = self._accept(operation)
        if refusal is not None:  # said without the lock, since a log's handlers have locks of their own
            self._troubles.report("refused", refusal)
        return refusal is None

    def has_room(self) -> bool:
        """Say whether a record submitted now would be accepted."""
        return self._deadline is None and self._accepted - self._settled < self._capacity

    def flush(self, timeout_seconds: float) -> bool:
        """Write what waits now, without the usual delay.

        Returns:
            True only if every record accepted before the call is in the table: no more, once one was set aside or
            lost. False at the timeout, and as soon as it is clear that one can't get there.
        """
        with self._changed:
            goal = self._accepted
            self._flush += 1
            flush = self._flush
            self._flushing += 1
            self._parking.expedite()
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._is_decided(goal, flush), timeout_seconds)
            finally:  # a signal's handler may raise in here
                self._flushing -= 1
            return self._oldest_unsettled() >= goal and not self._counts["set_aside"] + self._counts["lost"]

    def stop(self, timeout_seconds: float) -> int:
        """Refuse new records, write what waits until the deadline, end the thread and close the exporter.

        Harmless when repeated, also from a signal's handler, whatever that has interrupted. Returns by the deadline,
        even where a server that doesn't answer holds the thread: that closes its connection when it is let go.

        Returns:
            How many accepted records were not written by then. They are lost, and said to be.
        """
        with self._changed:
            first = self._deadline is None
            if self._deadline is None:
                self._deadline = self._clock() + timeout_seconds
                self._parking.expedite()
                self._changed.notify_all()
            if self._thread is not None and self._thread is not threading.current_thread():
                # Not by joining it: a condition lets go of a lock that this very thread may hold further up.
                self._changed.wait_for(lambda: self._ended, timeout_seconds)
        if first and self._thread is None:
            if self._accepted > self._settled:
                self._run()  # late in interpreter shutdown no thread can be started any more
            else:
                self._close()
        with self._changed:
            self._given_up = True
            left = self._accepted - self._settled
        if first and left:
            _logger.error("%d audit records could not be written before the shutdown's deadline and are lost.", left)
        return left

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process.

        `accepted`; of these `stored` in the table, `set_aside` (refused by it and kept beside it) and `lost`, and
        still open: `waiting` and `parked`. `refused_full` and `refused_shutdown` were never accepted, `unreadable`
        were audit spans that could not become a record.
        """
        with self._changed:
            counts = ("stored", "set_aside", "lost", "refused_full", "refused_shutdown", "unreadable")
            stats = {name: self._counts[name] for name in counts}
            left, parked = self._accepted - self._settled, len(self._parking)
            if self._given_up:  # what is left will only get there if a hanging server answers after all
                stats["lost"] += left
                left = parked = 0
            return {"accepted": self._accepted, "waiting": left - parked, "parked": parked, **stats}

    def count_unreadable(self) -> None:
        """Count an audit span that could not become a record."""
        with self._changed:
            self._counts["unreadable"] += 1

    def after_fork(self) -> None:
        """Begin anew in a forked child: what the parent accepted is the parent's to write."""
        self._begin()

    # What follows runs on the writer's thread, or is called with the lock held.

    def _accept(self, operation: Operation) -> str | None:
        """Put an operation into the backlog, or count it and say why it is refused."""
        if self._deadline is not None:
            self._counts["refused_shutdown"] += 1
            return "new audit records are refused: the pipeline is shut down"
        if self._accepted - self._settled >= self._capacity:
            self._counts["refused_full"] += 1
            return f"new audit records are refused and lost: {self._capacity} wait (max_queue_size)"
        self._accepted += 1  # first: a signal's handler may come between, and wait for all that is accepted
        self._backlog.append(operation)
        waiting = len(self._backlog)
        if waiting == 1:
            self._oldest_since = self._clock()
            self._changed.notify_all()
        elif waiting == self._batch_size:
            self._changed.notify_all()
        if self._thread is None:
            self._start_thread()
        return None

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="astrocyte-audit-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is shutting down: `stop` will write on its caller's thread
            self._thread = None

    def _run(self) -> None:
        self._delivery.look_at_table()
        while (batch := self._next_batch()) is not None:
            if self._overflowed:
                self._overflowed = False
                self._troubles.report(
                    "parked",
                    "new audit records of tenants that can't be written are lost: "
                    f"{self._capacity // 2} wait (half of max_queue_size)",
                )
            if batch:
                self._deliver(batch)
        self._close()

    def _close(self) -> None:
        self._delivery.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _next_batch(self) -> list[Numbered] | None:
        """Wait for records to write. None means that the thread shall end."""
        with self._changed:
            while True:
                now = self._clock()
                if self._deadline is not None and now >= self._deadline:
                    return None
                due = bool(len(self._backlog)) and now >= self._batch_is_due()
                batch: list[Numbered] = []
                if not due or now >= self._parked_rest_until:
                    batch = self._parking.due(now, self._batch_size)
                if not batch and due:
                    batch = self._take(now)
                if batch or self._overflowed:
                    self._in_flight = batch
                    return batch
                if not len(self._backlog) and self._deadline is not None:
                    return None
                wake = min(self._batch_is_due() if len(self._backlog) else float("inf"), self._parking.next_attempt())
                self._changed.wait(None if wake == float("inf") else max(0.0, wake - now))

    def _batch_is_due(self) -> float:
        hurry = self._flushing or self._deadline is not None or len(self._backlog) >= self._batch_size
        return 0.0 if hurry else self._oldest_since + self._delay

    def _take(self, now: float) -> list[Numbered]:
        operations = self._backlog.take(self._batch_size)
        taken = list(map(Numbered, itertools.count(self._taken), operations))
        self._taken += len(taken)
        self._oldest_since = now
        batch, overflow = self._parking.divert(taken, self._capacity // 2)
        self._overflowed |= bool(overflow)
        self._counts["lost"] += len(overflow)
        self._settle(overflow)
        return batch

    def _deliver(self, batch: list[Numbered]) -> None:
        """Write a batch, however long it takes. Past the deadline it stays what it is, in flight."""
        attempt, draining = 0, False
        while True:
            began, flush = self._clock(), self._flush  # this attempt answers to the flushes that were called before it
            if self._deadline is not None and not draining:
                attempt, draining = 0, True  # however long Postgres was away: what can be written shall be, until then
            delivered = self._delivery.attempt(batch)
            if delivered is not None:
                return self._book(delivered, began, flush)
            attempt += 1
            if not self._pause(self._backoff.delay(attempt), flush, draining):
                return None

    def _book(self, delivered: Delivered, began: float, flush: int) -> None:
        with self._changed:
            now = self._clock()
            for name, count in (
                ("stored", delivered.stored), ("set_aside", delivered.set_aside), ("lost", delivered.lost)
            ):  # fmt: skip
                self._counts[name] += count
            passed = {item.operation.schema for item in delivered.settled}
            for schema in passed - delivered.waiting.keys():
                self._parking.release(schema)
            for schema, waiting in delivered.waiting.items():
                self._parking.park(waiting, now, flush, others_passed=schema in passed)
            if delivered.waiting:
                # A lock is waited for, and many tenants may be locked: the others get as much of the time as these.
                self._parked_rest_until = now + (now - began)
            if self._flush != flush:
                self._parking.expedite()  # somebody has begun to wait since, perhaps because it is mended
            self._settle(delivered.settled)
            self._in_flight = []

    def _settle(self, items: Sequence[Numbered]) -> None:
        self._backlog.settle([item.operation for item in items])
        self._settled += len(items)
        self._changed.notify_all()

    def _pause(self, seconds: float, flush: int, draining: bool) -> bool:
        """Wait before the next attempt, unless a flush or the stop has come since the last one and wants it now.

        Returns:
            False where the deadline has passed.
        """
        with self._changed:
            until = self._clock() + seconds
            if self._deadline is not None:
                until = min(until, self._deadline)
            self._changed.wait_for(
                lambda: self._flush != flush or (self._deadline is not None) != draining,
                max(0.0, until - self._clock()),
            )
            return self._deadline is None or self._clock() < self._deadline

    def _oldest_unsettled(self) -> int:
        candidates = [self._taken, self._parking.oldest(), self._in_flight[0].number if self._in_flight else None]
        return min(candidate for candidate in candidates if candidate is not None)

    def _is_decided(self, goal: int, flush: int) -> bool:
        if self._ended or self._oldest_unsettled() >= goal:
            return True
        under_way = self._taken < goal or (self._in_flight and self._in_flight[0].number < goal)
        return not under_way and self._parking.all_failed_for(flush, goal)
