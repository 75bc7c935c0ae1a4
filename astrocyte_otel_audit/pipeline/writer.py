"""The writer: a thread that takes records out of the backlog and doesn't rest until each is in the table."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from astrocyte_otel_audit.pipeline.backlog import Backlog, Entry
from astrocyte_otel_audit.pipeline.delivery import Delivered, Delivery
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.parking import Backoff, Parking
from astrocyte_otel_audit.pipeline.spool import Spool, SpoolError
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.record import AuditRecord

_logger = logging.getLogger(__name__)
#: How often the spool is tended, and how often in it is looked for what dead processes have left.
_TEND_SECONDS, _ADOPT_SECONDS = 1.0, 15.0


class Writer:
    """Accepts records on any thread and writes them on its own. Thread-safe.

    Args:
        exporter: its `write` takes the batches.
        spool: where accepted records are kept until they are settled; None for memory only.
        capacity: records that may be in memory; parked ones may be half of them.
        batch_size: records in one call of `write`.
        delay_seconds: how long the first record of a batch waits for more.
        block_seconds: how long a caller waits for room where there is none; 0 for not at all.
        backoff: pauses while Postgres is away.
        parking: pauses between the attempts for a tenant whose table is missing.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        exporter: AuditSpanExporter,
        *,
        spool: Spool | None = None,
        capacity: int,
        batch_size: int,
        delay_seconds: float,
        block_seconds: float = 0.0,
        backoff: Backoff = Backoff(0.1, 30.0),
        parking: Backoff = Backoff(1.0, 60.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exporter = exporter
        self._spool = spool
        self._capacity = capacity
        self._batch_size = batch_size
        self._delay = delay_seconds
        self._block_seconds = block_seconds
        self._backoff = backoff
        self._parking_backoff = parking
        self._clock = clock
        #: When draining ends, once `stop` was called. A fork of a process that is shut down is shut down too.
        self._deadline: float | None = None
        self._begin()

    def _begin(self) -> None:
        # Reentrant, as garbage collection may end an abandoned generator's operation on a thread that is in here.
        self._changed = threading.Condition(threading.RLock())
        self._backlog = Backlog(self._spool, memory_limit=self._capacity, lock=self._changed)
        self._parking = Parking(self._parking_backoff)
        self._thread: threading.Thread | None = None
        self._in_flight: list[Entry] = []
        self._oldest_since = 0.0
        #: Calls of `flush` so far, and those that wait now.
        self._flush = self._flushing = 0
        self._counts: Counter[str] = Counter()
        #: When parked tenants may hold up the others again.
        self._parked_rest_until = 0.0
        self._tend_at = self._adopt_at = 0.0
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

    def begin(self, record: AuditRecord) -> bool:
        """Put the intent of an operation on the disk, so that it leaves a row whatever happens.

        Returns:
            False where that can't be done; then nothing is promised.
        """
        with self._changed:
            return self._deadline is None and self._backlog.begin(record)

    def submit(self, record: AuditRecord) -> bool:
        """Accept a record, or refuse and count it. Never raises, never waits for Postgres but where it was told to."""
        with self._changed:
            if self._block_seconds and not self._backlog.has_room():
                self._changed.wait_for(lambda: self._backlog.has_room() or self._ended, self._block_seconds)
            refusal = self._accept(record)
        if refusal is not None:  # said without the lock, since a log's handlers have locks of their own
            self._troubles.report("refused", refusal)
        return refusal is None

    def has_room(self) -> bool:
        """Say whether a record submitted now would be accepted."""
        return self._deadline is None and (self._block_seconds > 0 or self._backlog.has_room())

    def flush(self, timeout_seconds: float) -> bool:
        """Write what waits now, without the usual delay.

        Returns:
            True only if every record accepted before the call is in the table: no more, once one was set aside or
            lost. False at the timeout, and as soon as it is clear that one can't get there.
        """
        with self._changed:
            self._backlog.close_gap()
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

    def stop(self, timeout_seconds: float) -> int:
        """Refuse new records, write what waits until the deadline, end the thread and close the exporter.

        Harmless when repeated, also from a signal's handler, whatever that has interrupted. Returns by the deadline,
        even where a server that doesn't answer holds the thread: that closes its connection when it is let go.

        Returns:
            How many accepted records were not written by then: they stay in the spool, or are lost where there is
            none, and are said to be.
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
            if self._backlog.unsettled():
                self._run()  # late in interpreter shutdown no thread can be started any more
            else:
                self._close()
        with self._changed:
            self._given_up = True
            left = self._backlog.unsettled()
        if first and left and self._thread is threading.current_thread():
            pass  # it will write what it can, once this call has returned
        elif first and left and self._spool is not None:
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
        are places in the spool that can't be read.
        """
        with self._changed:
            backlog, counts = self._backlog, self._counts
            left, parked = backlog.unsettled(), len(self._parking)
            lost = counts["lost"]
            if self._given_up and self._spool is None:  # it only gets there if a hanging server answers after all
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
            }

    def count_unreadable(self) -> None:
        """Count an audit span that could not become a record."""
        with self._changed:
            self._counts["unreadable"] += 1

    def after_fork(self) -> None:
        """Begin anew in a forked child: what the parent accepted is the parent's to write."""
        self._backlog.after_fork()
        self._begin()

    # What follows runs on the writer's thread, or is called with the lock held.

    def _accept(self, record: AuditRecord) -> str | None:
        """Put a record into the backlog, or count it and say why it is refused."""
        backlog = self._backlog
        if self._deadline is not None and not backlog.has_begun(record.id):
            self._counts["refused_shutdown"] += 1
            return "new audit records are refused: the pipeline is shut down"
        waiting = len(backlog)
        if not backlog.append(record):
            why = (
                f"{self._capacity} wait (max_queue_size)" if backlog.spool is None else f"the spool: {backlog.trouble}"
            )
            return f"new audit records are refused and counted in a gap record: {why}"
        if waiting == 0:
            self._oldest_since = self._clock()
            self._changed.notify_all()
        elif waiting + 1 == self._batch_size:
            self._changed.notify_all()
        if self._thread is None:
            self._start_thread()
        return None

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
        while True:
            self._tend()
            self._backlog.refill(self._batch_size)
            batch = self._next_batch()
            if batch is None:
                break
            if self._overflowed:
                self._overflowed = False
                self._troubles.report(
                    "parked",
                    "new audit records of tenants that can't be written are lost: "
                    f"{self._capacity // 2} wait (half of max_queue_size)",
                )
            if batch:
                self._backlog.load(batch)
                self._deliver(batch)
        self._close()

    def _close(self) -> None:
        self._delivery.close()
        with self._changed:
            self._backlog.close()
            self._ended = True
            self._changed.notify_all()

    def _tend(self) -> None:
        """Look after the spool, about once a second."""
        spool, now = self._spool, self._clock()
        if now < self._tend_at:
            return
        self._tend_at = now + _TEND_SECONDS
        with self._changed:
            self._backlog.close_gap()  # no more often, or a queue that is nearly full would leave a row for each record
        if spool is None:
            return
        try:
            spool.sync()
            if missing := spool.missing():
                with self._changed:
                    spool.put_back(missing)
                self._troubles.report("spool", "files of the spool were deleted or moved, and were written again")
            if now >= self._adopt_at and self._deadline is None:
                self._adopt_at = now + _ADOPT_SECONDS
                if found := self._backlog.adopt():
                    _logger.info("Audit records that ended processes have left are written now: %s.", ", ".join(found))
        except SpoolError as error:
            self._troubles.report("spool", f"the spool has trouble: {error}")
        if self._backlog.trouble is not None:
            self._troubles.report("spool", f"the spool has trouble: {self._backlog.trouble}")

    def _next_batch(self) -> list[Entry] | None:
        """Wait for records to write. None means that the thread shall end; an empty batch, to look again."""
        with self._changed:
            now = self._clock()
            if self._deadline is not None and now >= self._deadline:
                return None
            waiting = len(self._backlog)
            due = self._backlog.has_found() or (waiting > 0 and now >= self._batch_is_due())
            batch: list[Entry] = []
            if not due or now >= self._parked_rest_until:
                batch = self._parking.due(now, self._batch_size)
            if not batch and due:
                batch = self._take(now)
            if batch or self._overflowed or due:
                self._in_flight = batch
                return batch
            if not waiting and self._deadline is not None:
                return [] if self._backlog.close_gap() else None
            wake = min(self._batch_is_due() if waiting else float("inf"), self._parking.next_attempt())
            if self._spool is not None or self._backlog.has_gap:
                wake = min(wake, self._tend_at)
            self._changed.wait(None if wake == float("inf") else max(0.0, wake - now))
            return []

    def _batch_is_due(self) -> float:
        hurry = self._flushing or self._deadline is not None or len(self._backlog) >= self._batch_size
        return 0.0 if hurry else self._oldest_since + self._delay

    def _take(self, now: float) -> list[Entry]:
        taken = self._backlog.take(self._batch_size)
        self._oldest_since = now
        batch, overflow = self._parking.divert(taken, self._capacity // 2, self._backlog.drop)
        self._overflowed |= bool(overflow)
        self._counts["lost"] += len(overflow)
        self._settle(overflow)
        return batch

    def _deliver(self, batch: list[Entry]) -> None:
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
            passed = {entry.schema for entry in delivered.settled}
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
            self._settle(delivered.settled)
            self._in_flight = []

    def _settle(self, items: Sequence[Entry]) -> None:
        self._backlog.settle(items)
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
        candidates = [
            self._backlog.taken,
            self._parking.oldest(),
            self._in_flight[0].number if self._in_flight else None,
        ]
        return min(candidate for candidate in candidates if candidate is not None)

    def _is_decided(self, goal: int, flush: int) -> bool:
        if self._ended or self._oldest_unsettled() >= goal:
            return True
        under_way = self._backlog.taken < goal or (self._in_flight and self._in_flight[0].number < goal)
        return not under_way and self._parking.all_failed_for(flush, goal)
