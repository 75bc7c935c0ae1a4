"""`AuditHolds`: legal holds, the rows that outlive every retention policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.postgres.encoding import text
from astrocyte_otel_audit.postgres.reader import AuditReader
from astrocyte_otel_audit.postgres.statements import statement
from astrocyte_otel_audit.postgres.sweep import sweep_key

#: What the table of holds answers with its own words: those of the log speak of writing rows.
_REASONS: Final = {
    "42P01": "the table of holds does not exist; run `astrocyte-otel-audit migrate` (--create-schema if its schema is "
    "missing too)",
    "42501": "a right is missing: holds are added and released by the table's owner, and listed by the roles of "
    "`astrocyte-otel-audit migrate --roles` that read and sweep",
}
#: What waiting for a batch of the sweep ends with: by lock_timeout or by statement_timeout.
_STILL_SWEPT: Final = frozenset({"55P03", "57014"})
_LARGEST_ID: Final = (1 << 63) - 1


class Hold(NamedTuple):
    """Records that no sweep deletes: those that fit all the criteria that it has."""

    id: int
    #: Criteria; None for any.
    bank_id: str | None
    actor_id: str | None
    trace_id: str | None
    reason: str
    #: Login role that added it, and when, by the server's clock.
    held_by: str
    held_at: datetime
    #: The same of its release; None while it holds.
    released_by: str | None
    released_at: datetime | None


class AuditHolds(AuditReader):
    """The legal holds of the audit log in one database. Thread-safe.

    Adding and releasing needs the table's owner, listing SELECT on the table of holds.

    Args:
        connections, schema, table, statement_timeout_seconds: as in `AuditReader`.
    """

    def add(
        self,
        *,
        bank_id: str | None = None,
        actor_id: str | None = None,
        trace_id: str | None = None,
        reason: str,
        schema: str | None = None,
    ) -> Hold:
        """Keep the records that fit all the criteria, those to come included, until the hold is released.

        MUST: when it returns, no sweep deletes such a record any more. A batch that is being deleted at that moment
        is waited for, as long as a statement may take.

        Args:
            bank_id, actor_id, trace_id: equal to this; None for any. One at least.
            reason: why, for whoever reads the hold later. It is cut at 512 characters.
            schema: tenant's schema; the table's default one otherwise.

        Raises:
            ConfigurationError: no criterion, or a text that can't be used.
            DatabaseUnavailableError: the hold was not added; the reason says what to do.
        """
        criteria = {"bank_id": bank_id, "actor_id": actor_id, "trace_id": trace_id}
        # Cut and mended as the row's was when it was written.
        values = {name: None if value is None else _text(value, name) for name, value in criteria.items()}
        if not any(values.values()):
            raise ConfigurationError("bank_id", "a hold needs a bank_id, an actor_id, a trace_id, or several of them")
        if values["trace_id"] is not None:
            values["trace_id"] = values["trace_id"].lower()
        values["reason"] = _text(reason, "reason")
        schema = settings.identifier(schema or self.schema, "schema")
        with self._changing() as cursor:
            wait = statement("holds/wait", schema, self.table)
            try:
                cursor.execute(wait, {"key": sweep_key(schema, self.table)}, prepare=False)
            except psycopg.Error as error:
                if error.sqlstate in _STILL_SWEPT:
                    raise DatabaseUnavailableError(
                        "records are being deleted, and that takes too long to wait for; the hold was not added, so "
                        "repeat it", error.sqlstate,
                    ) from None  # fmt: skip
                raise
            add = statement("holds/add", schema, self.table)
            return Hold(*cursor.execute(add, values, prepare=False).fetchall()[0])

    def list(self, include_released: bool = False, schema: str | None = None) -> list[Hold]:
        """Return the holds, in the order in which they were added.

        Args:
            include_released: also those that hold nothing any more.
            schema: tenant's schema; the table's default one otherwise.

        Raises:
            DatabaseUnavailableError: the table of holds can't be read; the reason says what to do.
        """
        try:
            return [Hold(*row) for row in self._read("holds/list", {"include_released": include_released}, schema)]
        except DatabaseUnavailableError as error:
            raise _in_own_words(error) from None

    def release(self, hold_id: int, schema: str | None = None) -> Hold | None:
        """End a hold; from the next sweep on, its records go when they are expired.

        A hold that was released before stays as it is.

        Args:
            hold_id: `Hold.id`.
            schema: tenant's schema; the table's default one otherwise.

        Returns:
            The hold as it is now, or None where there is none of that id.

        Raises:
            ConfigurationError: what can't be an id.
            DatabaseUnavailableError: the hold was not released; the reason says what to do.
        """
        if settings.positive_int(hold_id, "hold_id") > _LARGEST_ID:
            return None
        schema = settings.identifier(schema or self.schema, "schema")
        with self._changing() as cursor:
            release = statement("holds/release", schema, self.table)
            rows = cursor.execute(release, {"id": hold_id}, prepare=False).fetchall()
        return Hold(*rows[0]) if rows else None

    @contextmanager
    def _changing(self) -> Iterator[psycopg.Cursor[Any]]:
        try:
            with self._in_transaction() as cursor:
                yield cursor
        except DatabaseUnavailableError as error:
            raise _in_own_words(error) from None


def _in_own_words(error: DatabaseUnavailableError) -> DatabaseUnavailableError:
    return DatabaseUnavailableError(_REASONS.get(error.sqlstate or "", error.reason), error.sqlstate)


def _text(value: object, source: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(source, f"got {settings.shown(value)}; accepted is a text that is not empty")
    return text(value)
