"""What all tables and pages have in common: how a table looks, and how an instant and a cell are written."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.view.inert import inert


def new_table() -> Table:
    """Return a table without columns."""
    return Table(box=None, pad_edge=False, header_style="bold")


def moment(instant: datetime | None, absent: str = "–") -> str:
    """Return an instant to the second, as it stands under a heading that says UTC."""
    return absent if instant is None else f"{instant:%Y-%m-%d %H:%M:%S}"


def cells(texts: Iterable[str], style: str = "") -> list[Text]:
    """Return a row's texts as cells that can do a terminal no harm."""
    return [Text(inert(text), style=style) for text in texts]
