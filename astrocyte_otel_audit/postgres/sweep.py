"""`AuditSweeper`: deletes what a retention policy says is expired, one tenant's schema at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres.dropping import Kept, drop_expired
from astrocyte_otel_audit.postgres.faults import Fault, FaultClass, classify
from astrocyte_otel_audit.postgres.migrate import advisory_key, try_lock
from astrocyte_otel_audit.postgres.partitions import make_ahead
from astrocyte_otel_audit.postgres.reader import AuditReader
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.retention import ACTION, Cutoffs

#: Nobody is kept waiting behind a sweep that waits: it comes again.
_LOCK_TIMEOUT: Final = "2s"
#: A partition of hundreds of millions of rows is counted before it is dropped, while nobody waits.
_PARTITION_SECONDS: Final = 3_600.0
_NO_RIGHT: Final = Fault(
    FaultClass.PARK,
    "the role may not sweep it; GRANT it USAGE on the schema, and SELECT and DELETE on the table and its side table, "
    "as `astrocyte-otel-audit migrate --roles` does for astrocyte_audit_sweeper",
    "42501",
)
_NO_HOLDS: Final = Fault(
    FaultClass.PARK,
    "whether rows are held can't be seen: run `astrocyte-otel-audit migrate`, and GRANT SELECT on <table>_holds",
    "42P01",
)


class Tenant(NamedTuple):
    """A schema that holds the table."""

    schema: str
    #: Why it can't be swept, or None.
    fault: Fault | None = None


@dataclass(slots=True)
class Swept:
    """What a sweep has done to one schema."""

    schema: str
    #: Rows that are gone, those of dropped partitions included, and the start of the oldest and newest of them.
    rows: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None
    #: Set-aside records that are gone.
    set_aside: int = 0
    #: Names of partitions that were dropped, and of those that were made ahead.
    dropped: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    #: Rows that were moved out of the DEFAULT partition.
    moved: int = 0
    #: What kept it from doing more.
    faults: list[Fault] = field(default_factory=list)
    #: Somebody else is sweeping it at this moment, and goes on.
    is_busy: bool = False
    #: False where it was stopped before all was done.
    is_finished: bool = True

    def add(self, rows: int, oldest: datetime | None, newest: datetime | None) -> None:
        """Count rows that are gone."""
        self.rows += rows
        self.oldest = min((each for each in (self.oldest, oldest) if each is not None), default=None)
        self.newest = max((each for each in (self.newest, newest) if each is not None), default=None)


class Expiring(NamedTuple):
    """What a sweep would delete of one schema, by the part of the policy that says so."""

    schema: str
    #: ``default``, ``action <name>``, ``bank <name>`` or ``set aside``.
    rule: str
    rows: int
    oldest: datetime | None
    newest: datetime | None
    #: Partitions that would be dropped whole; their rows are counted.
    partitions: tuple[str, ...] = ()


class AuditSweeper(AuditReader):
    """The audit log in one database, to be swept. Its role needs SELECT and DELETE; for partitions, to own the table.

    Args:
        connections, schema, table, statement_timeout_seconds: as in `AuditReader`.
    """

    def now(self) -> datetime:
        """Return the server's time.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        [(now,)] = self._read("retention/now", {}, None)
        return now  # type: ignore[no-any-return]

    def tenants(self, schemas: Sequence[str] | None = None) -> list[Tenant]:
        """Return the schemas that hold the table, and what keeps any of them from being swept.

        Args:
            schemas: look for these only; one that doesn't hold the table has a fault.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        given = None if schemas is None else [settings.identifier(schema, "schemas") for schema in schemas]
        asked = {"table": self.table, "holds": f"{self.table}_holds", "schemas": given}
        found = {
            schema: Tenant(schema, (None if sees_holds else _NO_HOLDS) if may_sweep else _NO_RIGHT)
            for schema, may_sweep, sees_holds in self._read("retention/tenants", asked, None)
        }
        missing = Fault(FaultClass.PARK, "there is no audit log in it", "42P01")
        return [*found.values(), *(Tenant(schema, missing) for schema in given or () if schema not in found)]

    def last_run(self) -> datetime | None:
        """Return when any process's last run began, as its row in the default schema says; None where none does.

        Raises:
            DatabaseUnavailableError: the table can't be read.
        """
        [(began,)] = self._read("retention/last_run", {"action": ACTION}, None)
        return began  # type: ignore[no-any-return]

    def sweep(
        self,
        schema: str,
        cutoffs: Cutoffs,
        *,
        batch_size: int,
        should_stop: Callable[[], bool] = lambda: False,
        pause: Callable[[float], object] = time.sleep,
        progress: Callable[[int], object] = lambda rows: None,  # noqa: ARG005
    ) -> Swept:
        """Delete what is expired in one schema, in batches that are a transaction each.

        Of several at once one sweeps a schema, and the others leave it to that.

        Args:
            schema: the tenant's.
            cutoffs: what is expired.
            batch_size: rows of a batch.
            should_stop: asked before every batch.
            pause: waits between batches; told for how many seconds.
            progress: told of the rows of each batch.

        Returns:
            What was done. A fault of the schema's is in it, and raises nothing.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        swept = Swept(settings.identifier(schema, "schema"))
        work = _Work(swept, batch_size, should_stop, pause, progress)
        try:
            if not should_stop():
                self._look_after_partitions(cutoffs, work)
            for scan in _scans(cutoffs):
                for gone in self._batches("retention/delete", scan.parameters(cutoffs), work):
                    swept.add(len(gone), gone[0], gone[-1])
            if cutoffs.default is not None:
                for gone in self._batches("retention/delete_set_aside", {"cutoff": cutoffs.default}, work):
                    swept.set_aside += len(gone)
        except psycopg.Error as error:
            fault = classify(error)
            if fault.kind is FaultClass.RETRY:
                raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
            swept.faults.append(fault)
            swept.is_finished = False
        return swept

    def preview(self, schema: str, cutoffs: Cutoffs) -> list[Expiring]:
        """Return what `sweep` would delete of one schema.

        Raises:
            DatabaseUnavailableError: the table can't be read; the reason says what to do.
        """
        found = [
            Expiring(schema, scan.rule, *self._read("retention/count", scan.parameters(cutoffs), schema)[0])
            for scan in _scans(cutoffs)
        ]
        if cutoffs.default is not None:
            counted = self._read("retention/count_set_aside", {"cutoff": cutoffs.default}, schema)[0]
            found.append(Expiring(schema, "set aside", *counted))
        return found

    def _look_after_partitions(self, cutoffs: Cutoffs, work: _Work) -> None:
        """Make partitions ahead, and drop those that are expired whole. The others are thinned by batches."""
        swept, schema = work.swept, work.swept.schema
        with self._connection(_PARTITION_SECONDS) as connection:
            upkeep = make_ahead(
                connection, schema, self.table, cutoffs.now, oldest_kept=cutoffs.default, pause=work.pause
            )
            swept.made, swept.moved = upkeep.made, upkeep.moved
            swept.faults += upkeep.faults
            if cutoffs.default is None:
                return
            dropping = drop_expired(
                connection, schema, self.table, cutoffs.default,
                key=sweep_key(schema, self.table), kept=self._kept(schema, cutoffs), pause=work.pause,
            )  # fmt: skip
        swept.faults += [fault for fault in dropping.faults if fault not in swept.faults]
        for dropped in dropping.dropped:
            swept.dropped.append(dropped.name)
            swept.add(dropped.rows, dropped.oldest, dropped.newest)
            work.progress(dropped.rows)

    def _kept(self, schema: str, cutoffs: Cutoffs) -> Kept:
        """Return what outlives the default.

        Whether there is anything that can is a part of the condition, and so asked where the lock is held: a hold may
        be added at any time before. Where there is nothing, no partition is looked through for it.
        """
        parts = (statement(f"retention/{name}", schema, self.table) for name in ("has_exceptions", "kept"))
        return Kept(sql.SQL("({}) AND {}").format(*parts), exceptions(cutoffs))

    def _batches(self, name: str, parameters: dict[str, Any], work: _Work) -> Iterator[list[datetime]]:
        """Delete batch after batch until there is nothing left; yields the times of each one's rows, in order."""
        schema, limit = work.swept.schema, work.batch_size
        while work.swept.is_finished:
            if work.should_stop():
                work.swept.is_finished = False
                return
            began = time.monotonic()
            with self._sweeping(schema) as cursor:
                if cursor is None:
                    work.swept.is_busy, work.swept.is_finished = True, False
                    return
                cursor.execute(statement(name, schema, self.table), {**parameters, "limit": limit}, prepare=False)
                gone = sorted(row[0] for row in cursor)
            if gone:
                work.progress(len(gone))
                yield gone
            if len(gone) < limit:
                return
            parameters = {**parameters, "since": gone[-1]}  # what is before it is kept, or gone: not again through that
            # As long as it took, so that a sweep has half of a disk at most, and others come in between.
            work.pause(min(1.0, max(0.01, time.monotonic() - began)))

    @contextmanager
    def _sweeping(self, schema: str) -> Iterator[psycopg.Cursor[Any] | None]:
        """Give a transaction beside which nobody else sweeps the schema or adds a hold; None where somebody does."""
        with self._transaction() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT], prepare=False)
            yield cursor if try_lock(cursor, sweep_key(schema, self.table)) else None


