"""The layout of a partitioned log: by the UTC day, ISO week or month of its records' start, and a DEFAULT partition.

DEFAULT takes what no other one does, so that no record is ever refused for want of a partition. Which of the three
units it is, the newest partitions say: there is no other state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, get_args

import psycopg

from astrocyte_otel_audit.postgres.statements import statement

Unit = Literal["day", "week", "month"]
Period = tuple[datetime, datetime]

_UNITS: Final[tuple[Unit, ...]] = get_args(Unit)
_SUFFIXES: Final[Mapping[Unit, str]] = {"day": "p%Y%m%d", "week": "w%Y%m%d", "month": "m%Y%m"}


class Partition(NamedTuple):
    """A partition of the log, from `lower` on and before `upper`."""

    name: str
    #: None: from the beginning of time.
    lower: datetime | None
    #: None: to its end.
    upper: datetime | None
    #: It takes what no other one does, and has no bounds.
    is_default: bool = False


class Layout(NamedTuple):
    """What partitions a log has."""

    #: Oldest first, the DEFAULT partition last.
    partitions: list[Partition]
    #: How long a new partition shall be; None where no partition is of a length that we know.
    unit: Unit | None
    owner: str
    #: Whether the connecting role may do what the owner may.
    is_owner: bool
    #: Tables that were detached to be dropped, by a process that did not come so far.
    leftovers: list[str]

    @property
    def bounded(self) -> list[Partition]:
        """All but the DEFAULT partition."""
        return [each for each in self.partitions if not each.is_default]

    @property
    def default(self) -> str | None:
        """Name of the DEFAULT partition."""
        return next((each.name for each in self.partitions if each.is_default), None)

    def overlaps(self, lower: datetime, upper: datetime) -> bool:
        """Whether a bounded partition takes records of a period."""
        return any(
            (each.lower is None or each.lower < upper) and (each.upper is None or each.upper > lower)
            for each in self.bounded
        )

    def expired(self, cutoff: datetime) -> list[str]:
        """Return the names of partitions that end by the cutoff, but for the newest, which says what unit is next."""
        ended = [each for each in self.bounded if each.upper is not None]
        newest = max(
            (each for each in ended if each.lower is not None), key=lambda each: each.upper or cutoff, default=None
        )
        return [each.name for each in ended if each.upper is not None and each.upper <= cutoff and each != newest]


def period(unit: Unit, instant: datetime) -> Period:
    """Return begin and end of the UTC day, ISO week or month that an instant lies in. The end is the next one's begin.

    Args:
        unit: which.
        instant: with a time zone.
    """
    day = instant.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "day":
        return day, day + timedelta(days=1)
    if unit == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    first = day.replace(day=1)
    return first, (first + timedelta(days=31)).replace(day=1)


def periods(unit: Unit, instant: datetime, count: int) -> Iterator[Period]:
    """Yield the period that an instant lies in, and those after it."""
    for _ in range(count):
        lower, instant = period(unit, instant)
        yield lower, instant


def name_of(table: str, unit: Unit, instant: datetime) -> str:
    """Return the name of the partition for the period that an instant lies in."""
    return f"{table}_{period(unit, instant)[0].strftime(_SUFFIXES[unit])}"


def layout(cursor: psycopg.Cursor[Any], schema: str, table: str) -> Layout | None:
    """Return what partitions a log has, from the catalog; None of a plain table, or of none at all.

    Args:
        cursor: a plain one, in a transaction.
        schema: where the table is.
        table: name of the table.

    Raises:
        psycopg.Error: as it comes.
    """
    # What prints a bound and what reads it again need a style and a zone that lose nothing.
    cursor.execute("SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true)", prepare=False)
    found = cursor.execute(statement("partitions/table", schema, table), prepare=False).fetchall()
    if not found or not found[0][0]:
        return None
    _, is_by_start, owner, is_owner = found[0]
    if not is_by_start:  # not for us to look after
        return Layout([], None, owner, is_owner, [])
    attached = cursor.execute(statement("partitions/attached", schema, table), prepare=False)
    partitions = [Partition(*row) for row in attached]
    leftovers = cursor.execute(statement("partitions/leftovers", schema, table, mark=mark(table)), prepare=False)
    return Layout(partitions, _unit(partitions), owner, is_owner, [name for (name,) in leftovers])


def mark(table: str) -> str:
    """Return the comment on a table that is detached to be dropped."""
    return f"astrocyte-otel-audit: was a partition of {table}, and is about to be dropped"


def _unit(partitions: list[Partition]) -> Unit | None:
    for each in reversed(partitions):
        for unit in _UNITS:
            if each.lower is not None and (each.lower, each.upper) == period(unit, each.lower):
                return unit
    return None
