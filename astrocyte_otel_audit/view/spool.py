"""The spool as a table."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.view.inert import inert
from astrocyte_otel_audit.view.tables import moment, new_table


def spool_table(found: Iterable[NamedTuple]) -> Table:
    """Return what each process has in the spool, see `pipeline.replay.ProcessStatus`, one line each."""
    table = new_table()
    for number, row in enumerate(found):
        values = row._asdict()
        if number == 0:
            for name, value in values.items():
                counts = isinstance(value, int) and not isinstance(value, bool)
                table.add_column(name, justify="right" if counts else "left", overflow="fold")
        table.add_row(*(_cell(value) for value in values.values()))
    return table


def _cell(value: object) -> Text:
    if isinstance(value, bool):
        return Text("yes" if value else "no", style="green" if value else "yellow")
    if isinstance(value, int):
        return Text(f"{value:,}")
    return Text(moment(value) if isinstance(value, datetime) else inert(str(value or "–")))
