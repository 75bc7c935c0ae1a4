"""`AuditTable`: the rows of `astrocyte_audit_log`, written and read. The pipeline's only door to Postgres."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import migrate, roles
from astrocyte_otel_audit.postgres.connection import Connections
from astrocyte_otel_audit.postgres.encoding import columns, side_row
from astrocyte_otel_audit.postgres.faults import MENDED_BY_MIGRATING, Fault, FaultClass, classify
from astrocyte_otel_audit.postgres.reader import LONGEST_LOCK_SECONDS, AuditReader, plain_cursor
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.record import AuditRecord

_NO_SCHEMA = Fault(FaultClass.SET_ASIDE, "the name of its tenant's schema can't be a schema's name")


@dataclass(slots=True)
class Appended:
    """What became of a batch. Every record of it is in the table, or in one of the two lists."""

    #: Records that are in the table now, counting those that were there before.
    stored: int = 0
    #: Schemas that took theirs.
    schemas: set[str] = field(default_factory=set)
    #: By schema: why it can't take records for now, and the records that wait for it.
    parked: dict[str, tuple[Fault, list[AuditRecord]]] = field(default_factory=dict)
    #: Records that can never be stored, each with the reason; they are in the side table.
    set_aside: list[tuple[AuditRecord, Fault]] = field(default_factory=list)

    def waiting_ids(self) -> set[str]:
        """Return the ids of the records that are parked."""
        return {record.id for _, records in self.parked.values() for record in records}

    def park(self, schema: str, fault: Fault, records: Sequence[AuditRecord]) -> None:
        """Let records wait for their schema; the reason that was found first is told."""
        self.parked.setdefault(schema, (fault, []))[1].extend(records)


class AuditTable(AuditReader):
    """The audit log in one database, written and read: one table a tenant schema, all of one name. Thread-safe.

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
        super().__init__(connections, schema=schema, table=table, statement_timeout_seconds=statement_timeout_seconds)
        #: This table, as a name without a secret in it.
        self.destination = f"{connections.database}/{table}"
        self._migrates = migrate
        self._migrated: set[str] = set()

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

    def check(self, schema: str | None = None) -> Fault | None:
        """Say what keeps records of one schema from being written, or None if nothing does.

        An empty batch is appended, to the table and to its side table: that needs all that a real one needs, and
        leaves nothing.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
        """
        schema = schema or self.schema
        if not settings.is_identifier(schema):
            return _NO_SCHEMA
        result = Appended()
        self._append(schema, [], result)
        return next((fault for fault, _ in result.parked.values()), None) or self._cant_set_aside(schema, [])

    def migrate(
        self, schema: str | None = None, *, create_schema: bool = False, lock_timeout_seconds: float | None = None
    ) -> list[str]:
        """Create or upgrade one schema's table; see `postgres.migrate.migrate`.

        A lock is waited for as long as a statement may take, unless another time is given.

        Raises:
            DatabaseUnavailableError: the server can't be used now.
            psycopg.Error: it can, and refuses.
        """
        with self._administering() as connection:
            return migrate.migrate(
                connection,
                schema or self.schema,
                self.table,
                create_schema=create_schema,
                lock_timeout_seconds=lock_timeout_seconds or self._statement_seconds,
            )

    def grant_roles(self, schema: str | None = None, *, role_prefix: str = settings.DEFAULT_ROLE_PREFIX) -> roles.Roles:
        """Make the roles that may write, read and sweep one schema's table; see `postgres.roles.grant_roles`.

        Raises:
            ConfigurationError: a prefix that can't begin a role's name.
            RolesError: a role can't be made, or can't have its rights and no others.
            DatabaseUnavailableError: the server can't be used now.
            psycopg.Error: it can, and refuses.
        """
        prefix = settings.role_prefix(role_prefix, "role_prefix")
        with self._administering() as connection:
            return roles.grant_roles(
                connection, schema or self.schema, self.table, prefix, lock_timeout_seconds=self._statement_seconds
            )

    def _append_together(self, batches: dict[str, list[AuditRecord]], result: Appended) -> bool:
        """Write the batches of several schemas in one transaction, or say that they have to go one by one."""
        if not all(settings.is_identifier(schema) for schema in batches):
            return False
        try:
            with self._writing() as cursor:
                for schema, batch in batches.items():
                    cursor.execute(statement("append", schema, self.table), columns(batch), prepare=False)
        except Exception as error:
            _fault(error)
            return False
        result.stored += sum(map(len, batches.values()))
        result.schemas.update(batches)
        return True

    def _append(self, schema: str, batch: list[AuditRecord], result: Appended) -> None:
        if not settings.is_identifier(schema):
            return self._set_aside(self.schema, batch, _NO_SCHEMA, result)
        try:
            with self._writing() as cursor:
                cursor.execute(statement("append", schema, self.table), columns(batch), prepare=False)
        except Exception as error:
            fault = _fault(error)
        else:
            result.stored += len(batch)
            result.schemas.add(schema)
            return None
        if self._migrates and fault.sqlstate in MENDED_BY_MIGRATING and schema not in self._migrated:
            refused = self._try_migrate(schema)
            if refused is None:
                return self._append(schema, batch, result)
            fault = refused._replace(kind=FaultClass.PARK)
        if fault.kind is FaultClass.PARK or not batch:  # empty, where `check` asked
            result.park(schema, fault, batch)
        elif len(batch) == 1:
            self._set_aside(schema, batch, fault, result)
        else:
            # One bad record fails its whole statement: halving finds it in a handful of statements.
            middle = len(batch) // 2
            self._append(schema, batch[:middle], result)
            self._append(schema, batch[middle:], result)
        return None

    def _set_aside(self, schema: str, batch: list[AuditRecord], fault: Fault, result: Appended) -> None:
        refused = self._cant_set_aside(schema, [side_row(record, fault.reason, fault.sqlstate) for record in batch])
        if refused is None:
            result.set_aside.extend((record, fault) for record in batch)
        else:  # only the caller has them now
            reason = f"a record was refused ({fault}) and can't be set aside: {refused.reason}"
            result.park(schema, Fault(FaultClass.PARK, reason, refused.sqlstate), batch)

    def _cant_set_aside(self, schema: str, rows: list[tuple[str | None, ...]]) -> Fault | None:
        """Put rows into the side table, or say why it doesn't take them."""
        try:
            with self._writing() as cursor:
                columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 5
                cursor.execute(statement("set_aside", schema, self.table), columns, prepare=False)
        except Exception as error:
            return _fault(error)
        return None

    def _try_migrate(self, schema: str) -> Fault | None:
        try:
            # Nobody waits for this process's locks for longer than it would wait itself.
            seconds = min(LONGEST_LOCK_SECONDS, self._statement_seconds)
            self.migrate(schema, create_schema=True, lock_timeout_seconds=seconds)
        except psycopg.Error as error:
            return classify(error)
        self._migrated.add(schema)  # once: a table that is still refused after it needs a person
        return None

    @contextmanager
    def _administering(self) -> Iterator[psycopg.Connection[Any]]:
        with self._connection() as connection:
            try:
                yield connection
            except psycopg.Error as error:
                _fault(error)
                raise

    @contextmanager
    def _writing(self) -> Iterator[psycopg.Cursor[Any]]:
        with self._connection(self._answer_seconds) as connection:
            try:
                # One answer to wait for. On a busy interpreter each wait can cost the thread a switch interval of the
                # GIL, 5 ms, and psycopg's own transaction() would wait for BEGIN and for COMMIT.
                with _quiet_pipeline(connection) if psycopg.Pipeline.is_supported() else nullcontext():
                    cursor = plain_cursor(connection)
                    cursor.execute("BEGIN", prepare=False)
                    cursor.execute(self._settings, prepare=False)
                    yield cursor
                    # Said, although the pipeline's end would do: libpq takes an error that comes then for a broken
                    # connection, such as that of a deferred trigger.
                    cursor.execute("COMMIT", prepare=False)
            except psycopg.Error:
                if connection.info.transaction_status is TransactionStatus.INERROR:
                    connection.rollback()
                raise


@contextmanager
def _quiet_pipeline(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Give a pipeline that ends with the error that came in it. psycopg's would log what comes of that at its end."""
    error: Exception | None = None
    try:
        with connection.pipeline() as pipeline:
            try:
                yield
            except (psycopg.Error, DatabaseUnavailableError) as first:
                error = first
                with suppress(psycopg.Error):
                    pipeline.sync()
    except (psycopg.Error, DatabaseUnavailableError) as last:
        error = error or last
    if error is not None:
        raise error


def _fault(error: Exception) -> Fault:
    """Return what an error says of the records, or raise where it says nothing but that Postgres can't be used."""
    if isinstance(error, DatabaseUnavailableError):
        raise error
    fault = classify(error)
    if fault.kind is FaultClass.RETRY:
        raise DatabaseUnavailableError(fault.reason, fault.sqlstate) from None
    return fault
