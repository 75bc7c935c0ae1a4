"""Upkeep of a partitioned log: partitions are made ahead, and the DEFAULT partition is emptied into its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import psycopg

from astrocyte_otel_audit.postgres.faults import Fault, FaultClass, classify
from astrocyte_otel_audit.postgres.layout import Layout, Period, layout, name_of, period, periods
from astrocyte_otel_audit.postgres.migrate import alone_in, brief
from astrocyte_otel_audit.postgres.statements import statement

#: How many periods after the current one have their partitions already.
AHEAD: Final = 7
#: Writers queue behind whoever waits for a lock of the whole table, so nobody waits for longer.
SHORTEST_LOCK_SECONDS: Final = 0.2
ATTEMPTS: Final = 5
NOT_OWNER: Final = Fault(
    FaultClass.PARK, "only the table's owner can make and drop its partitions; let retention's role be a member of it"
)

_PAUSE_SECONDS: Final = 0.5
_NO_UNIT: Final = Fault(
    FaultClass.PARK, "the table is not partitioned by the day, week or month of started_at; make its partitions as ever"
)
#: What passes. A check is violated where a record came into the DEFAULT partition while its own was made.
_PASSING: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.CheckViolation,
)

T = TypeVar("T")


@dataclass(slots=True)
class Upkeep:
    """What `make_ahead` has done."""

    #: Names of new partitions.
    made: list[str] = field(default_factory=list)
    #: Rows that have left the DEFAULT partition.
    moved: int = 0
    faults: list[Fault] = field(default_factory=list)


def make_ahead(
    connection: psycopg.Connection[Any],
    schema: str,
    table: str,
    now: datetime,
    *,
    ahead: int = AHEAD,
    oldest_kept: datetime | None = None,
    lock_timeout_seconds: float = SHORTEST_LOCK_SECONDS,
    attempts: int = ATTEMPTS,
    pause: Callable[[float], object] = time.sleep,
) -> Upkeep:
    """Make the partitions that the next records go to, and empty the DEFAULT partition into partitions of their own.

    Each is a transaction of its own; any number of processes may do this at once. Of a plain table nothing is made.
    Records that begin after the last partition stay in DEFAULT until their time comes.

    Args:
        connection: not inside a transaction, with autocommit; as the table's owner.
        schema: where the table is.
        table: name of the table.
        now: the present time, better the server's.
        ahead: periods after the current one.
        oldest_kept: what ends before it gets no partition; by default, what ends before the oldest one begins.
        lock_timeout_seconds: how long to wait for one lock, and writers behind it.
        attempts: how often to try each.
        pause: waits between attempts; told for how many seconds.

    Returns:
        What was done, with a fault for every partition that could not be made.

    Raises:
        psycopg.Error: the connection is broken.
    """
    result = Upkeep()
    patience = Patience(connection, result.faults, attempts, pause)

    def read() -> tuple[Layout, list[Period]] | None:
        with brief(connection, lock_timeout_seconds) as cursor:
            found = layout(cursor, schema, table)
            if found is None or found.unit is None or not found.is_owner:
                return found and (found, [])
            return found, _wanted(cursor, schema, table, found, now, ahead, oldest_kept)

    if (seen := patience.get(table, read)) is None:
        return result
    found, wanted = seen
    if found.unit is None or not found.is_owner:
        result.faults.append(_NO_UNIT if found.unit is None else NOT_OWNER)
        return result
    for each in wanted:
        name = name_of(table, found.unit, each[0])
        moved = patience.get(name, lambda: _make(connection, schema, table, name, each, lock_timeout_seconds))  # noqa: B023
        if moved is not None:
            result.made.append(name)
            result.moved += moved
    return result


def create(cursor: psycopg.Cursor[Any], schema: str, table: str, owner: str, name: str, bounds: Period) -> None:
    """Make a partition, which is its log's owner's, and nobody else's to use but through the log."""
    lower, upper = (bound.isoformat() for bound in bounds)
    make = statement("partitions/make", schema, table, partition=name, owner=owner, lower=lower, upper=upper)
    cursor.execute(make, prepare=False)
    make_private(cursor, schema, table, name)


