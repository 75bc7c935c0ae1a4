"""`AuditTable`: the rows of `astrocyte_audit_log`, written and read. The only door to Postgres."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.postgres import migrate
from astrocyte_otel_audit.postgres.connection import Connections
from astrocyte_otel_audit.postgres.encoding import columns, record_text, text
from astrocyte_otel_audit.postgres.faults import Fault, FaultClass, classify
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.record import AuditRecord

#: Postgres holds a timeout as 31 bits of milliseconds.
_LONGEST_SECONDS = 2_000_000.0
#: A lock that is held for longer is somebody's work on that table; its tenant waits, and the others go on.
_LONGEST_LOCK_SECONDS = 5.0
_NO_SCHEMA = Fault(FaultClass.SET_ASIDE, "the name of its tenant's schema can't be a schema's name")


@dataclass(slots=True)
class Appended:
    """What became of a batch. Every record of it is in the table or in one of the lists."""

    #: Records that are in the table now, counting those that were there before.
    stored: int = 0
    #: Schemas that took theirs.
    schemas: set[str] = field(default_factory=set)
    #: By schema: why it can't take records for now, and the records that wait for it.
    parked: dict[str, tuple[Fault, list[AuditRecord]]] = field(default_factory=dict)
    #: Records that can never be stored, each with the reason; they are in the side table.
    set_aside: list[tuple[AuditRecord, Fault]] = field(default_factory=list)
    #: The same, where the side table could not take them either: only the caller has them now.
    homeless: list[tuple[AuditRecord, Fault]] = field(default_factory=list)


class Cursor(NamedTuple):
    """Where a page ended: the next one begins behind it."""

    started_at: datetime
    id: str

    def __str__(self) -> str:
        return f"{self.started_at.isoformat()}/{self.id}"

    @classmethod
    def parse(cls, printed: str) -> Cursor:
        """Return the cursor that was printed so.

        Raises:
            ConfigurationError: a text that isn't one.
        """
        instant, _, record_id = printed.partition("/")
        try:
            cursor = cls(datetime.fromisoformat(instant), record_id)
            if cursor.started_at.tzinfo is not None and _uuid(record_id):
                return cursor
        except ValueError:
            pass
        raise ConfigurationError("after", "not a cursor; accepted is what the page before gave as `next`")


class Page(NamedTuple):
    """One page of a search, newest first."""

    records: list[AuditRecord]
    #: Cursor of the next page, or None at the end.
    next: Cursor | None


class SetAside(NamedTuple):
    """A record that the table refused."""

    id: str
    action: str
    reason: str
    sqlstate: str | None
    #: The whole record as JSON.
    record: str
    set_aside_at: datetime


class AuditTable:
    """The audit log in one database: one table a tenant schema, all of one name. Thread-safe.

    Args:
        connections: where connections come from.
        schema: schema of records that name none, and of every read that names none.
        table: name of the table in every schema.
        migrate: create or upgrade a table, and a tenant's schema, when a record needs it.
        statement_timeout_seconds: how long one statement may take before the server cancels it.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        schema: str = settings.DEFAULT_SCHEMA,
        table: str = settings.DEFAULT_TABLE,
        migrate: bool = False,
        statement_timeout_seconds: float = 30.0,
    ) -> None:
        self.schema = schema
        self.table = table
        self._connections = connections
        self._migrates = migrate
        self._migrated: set[str] = set()
        self._timeout_seconds = min(statement_timeout_seconds, _LONGEST_SECONDS)
        timeout, lock_timeout = (
            sql.Literal(f"{max(1, round(seconds * 1000))}ms")
            for seconds in (self._timeout_seconds, min(self._timeout_seconds, _LONGEST_LOCK_SECONDS))
        )
        # Local to each transaction, and not a start-up option: pgbouncer refuses those, and a lent connection has
        # settings of its own. One statement, as a pipeline takes no more.
        self._settings = sql.SQL(
            "SELECT set_config('statement_timeout', {}, true), set_config('lock_timeout', {}, true),"
            " set_config('TimeZone', 'UTC', true)"
        ).format(timeout, lock_timeout)

    def append(self, records: Sequence[AuditRecord]) -> Appended:
        """Write a batch: one transaction, and in it one statement for every schema.

        MUST: when it returns, every record is in the table, or in exactly one list of the result. A record that is
        already in the table counts as stored, so a batch may be given again. MUST NOT: let one record or one
        tenant hold up another.

        Raises:
            DatabaseUnavailableError: nothing is known of the batch but that it can be given again.
        """
        batches: dict[str, list[AuditRecord]] = {}
        for record in records:
            batches.setdefault(record.schema or self.schema, []).append(record)
        result = Appended()
        if len(batches) == 1 or not self._append_together(batches, result):
            for schema, batch in batches.items():
                self._append(schema, batch, result)
        return result

    def _append_together(self, batches: dict[str, list[AuditRecord]], result: Appended) -> bool:
        """Write the batches of several schemas in one transaction, or say that they have to go one by one."""
        if not all(settings.is_identifier(schema) for schema in batches):
            return False
        try:
            with self._transaction() as connection:
                for schema, batch in batches.items():
                    connection.execute(statement("append", schema, self.table), columns(batch))
        except Exception as error:
            if (fault := classify(error)).kind is FaultClass.RETRY:
                raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
            return False
        result.stored += sum(map(len, batches.values()))
        result.schemas.update(batches)
        return True

    def _append(self, schema: str, batch: list[AuditRecord], result: Appended) -> None:
        if not settings.is_identifier(schema):
            for record in batch:
                self._set_aside(self.schema, record, _NO_SCHEMA, result)
            return None
        try:
            with self._transaction() as connection:
                connection.execute(statement("append", schema, self.table), columns(batch))
        except Exception as error:
            fault = classify(error)
            if fault.kind is FaultClass.RETRY:
                raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
            if fault.kind is FaultClass.PARK and self._migrates and schema not in self._migrated:
                refused = self._try_migrate(schema)
                if refused is None:
                    return self._append(schema, batch, result)
                fault = refused._replace(kind=FaultClass.PARK)
            if fault.kind is FaultClass.PARK or not batch:  # empty, where `check` asked
                # The other half of a batch may be waiting already.
                result.parked.setdefault(schema, (fault, []))[1].extend(batch)
            elif len(batch) == 1:
                self._set_aside(schema, batch[0], fault, result)
            else:
                # One bad record fails its whole statement: halving finds it in a handful of statements.
                middle = len(batch) // 2
                self._append(schema, batch[:middle], result)
                self._append(schema, batch[middle:], result)
        else:
            result.stored += len(batch)
            result.schemas.add(schema)

    def _set_aside(self, schema: str, record: AuditRecord, fault: Fault, result: Appended) -> None:
        try:
            row = [record.id, text(record.action), fault.reason, fault.sqlstate, record_text(record)]
            with self._transaction() as connection:
                connection.execute(statement("set_aside", schema, self.table), row)
        except Exception as error:
            second = classify(error)
            if second.kind is FaultClass.RETRY:
                raise DatabaseUnavailableError(second.reason, second.sqlstate) from None
            result.homeless.append((record, fault))
        else:
            result.set_aside.append((record, fault))

    def _try_migrate(self, schema: str) -> Fault | None:
        try:
            self.migrate(schema, create_schema=True)
        except psycopg.Error as error:
            return classify(error)
        self._migrated.add(schema)  # once: a table that is still refused after it needs a person
        return None

    def migrate(self, schema: str | None = None, *, create_schema: bool = False) -> list[str]:
        """Create or upgrade one schema's table; see `postgres.migrate.migrate`.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
            psycopg.Error: it can, and refuses.
        """
        with self._reported(), self._connections.connection() as connection:
            return migrate.migrate(
                connection,
                schema or self.schema,
                self.table,
                create_schema=create_schema,
                lock_timeout_seconds=self._timeout_seconds,
            )

    def check(self, schema: str | None = None) -> Fault | None:
        """Say what keeps records of one schema from being written, or None if nothing does.

        An empty batch is appended: it needs all that a real one needs, and leaves nothing.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        schema = schema or self.schema
        if not settings.is_identifier(schema):
            return _NO_SCHEMA
        result = Appended()
        self._append(schema, [], result)
        return next((fault for fault, _ in result.parked.values()), None)

    def search(
        self,
        *,
        bank_id: str | None = None,
        action: str | None = None,
        transport: str | None = None,
        outcome: str | None = None,
        actor_id: str | None = None,
        trace_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: Cursor | None = None,
        limit: int = 50,
        schema: str | None = None,
    ) -> Page:
        """Return one page of records, newest first.

        Args:
            bank_id, action, transport, outcome, actor_id, trace_id: equal to this; None for any.
            since, until: start of the operation, half-open: `since` is in, `until` is not. With a time zone.
            after: `Page.next` of the page before.
            limit: records a page, 1 to 10,000.
            schema: tenant's schema; the table's default one otherwise.

        Raises:
            ConfigurationError: an argument that can't be used.
            DatabaseUnavailableError: the table can't be read; the reason says what to do.
        """
        _check_limit(limit)
        for name, instant in (("since", since), ("until", until)):
            if instant is not None and instant.tzinfo is None:
                raise ConfigurationError(name, "has no time zone; accepted is a datetime with one")
        texts = {
            "bank_id": bank_id, "action": action, "transport": transport, "outcome": outcome, "actor_id": actor_id,
            "trace_id": None if trace_id is None else trace_id.lower(),
        }  # fmt: skip
        filters: dict[str, Any] = {
            # Cut and mended as the row's was when it was written.
            **{name: None if value is None else text(value) for name, value in texts.items()},
            "since": since, "until": until,
            "after_started_at": after and after.started_at, "after_id": after and after.id,
            "limit": limit + 1,
        }  # fmt: skip
        schema = schema or self.schema
        rows = self._read("search", filters, schema)
        records = [AuditRecord._make((*row, schema)) for row in rows[:limit]]
        more = len(rows) > limit
        return Page(records, Cursor(records[-1].started_at, records[-1].id) if more else None)

    def get(self, record_id: str, schema: str | None = None) -> AuditRecord | None:
        """Return one record by its id, or None.

        Raises:
            ConfigurationError: an id that isn't a UUID.
            DatabaseUnavailableError: the table can't be read; the reason says what to do.
        """
        schema = schema or self.schema
        rows = self._read("get", {"id": _uuid(record_id)}, schema)
        return AuditRecord._make((*rows[0], schema)) if rows else None

    def set_aside(self, limit: int = 50, schema: str | None = None) -> list[SetAside]:
        """Return the records that the table refused, newest first.

        Args:
            limit: records at most, 1 to 10,000.
            schema: tenant's schema; the table's default one otherwise.

        Raises:
            ConfigurationError: an argument that can't be used.
            DatabaseUnavailableError: the side table can't be read; the reason says what to do.
        """
        _check_limit(limit)
        return [SetAside(*row) for row in self._read("list_set_aside", {"limit": limit}, schema)]

    def close(self) -> None:
        """Close the connection that this table has opened, if any."""
        self._connections.close()

    def after_fork(self) -> None:
        """Make it usable in a forked child."""
        self._connections.after_fork()

    def _read(self, name: str, parameters: dict[str, Any], schema: str | None) -> list[tuple[Any, ...]]:
        schema = self.schema if schema is None else settings.identifier(schema, "schema")
        try:
            with self._transaction(read_only=True) as connection, connection.cursor(row_factory=tuple_row) as cursor:
                return cursor.execute(statement(name, schema, self.table), parameters).fetchall()
        except psycopg.Error as error:
            fault = classify(error)
            raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None

    @contextmanager
    def _transaction(self, *, read_only: bool = False) -> Iterator[psycopg.Connection[Any]]:
        with self._connections.connection() as connection:
            # What is written needs no answer but the last: in a pipeline, all of it is one round trip. On a busy
            # interpreter each wait can cost the thread a switch interval of the GIL, 5 ms.
            pipeline = nullcontext() if read_only or not psycopg.Pipeline.is_supported() else connection.pipeline()
            with pipeline, connection.transaction():
                connection.execute(self._settings)
                if read_only:
                    connection.execute("SET LOCAL transaction_read_only = on")
                yield connection

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            fault = classify(error)
            if fault.kind is FaultClass.RETRY:
                raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
            raise


def _check_limit(limit: object) -> None:
    if type(limit) is not int or not 1 <= limit <= 10_000:
        raise ConfigurationError("limit", f"got {limit!r}; accepted is a whole number from 1 to 10,000")


def _uuid(given: str) -> str:
    compact = given.strip().lower().replace("-", "")
    if len(compact) != 32 or not set(compact) <= set("0123456789abcdef"):
        raise ConfigurationError("id", "not a record's id; accepted is a UUID")
    return compact
