"""Records as tables, as a page of details, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.postgres import SetAside
from astrocyte_otel_audit.record import AuditRecord
from astrocyte_otel_audit.view.inert import inert
from astrocyte_otel_audit.view.tables import cells, moment, new_table

_OUTCOME_STYLES = {"success": "green", "failure": "bold red", "unknown": "yellow"}

_Cell = Callable[[AuditRecord], Text]


def _plain(get: Callable[[AuditRecord], str | None]) -> _Cell:
    return lambda record: Text(inert(get(record) or "–"))


def _outcome(record: AuditRecord) -> Text:
    outcome = record.outcome or "–"
    text = Text(inert(outcome), style=_OUTCOME_STYLES.get(outcome, ""))
    if record.error_type:
        text.append(f" {inert(record.error_type.rpartition('.')[2])}", style="red")
    return text


#: Columns by name. A trace that was not sampled is dim: there is nothing to open in a trace backend.
_COLUMNS: dict[str, _Cell] = {
    "started (UTC)": lambda record: Text(moment(record.started_at)),
    "action": _plain(lambda record: record.action),
    "bank": _plain(lambda record: record.bank_id),
    "outcome": _outcome,
    "duration": lambda record: Text(duration(record), justify="right"),
    "actor": _plain(lambda record: record.actor_id),
    "transport": _plain(lambda record: record.transport),
    "trace": lambda record: Text(inert(record.trace_id or "–"), style="dim" if record.sampled is False else ""),
    "id": _plain(lambda record: record.id),
}
#: What a list shows, and the width that all of it takes; on a narrower terminal the trace is left to `show`.
LIST_COLUMNS = ("started (UTC)", "action", "bank", "outcome", "duration", "actor", "trace", "id")
WIDE = 150


def duration(record: AuditRecord) -> str:
    """Return how long an operation took, as a person says it."""
    seconds = record.duration_seconds
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def records_table(records: Iterable[AuditRecord], columns: Sequence[str]) -> Table:
    """Return records as a table, one line each.

    Args:
        records: in the order to show.
        columns: names out of `LIST_COLUMNS`, and ``transport``.
    """
    table = new_table()
    for column in columns:
        table.add_column(column, no_wrap=column in ("id", "trace", "started (UTC)", "duration"), overflow="fold")
    for record in records:
        table.add_row(*(_COLUMNS[column](record) for column in columns))
    return table


def record_details(record: AuditRecord) -> RenderableType:
    """Return everything that one record says, a line a field, payloads as JSON."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in record._asdict().items():
        if name in ("request", "response", "metadata"):
            continue
        if name == "outcome":
            facts.add_row(name, _outcome(record))
        elif name == "ended_at":
            facts.add_row(name, Text(f"{_shown(value)}  ({duration(record)})"))
        elif name == "sampled":
            facts.add_row("trace kept", {True: "yes", False: "no: the trace was sampled out", None: "–"}[value])
        else:
            facts.add_row(name, Text(inert(_shown(value))))
    payloads: list[RenderableType] = []
    for name, payload in (("request", record.request), ("response", record.response), ("metadata", record.metadata)):
        if payload:
            payloads += [Text(f"\n{name}", style="bold"), Text(json.dumps(payload, indent=2, default=str))]
    return Group(facts, *payloads)


def set_aside_table(refused: Iterable[SetAside]) -> Table:
    """Return the records that the table refused, with the reasons."""
    table = new_table()
    for column in ("set aside (UTC)", "action", "reason", "SQLSTATE", "id"):
        table.add_column(column, no_wrap=column in ("id", "set aside (UTC)"), overflow="fold")
    for row in refused:
        texts = (moment(row.set_aside_at), row.action, row.reason, row.sqlstate or "–", row.id)
        table.add_row(*cells(texts))
    return table


def as_json(row: NamedTuple) -> str:
    """Return a row as one line of JSON; ASCII only, so nothing in it can steer a terminal."""
    return json.dumps(row._asdict(), default=_shown)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value.isoformat() if isinstance(value, datetime) else str(value)
