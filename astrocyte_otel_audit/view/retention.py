"""What is held, what is expired, and what a sweep has done, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich.table import Table

from astrocyte_otel_audit.postgres.holds import Hold
from astrocyte_otel_audit.postgres.sweep import Expiring, Swept
from astrocyte_otel_audit.view.inert import inert
from astrocyte_otel_audit.view.tables import cells, moment, new_table

#: Partitions of a rule that a line names; the others are counted.
_NAMED = 3


def holds_table(holds: Iterable[Hold]) -> Table:
    """Return holds as a table, one line each."""
    table = _table("id", "bank", "actor", "trace", "reason", "held (UTC)", "by", "released (UTC)", "by")
    for hold in holds:
        texts = (
            str(hold.id), hold.bank_id or "any", hold.actor_id or "any", hold.trace_id or "any", hold.reason,
            moment(hold.held_at), hold.held_by, moment(hold.released_at), hold.released_by or "–",
        )  # fmt: skip
        table.add_row(*cells(texts, "" if hold.released_at is None else "dim"))
    return table


def criteria(hold: Hold) -> str:
    """Return what a hold keeps, in words."""
    named = (("bank", hold.bank_id), ("actor", hold.actor_id), ("trace", hold.trace_id))
    return " and ".join(f"{name} {inert(value)}" for name, value in named if value is not None)


def expiring_table(expiring: Iterable[Expiring]) -> Table:
    """Return what a sweep would delete, a line each schema and rule."""
    table = _table("schema", "by the rule", "rows", "oldest (UTC)", "newest (UTC)", "partitions", right="rows")
    for row in expiring:
        texts = (
            row.schema, row.rule, f"{row.rows:,}", moment(row.oldest), moment(row.newest),
            _listed(row.partitions),
        )  # fmt: skip
        table.add_row(*cells(texts))
    return table


def swept_table(swept: Iterable[Swept]) -> Table:
    """Return what a sweep has done, a line a schema, and what kept it from doing more."""
    table = _table(
        "schema", "rows", "set aside", "oldest (UTC)", "newest (UTC)", "partitions", "unfinished", right="rows"
    )
    for row in swept:
        texts = (
            row.schema, f"{row.rows:,}", f"{row.set_aside:,}", moment(row.oldest), moment(row.newest),
            _listed(row.dropped), unfinished(row) or "–",
        )  # fmt: skip
        table.add_row(*cells(texts))
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
    table = new_table()
    for column in columns:
        is_short = column in ("id", "rows") or column.endswith("(UTC)")
        table.add_column(column, no_wrap=is_short, overflow="fold", justify="right" if column == right else "left")
    return table


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "") or "–"
