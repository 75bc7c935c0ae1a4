"""What is held, what is expired, and what a sweep has done, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime

from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.postgres.holds import Hold
from astrocyte_otel_audit.postgres.sweep import Expiring, Swept
from astrocyte_otel_audit.view.inert import inert

#: Partitions of a rule that a line names; the others are counted.
_NAMED = 3


def holds_table(holds: Iterable[Hold]) -> Table:
    """Return holds as a table, one line each."""
    table = _table("id", "bank", "actor", "trace", "reason", "held (UTC)", "by", "released (UTC)", "by")
    for hold in holds:
        cells = (
            str(hold.id), hold.bank_id or "any", hold.actor_id or "any", hold.trace_id or "any", hold.reason,
            _instant(hold.held_at), hold.held_by, _instant(hold.released_at), hold.released_by or "–",
        )  # fmt: skip
        table.add_row(*_cells(cells, "" if hold.released_at is None else "dim"))
    return table


def criteria(hold: Hold) -> str:
    """Return what a hold keeps, in words."""
    named = (("bank", hold.bank_id), ("actor", hold.actor_id), ("trace", hold.trace_id))
    return " and ".join(f"{name} {inert(value)}" for name, value in named if value is not None)


def expiring_table(expiring: Iterable[Expiring]) -> Table:
    """Return what a sweep would delete, a line each schema and rule."""
    table = _table("schema", "by the rule", "rows", "oldest (UTC)", "newest (UTC)", "partitions", right="rows")
    for row in expiring:
        cells = (
            row.schema, row.rule, f"{row.rows:,}", _instant(row.oldest), _instant(row.newest),
            _listed(row.partitions),
        )  # fmt: skip
        table.add_row(*_cells(cells))
    return table


def swept_table(swept: Iterable[Swept]) -> Table:
    """Return what a sweep has done, a line a schema, and what kept it from doing more."""
    table = _table(
        "schema", "rows", "set aside", "oldest (UTC)", "newest (UTC)", "partitions", "unfinished", right="rows"
    )
    for row in swept:
        cells = (
            row.schema, f"{row.rows:,}", f"{row.set_aside:,}", _instant(row.oldest), _instant(row.newest),
            _listed(row.dropped), unfinished(row) or "–",
        )  # fmt: skip
        table.add_row(*_cells(cells))
    return table


def swept_json(swept: Swept) -> str:
    """Return what a sweep has done to one schema as one line of JSON."""
    facts = {**asdict(swept), "faults": [str(fault) for fault in swept.faults]}
    return json.dumps(facts, default=lambda instant: instant.isoformat())


def unfinished(swept: Swept) -> str:
    """Return why a sweep of one schema has left something; empty where it has done all."""
    if swept.faults:
        return "; ".join(map(str, swept.faults))
    if swept.is_busy:
        return "somebody else is sweeping it"
    return "" if swept.is_finished else "stopped before the end"


def _table(*columns: str, right: str = "id") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_short = column in ("id", "rows") or column.endswith("(UTC)")
        table.add_column(column, no_wrap=is_short, overflow="fold", justify="right" if column == right else "left")
    return table


def _cells(texts: Iterable[str], style: str = "") -> list[Text]:
    return [Text(inert(text), style=style) for text in texts]


def _instant(instant: datetime | None) -> str:
    return "–" if instant is None else f"{instant:%Y-%m-%d %H:%M:%S}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "") or "–"
