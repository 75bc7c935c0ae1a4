"""What `doctor` finds, a line each."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from astrocyte_otel_audit.view.inert import inert

_STYLES = {"ok": "green", "warning": "bold yellow", "failed": "bold red", "skipped": "dim"}
#: Widths of status and check.
_STATUS, _CHECK = 7, 16


def plain_line(check: str, status: str, what: str, advice: str | None) -> str:
    """Return a finding as one line of plain text, however long."""
    return inert(f"{status:<{_STATUS}}  {check:<{_CHECK}}  {what}" + (f" -> {advice}" if advice else ""))


def styled_line(check: str, status: str, what: str, advice: str | None) -> RenderableType:
    """Return a finding for a terminal, what to do on a line of its own."""
    body: list[RenderableType] = [Text(inert(what), style="dim" if status == "skipped" else "")]
    if advice and status == "skipped":
        body = [Text(f"{inert(what)}: {inert(advice)}", style="dim")]
    elif advice:
        body.append(Text(f"→ {inert(advice)}", style="bold"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_STATUS)
    grid.add_column(width=_CHECK)
    grid.add_column(overflow="fold")
    grid.add_row(Text(status, style=_STYLES.get(status, "")), Text(inert(check)), Group(*body))
    return grid


def summary(found: Iterable[tuple[str, str]]) -> str:
    """Return how many findings there are of each status, the worst first, and which they are if they need somebody.

    Args:
        found: check and status of each.
    """
    checks: dict[str, list[str]] = {"failed": [], "warning": [], "skipped": [], "ok": []}
    for check, status in found:
        checks[status].append(check)
    return ", ".join(
        f"{len(names)} {status}" + (f" ({', '.join(dict.fromkeys(names))})" if status in ("failed", "warning") else "")
        for status, names in checks.items()
        if names
    )
