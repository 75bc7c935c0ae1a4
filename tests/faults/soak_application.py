"""The program of the soak's processes: audits in threads and children, and notes each operation that has returned.

Its ledger is no part of the pipeline: a note is one `write`, after the operation and before the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from astrocyte_otel_audit import AuditUnavailableError, audit_operation, audit_scope, configure_audit
from tests.faults.soak_faults import SCHEMAS

#: What groups of operations are like, and how many rows each becomes. A nested one is a part of the row around it.
KINDS = {"plain": 1, "fails": 1, "required": 1, "two actions": 2, "nested": 1}


class Note(NamedTuple):
    """A line of a ledger."""

    #: One of KINDS, of which a part has returned; or a child has `begun`, or `left`.
    what: str
    #: The thread or child, its group, counted from 1, and of that the outer operation (0) or the inner one.
    slot: str
    number: int
    part: int = 0
    schema: str = ""
    outcome: str = ""


def read_ledger(path: Path) -> list[Note]:
    """Return what a process has noted, in order."""
    notes = []
    for line in path.read_text().split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # cut off by the end of its process
            notes.append(Note(*json.loads(line)))
    return notes


class OnPurposeError(Exception):
    """That of an operation which fails."""


class Application:
    """Audits until its input ends."""

    def __init__(self, *, name: str, seed: str, ledger: str, kinds: list[str], settings: dict[str, Any]) -> None:
        self._name, self._seed, self._kinds, self._chance = name, seed, kinds, random.Random(seed)
        self._tracers = TracerProvider(
            resource=Resource({"service.name": name}), sampler=TraceIdRatioBased(self._chance.choice([0.0, 0.5, 1.0]))
        )
        self._processor = configure_audit(actions="*", tracer_provider=self._tracers, **settings)
        self._is_over = False
        # It may be ended once that is there.
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def run(self) -> None:
        threading.excepthook = _end_at_once
        threads = [threading.Thread(target=self._work, args=(f"t{i}", itertools.count(1))) for i in range(2)]
        for thread in threads:
            thread.start()
        for number in itertools.count():
            if select.select([sys.stdin], [], [], self._chance.uniform(0.2, 3))[0]:
                break
            self._fork(f"c{number}", self._chance.randint(0, 20))
        self._is_over = True
        for thread in threads:
            thread.join()

    def _fork(self, slot: str, count: int) -> None:
        if self._chance.random() < 0.3:
            child = multiprocessing.get_context("fork").Process(target=self._work_in_child, args=(slot, count))
            child.start()
            threading.Thread(target=child.join, daemon=True).start()
            return
        if (pid := os.fork()) == 0:
            self._work_in_child(slot, count)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()

    def _work_in_child(self, slot: str, count: int) -> None:
        signal.alarm(60)  # where it hangs, it ends by that
        self._note(Note("begun", slot, 0))
        self._work(slot, range(1, count + 1))
        self._note(Note("left", slot, 0))

    def _work(self, slot: str, numbers: Iterable[int]) -> None:
        chance = random.Random(f"{self._seed} {slot}")
        for number in numbers:
            self._perform(Note(chance.choice(self._kinds), slot, number, schema=chance.choice(SCHEMAS)))
            time.sleep(chance.expovariate(200))
            if chance.random() < 0.003:
                self._processor.force_flush(1000)
            if self._is_over:
                return

    def _perform(self, group: Note) -> None:
        with (
            contextlib.suppress(OnPurposeError, AuditUnavailableError),
            audit_scope(schema=group.schema),
            self._operation(group, "recall"),
        ):
            if group.what == "fails":
                raise OnPurposeError
            if group.what in ("nested", "two actions"):
                with self._operation(group._replace(part=1), "recall" if group.what == "nested" else "retain"):
                    pass

    @contextlib.contextmanager
    def _operation(self, note: Note, action: str) -> Iterator[None]:
        token, outcome = f"{self._name}:{note.slot}:{note.number}", "failure"
        try:
            with audit_operation(
                action, bank_id=token, metadata={f"part{note.part}": token}, required=note.what == "required",
                tracer_provider=self._tracers,
            ):  # fmt: skip
                yield
            outcome = "success"
        finally:
            self._note(note._replace(outcome=outcome))

    def _note(self, note: Note) -> None:
        os.write(self._ledger, f"\n{json.dumps(note)}\n".encode())  # one that is cut off spoils no other


def _end_at_once(what: threading.ExceptHookArgs) -> None:
    """End the process where one of its threads can't go on, for the verdict to say so."""
    sys.excepthook(what.exc_type, what.exc_value or what.exc_type(), what.exc_traceback)
    os._exit(1)