def create_default(cursor: psycopg.Cursor[Any], schema: str, table: str, owner: str, name: str) -> None:
    """Make the DEFAULT partition, likewise."""
    cursor.execute(statement("partitions/make_default", schema, table, partition=name, owner=owner), prepare=False)
    make_private(cursor, schema, table, name)


def make_private(cursor: psycopg.Cursor[Any], schema: str, table: str, name: str) -> None:
    """Take away all rights on a table that its owner has not."""
    revoke = statement("partitions/make_private", schema, table, partition=name)
    for (text,) in cursor.execute(revoke, prepare=False).fetchall():
        cursor.execute(text.encode(), prepare=False)


def tried(work: Callable[[], T], attempts: int, pause: Callable[[float], object]) -> T:
    """Return what some work does, once nobody is in its way.

    Raises:
        psycopg.Error: it can't be done, or not in so many attempts.
    """
    for attempt in range(1, attempts):
        try:
            return work()
        except _PASSING:
            pause(_PAUSE_SECONDS * attempt)
    return work()


@dataclass(slots=True)
class Patience:
    """Tries things one after the other, and keeps what comes in between as faults."""

    connection: psycopg.Connection[Any]
    faults: list[Fault]
    attempts: int
    pause: Callable[[float], object]

    def get(self, name: str, work: Callable[[], T]) -> T | None:
        """Return what some work does, or None where there is a fault more."""
        try:
            return tried(work, self.attempts, self.pause)
        except psycopg.Error as error:
            if self.connection.closed:
                raise
            if isinstance(error, psycopg.errors.LockNotAvailable):
                self.attempts = 1  # whoever is in the way of one is likely to be in the way of the others
            fault = classify(error)
            self.faults.append(fault._replace(reason=f"{name}: {fault.reason}"))
        return None


def _wanted(
    cursor: psycopg.Cursor[Any],
    schema: str,
    table: str,
    found: Layout,
    now: datetime,
    ahead: int,
    oldest_kept: datetime | None,
) -> list[Period]:
    """Return the periods that have no partition, and should: from the current one on, and those of strays."""
    if found.unit is None:
        return []
    chosen = list(periods(found.unit, now, ahead + 1))
    if found.default is not None:
        beginning = datetime.min.replace(tzinfo=UTC)
        oldest = oldest_kept or min(each.lower or beginning for each in found.bounded)
        strays = statement("partitions/strays", schema, table, unit=found.unit, default=found.default)
        horizon = chosen[-1][1]
        chosen += [period(found.unit, start) for (start,) in cursor.execute(strays, [oldest, horizon], prepare=False)]
    return [bounds for bounds in dict.fromkeys(chosen) if not found.overlaps(*bounds)]


def _make(
    connection: psycopg.Connection[Any], schema: str, table: str, name: str, bounds: Period, lock_timeout_seconds: float
) -> int | None:
    """Make one partition, and return how many rows went there from DEFAULT; None where it has been made meanwhile."""
    with alone_in(connection, schema, lock_timeout_seconds) as cursor:
        found = layout(cursor, schema, table)
        if found is None or found.overlaps(*bounds):
            return None
        has_strays = False
        if found.default is not None:
            look = statement("partitions/has_strays", schema, table, default=found.default)
            ((has_strays,),) = cursor.execute(look, bounds, prepare=False).fetchall()
        if has_strays:
            lower, upper = (bound.isoformat() for bound in bounds)
            move = statement("partitions/move_out", schema, table, lower=lower, upper=upper)
            cursor.execute(move, prepare=False)
        create(cursor, schema, table, found.owner, name, bounds)
        if not has_strays:
            return 0
        return cursor.execute(statement("partitions/move_in", schema, table), prepare=False).rowcount
