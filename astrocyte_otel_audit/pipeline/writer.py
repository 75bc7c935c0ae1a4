"""The writer: a thread that takes records out of the backlog and doesn't rest until each is in the table."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

from astrocyte_otel_audit.pipeline.backlog import Entry
from astrocyte_otel_audit.pipeline.delivery import Delivered, Delivery
from astrocyte_otel_audit.pipeline.directory import SpoolError
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.intake import Intake
from astrocyte_otel_audit.pipeline.parking import Backoff, Parking
from astrocyte_otel_audit.pipeline.spool import Spool

_logger = logging.getLogger(__name__)
#: How often the spool is tended, and how often in it is looked for what dead processes have left.
_TEND_SECONDS, _ADOPT_SECONDS = 1.0, 15.0


class Writer(Intake):
    """Accepts operations on any thread and writes them on its own. Thread-safe.

    Args:
        exporter: its `write` takes the batches.
        spool: where accepted operations are kept until they are settled.
        capacity: records that may be in memory; parked ones may be half of them.
        batch_size: records in one call of `write`.
        delay_seconds: how long the first record of a batch waits for more.
        block_seconds: how long a caller waits for room where there is none; 0 for not at all.
        tailed: destinations of processes that leave writing to this one.
        backoff: pauses while Postgres is away.
        parking: pauses between the attempts for a tenant whose table is missing.
        attempted: told after each attempt to write how many seconds it took, and the class of the error.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        exporter: AuditSpanExporter,
        *,
        spool: Spool,
        capacity: int,
        batch_size: int,
        delay_seconds: float,
        block_seconds: float = 0.0,
        tailed: Collection[str] = (),
        backoff: Backoff = Backoff(0.1, 30.0),
        parking: Backoff = Backoff(1.0, 60.0),
        attempted: Callable[[float, str | None], None] = lambda seconds, error: None,  # noqa: ARG005
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exporter = exporter
        self._capacity = capacity
        self._batch_size = batch_size
        self._delay = delay_seconds
        self._backoff = backoff
        self._parking_backoff = parking
        self._attempted = attempted
        super().__init__(spool, block_seconds=block_seconds, tailed=tailed, clock=clock)

    def _begin(self) -> None:
        super()._begin()
        self._parking = Parking(self._parking_backoff)
        self._thread: threading.Thread | None = None
        self._in_flight: list[Entry] = []
        self._oldest_since = 0.0
        #: Calls of `flush` so far, and those that wait now.
        self._flush = self._flushing = 0
        #: When parked tenants may hold up the others again.
        self._parked_rest_until = 0.0
        self._tend_at = self._adopt_at = 0.0
        #: Set when nothing is written any more, and when `stop` has stopped waiting for it.
        self._ended = self._given_up = False
        #: Set while what is kept has to be written again.
        self._again = False
        self._delivery = Delivery(self._exporter, self._troubles, self._attempted)

    def start(self) -> None:
        """Start the thread, which looks at the table at once: a mistake is reported before it delays a row."""
        with self._lock:
            self._start_thread()

    def _flush_now(self, timeout_seconds: float) -> bool:
        """Write what waits now, without the usual delay.

        Returns:
            True only if every record accepted before the call is in the table: no more, once one was set aside or
            lost. False at the timeout, and as soon as it is clear that one can't get there.
        """
        with self._lock:
            self._backlog.close_gap()
            self._catch_up()
            goal = self._backlog.accepted
            self._flush += 1
            flush = self._flush
            self._flushing += 1
            self._parking.expedite()
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._is_decided(goal, flush), timeout_seconds)
            finally:  # a signal's handler may raise in here
                self._flushing -= 1
            failed = self._counts["set_aside"] + self._counts["lost"] + self._backlog.damaged
            return self._oldest_unsettled() >= goal and not failed

    def _stop_now(self, timeout_seconds: float) -> int:
        """Refuse new records, write what waits until the deadline, end the thread and close the exporter.

        Returns by the deadline, even where a server that doesn't answer holds the thread: that closes its connection
        when it is let go.

        Returns:
            How many accepted records were not written by then: they stay in the spool, or are lost where there is
            none, and are said to be.
        """
        with self._lock:
            first = self._deadline is None
            if self._deadline is None:
                self._deadline = self._clock() + timeout_seconds
                self._parking.expedite()
                self._changed.notify_all()
            if self._thread is not None and self._thread is not threading.current_thread():
                # Not by joining it: a condition lets go of the lock, which this thread has where this was put off.
                self._changed.wait_for(lambda: self._ended, timeout_seconds)
        if first and self._thread is None:
            if self._backlog.unsettled():
                self._run()  # late in interpreter shutdown no thread can be started any more
            else:
                self._close()
        with self._lock:
            self._given_up = True
            left = self._left()
        if first and left and self._thread is threading.current_thread():
            pass  # it will write what it can, once this call has returned
        elif first and left and self._spool.root is not None:
            _logger.warning(
                "%d audit records were not written by the shutdown's deadline: they are in the spool.", left
            )
        elif first and left:
            _logger.error("%d audit records could not be written before the shutdown's deadline and are lost.", left)
        return left

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process.

        `accepted`, and `adopted` of those that dead processes left; of both `stored` in the table, `set_aside` (refused
        by it and kept beside it) and `lost`, and still open: `waiting` and `parked`. `refused_full` and
        `refused_shutdown` were never accepted, `unreadable` were audit spans that could not become a record, `damaged`
        are places in the spool that can't be read. `spool_bytes` are on disk now.
        """
        with self._lock:
            backlog, counts = self._backlog, self._counts
            left, parked = backlog.unsettled(), len(self._parking)
            lost = counts["lost"]
            if self._given_up and self._spool.root is None:  # it only gets there if a hanging server answers after all
                lost, left, parked = lost + left, 0, 0
            return {
                "accepted": backlog.accepted - backlog.adopted,
                "adopted": backlog.adopted,
                "waiting": left - parked,
                "parked": parked,
                "stored": counts["stored"],
                "set_aside": counts["set_aside"],
                "lost": lost,
                "refused_full": backlog.refused,
                "refused_shutdown": counts["refused_shutdown"],
                "unreadable": counts["unreadable"],
                "damaged": backlog.damaged,
                "spool_bytes": self._spool.bytes,
            }

    # What follows runs on the writer's thread, or is called with the lock held.

    def _accepted(self, unread: int) -> None:
        if unread == 1:
            self._oldest_since = self._clock()
            self._changed.notify_all()
        elif unread == self._batch_size:
            self._changed.notify_all()
        if self._thread is None:
            self._start_thread()

    def _left(self) -> int:
        return self._backlog.unsettled()

    def _wait_for_room(self, seconds: float) -> None:
        self._changed.wait_for(lambda: self._backlog.has_room() or self._ended, seconds)

    def _start_thread(self) -> None:
        if self._thread is not None or self._deadline is not None:
            return
        self._thread = threading.Thread(target=self._run, name="astrocyte-audit-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is shutting down: `stop` will write on its caller's thread
            self._thread = None

    def _run(self) -> None:
        self._delivery.look_at_table()
        while (batch := self._next_batch()) is not None:
            if batch:
                self._deliver(batch)
            if self._again:
                self._deliver_again()
            self._tend()
        self._close()

    def _close(self) -> None:
        self._delivery.close()
        with self._lock:
            self._backlog.close()
            self._ended = True
            self._changed.notify_all()

    def _tend(self) -> None:
        """Look after the spool, about once a second."""
        now = self._clock()
        if now < self._tend_at:
            return
        self._tend_at = now + _TEND_SECONDS
        adopting = now >= self._adopt_at and self._deadline is None
        if adopting:
            self._adopt_at = now + (_TEND_SECONDS if self._tailed else _ADOPT_SECONDS)
        for trouble in self._backlog.tend(adopting=adopting):
            self._troubles.report("spool", trouble)

    def _next_batch(self) -> list[Entry] | None:
        """Wait for records to write. None means that the thread shall end; an empty batch, to look again."""
        with self._lock:
            self._catch_up()
            now = self._clock()
            if self._deadline is not None and now >= self._deadline:
                return None
            waiting = len(self._backlog)
            # Processes that live go on and on: at the end, what they have written by then is for the next writer.
            found = self._backlog.has_found() and not (self._tailed and self._deadline is not None)
            due = found or (waiting > 0 and now >= self._batch_is_due())
            parked: list[Entry] = []
            if not due or now >= self._parked_rest_until:
                parked = self._in_flight = self._parking.due(now, self._batch_size)
            if not parked and not due:
                if not waiting and self._deadline is not None:
                    return [] if self._backlog.close_gap() else None
                wake = min(self._batch_is_due() if waiting else float("inf"), self._parking.next_attempt())
                if self._spool.root is not None or self._backlog.has_gap:
                    wake = min(wake, self._tend_at)
                if self._tailed:
                    wake = min(wake, now + self._delay)
                self._changed.wait(None if wake == float("inf") else max(0.0, wake - now))
                return []
        return self._load(parked) if parked else self._take(now)

    def _batch_is_due(self) -> float:
        hurry = self._flushing or self._deadline is not None or len(self._backlog) >= self._batch_size
        return 0.0 if hurry else self._oldest_since + self._delay

    def _load(self, parked: list[Entry]) -> list[Entry] | None:
        while True:
            try:
                self._backlog.load(parked)
                return parked
            except SpoolError as error:
                self._troubles.report("spool", f"the spool has trouble: {error}")
                if not self._pause(_TEND_SECONDS, self._flush, self._deadline is not None):
                    return None

    def _take(self, now: float) -> list[Entry]:
        try:
            self._backlog.refill(self._batch_size)
        except SpoolError as error:
            self._troubles.report("spool", f"the spool has trouble: {error}")
            self._pause(_TEND_SECONDS, self._flush, self._deadline is not None)
        with self._lock:
            taken = self._backlog.take(self._batch_size)
            self._oldest_since = now
            batch, overflow = self._parking.divert(taken, self._capacity // 2, self._backlog.drop)
            self._counts["lost"] += len(overflow)
            self._backlog.settle(overflow, stored=False)
            self._in_flight = batch
            self._changed.notify_all()
        if overflow:
            self._troubles.report(
                "parked",
                "new audit records of tenants that can't be written are lost: "
                f"{self._capacity // 2} wait (half of max_queue_size)",
            )
        return batch

    def _deliver(self, batch: list[Entry]) -> None:
        """Write a batch, however long it takes. Past the deadline it stays what it is, in flight."""
        attempt, draining, failed = 0, False, False
        while True:
            began, flush = self._clock(), self._flush  # this attempt answers to the flushes that were called before it
            if self._deadline is not None and not draining:
                attempt, draining = 0, True  # however long Postgres was away: what can be written shall be, until then
            if self._put_off:  # this may take long
                with self._lock:
                    self._catch_up()
            delivered = self._delivery.attempt(batch)
            if delivered is not None:
                self._again |= failed and self._spool.keeps
                return self._book(delivered, began, flush)
            attempt, failed = attempt + 1, True
            if not self._pause(self._backoff.delay(attempt), flush, draining):
                return None

    def _deliver_again(self) -> None:
        """Write again what is kept: Postgres was away, and who has taken over may lack the last of what was written."""
        try:
            for piece in self._backlog.settled_before():
                for first in range(0, len(piece), self._batch_size):
                    if self._deadline is not None and self._clock() >= self._deadline:
                        return
                    if self._delivery.attempt(piece[first : first + self._batch_size]) is None:
                        return  # it is away again: all of it once more, when it is back
        except SpoolError as error:
            self._troubles.report("spool", f"the spool has trouble: {error}")
        with self._lock:
            self._again = False
            self._changed.notify_all()

    def _book(self, delivered: Delivered, began: float, flush: int) -> None:
        with self._lock:
            now = self._clock()
            self._counts["stored"] += len(delivered.stored)
            self._counts["set_aside"] += len(delivered.set_aside)
            passed = {entry.schema for entry in (*delivered.stored, *delivered.set_aside)}
            for schema in passed - delivered.waiting.keys():
                self._parking.release(schema)
            for schema, waiting in delivered.waiting.items():
                self._parking.park(waiting, now, flush, others_passed=schema in passed)
                if len(self._parking) > self._capacity // 2:
                    for entry in waiting:
                        self._backlog.drop(entry)
            if delivered.waiting:
                # A lock is waited for, and many tenants may be locked: the others get as much of the time as these.
                self._parked_rest_until = now + (now - began)
            if self._flush != flush:
                self._parking.expedite()  # somebody has begun to wait since, perhaps because it is mended
            self._backlog.settle(delivered.stored)
            self._backlog.settle((*delivered.set_aside, *delivered.unreadable), stored=False)
            self._in_flight = []
            self._changed.notify_all()

    def _pause(self, seconds: float, flush: int, draining: bool) -> bool:
        """Wait before the next attempt, unless a flush or the stop has come since the last one and wants it now.

        Returns:
            False where the deadline has passed.
        """
        with self._lock:
            until = self._clock() + seconds
            if self._deadline is not None:
                until = min(until, self._deadline)
            self._changed.wait_for(
                lambda: self._flush != flush or (self._deadline is not None) != draining,
                max(0.0, until - self._clock()),
            )
            return self._deadline is None or self._clock() < self._deadline

    def _oldest_unsettled(self) -> int:
        if self._again:
            return 0
        candidates = [
            self._backlog.taken,
            self._parking.oldest(),
            self._in_flight[0].number if self._in_flight else None,
        ]
        return min(candidate for candidate in candidates if candidate is not None)

    def _is_decided(self, goal: int, flush: int) -> bool:
        if self._ended or self._oldest_unsettled() >= goal:
            return True
        if self._again:
            return False
        under_way = self._backlog.taken < goal or (self._in_flight and self._in_flight[0].number < goal)
        return not under_way and self._parking.all_failed_for(flush, goal)
