"""`AuditLog`: what operations under test have left, and assertions about it."""

from __future__ import annotations

from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack

from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline import AuditSpanProcessor
from astrocyte_otel_audit.record import AuditRecord
from astrocyte_otel_audit.testing.table import InMemoryAuditTable

#: What a failed assertion shows of a record, where it is there; beside what was asked for.
_SHOWN: Final = ("bank_id", "outcome", "error_type", "transport", "actor_id", "request", "response", "metadata")
_MAX_SHOWN: Final = 20
#: Counts of a pipeline, each of operations that left no record.
_MISSING: Final = ("lost", "set_aside", "refused_full", "refused_shutdown", "unreadable")


class Columns(TypedDict, total=False):
    """Columns of a row that an assertion may name, beside the action. Each is compared by equality."""

    id: str
    transport: str
    bank_id: str | None
    started_at: datetime
    ended_at: datetime | None
    request: dict[str, Any] | None
    response: dict[str, Any] | None
    metadata: dict[str, Any]
    outcome: str | None
    error_type: str | None
    actor_id: str | None
    actor_type: str | None
    trace_id: str | None
    span_id: str | None
    parent_span_id: str | None
    sampled: bool | None
    service_name: str | None
    recorded_at: datetime | None
    schema: str | None


class AuditLog:
    """The records of a pipeline into an `InMemoryAuditTable`. Every reading waits for what has ended before it.

    Args:
        processor: what `configure_audit(storage=InMemoryAuditTable(), …)` has given.

    Raises:
        ConfigurationError: a pipeline that writes elsewhere.
    """

    def __init__(self, processor: AuditSpanProcessor) -> None:
        storage = processor.exporter.storage
        if not isinstance(storage, InMemoryAuditTable):
            raise ConfigurationError(
                "processor", f"its storage is a {type(storage).__name__}; accepted is one with an InMemoryAuditTable"
            )
        self._processor = processor
        self._table = storage

    @property
    def table(self) -> InMemoryAuditTable:
        """The table, with everything in it that has ended before.

        Raises:
            AssertionError: an operation that has ended was not recorded, as where the pipeline was shut down before.
        """
        is_whole = self._processor.force_flush()
        stats = self._processor.stats()
        missing = {name: stats[name] for name in _MISSING if stats[name]}
        if missing or not is_whole:
            raise AssertionError(f"not every operation that has ended was recorded: {missing or stats}")
        return self._table

    @property
    def records(self) -> list[AuditRecord]:
        """All records, in the order in which their operations ended."""
        return self.table.records

    def clear(self) -> None:
        """Forget what is recorded so far."""
        self.table.clear()

    def one(self, action: str | None = None, **columns: Unpack[Columns]) -> AuditRecord:
        """Return the one record with this action and these columns; there may be others with other ones.

        Args:
            action: None for any.
            columns: columns of the row, each compared by equality.

        Raises:
            AssertionError: none or several; it shows what was recorded.
            TypeError: a name that is no column.
        """
        return _one(self.records, _asked(action, columns))

    def none(self, action: str | None = None, **columns: Unpack[Columns]) -> None:
        """Assert that there is no record with this action and these columns, or none at all.

        Args:
            action: None for any.
            columns: columns of the row, each compared by equality.

        Raises:
            AssertionError: there is one; it shows what was recorded.
            TypeError: a name that is no column.
        """
        records, asked = self.records, _asked(action, columns)
        if found := _matching(records, asked):
            raise AssertionError(_wrong("no record", asked, len(found), records))

    def expect(self, action: str | None = None, **columns: Unpack[Columns]) -> Expectation:
        """Return a block that has to leave exactly one record with this action and these columns.

        For ``with`` and ``async with``. It doesn't look at a block that an exception leaves: where one is expected,
        catch it inside.

        Args:
            action: None for any.
            columns: columns of the row, each compared by equality.

        Raises:
            AssertionError: at the end of the block, if it left none or several; it shows what the block has left.
            TypeError: a name that is no column.
        """
        return Expectation(self, _asked(action, columns))


class Expectation:
    """A block that has to leave one record, see `AuditLog.expect`; then that record is its `record`."""

    def __init__(self, log: AuditLog, asked: dict[str, Any]) -> None:
        self._log = log
        self._asked = asked
        self._before: set[tuple[str | None, str]] = set()
        self._record: AuditRecord | None = None

    @property
    def record(self) -> AuditRecord:
        """What the block has left.

        Raises:
            AssertionError: the block has not ended yet, or ended with an exception.
        """
        if self._record is None:
            raise AssertionError("an expected record is there once its block has ended")
        return self._record

    def __enter__(self) -> Self:
        self._record = None
        self._before = {(record.schema, record.id) for record in self._log.records}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            left = [record for record in self._log.records if (record.schema, record.id) not in self._before]
            self._record = _one(left, self._asked)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def _asked(action: str | None, columns: Columns) -> dict[str, Any]:
    if unknown := sorted(set(columns) - set(AuditRecord._fields)):
        raise TypeError(f"{', '.join(unknown)}: no column of a record; accepted are {', '.join(AuditRecord._fields)}")
    return {**({} if action is None else {"action": action}), **columns}


def _matching(records: list[AuditRecord], asked: dict[str, Any]) -> list[AuditRecord]:
    return [record for record in records if all(getattr(record, name) == value for name, value in asked.items())]


def _one(records: list[AuditRecord], asked: dict[str, Any]) -> AuditRecord:
    found = _matching(records, asked)
    if len(found) != 1:
        raise AssertionError(_wrong("one record", asked, len(found), records))
    return found[0]


def _wrong(expected: str, asked: dict[str, Any], found: int, records: list[AuditRecord]) -> str:
    said = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    lines = [f"expected {expected}{' with ' if said else ''}{said}, found {found or 'none'}"]
    if records:
        lines.append(f"recorded {'was' if len(records) == 1 else 'were'} {len(records)}:")
        lines += [_line(record, asked) for record in records[:_MAX_SHOWN]]
        if len(records) > _MAX_SHOWN:
            lines.append(f"  and {len(records) - _MAX_SHOWN} more")
    else:
        lines.append("nothing was recorded")
    return "\n".join(lines)


def _line(record: AuditRecord, asked: dict[str, Any]) -> str:
    names = [name for name in _SHOWN if name in asked or getattr(record, name)]
    names += [name for name in asked if name not in _SHOWN and name != "action"]
    return f"  {record.action}: " + ", ".join(f"{name}={getattr(record, name)!r}" for name in names)
