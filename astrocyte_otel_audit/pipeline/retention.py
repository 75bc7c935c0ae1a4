"""`RetentionTask`: a thread that has expired records deleted, once an interval for all processes together."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline.run import Orders, Run, Runner
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.postgres.sweep import AuditSweeper
from astrocyte_otel_audit.retention import RetentionPolicy

_logger = logging.getLogger(__name__)
#: SQLSTATE of a right that is missing.
_NO_RIGHT: Final = "42501"
#: Of an interval: a run within it is enough for all processes. Not the whole of it, as no wait is that exact.
_ENOUGH: Final = 0.9


def _global_tracer() -> Tracer:
    return trace.get_tracer(attributes.SCOPE_NAME, __version__)


@dataclass(eq=False, slots=True)
class _Errand:
    """What tells the thread, or somebody's own run, to end."""

    is_scheduled: bool
    is_over: bool = False


class RetentionTask:
    """Deletes what is expired in every tenant's schema: a run now and then, on a thread of its own. Thread-safe.

    Of all processes that write to one database, one does a run in each interval.

    Args:
        sweeper: deletes.
        policy: says what is expired, when a run is due, and what it may take.
        tracer: returns the tracer of the provider that the processor is attached to; asked at every run.
        clock: says what expiry is reckoned from. By default the server's clock or this machine's, whichever is
            behind: one that runs ahead can't delete too much.
        schemas: these tenants only.
        draw: gives a random number from 0 to 1.
        monotonic: seconds.
    """

    def __init__(
        self,
        sweeper: AuditSweeper,
        policy: RetentionPolicy,
        *,
        tracer: Callable[[], Tracer] = _global_tracer,
        clock: Callable[[], datetime] | None = None,
        schemas: Sequence[str] | None = None,
        draw: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweeper = sweeper
        self._policy = policy
        self._tracer = tracer
        self._clock = clock
        self._schemas = schemas
        self._draw = draw
        self._monotonic = monotonic
        self._is_paused = False
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()  # reentrant, as a signal's handler may stop what it has interrupted
        self._changed = threading.Condition(self._lock)
        #: One run at a time: they share a connection.
        self._running = threading.RLock()
        self._thread: threading.Thread | None = None
        #: The thread's, unless it was told to end; and all that are under way.
        self._schedule: _Errand | None = None
        self._errands: set[_Errand] = set()
        self._counts: Counter[str] = Counter()
        # By a clock that stands still: what lasts is said once, and not again at every run.
        self._troubles = Troubles(_logger, lambda: 0.0)
        self._runner = Runner(
            self._sweeper,
            self._policy,
            tracer=self._tracer,
            clock=self._clock,
            schemas=self._schemas,
            monotonic=self._monotonic,
            troubles=self._troubles,
            counts=self._counts,
        )

    @property
    def policy(self) -> RetentionPolicy:
        """What it goes by."""
        return self._policy

    @property
    def is_started(self) -> bool:
        """Whether it has a thread that will do runs; no more, once that has stood down for want of rights."""
        return self._schedule is not None

    def start(self) -> None:
        """Start the thread; harmless where it runs already. The first run comes within the policy's jitter."""
        with self._lock:
            if self._schedule is not None:
                return
            errand = _Errand(is_scheduled=True)
            thread = threading.Thread(
                target=self._keep_on, args=(errand,), name="astrocyte-audit-retention", daemon=True
            )
            with suppress(RuntimeError):  # late in interpreter shutdown no thread can be started any more
                thread.start()
                self._thread, self._schedule = thread, errand
                self._errands.add(errand)

    def pause(self) -> None:
        """Let no run begin on the thread until `resume`; one that is under way ends after its batch."""
        self._set_paused(True)

    def resume(self) -> None:
        """Let runs begin on the thread again; one that was due meanwhile begins now."""
        self._set_paused(False)

    def stop(self, timeout_seconds: float = 30.0) -> bool:
        """End the thread, and after its batch any run that is under way. Harmless when repeated; it may start again.

        Returns:
            Whether nothing runs any more: False where a batch has not ended in time, and within a run.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            for errand in self._errands:
                errand.is_over = True
            self._schedule, thread = None, self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, timeout_seconds))
        if not self._running.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        self._running.release()
        return not self._errands

    def run(self, progress: Callable[[int], object] = lambda rows: None) -> Run:  # noqa: ARG005
        """Do a run now, on the calling thread, whoever else has just done one.

        Args:
            progress: told of the rows of each batch.

        Returns:
            What was done. A tenant's fault is in it, and raises nothing.

        Raises:
            DatabaseUnavailableError: the server can't be used now. What was deleted before is in the run's row.
        """
        errand = _Errand(is_scheduled=False)
        with self._running:
            with self._lock:
                self._errands.add(errand)
            try:
                tenants = self._runner.tenants()
                return self._runner.run(tenants, self._orders(errand, otel_context.get_current(), progress))
            except BaseException:
                self._counts["failed_runs"] += 1
                raise
            finally:
                with self._lock:
                    self._errands.discard(errand)
                self._close()

    def stats(self) -> dict[str, int]:
        """Return counts since the start of the process.

        `runs` that have begun, `failed_runs` that could not begin or were broken off, `rows_deleted` and
        `partitions_dropped`.
        """
        return {name: self._counts[name] for name in ("runs", "failed_runs", "rows_deleted", "partitions_dropped")}

    def after_fork(self) -> None:
        """Begin anew in a forked child, which has no thread, with a connection and a schedule of its own."""
        was_started = self._schedule is not None
        self._sweeper.after_fork()
        self._begin()
        if was_started:
            self.start()

    def _set_paused(self, is_paused: bool) -> None:
        with self._changed:
            self._is_paused = is_paused
            self._changed.notify_all()

    def _is_stopped(self, errand: _Errand) -> bool:
        return errand.is_over or (errand.is_scheduled and self._is_paused)

    def _orders(self, errand: _Errand, parent: Context, progress: Callable[[int], object]) -> Orders:
        def pause(seconds: float) -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped(errand), seconds)

        return Orders(parent, lambda: self._is_stopped(errand), pause, progress)

    def _close(self) -> None:
        with suppress(Exception):  # it is over all the same
            self._sweeper.close()  # for as long as an interval, a connection of its own is of more use to others

    # What follows runs on the thread.

    def _keep_on(self, errand: _Errand) -> None:
        seconds: float | None = self._jitter()
        while seconds is not None and self._wait(errand, seconds):
            with self._running:
                seconds = self._take_turn(errand)
        with self._lock:
            self._errands.discard(errand)
            if self._schedule is errand:
                self._schedule = None

    def _wait(self, errand: _Errand, seconds: float) -> bool:
        """Wait for that long, and for as long as it is paused. False where it is over."""
        with self._changed:
            self._changed.wait_for(lambda: errand.is_over, seconds)
            self._changed.wait_for(lambda: errand.is_over or not self._is_paused)
            return not errand.is_over

    def _take_turn(self, errand: _Errand) -> float | None:
        """Do a run, unless another process has done one. Never raises.

        Returns:
            Seconds until it is due again, or None where there is no use in that.
        """
        began = self._monotonic()
        try:
            tenants = self._runner.tenants()
            if tenants and all(tenant.fault and tenant.fault.sqlstate == _NO_RIGHT for tenant in tenants):
                self._stand_down()
                return None
            if rest := self._rest_of_interval():
                return rest + self._jitter()  # so that not all come at once when it is over
            # In no context: an instrumentation of threads may have given this one whatever was there at its start.
            self._runner.run(tenants, self._orders(errand, Context(), lambda rows: None))  # noqa: ARG005
        except BaseException as error:  # whatever it is: were this thread to end, the table would grow in silence
            self._counts["failed_runs"] += 1
            is_known = isinstance(error, DatabaseUnavailableError)
            reason = error if is_known else f"an unexpected {type(error).__qualname__}"
            self._troubles.report("run", f"expired audit records are not deleted, until a later run: {reason}")
        else:
            self._troubles.clear("run", "expired audit records are being deleted again")
        finally:
            self._close()
        return max(0.0, self._policy.interval_seconds - (self._monotonic() - began))

    def _stand_down(self) -> None:
        self._troubles.report(
            "rights",
            "expired audit records will not be deleted, as the role may delete from no tenant's table: GRANT it what "
            "`astrocyte-otel-audit migrate --roles` gives astrocyte_audit_sweeper, or name a connection of another "
            "role in OTEL_ASTROCYTE_AUDIT_RETENTION_DSN, and start again",
        )

    def _rest_of_interval(self) -> float:
        """Return for how many seconds more the last run of any process is enough; 0 where it isn't."""
        try:
            began = self._runner.last_run()
        except DatabaseUnavailableError as error:  # where it can't be read, each process does its own
            self._troubles.report("last run", f"whether another process deletes audit records can't be seen: {error}")
            return 0.0
        if began is None:
            return 0.0
        interval = self._policy.interval_seconds
        ago = (self._runner.now() - began).total_seconds()
        # A clock that runs ahead begins runs that are to come; one that is years ahead is not waited for.
        return min(interval, interval - ago) if abs(ago) < _ENOUGH * interval else 0.0

    def _jitter(self) -> float:
        return self._draw() * self._policy.jitter_seconds
