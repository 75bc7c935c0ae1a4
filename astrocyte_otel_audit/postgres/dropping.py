"""Expiry of a partitioned log: partitions whose records are expired are dropped whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg import sql

from astrocyte_otel_audit.postgres.faults import Fault
from astrocyte_otel_audit.postgres.layout import Layout, layout, mark
from astrocyte_otel_audit.postgres.migrate import brief, try_lock
from astrocyte_otel_audit.postgres.partitions import ATTEMPTS, NOT_OWNER, SHORTEST_LOCK_SECONDS, Patience
from astrocyte_otel_audit.postgres.statements import statement


class Kept(NamedTuple):
    """What must not be dropped."""

    #: A condition on a row ``l`` of the log, with named placeholders.
    condition: sql.Composable = sql.SQL("false")
    parameters: Mapping[str, Any] = MappingProxyType({})


class Dropped(NamedTuple):
    """A partition that is gone."""

    name: str
    #: Rows that are gone with it, and the start of the oldest and newest of them.
    rows: int
    oldest: datetime | None
    newest: datetime | None
    #: Rows that have come to be kept while it was dropped, and are in the log.
    put_back: int


@dataclass(slots=True)
class Dropping:
    """What `drop_expired` has done."""

    dropped: list[Dropped] = field(default_factory=list)
    #: Names of expired partitions that hold what is kept.
    kept: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def drop_expired(
    connection: psycopg.Connection[Any],
    schema: str,
    table: str,
    cutoff: datetime,
    *,
    key: int,
    kept: Kept = Kept(),
    lock_timeout_seconds: float = SHORTEST_LOCK_SECONDS,
    attempts: int = ATTEMPTS,
    pause: Callable[[float], object] = time.sleep,
) -> Dropping:
    """Drop the partitions that end by the cutoff, each whole and in no time, but for those that hold what is kept.

    A partition is detached, and then dropped in a transaction of its own: what has come to be kept in between is put
    back, into DEFAULT. Where a process dies in between, the next run goes on. Of a plain table nothing is dropped, nor
    is the newest partition.

    Args:
        connection: not inside a transaction, with autocommit; as the table's owner.
        schema: where the table is.
        table: name of the table.
        cutoff: records that began before it are expired.
        key: of the advisory lock that whoever deletes rows of this table takes. Where somebody else has it, the
            partition is passed over.
        kept: which rows are not expired all the same.
        lock_timeout_seconds: how long to wait for one lock, and writers behind it.
        attempts: how often to try each.
        pause: waits between attempts; told for how many seconds.

    Returns:
        What was done, with a fault for every partition that could not be dropped.

    Raises:
        psycopg.Error: the connection is broken.
    """
    result = Dropping()
    patience = Patience(connection, result.faults, attempts, pause)
    dropper = _Dropper(connection, schema, table, key, kept, lock_timeout_seconds)
    found = patience.get(table, dropper.layout)
    if found is None:
        return result
    expired = found.expired(cutoff)
    if (expired or found.leftovers) and not found.is_owner:
        result.faults.append(NOT_OWNER)
        return result
    for name in [*found.leftovers, *expired]:
        if name in expired:
            outcome = patience.get(name, lambda: dropper.detach(name))  # noqa: B023
            if outcome == "kept":
                result.kept.append(name)
            if outcome != "detached":
                continue
        dropped = patience.get(name, lambda: dropper.drop(name))  # noqa: B023
        if dropped is not None:
            result.dropped.append(dropped)
    return result


@dataclass(frozen=True, slots=True)
class _Dropper:
    connection: psycopg.Connection[Any]
    schema: str
    table: str
    key: int
    kept: Kept
    lock_timeout_seconds: float

    def layout(self) -> Layout | None:
        with brief(self.connection, self.lock_timeout_seconds) as cursor:
            return layout(cursor, self.schema, self.table)

    def detach(self, name: str) -> Literal["detached", "kept", "busy"]:
        with self._alone() as cursor:
            if cursor is None or (found := layout(cursor, self.schema, self.table)) is None:
                return "busy"
            if name not in {each.name for each in found.partitions}:
                return "busy"  # it was, and has been seen to
            if self._execute(cursor, "SELECT EXISTS (SELECT FROM {name} AS l WHERE {kept})", name).fetchall()[0][0]:
                return "kept"
            detach = statement("partitions/detach", self.schema, self.table, partition=name, mark=mark(self.table))
            cursor.execute(detach, prepare=False)
            return "detached"

    def drop(self, name: str) -> Dropped | None:
        with self._alone() as cursor:
            found = None if cursor is None else layout(cursor, self.schema, self.table)
            if cursor is None or found is None or name not in found.leftovers:
                return None
            # Counted first: what comes to be kept just now is put back all the same.
            count = "SELECT count(*), min(started_at), max(started_at) FROM {name} AS l WHERE ({kept}) IS NOT TRUE"
            ((rows, oldest, newest),) = self._execute(cursor, count, name).fetchall()
            columns = cursor.execute(
                statement("partitions/columns", self.schema, self.table, partition=name), prepare=False
            )
            listed = sql.SQL(", ").join(sql.Identifier(column) for (column,) in columns)
            put_back = (
                "INSERT INTO {log} ({columns}) SELECT {columns} FROM {name} AS l WHERE {kept} ON CONFLICT DO NOTHING"
            )
            back = self._execute(cursor, put_back, name, columns=listed).rowcount
            cursor.execute(statement("partitions/drop", self.schema, self.table, partition=name), prepare=False)
        return Dropped(name, rows, oldest, newest, back)

    def _execute(
        self, cursor: psycopg.Cursor[Any], text: str, name: str, **names: sql.Composable
    ) -> psycopg.Cursor[Any]:
        query = sql.SQL(text).format(
            log=sql.Identifier(self.schema, self.table),
            name=sql.Identifier(self.schema, name),
            kept=self.kept.condition,
            **names,
        )
        return cursor.execute(query, self.kept.parameters, prepare=False)

    @contextmanager
    def _alone(self) -> Iterator[psycopg.Cursor[Any] | None]:
        """Give a transaction beside which nobody deletes rows of this log, or None."""
        with brief(self.connection, self.lock_timeout_seconds) as cursor:
            yield cursor if try_lock(cursor, self.key) else None
