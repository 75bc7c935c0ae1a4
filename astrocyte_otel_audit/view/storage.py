"""What a log takes of the server, as a page and as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.postgres.storage import Count, Storage
from astrocyte_otel_audit.view.inert import inert
from astrocyte_otel_audit.view.tables import cells, moment, new_table

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_BY = {0: "expired now", 1: "expired in 1 day"}


def size(count: int) -> str:
    """Return a number of bytes as a person says it, as Postgres does: a kB has 1,024 of them."""
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{amount:,.1f} {_UNITS[unit]}"


def rows(count: Count | None) -> str:
    """Return a number of rows with how well it is known."""
    if count is None:
        return "can't be seen"
    return {"estimate": "about ", "at least": "more than "}.get(count.how, "") + f"{count.rows:,}"


def storage_page(storage: Storage) -> RenderableType:
    """Return everything that is known of one schema's log, a line a fact, and a line a partition."""
    parts = (("table", storage.table_bytes), ("indexes", storage.index_bytes), ("TOAST", storage.toast_bytes))
    facts: list[tuple[str, str]] = [
        ("table", f"{storage.schema}.{storage.table}"),
        ("rows", rows(storage.rows)),
        ("size", f"{size(sum(part for _, part in parts))}: " + ", ".join(f"{name} {size(n)}" for name, n in parts)),
        ("oldest (UTC)", moment(storage.oldest)),
        ("newest (UTC)", moment(storage.newest)),
        *((_BY.get(days, f"expired in {days} days"), rows(count)) for days, count in storage.expired.items()),
        ("dead rows", f"about {storage.dead_rows:,}; last autovacuum {moment(storage.last_autovacuum, 'never')}"),
        ("set aside", rows(storage.set_aside)),
        ("active holds", "can't be seen" if storage.holds is None else f"{storage.holds:,}"),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(inert(value)))
    partitions: list[RenderableType] = [Text(), _partitions(storage)] if storage.partitions else []
    return Group(grid, *partitions)


def storage_json(storage: Storage) -> str:
    """Return the same as one line of JSON, numbers as numbers."""
    facts: dict[str, Any] = storage._asdict()
    for name in ("rows", "set_aside"):
        facts[name] = None if facts[name] is None else facts[name]._asdict()
    facts["expired"] = {str(days): count._asdict() for days, count in storage.expired.items()}
    facts["partitions"] = [{**each._asdict(), "rows": each.rows._asdict()} for each in storage.partitions]
    return json.dumps(facts, default=lambda instant: instant.isoformat())


def _partitions(storage: Storage) -> Table:
    table = new_table()
    table.add_column("partition", overflow="fold")
    table.add_column("bounds", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for each in storage.partitions:
        table.add_row(*cells((each.name, each.bounds, rows(each.rows), size(each.bytes))))
    return table
