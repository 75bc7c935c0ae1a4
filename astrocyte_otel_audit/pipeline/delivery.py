"""Delivery: one attempt to bring a batch to the table, what became of each record, and what the log says of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline.backlog import Entry
from astrocyte_otel_audit.pipeline.exporter import AuditSpanExporter
from astrocyte_otel_audit.pipeline.troubles import Troubles

_logger = logging.getLogger(__name__)


class Delivered(NamedTuple):
    """What became of a batch: each of its entries is in one of the collections."""

    #: In the table.
    stored: list[Entry]
    #: Beside it.
    set_aside: list[Entry]
    #: Those whose place in the spool is damaged.
    unreadable: list[Entry]
    #: By schema: those whose table can't take them for now.
    waiting: dict[str | None, list[Entry]]


class Delivery:
    """Gives records to the exporter. Used by one thread.

    Args:
        exporter: its `write` takes the records.
        troubles: says what goes wrong, and when it is over.
        attempted: told after each attempt how many seconds it took, and the class of the error, if there was one.
    """

    def __init__(
        self, exporter: AuditSpanExporter, troubles: Troubles, attempted: Callable[[float, str | None], None]
    ) -> None:
        self._exporter = exporter
        self._troubles = troubles
        self._attempted = attempted

    def look_at_table(self) -> None:
        """Say what would keep a record from being written, before there is one."""
        try:
            fault = self._exporter.check()
        except DatabaseUnavailableError as unavailable:
            self._away(str(unavailable))
        except BaseException as error:  # whatever it is, the first batch will meet it again
            self._away(f"the audit table can't be looked at ({type(error).__qualname__})")
        else:
            schema = self._exporter.default_schema
            if fault is not None and schema is not None:
                self._parked(schema, fault)

    def attempt(self, batch: Sequence[Entry]) -> Delivered | None:
        """Write a batch once. None means that it has to be given again: Postgres is away. Never raises."""
        began, failed = time.perf_counter(), None
        try:
            appended = self._exporter.write([entry.record for entry in batch if entry.record is not None])
            waiting_ids = appended.waiting_ids()
            refused_ids = {record.id for record, _ in appended.set_aside}
        except DatabaseUnavailableError as unavailable:
            failed = unavailable.sqlstate or type(unavailable).__qualname__
            self._away(str(unavailable))
            return None
        except BaseException as error:  # a thread that ends here would let the backlog grow in silence
            failed = type(error).__qualname__
            self._away(f"an unexpected {failed}")
            return None
        finally:
            with suppress(Exception):  # a meter's is not to end this thread either
                self._attempted(time.perf_counter() - began, failed)
        # Said first, so that whoever waits in `flush` finds the reason in the log.
        self._troubles.clear("database", "audit records are being written again")
        for schema, (fault, _) in appended.parked.items():
            self._parked(schema, fault)
        for schema in appended.schemas - appended.parked.keys():
            self._troubles.clear(("schema", schema), f"audit records of schema {schema!r} are being written again")
        with suppress(Exception):  # as in Troubles: a log's handler must not end this thread
            for record, fault in appended.set_aside:
                _logger.error("Audit record %s (%r) was set aside: %s.", record.id, record.action, fault)
        delivered = Delivered([], [], [], {})
        for entry in batch:
            if entry.record is None:
                delivered.unreadable.append(entry)
            elif entry.record.id in waiting_ids:
                delivered.waiting.setdefault(entry.schema, []).append(entry)
            elif entry.record.id in refused_ids:
                delivered.set_aside.append(entry)
            else:
                delivered.stored.append(entry)
        return delivered

    def close(self) -> None:
        """Close the exporter."""
        try:
            self._exporter.shutdown()
        except Exception as error:  # it is over all the same
            self._troubles.report("close", f"the audit table could not be closed ({type(error).__qualname__})")

    def _away(self, reason: str) -> None:
        self._troubles.report("database", f"audit records wait for Postgres: {reason}")

    def _parked(self, schema: str, fault: object) -> None:
        self._troubles.report(("schema", schema), f"audit records of schema {schema!r} wait: {fault}")
