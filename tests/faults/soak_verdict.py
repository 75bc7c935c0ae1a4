"""The soak's verdict: each operation that has returned is in exactly one row, or counted in a gap record."""

from __future__ import annotations

import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tests.faults.server import Server
from tests.faults.soak_application import KINDS, Note, read_ledger
from tests.faults.soak_faults import LOG, SCHEMAS

#: How a process is ended, and what that is to whoever waits for it.
ENDS = {"in order": 0, "SIGKILL": -9, "SIGTERM": -15}


@dataclass
class Process:
    """One that audits."""

    name: str
    is_capped: bool
    popen: subprocess.Popen[bytes]
    #: How it was ended.
    end: str = ""


@dataclass
class Report:
    """What has come of a soak."""

    seed: int
    faults: Counter[str]
    #: Sentences, each about something that may not be.
    unexplained: list[str]
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = [*sorted(self.faults.items()), ("faults", self.faults.total()), *self.counts.items()]
        lines = [f"{name:<40}{count:8,}" for name, count in (*counts, ("unexplained", len(self.unexplained)))]
        return "\n".join([f"seed {self.seed}", *lines, *self.unexplained[:50]])


class Row(NamedTuple):
    schema: str
    id: str
    action: str
    bank_id: str | None
    metadata: dict[str, Any]
    outcome: str | None
    service_name: str | None


Groups: TypeAlias = dict[str | None, list[Row]]


def judge(report: Report, server: Server, past: list[Process], ledgers: Path) -> None:
    """Compare the table with the ledgers."""
    columns = "id::text, action, bank_id, metadata, outcome, service_name"
    rows: list[Row] = []
    for schema in SCHEMAS:
        rows += [Row(schema, *values) for values in server.execute(f"SELECT {columns} FROM {schema}.{LOG}")]
        aside = server.execute(f"SELECT id, reason FROM {schema}.{LOG}_set_aside")
        report.unexplained += [f"{row_id} was set aside: {reason}" for row_id, reason in aside]
    gaps: Counter[str | None] = Counter()
    groups: Groups = defaultdict(list)
    for row in rows:
        if row.action == "audit.gap":
            gaps[row.service_name] += row.metadata["missing"]
        else:
            groups[row.bank_id].append(row)
    report.counts.update(
        {"processes": len(past), "rows": len(rows), "duplicates": len(rows) - len({row.id for row in rows}),
         "gap records": len(rows) - sum(map(len, groups.values())), "operations in gap records": gaps.total()}
    )  # fmt: skip
    for process in past:
        Account(report, process, read_ledger(ledgers / process.name), groups).judge(gaps.pop(process.name, 0))
    report.unexplained += [f"nobody's row: {row}" for found in groups.values() for row in found]
    report.unexplained += [f"nobody's gap: {name}, {missing}" for name, missing in gaps.items()]


class Account:
    """What one process has noted, and what has come of it. Takes the rows that it accounts for out of the groups."""

    def __init__(self, report: Report, process: Process, notes: list[Note], groups: Groups) -> None:
        self._report, self._process, self._notes, self._groups = report, process, notes, groups
        self._missing: list[Note] = []

    def judge(self, gap: int) -> None:
        """Compare all that has returned with the rows, and what has none with what the gap records say."""
        returned: dict[str, dict[int, dict[int, Note]]] = {note.slot: defaultdict(dict) for note in self._notes}
        for note in self._notes:
            if note.what in KINDS:
                returned[note.slot][note.number][note.part] = note
                self._report.counts["operations that returned"] += 1
        for slot, numbers in returned.items():
            for number, parts in numbers.items():
                self._judge_group(parts, self._groups.pop(f"{self._process.name}:{slot}:{number}", []))
            # The next one may have begun.
            unheard = self._groups.pop(f"{self._process.name}:{slot}:{max(numbers, default=0) + 1}", [])
            self._report.counts["rows of what had not returned"] += len(unheard)
            if unheard and slot.startswith("t") and self._process.end == "in order":
                self._say(f"has ended in order, and this has not returned: {unheard}")
        # One group of each slot, of two operations at most, can be counted and have returned to nobody.
        if not len(self._missing) <= gap <= len(self._missing) + 2 * len(returned):
            self._say(f"{len(self._missing)} have no row, and its gap records say {gap}: {self._missing[:5]}")
        if gap and not self._process.is_capped:
            self._say(f"there was room for all, and its gap records say {gap}")
        if (code := self._process.popen.returncode) != ENDS.get(self._process.end):
            self._say(f"has ended with {code}, see its log")
        begun, left = ({note.slot for note in self._notes if note.what == what} for what in ("begun", "left"))
        self._report.counts["children"] += len(begun)
        if begun != left:
            self._say(f"its children {begun - left} have not come to their ends")

    def _judge_group(self, parts: dict[int, Note], rows: list[Row]) -> None:
        missing = len(self._missing)
        for part, note in parts.items():
            found = [row for row in rows if f"part{part}" in row.metadata]
            for row in found:
                told = note.schema, self._process.name, note.outcome
                # Of an outer operation that has not returned, the row says what the inner one was like.
                if (row.schema, row.service_name, row.outcome if part == 0 else note.outcome) != told:
                    self._say(f"{note} has another row: {row}")
            if not found:
                self._missing.append(note)
            if len(found) > 1:
                self._report.counts["duplicates"] += 1
                self._say(f"{note} is in {len(found)} rows: {found}")
        if 0 in parts and len(rows) != KINDS[parts[0].what] - (len(self._missing) - missing):
            self._say(f"{parts} is in {len(rows)} rows: {rows}")

    def _say(self, trouble: str) -> None:
        room = "little room" if self._process.is_capped else "room"
        self._report.unexplained.append(f"{self._process.name} ({room}, {self._process.end}): {trouble}")
