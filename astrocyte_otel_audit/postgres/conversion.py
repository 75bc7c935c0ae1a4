"""Conversion of a plain log into a partitioned one, while it is written and read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from astrocyte_otel_audit.errors import AuditError
from astrocyte_otel_audit.postgres.layout import Unit, period
from astrocyte_otel_audit.postgres.migrate import brief
from astrocyte_otel_audit.postgres.partitions import ATTEMPTS, tried
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.postgres.switch import Target, switch

#: What a disk reads in a second, said with caution.
_BYTES_A_SECOND: Final = 200_000_000
_NOBODY: Final = "nobody"


class ConversionError(AuditError):
    """The table can't be partitioned; the message says why. Its rows are where they were."""


class Step(NamedTuple):
    """One step of a conversion, in words."""

    does: str
    #: Who has to wait for it, and for about how long.
    waits: str


class Plan(NamedTuple):
    """What `convert` would do."""

    #: Rows of the table, as the server estimates them, and bytes of it and its indexes.
    rows: int
    bytes: int
    #: In order; none where it is partitioned already, or can't be.
    steps: list[Step]
    #: What keeps it from being converted.
    obstacles: list[str]
    is_partitioned: bool


def plan(connection: psycopg.Connection[Any], schema: str, table: str, unit: Unit) -> Plan:
    """Return what `convert` would do, and do nothing.

    Args:
        connection: not inside a transaction, with autocommit.
        schema: where the table is.
        table: name of the table.
        unit: how long a partition shall be.

    Raises:
        ConversionError: there is no such table.
        psycopg.Error: any other; `faults.classify` says what it means.
    """
    preparation = _Preparation(connection, schema, table, unit)
    found = preparation.found
    if found.is_partitioned or found.obstacles:
        return Plan(found.rows, found.bytes, [], found.obstacles, found.is_partitioned)
    if preparation.is_empty():
        replace = Step("put a partitioned table in the place of the empty one", "writers and readers, for milliseconds")
        return Plan(0, found.bytes, [replace], [], False)
    day = f"{preparation.target.boundary:%Y-%m-%d}"
    steps = [Step("build indexes on (started_at, id) and on (id), concurrently", _NOBODY)]
    attach = f"make a partitioned table, of which the old one is the partition of all that begins before {day}"
    waits = "writers and readers, for milliseconds"
    if preparation.has_beyond():
        attach += ", and move the rows that begin later"
        waits = f"writers and readers, for about {1 + found.bytes // _BYTES_A_SECOND} s, as the table is read once"
    else:
        steps.append(Step(f"check that all rows begin before {day}; meanwhile others are refused", _NOBODY))
    return Plan(found.rows, found.bytes, [*steps, Step(attach, waits)], [], False)


def convert(
    connection: psycopg.Connection[Any],
    schema: str,
    table: str,
    unit: Unit,
    *,
    lock_timeout_seconds: float = 5.0,
    attempts: int = ATTEMPTS,
    progress: Callable[[str], object] = lambda step: None,  # noqa: ARG005
    pause: Callable[[float], object] = time.sleep,
) -> list[str]:
    """Make a plain log a partitioned one. Safe to repeat, also after it was killed; no row is lost at any point.

    The old table becomes the partition of all that begins before the end of the next period; new ones follow it.
    Whoever has written or read the log goes on, with the same rights. While the rows are checked, which makes nobody
    wait, a record that begins after that end is refused by the check.

    Args:
        connection: not inside a transaction, with autocommit; as the table's owner.
        schema: where the table is.
        table: name of the table.
        unit: how long a partition shall be.
        lock_timeout_seconds: how long to wait for one lock, and writers behind it.
        attempts: how often to try what needs one.
        progress: told of each step when it is done.
        pause: waits between attempts; told for how many seconds.

    Returns:
        The steps that were done now; none where the table is partitioned already.

    Raises:
        ConversionError: the table can't be partitioned as it is.
        psycopg.Error: any other; `faults.classify` says what it means.
    """
    preparation = _Preparation(connection, schema, table, unit, lock_timeout_seconds)
    if preparation.found.is_partitioned:
        return []
    if preparation.found.obstacles:
        raise ConversionError(f"the table can't be partitioned: {'; '.join(preparation.found.obstacles)}")
    steps: list[str] = []

    def done(step: str) -> None:
        steps.append(step)
        progress(step)

    def replace() -> str | None:
        return switch(connection, preparation.target, lock_timeout_seconds)

    with preparation.unchecked_on_failure():
        replaced = tried(replace, attempts, pause) if preparation.is_empty() else None
        if replaced is None:
            for step in preparation.indexes():
                done(step)
            done(tried(preparation.check, attempts, pause))
            replaced = tried(replace, attempts, pause)
        if replaced is None:
            raise ConversionError("somebody else has changed the table meanwhile; repeat this")
    done(replaced)
    return steps