class _Work(NamedTuple):
    """How a sweep is to be done, and what has come of it."""

    swept: Swept
    batch_size: int
    should_stop: Callable[[], bool]
    pause: Callable[[float], object]
    progress: Callable[[int], object]


class _Scan(NamedTuple):
    """One part of a policy: rows that an index finds, and that are expired unless something keeps them."""

    rule: str
    since: datetime | None
    cutoff: datetime
    action: str | None = None
    bank: str | None = None
    #: Actions with a scan of their own, before.
    seen: tuple[str, ...] = ()

    def parameters(self, cutoffs: Cutoffs) -> dict[str, Any]:
        """Return what the statements ask for."""
        return {
            "since": self.since, "cutoff": self.cutoff, "action": self.action, "bank": self.bank,
            "seen": list(self.seen), **exceptions(cutoffs),
        }  # fmt: skip


def _scans(cutoffs: Cutoffs) -> list[_Scan]:
    """Return the scans of a policy. An override that keeps for longer than the default needs none of its own."""
    default = cutoffs.default
    actions, banks = _newer(cutoffs.actions, default), _newer(cutoffs.banks, default)
    return [
        *([] if default is None else [_Scan("default", None, default)]),
        *(_Scan(f"action {name}", default, cutoff, action=name) for name, cutoff in actions.items()),
        *(_Scan(f"bank {name}", default, cutoff, bank=name, seen=tuple(actions)) for name, cutoff in banks.items()),
    ]


def _newer(cutoffs: Mapping[str, datetime | None], default: datetime | None) -> dict[str, datetime]:
    return {
        name: cutoff for name, cutoff in cutoffs.items() if cutoff is not None and (default is None or cutoff > default)
    }


def exceptions(cutoffs: Cutoffs) -> dict[str, Any]:
    """Return the parameters of ``retention/override.sql``."""
    return {
        "actions": list(cutoffs.actions), "action_cutoffs": [*map(as_cutoff, cutoffs.actions.values())],
        "banks": list(cutoffs.banks), "bank_cutoffs": [*map(as_cutoff, cutoffs.banks.values())],
    }  # fmt: skip


def as_cutoff(cutoff: datetime | None) -> str:
    """Return a cutoff as Postgres reads it: what is kept for ever began before all time."""
    return "-infinity" if cutoff is None else cutoff.isoformat()


def sweep_key(schema: str, table: str) -> int:
    """Return the key of the advisory lock that whoever sweeps a schema's table has, or adds a hold to it."""
    return advisory_key(f"sweep {schema}.{table}")
