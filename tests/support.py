"""Stand-ins that tests share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import Appended, Fault


class MemoryStorage:
    """Keeps records in a list, once each, as the table does; can be made to fail.

    Only the pipeline's own behaviour is tested with it. What Postgres does is tested on Postgres.
    """

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.batches: list[int] = []
        #: Called before each append; may raise, or wait.
        self.before_append: Callable[[Sequence[AuditRecord]], None] = lambda records: None
        #: Schemas that can't take records, with the fault.
        self.parked: dict[str | None, Fault] = {}
        self.fault: Fault | None = None
        self.closed = False
        self._lock = threading.Lock()

    def append(self, records: Sequence[AuditRecord]) -> Appended:
        self.before_append(records)
        result = Appended()
        with self._lock:
            self.batches.append(len(records))
            known = {record.id for record in self.records}
            for record in records:
                if (fault := self.parked.get(record.schema)) is not None:
                    result.parked.setdefault(record.schema or "public", (fault, []))[1].append(record)
                    continue
                if record.id not in known:
                    known.add(record.id)
                    self.records.append(record)
                result.stored += 1
                result.schemas.add(record.schema or "public")
        return result

    def check(self) -> Fault | None:
        return self.fault

    def close(self) -> None:
        self.closed = True

    def after_fork(self) -> None:
        self._lock = threading.Lock()


def unavailable(records: Sequence[AuditRecord]) -> None:
    """Behave as an absent database does."""
    raise DatabaseUnavailableError("nothing listens there")
