"""The one step of a conversion for which others wait: a partitioned table takes the place of the plain one."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from astrocyte_otel_audit.postgres.layout import Unit, name_of, periods
from astrocyte_otel_audit.postgres.migrate import alone_in
from astrocyte_otel_audit.postgres.partitions import AHEAD, create, create_default, make_private
from astrocyte_otel_audit.postgres.statements import statement


class Target(NamedTuple):
    """What a plain table shall become."""

    schema: str
    table: str
    unit: Unit
    #: The server's time.
    now: datetime
    #: What begins before it stays in the old table.
    boundary: datetime

    @property
    def before(self) -> str:
        """Name of the old table, once it is a partition. Those of all that is prepared on it begin so."""
        return f"{self.table}_before"

    @property
    def default(self) -> str:
        """Name of the DEFAULT partition."""
        return f"{self.table}_default"

    @property
    def pkey(self) -> str:
        """Name of the index that becomes the old table's primary key."""
        return f"{self.before}_pkey"

    @property
    def id_index(self) -> str:
        """Name of the index on the old table's ids alone."""
        return f"{self.before}_id"

    @property
    def check(self) -> str:
        """Name of the constraint that proves the boundary, and says which."""
        return f"{self.before}_{self.boundary:%Y%m%d}"


def switch(connection: psycopg.Connection[Any], target: Target, lock_timeout_seconds: float) -> str | None:
    """Put a partitioned table in the place of the plain one, in one transaction.

    An empty table is dropped. Any other becomes a partition, which costs no more than entries in the catalog: its
    indexes match those of the new table, and its constraint proves that no row is beyond its bound.

    Args:
        connection: not inside a transaction, with autocommit; as the table's owner.
        target: what it shall become.
        lock_timeout_seconds: how long to wait for one lock.

    Returns:
        What was done; None where it can't be, as there are rows, and nothing is prepared for them.

    Raises:
        psycopg.Error: as it comes.
    """
    with alone_in(connection, target.schema, lock_timeout_seconds) as cursor:
        return _Switch(cursor, target).run()


class _Switch:
    def __init__(self, cursor: psycopg.Cursor[Any], target: Target) -> None:
        self._cursor = cursor
        self._target = target

    def run(self) -> str | None:
        target = self._target
        self._execute("lock")
        ((is_partitioned, _, owner, _),) = self._ask("table")
        ((is_empty,),) = self._ask("is_empty")
        prepared = {name: usable for name, _, usable, _ in self._ask("prepared", before=target.before)}
        if is_partitioned or not (is_empty or (prepared.get(target.pkey) and prepared.get(target.id_index))):
            return None
        rights = [text for (text,) in self._ask("rights")]
        indexes = self._ask("indexes", before=target.before)
        moves = not is_empty and not prepared.get(target.check)
        if moves:
            self._execute("move_beyond", boundary=target.boundary.isoformat())
        self._execute("partitioned", partition=target.before, owner=owner, check=target.check)
        self._replace_old_keys(indexes, is_empty)
        self._execute("keys", pkey=f"{target.table}_pkey", id_idx=f"{target.table}_id_idx")
        for _, is_primary, definition in indexes:
            if not is_primary:
                self._cursor.execute(definition.encode(), prepare=False)
        if is_empty:
            self._execute("drop", partition=target.before)
        else:
            self._execute("attach", partition=target.before, boundary=target.boundary.isoformat(), check=target.check)
            make_private(self._cursor, target.schema, target.table, target.before)
        self._make_new_partitions(owner, is_empty)
        moved = self._execute("move_in").rowcount if moves else 0
        make_private(self._cursor, target.schema, target.table, target.table)
        for text in rights:
            self._cursor.execute(text.encode(), prepare=False)
        return f"made it a table partitioned by {target.unit}" + (f", and moved {moved} rows" if moved else "")

    def _replace_old_keys(self, indexes: list[tuple[Any, ...]], is_empty: bool) -> None:
        """Let the new table have the names of the old one's indexes, and the old one a key like the new one's."""
        before = self._target.before
        for number, (name, is_primary, _) in enumerate(indexes):
            if is_primary:
                self._execute("drop_pkey", partition=before, pkey=name)
            else:
                self._execute("rename_index", index=name, renamed=f"{before}_{number}")
        if not is_empty:
            self._execute("use_pkey", partition=before, index=self._target.pkey)

    def _make_new_partitions(self, owner: str, is_empty: bool) -> None:
        target = self._target
        create_default(self._cursor, target.schema, target.table, owner, target.default)
        for bounds in periods(target.unit, target.now, AHEAD + 1):
            if is_empty or bounds[0] >= target.boundary:
                name = name_of(target.table, target.unit, bounds[0])
                create(self._cursor, target.schema, target.table, owner, name, bounds)

    def _ask(self, name: str, **names: str) -> list[tuple[Any, ...]]:
        return self._execute(name, **names).fetchall()

    def _execute(self, name: str, **names: str) -> psycopg.Cursor[Any]:
        query: sql.Composed = statement(f"partitions/{name}", self._target.schema, self._target.table, **names)
        return self._cursor.execute(query, prepare=False)
