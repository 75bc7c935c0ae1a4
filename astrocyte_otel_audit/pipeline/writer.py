"""The writer: a thread that takes records out of the backlog and doesn't rest until each is in the table."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline.backlog import Backlog, MemoryBacklog, Operation
from astrocyte_otel_audit.pipeline.captured import to_record
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.parking import Backoff, Numbered, Parking
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.record import AuditRecord

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
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._backlog = self._new_backlog()
        self._parking = Parking(self._parking_backoff)
        self._thread: threading.Thread | None = None
        #: Records accepted, taken out of the backlog, and done with, whatever became of them.
        self._accepted = self._taken = self._settled = 0
        self._in_flight: list[Numbered] = []
        self._oldest_since = 0.0
        #: Calls of `flush` so far, and those that wait now.
        self._flush = self._flushing = 0
        #: When draining ends, once `stop` was called.
        self._deadline: float | None = None
        self._counts: Counter[str] = Counter()
        self._troubles = Troubles(_logger, self._clock)

    def start(self) -> None:
        """Start the thread, which looks at the table at once: a mistake is reported before it delays a row."""
        with self._changed:
            self._start_thread()

    def submit(self, operation: Operation) -> bool:
        """Accept an operation, or refuse and count it. Never raises, never waits for Postgres."""
        with self._changed:
            if self._deadline is not None:
                self._counts["refused_shutdown"] += 1
                self._troubles.report("refused", "new audit records are refused: the pipeline is shut down")
                return False
            if self._accepted - self._settled >= self._capacity:
                self._counts["refused_full"] += 1
                self._troubles.report(
                    "refused", f"new audit records are refused and lost: {self._capacity} wait (max_queue_size)"
                )
                return False
            self._backlog.append(operation)
            self._accepted += 1
            waiting = len(self._backlog)
            if waiting == 1:
                self._oldest_since = self._clock()
                self._changed.notify_all()
            elif waiting == self._batch_size:
                self._changed.notify_all()
            if self._thread is None:
                self._start_thread()
            return True

    def has_room(self) -> bool:
        """Say whether a record submitted now would be accepted."""
        return self._deadline is None and self._accepted - self._settled < self._capacity

    def flush(self, timeout_seconds: float) -> bool:
        """Write what waits now, without the usual delay.

        Returns:
            True only if every record accepted before the call is in the table. False at the timeout, and as soon
            as it is clear that one can't get there: its tenant's table is missing, or it was set aside or lost.
        """
        with self._changed:
            goal, failed = self._accepted, self._failed()
            self._flush += 1
            flush = self._flush
            self._flushing += 1
            self._parking.expedite()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_decided(goal, flush), timeout_seconds)
            self._flushing -= 1
            return self._oldest_unsettled() >= goal and self._failed() == failed

    def stop(self, timeout_seconds: float) -> int:
        """Refuse new records, write what waits until the deadline, and end the thread. Harmless when repeated.

        Returns:
            How many accepted records were not written by then. They are lost, and said to be.
        """
        with self._changed:
            first = self._deadline is None
            if self._deadline is None:
                self._deadline = self._clock() + timeout_seconds
                self._parking.expedite()
                self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
        elif first and self._accepted > self._settled:
            self._run()  # late in interpreter shutdown no thread can be started any more
        left = self._accepted - self._settled
        if first and left:
            _logger.error("%d audit records could not be written before the shutdown's deadline and are lost.", left)
        return left

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process.

        `accepted`; of these `stored` in the table, `set_aside` (refused by it and kept beside it) and `lost`, and
        still open: `waiting` and `parked`. `refused_full` and `refused_shutdown` were never accepted.
        """
        with self._changed:
            parked = len(self._parking)
            counts = ("stored", "set_aside", "lost", "refused_full", "refused_shutdown")
            return {
                "accepted": self._accepted,
                "waiting": self._accepted - self._settled - parked,
                "parked": parked,
                **{name: self._counts[name] for name in counts},
            }

    def after_fork(self) -> None:
        """Begin anew in a forked child: what the parent accepted is the parent's to write."""
        self._begin()

    # What follows runs on the writer's thread, or is called with the lock held.

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._run, name="astrocyte-audit-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: `stop` will write on its caller's thread
            return
        self._thread = thread

    def _run(self) -> None:
        self._look_at_table()
        while batch := self._next_batch():
            self._deliver(batch)

    def _look_at_table(self) -> None:
        try:
            fault = self._exporter.check()
        except DatabaseUnavailableError as unavailable:
            self._troubles.report("database", f"no audit record can be written for now: {unavailable}")
        except BaseException as error:  # whatever it is, the first batch will meet it again
            self._troubles.report("database", f"the audit table can't be looked at ({type(error).__qualname__})")
        else:
            if fault is not None:
                self._troubles.report("table", f"no audit record can be written for now: {fault}")

    def _next_batch(self) -> list[Numbered]:
        """Wait for records to write. None at all means that the thread shall end."""
        with self._changed:
            while True:
                now = self._clock()
                batch = self._parking.due(now, self._batch_size)
                if not batch and len(self._backlog) and now >= self._batch_is_due():
                    batch = self._take(now)
                if batch:
                    self._in_flight = batch
                    return batch
                if not len(self._backlog):
                    if self._deadline is not None:
                        return []
                    due = self._parking.next_attempt()
                else:
                    due = min(self._batch_is_due(), self._parking.next_attempt())
                self._changed.wait(None if due == float("inf") else max(0.0, due - now))

    def _batch_is_due(self) -> float:
        hurry = self._flushing or self._deadline is not None or len(self._backlog) >= self._batch_size
        return 0.0 if hurry else self._oldest_since + self._delay

    def _take(self, now: float) -> list[Numbered]:
        operations = self._backlog.take(self._batch_size)
        taken = list(map(Numbered, itertools.count(self._taken), operations))
        self._taken += len(taken)
        self._oldest_since = now
        batch, overflow = self._parking.divert(taken, self._capacity // 2)
        if overflow:
            self._counts["lost"] += len(overflow)
            self._settle(overflow)
            self._troubles.report(
                "parked", f"audit records of tenants that can't be written are lost: {len(self._parking)} of them wait"
            )
        self._changed.notify_all()
        return batch

    def _deliver(self, batch: list[Numbered]) -> None:
        """Write a batch, however long it takes. Past the deadline it stays what it is, in flight."""
        records = [self._to_record(item.operation) for item in batch]
        attempt = 0
        while True:
            try:
                appended = self._exporter.write([record for record in records if record is not None])
                break
            except DatabaseUnavailableError as unavailable:
                trouble = str(unavailable)
            except BaseException as error:  # a thread that ends here would let the backlog grow in silence
                trouble = f"an unexpected {type(error).__qualname__}"
            self._troubles.report("database", f"audit records wait for Postgres: {trouble}")
            attempt += 1
            if not self._pause(self._backoff.delay(attempt)):
                return
        self._troubles.clear("database", "audit records are being written again")
        refused = {id(record) for _, parked in appended.parked.values() for record in parked}
        with self._changed:
            self._counts["stored"] += appended.stored
            self._counts["set_aside"] += len(appended.set_aside)
            self._counts["lost"] += len(appended.homeless) + records.count(None)
            parked = (
                [item for item, record in zip(batch, records, strict=True) if id(record) in refused] if refused else []
            )
            for schema in {item.operation.schema for item in batch}:
                if again := [item for item in parked if item.operation.schema == schema]:
                    self._parking.park(again, self._clock(), self._flush)
                else:
                    self._parking.release(schema)
            self._settle([item for item in batch if item not in parked] if parked else batch)
            self._in_flight = []
        for name in appended.schemas:
            self._troubles.clear(name, f"audit records of schema {name!r} are being written again")
        for name, (fault, _) in appended.parked.items():
            self._troubles.report(name, f"audit records of schema {name!r} wait: {fault}")
        for record, fault in appended.set_aside:
            _logger.error("Audit record %s (%r) was set aside: %s.", record.id, record.action, fault)
        for record, fault in appended.homeless:
            _logger.error(
                "Audit record %s (%r) could not even be set aside, and is lost: %s.", record.id, record.action, fault
            )

    def _to_record(self, operation: Operation) -> AuditRecord | None:
        try:
            return operation if isinstance(operation, AuditRecord) else to_record(operation)
        except Exception as error:  # a mistake in there must cost one record, not all of them
            self._troubles.report("record", f"an operation could not become a record ({type(error).__qualname__})")
            return None

    def _settle(self, items: Sequence[Numbered]) -> None:
        self._backlog.settle([item.operation for item in items])
        self._settled += len(items)
        self._changed.notify_all()

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt, unless a flush or the stop wants it now. False: the deadline has passed."""
        with self._changed:
            flush = self._flush
            draining = self._deadline is not None
            until = self._clock() + seconds
            if self._deadline is not None:
                until = min(until, self._deadline)
            self._changed.wait_for(
                lambda: self._flush != flush or (self._deadline is not None) != draining,
                max(0.0, until - self._clock()),
            )
            return self._deadline is None or self._clock() < self._deadline

    def _failed(self) -> int:
        return self._counts["set_aside"] + self._counts["lost"]

    def _oldest_unsettled(self) -> int:
        candidates = [self._taken, self._parking.oldest(), self._in_flight[0].number if self._in_flight else None]
        return min(candidate for candidate in candidates if candidate is not None)

    def _is_decided(self, goal: int, flush: int) -> bool:
        if self._oldest_unsettled() >= goal:
            return True
        under_way = self._taken < goal or (self._in_flight and self._in_flight[0].number < goal)
        return not under_way and self._parking.all_failed_for(flush, goal)