class _Found(NamedTuple):
    """A table that somebody wants to convert."""

    is_partitioned: bool
    rows: int
    bytes: int
    now: datetime
    obstacles: list[str]


class _Preparation:
    """What can be done before anybody has to wait."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str,
        table: str,
        unit: Unit,
        lock_timeout_seconds: float = 5.0,
    ) -> None:
        self._connection = connection
        self._lock_seconds = lock_timeout_seconds
        self.target = Target(schema, table, unit, datetime.min, datetime.min)
        rows = self._ask("convertible", before=self.target.before, default=self.target.default, pkey=self.target.pkey)
        if not rows:
            raise ConversionError("the table does not exist; run `astrocyte-otel-audit migrate`")
        self.found = _Found(*rows[0])
        boundary = period(unit, period(unit, self.found.now)[1])[1]
        self.target = self.target._replace(now=self.found.now, boundary=boundary)

    def is_empty(self) -> bool:
        """Whether there is no row."""
        return bool(self._ask("is_empty")[0][0])

    def has_beyond(self) -> bool:
        """Whether some row begins after what the old table shall hold."""
        return bool(self._ask("has_beyond", boundary=self.target.boundary.isoformat())[0][0])

    def indexes(self) -> Iterator[str]:
        """Build the indexes that the partitioned table will have and the old one has not; yields what was done."""
        for name, kind, told in (
            (self.target.pkey, "pkey", "(started_at, id)"),
            (self.target.id_index, "id", "(id)"),
        ):
            usable, is_building = self._there("index").get(name, (None, False))
            if is_building:
                raise ConversionError("an index of the table is being built; is somebody else converting it?")
            if usable:
                continue
            if usable is False:  # left by one who was interrupted
                self._execute("unbuild", index=name)
            self._execute(f"build_{kind}", index=name)
            yield f"built an index on {told}"

    def check(self) -> str:
        """Let the server prove that no row begins after the boundary, so that it need not look once others wait."""
        target = self.target
        for stale in self._there("constraint").keys() - {target.check}:
            self._locking("uncheck", check=stale)
        if self.has_beyond():
            self._locking("uncheck", check=target.check)
            return "found rows that begin later, which are to be moved"
        boundary = target.boundary.isoformat()
        if target.check not in self._there("constraint"):
            self._locking("check", check=target.check, boundary=boundary)
        self._execute("validate", check=target.check)
        return f"checked that all rows begin before {target.boundary:%Y-%m-%d}"

    @contextmanager
    def unchecked_on_failure(self) -> Iterator[None]:
        """Leave no check behind: as time goes on, it would refuse every record."""
        try:
            yield
        except BaseException:
            with suppress(psycopg.Error):
                for name in self._there("constraint"):
                    self._locking("uncheck", check=name)
            raise

    def _there(self, kind: str) -> dict[str, tuple[bool, bool]]:
        found = self._ask("prepared", before=self.target.before)
        return {name: (usable, is_building) for name, what, usable, is_building in found if what == kind}

    def _ask(self, name: str, **names: str) -> list[tuple[Any, ...]]:
        with brief(self._connection, self._lock_seconds) as cursor:
            return cursor.execute(self._statement(name, names), prepare=False).fetchall()

    def _locking(self, name: str, **names: str) -> None:
        with brief(self._connection, self._lock_seconds) as cursor:
            cursor.execute(self._statement(name, names), prepare=False)

    def _execute(self, name: str, **names: str) -> None:
        # Not in a transaction: it would have to wait for itself, or keep its locks for as long as it works.
        self._connection.execute(self._statement(name, names), prepare=False)

    def _statement(self, name: str, names: dict[str, str]) -> sql.Composed:
        return statement(f"partitions/{name}", self.target.schema, self.target.table, **names)
