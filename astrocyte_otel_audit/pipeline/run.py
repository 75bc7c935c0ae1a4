"""One run of the retention: every tenant is swept, and rows say what became of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline.evidence import Evidence, error_type
from astrocyte_otel_audit.pipeline.exporter import suppressed_instrumentation
from astrocyte_otel_audit.pipeline.troubles import Troubles
from astrocyte_otel_audit.postgres import Fault, FaultClass
from astrocyte_otel_audit.postgres.faults import MENDED_BY_MIGRATING
from astrocyte_otel_audit.postgres.sweep import AuditSweeper, Swept, Tenant
from astrocyte_otel_audit.retention import ACTION, Cutoffs, RetentionPolicy

#: Names in one list of a row.
_MAX_NAMES: Final = 100


@dataclass(slots=True)
class Run:
    """What one run has done."""

    #: The policy at the instant that expiry was reckoned from.
    cutoffs: Cutoffs
    #: How many tenants there are, and what was done to each that it came to, those that can't be swept included.
    tenants: int
    swept: list[Swept] = field(default_factory=list)

    @property
    def total(self) -> Swept:
        """All of it as one; its names and faults say whose they are."""
        total = Swept("", is_finished=len(self.swept) == self.tenants)
        for each in self.swept:
            total.add(each.rows, each.oldest, each.newest)
            total.set_aside += each.set_aside
            total.moved += each.moved
            total.dropped += [f"{each.schema}.{name}" for name in each.dropped]
            total.made += [f"{each.schema}.{name}" for name in each.made]
            total.faults += [fault._replace(reason=f"{each.schema}: {fault.reason}") for fault in each.faults]
            total.is_busy |= each.is_busy
            total.is_finished &= each.is_finished
        return total


class Orders(NamedTuple):
    """How a run is to be done."""

    #: What the run's span is part of.
    parent: Context
    #: Whether somebody wants it to end.
    should_stop: Callable[[], bool]
    #: Waits between batches; told for how many seconds.
    pause: Callable[[float], object]
    #: Told of the rows of each batch.
    progress: Callable[[int], object]


class Runner:
    """Does runs, one at a time.

    Args:
        sweeper: deletes.
        policy: says what is expired, and what a run may take.
        tracer: returns the tracer of the provider that the processor is attached to; asked at every run.
        clock: says what expiry is reckoned from.
        schemas: these tenants only.
        monotonic: seconds.
        troubles: says what goes wrong.
        counts: of runs and of what is gone.
    """

    def __init__(
        self,
        sweeper: AuditSweeper,
        policy: RetentionPolicy,
        *,
        tracer: Callable[[], Tracer],
        clock: Callable[[], datetime] | None,
        schemas: Sequence[str] | None,
        monotonic: Callable[[], float],
        troubles: Troubles,
        counts: Counter[str],
    ) -> None:
        self._sweeper = sweeper
        self._policy = policy
        self._tracer = tracer
        self._clock = clock
        self._schemas = schemas
        self._monotonic = monotonic
        self._troubles = troubles
        self._counts = counts
        #: Where the next run begins, as the last one did not come to it.
        self._first = ""

    def tenants(self) -> list[Tenant]:
        """Return the tenants, and what keeps any from being swept; raises DatabaseUnavailableError."""
        with suppressed_instrumentation():
            return self._sweeper.tenants(self._schemas)

    def now(self) -> datetime:
        """Return what expiry is reckoned from; raises DatabaseUnavailableError."""
        if self._clock is not None:
            return self._clock()
        with suppressed_instrumentation():
            return min(self._sweeper.now(), datetime.now(UTC))

    def last_run(self) -> datetime | None:
        """Return when any process's last run began; raises DatabaseUnavailableError."""
        with suppressed_instrumentation():
            return self._sweeper.last_run()

    def run(self, tenants: Sequence[Tenant], orders: Orders) -> Run:
        """Sweep tenants, and leave a row.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        run = Run(self._policy.cutoffs(self.now()), len(tenants))
        self._counts["runs"] += 1
        evidence = self._evidence(self._sweeper.schema, orders.parent, _plan(self._policy, run.cutoffs))
        if evidence.receipt is None:
            self._troubles.report("evidence", "a run of the retention may leave no row: no pipeline has promised one")
        failed: str | None = None
        try:
            self._sweep_all(run, tenants, orders, evidence.context)
        except BaseException as error:
            failed = error_type(error)
            raise
        finally:
            names = [each.schema for each in run.swept]
            _end(evidence, run.total, {"schemas": names[:_MAX_NAMES], "schemas_swept": len(names)}, failed)
        return run

    def _sweep_all(self, run: Run, tenants: Sequence[Tenant], orders: Orders, context: Context) -> None:
        wanted, deadline = orders.should_stop, self._monotonic() + self._policy.budget_seconds

        def should_stop() -> bool:
            return wanted() or self._monotonic() >= deadline

        orders = orders._replace(should_stop=should_stop)
        away: DatabaseUnavailableError | None = None
        first, self._first = self._first, ""
        for tenant in sorted(tenants, key=lambda each: (each.schema < first, each.schema)):
            if should_stop():
                self._first = tenant.schema
                break
            try:
                self._sweep(run, tenant, orders, context)
                away = None
            except DatabaseUnavailableError as error:
                if away is not None:
                    raise
                away = error  # it may be a deadlock in this one's table: the next one tells
        if away is not None:
            raise away

    def _sweep(self, run: Run, tenant: Tenant, orders: Orders, context: Context) -> None:
        """Sweep one tenant; an error of its own is a fault of its own, and the others go on."""
        swept, gone, began_ns = Swept(tenant.schema), 0, time.time_ns()

        def progress(rows: int) -> None:
            nonlocal gone
            gone += rows
            orders.progress(rows)

        try:
            if tenant.fault is not None:
                swept = _broken_off(tenant.schema, 0, tenant.fault)
                return
            with suppressed_instrumentation():
                swept = self._sweeper.sweep(
                    tenant.schema,
                    run.cutoffs,
                    batch_size=self._policy.batch_size,
                    should_stop=orders.should_stop,
                    pause=orders.pause,
                    progress=progress,
                )
        except DatabaseUnavailableError as error:
            swept = _broken_off(tenant.schema, gone, Fault(FaultClass.RETRY, error.reason, error.sqlstate))
            raise
        except BaseException as error:
            swept = _broken_off(tenant.schema, gone, Fault(FaultClass.PARK, f"an unexpected {error_type(error)}"))
            if not isinstance(error, Exception):
                raise
        finally:
            self._settle(run, swept, began_ns, context)

    def _settle(self, run: Run, swept: Swept, began_ns: int, context: Context) -> None:
        run.swept.append(swept)
        self._counts["rows_deleted"] += swept.rows
        self._counts["partitions_dropped"] += len(swept.dropped)
        topic = ("schema", swept.schema)
        if swept.faults:
            reasons = "; ".join(map(str, swept.faults))
            self._troubles.report(topic, f"expired records of schema {swept.schema!r} are not all deleted: {reasons}")
        elif not swept.is_busy:
            self._troubles.clear(topic, f"expired records of schema {swept.schema!r} are being deleted again")
        if self._has_a_row(run, swept):
            part = self._evidence(swept.schema, context, _plan(self._policy, run.cutoffs), began_ns)
            _end(part, swept, {})

    def _has_a_row(self, run: Run, swept: Swept) -> bool:
        if run.tenants == 1 and swept.schema == self._sweeper.schema:
            return False  # the run's own says it all, in the same table
        is_missing = any(fault.sqlstate in MENDED_BY_MIGRATING for fault in swept.faults)
        if is_missing or not settings.is_identifier(swept.schema):
            return False  # it would wait for a table that isn't there
        return bool(swept.rows or swept.set_aside or swept.dropped or swept.faults)

    def _evidence(
        self, schema: str, parent: Context, metadata: Mapping[str, Any], start_ns: int | None = None
    ) -> Evidence:
        return Evidence(self._tracer, ACTION, schema=schema, parent=parent, metadata=metadata, start_ns=start_ns)


def _broken_off(schema: str, rows: int, fault: Fault) -> Swept:
    return Swept(schema, rows=rows, faults=[fault], is_finished=False)


def _plan(policy: RetentionPolicy, cutoffs: Cutoffs) -> dict[str, Any]:
    """Return what a row says of what a run is about to do."""
    plan: dict[str, Any] = {}
    for name, said in policy.described().items():
        if isinstance(said, Mapping):  # one attribute, however many there are: a span has room for so many only
            said = [f"{key}={settings.FOREVER if days is None else days}" for key, days in said.items()]
        plan[f"policy.{name}"] = said
    given = (cutoffs.default, *cutoffs.actions.values(), *cutoffs.banks.values())
    plan["cutoff.oldest"] = min((cutoff for cutoff in given if cutoff is not None), default=None)
    plan["cutoff.newest"] = cutoffs.newest
    return plan


def _end(evidence: Evidence, swept: Swept, metadata: Mapping[str, Any], failed: str | None = None) -> None:
    """Say in a row what was done; a fault makes it a failure, and so does the error that has ended the run."""
    said = {
        **metadata,
        "rows": swept.rows,
        "oldest": swept.oldest,
        "newest": swept.newest,
        "set_aside": swept.set_aside or None,
        "partitions_dropped": swept.dropped[:_MAX_NAMES],
        "partitions_made": swept.made[:_MAX_NAMES],
        "moved": swept.moved or None,
        "faults": [str(fault) for fault in swept.faults[:_MAX_NAMES]],
        "busy": swept.is_busy or None,
        "finished": swept.is_finished,
    }
    if failed is None and swept.faults:
        failed = swept.faults[0].sqlstate or "fault"
    evidence.end("success" if failed is None else "failure", said, failed)
