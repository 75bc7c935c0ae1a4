"""`InMemoryAuditTable`: the audit log as a dict, for tests that need no Postgres."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import Appended, AuditReader, Fault
from astrocyte_otel_audit.postgres.encoding import COLUMNS, text
from astrocyte_otel_audit.record import AuditRecord, datetime_from_ns, ns_from_datetime
from astrocyte_otel_audit.storable import encode_payload

#: Columns that a search asks for by equality.
_EQUAL: Final = ("bank_id", "action", "transport", "outcome", "actor_id", "trace_id")


class InMemoryAuditTable(AuditReader):
    """A `storage` for `configure_audit` that keeps what Postgres would keep, as it would. Thread-safe.

    `search` and `get` are those of the real table. What is cut or mended on the way into Postgres is cut and mended
    here too; a record whose id is there already is left as it was. It refuses nothing, and every schema has a table. In
    a forked child it begins as a copy, and what the child writes is not seen outside.

    Args:
        schema: schema of records that name none, and of every read that names none.
    """

    def __init__(self, *, schema: str = settings.DEFAULT_SCHEMA) -> None:
        super().__init__(_NoConnections(), schema=settings.identifier(schema, "schema"))
        #: By schema and id, in the order in which they came.
        self._rows: dict[tuple[str, str], AuditRecord] = {}
        self._lock = threading.Lock()

    @property
    def records(self) -> list[AuditRecord]:
        """All rows of all schemas, in the order in which they were written."""
        with self._lock:
            return list(self._rows.values())

    def clear(self) -> None:
        """Remove all rows."""
        with self._lock:
            self._rows.clear()

    def append(self, records: Sequence[AuditRecord]) -> Appended:
        """Store a batch; a record that is there already counts as stored, and is left as it was."""
        result = Appended(stored=len(records))
        now = datetime.now(UTC)
        with self._lock:
            for record in records:
                schema = record.schema or self.schema
                result.schemas.add(schema)
                if (schema, record.id) not in self._rows:
                    self._rows[schema, record.id] = _as_stored(record, now, schema)
        return result

    def check(self) -> Fault | None:
        """Say that nothing keeps records from being stored."""
        return None

    def after_fork(self) -> None:
        """Become usable in a forked child."""
        self._lock = threading.Lock()

    def _read(self, name: str, parameters: dict[str, Any], schema: str | None) -> list[tuple[Any, ...]]:
        schema = self.schema if schema is None else settings.identifier(schema, "schema")
        # A row is a record without its schema, which is the last of its fields.
        return [row[:-1] for row in _READS[name]([row for row in self.records if row.schema == schema], parameters)]


class _NoConnections:
    """Stands where a reader has its connections: nothing is read through one."""

    database = "memory"

    def connection(self, answer_seconds: float | None = None) -> Any:  # noqa: ARG002 - the interface's argument
        raise DatabaseUnavailableError("a table in memory has no connection")

    def close(self) -> None:
        """Close nothing, so that a table can still be read when its pipeline is shut down."""

    def after_fork(self) -> None:
        """Forget nothing."""


def _as_stored(record: AuditRecord, now: datetime, schema: str) -> AuditRecord:
    """Return a record as Postgres would give it back."""
    columns = zip(AuditRecord._fields[:COLUMNS], record, strict=False)
    values = [None if value is None else _STORED.get(name, text)(value) for name, value in columns]
    return AuditRecord._make((*values, now, schema))


def _instant(value: datetime) -> datetime:
    return datetime_from_ns(ns_from_datetime(value))


def _payload(value: dict[str, Any]) -> Any:
    return orjson.loads(encode_payload(value))


#: What becomes of a column's value on its way into Postgres; where nothing stands here, what becomes of a text.
_STORED: Final[dict[str, Callable[[Any], Any]]] = {
    "started_at": _instant,
    "ended_at": _instant,
    "request": _payload,
    "response": _payload,
    "metadata": _payload,
    "sampled": bool,
}


def _compact(record_id: str) -> str:
    return record_id.replace("-", "").lower()


def _place(row: AuditRecord) -> tuple[datetime, str]:
    return row.started_at, _compact(row.id)


def _search(rows: list[AuditRecord], filters: dict[str, Any]) -> list[AuditRecord]:
    """Return what `search.sql` returns."""
    asked = {name: filters[name] for name in _EQUAL if filters[name] is not None}
    since, until, limit = filters["since"], filters["until"], filters["limit"]
    begin = filters["after_started_at"] and (filters["after_started_at"], _compact(filters["after_id"]))
    found = [
        row
        for row in rows
        if all(getattr(row, name) == value for name, value in asked.items())
        and (since is None or row.started_at >= since)
        and (until is None or row.started_at < until)
        and (begin is None or _place(row) < begin)
    ]
    return sorted(found, key=_place, reverse=True)[:limit]


def _get(rows: list[AuditRecord], parameters: dict[str, Any]) -> list[AuditRecord]:
    """Return what `get.sql` returns."""
    return [row for row in rows if _compact(row.id) == parameters["id"]]


#: The statements of a reader, by their names. Nothing is ever set aside.
_READS: Final[dict[str, Callable[[list[AuditRecord], dict[str, Any]], list[AuditRecord]]]] = {
    "search": _search,
    "get": _get,
    "list_set_aside": lambda rows, parameters: [],  # noqa: ARG005
}
