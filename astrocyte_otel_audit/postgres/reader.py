"""`AuditReader`: what is read of `astrocyte_audit_log`. Needs SELECT only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row
from psycopg.types.datetime import TimestamptzLoader

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.postgres.connection import Connections
from astrocyte_otel_audit.postgres.encoding import text
from astrocyte_otel_audit.postgres.faults import classify, connection_fault
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.record import AuditRecord

#: Postgres holds a timeout as 31 bits of milliseconds.
_LONGEST_SECONDS = 2_000_000.0
#: A lock that is held for longer is somebody's work on that table; its tenant waits, and the others go on.
LONGEST_LOCK_SECONDS = 5.0


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


class AuditReader:
    """The audit log in one database, to be read: one table a tenant schema, all of one name. Thread-safe.

    Args:
        connections: where connections come from.
        schema: schema of every read that names none.
        table: name of the table in every schema.
        statement_timeout_seconds: how long one statement may take before the server cancels it.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        schema: str = settings.DEFAULT_SCHEMA,
        table: str = settings.DEFAULT_TABLE,
        statement_timeout_seconds: float = 30.0,
    ) -> None:
        self.schema = schema
        self.table = table
        self._connections = connections
        self._statement_seconds = statement_seconds = min(statement_timeout_seconds, _LONGEST_SECONDS)
        #: The server, where it answers at all, has given up before.
        self._answer_seconds = statement_seconds * 1.5
        timeout, lock_timeout = (
            sql.Literal(f"{max(1, round(seconds * 1000))}ms")
            for seconds in (statement_seconds, min(statement_seconds, LONGEST_LOCK_SECONDS))
        )
        # Local to each transaction, and not a start-up option: pgbouncer refuses those, and a lent connection has
        # settings of its own. One statement, as a pipeline takes no more.
        self._settings = sql.SQL(
            "SELECT set_config('statement_timeout', {}, true), set_config('lock_timeout', {}, true),"
            " set_config('TimeZone', 'UTC', true)"
        ).format(timeout, lock_timeout)

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
        """Close the connection that was opened for it, if any."""
        self._connections.close()

    def after_fork(self) -> None:
        """Make it usable in a forked child."""
        self._connections.after_fork()

    def _read(self, name: str, parameters: dict[str, Any], schema: str | None) -> list[tuple[Any, ...]]:
        schema = self.schema if schema is None else settings.identifier(schema, "schema")
        with self._in_transaction() as cursor:
            cursor.execute("SET LOCAL transaction_read_only = on", prepare=False)
            return cursor.execute(statement(name, schema, self.table), parameters, prepare=False).fetchall()

    @contextmanager
    def _in_transaction(self) -> Iterator[psycopg.Cursor[Any]]:
        """Give a transaction with our settings; whatever Postgres refuses in it is a `DatabaseUnavailableError`."""
        try:
            with self._transaction() as cursor:
                yield cursor
        except psycopg.Error as error:
            fault = classify(error)
            raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Cursor[Any]]:
        """Give a transaction with our settings."""
        with self._connection(self._answer_seconds) as connection, connection.transaction():
            cursor = plain_cursor(connection)
            cursor.execute(self._settings, prepare=False)
            yield cursor

    @contextmanager
    def _connection(self, answer_seconds: float | None = None) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection; where none is to be had, no statement and no record is to blame."""
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._connections.connection(answer_seconds))
            except Exception as error:
                if isinstance(error, DatabaseUnavailableError):
                    raise
                fault = connection_fault(error)
                raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
            yield connection


def plain_cursor(connection: psycopg.Connection[Any]) -> psycopg.Cursor[tuple[Any, ...]]:
    """Return a cursor that does what ours expect: a lent connection may make rows, or cursors, of another kind."""
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    cursor.adapters.register_loader("timestamptz", _NearestInstant)
    return cursor


class _NearestInstant(TimestamptzLoader):
    """Reads what no datetime can hold, such as ``infinity`` in another writer's row, as the nearest that one can."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except psycopg.DataError:
            early = bytes(data).startswith(b"-") or bytes(data).endswith(b"BC")
            return (datetime.min if early else datetime.max).replace(tzinfo=UTC)


def _check_limit(limit: object) -> None:
    if type(limit) is not int or not 1 <= limit <= 10_000:
        raise ConfigurationError("limit", f"got {limit!r}; accepted is a whole number from 1 to 10,000")


def _uuid(given: str) -> str:
    compact = given.strip().lower().replace("-", "")
    if len(compact) != 32 or not set(compact) <= set("0123456789abcdef"):
        raise ConfigurationError("id", "not a record's id; accepted is a UUID")
    return compact
