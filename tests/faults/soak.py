"""A soak: processes that audit, faults at random, and in the end a row for each operation that has returned.

    python -m tests.faults.soak --seconds 600 --seed 1

Processes with a writer's thread, and processes that leave writing to `astrocyte-otel-audit writer`, share one spool and
one table, which is on a server that fails, behind a network that fails. They are killed, and others take their place.
Each says in a ledger of its own, outside of the pipeline, which operations have returned. When all of it is over, the
table and the ledgers are compared: each operation is in exactly one row, or counted in a gap record.

What the promises leave out is left out here: a process whose files in the spool were deleted isn't killed until it has
put them back. A seed says what comes, and not at which instruction it hits: the same one finds other things.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import psutil
import psycopg
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit import AuditUnavailableError, audit_operation, audit_scope, configure_audit
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.faults.proxy import Proxy
from tests.faults.server import Server, migrated

ROOT = Path(__file__).parents[2]
TENANTS = ("tenant_a", "tenant_b")
SCHEMAS = ("public", *TENANTS)
LOG = "astrocyte_audit_log"

#: What a group of operations is like, and which of its parts are one row together; the first of a row is outermost.
KINDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "plain": ((0,),),
    "raises": ((0,),),
    "required": ((0,),),
    # An operation directly in another one of the same action is a part of it,
    "nested": ((0, 1),),
    "deep": ((0, 1, 2),),
    "required around": ((0, 1),),
    # unless it is the second one, fails where the outer one succeeds, is required, or another bank's or tenant's.
    "two": ((0, 1), (2,)),
    "fails within": ((0,), (1,)),
    "required within": ((0,), (1,)),
    "banks": ((0,), (1,)),
    "tenants": ((0,), (1,)),
    "actions": ((0,), (1,)),
}
_WEIGHTS = {"plain": 6, "required": 3, "nested": 4}


class Event(NamedTuple):
    """A line of a ledger."""

    #: `start` and `body` of an operation that must leave a row, `returned`, or `unavailable`: it was refused. `flush`
    #: begins, and has `flushed`; a child is `forked`, and has `left`; the process is `ending`, and `ended` in order.
    what: str
    #: A thread or task, what of it (counted from 1), of which kind, and which part of that.
    slot: str
    number: int
    kind: str
    part: int
    id: str
    schema: str
    outcome: str
    #: Seconds since the epoch.
    at: float

    def line(self) -> bytes:
        # Between line feeds, so that one that is cut off by the end of its process spoils no other.
        return ("\n" + "\t".join(map(str, self)) + "\t.\n").encode()

    @classmethod
    def parse(cls, line: str) -> Event | None:
        values = line.split("\t")
        if len(values) != len(cls._fields) + 1 or values[-1] != ".":
            return None
        what, slot, number, kind, part, row_id, schema, outcome, at, _ = values
        return cls(what, slot, int(number), kind, int(part), row_id, schema, outcome, float(at))


# The processes that audit.


class OnPurposeError(Exception):
    """That of an operation which fails."""


@dataclass(frozen=True)
class Plan:
    """What one process does."""

    name: str
    seed: str
    ledger: str
    settings: dict[str, Any]
    threads: int = 2
    tasks: int = 2
    #: Seconds between two operations, on average.
    pace: float = 0.01
    sampled: float = 1.0
    flushes: bool = True


class Application:
    """Audits in threads and tasks until it is told to stop, and notes each operation that has returned."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._stopped = threading.Event()
        self._forks = itertools.count(1)
        self._chance = random.Random(f"{plan.seed} main")
        atexit.register(self._say_goodbye)  # before the provider's own, so that it is called after that
        self.provider = TracerProvider(
            resource=Resource({"service.name": plan.name}), sampler=TraceIdRatioBased(plan.sampled)
        )
        self._processor = configure_audit(actions="*", tracer_provider=self.provider, **plan.settings)
        slots = [threading.Thread(target=self._work, args=(f"t{i}",), daemon=True) for i in range(plan.threads)]
        slots.append(threading.Thread(target=lambda: asyncio.run(self._work_in_tasks()), daemon=True))
        if plan.flushes:
            slots.append(threading.Thread(target=self._flush, daemon=True))
        self._slots = slots

    def run(self) -> None:
        signal.signal(signal.SIGUSR1, self._exit_in_order)
        # From now on it may be ended.
        self._ledger = os.open(self.plan.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for slot in self._slots:
            slot.start()
        for command in sys.stdin:
            match command.split():
                case ["fork", how]:
                    self._fork(how)
                case ["stop"]:
                    self._stop()
                    self.note("ending")
                    return
        os._exit(0)  # "_exit", or nobody is there any more

    def note(self, what: str, *, number: int = 0) -> None:
        """Note what the process does."""
        self.write(Event(what, "-", number, "-", 0, "-", "-", "-", time.time()))

    def write(self, event: Event) -> None:
        os.write(self._ledger, event.line())

    def _exit_in_order(self, *_: object) -> None:
        # While the others go on: what they begin from now on may be refused.
        self.note("ending")
        sys.exit(0)

    def _stop(self) -> None:
        self._stopped.set()
        for slot in self._slots:
            slot.join(10)

    def _say_goodbye(self) -> None:
        self._stop()
        self.note("ended", number=self._processor.stats()["refused_shutdown"])

    def _work(self, slot: str) -> None:
        for group in self._groups(slot):
            for pause in group:
                time.sleep(pause)

    async def _work_in_tasks(self) -> None:
        async def work(slot: str) -> None:
            for group in self._groups(slot):
                for pause in group:
                    await asyncio.sleep(pause)

        await asyncio.gather(*(work(f"a{i}") for i in range(self.plan.tasks)))

    def _flush(self) -> None:
        chance = random.Random(f"{self.plan.seed} flush")
        for number in itertools.count(1):
            if self._stopped.wait(chance.uniform(0.2, 3)):
                return
            self.note("flush", number=number)
            if self._processor.force_flush(2000):
                self.note("flushed", number=number)

    def _groups(self, slot: str) -> Iterator[Iterator[float]]:
        """Yield what a slot does, each as an iterator over its pauses."""
        chance = random.Random(f"{self.plan.seed} {slot}")
        kinds, weights = list(KINDS), [_WEIGHTS.get(kind, 1) for kind in KINDS]
        hurry = 0
        for number in itertools.count(1):
            if self._stopped.is_set():
                return
            [kind] = chance.choices(kinds, weights)
            schema = chance.choice(SCHEMAS)
            if chance.random() < 0.005:
                hurry = chance.randint(20, 200)
            pace = 1e6 if hurry else 1 / self.plan.pace
            hurry = max(0, hurry - 1)
            yield self._paced(Group(self, slot, number, kind, schema), chance, pace)

    @staticmethod
    def _paced(group: Group, chance: random.Random, pace: float) -> Iterator[float]:
        for _ in group.perform():
            yield chance.expovariate(pace)
        yield chance.expovariate(pace)

    def _fork(self, how: str) -> None:
        number = next(self._forks)
        count = self._chance.randint(0, 20)
        if how == "multiprocessing":
            child = multiprocessing.get_context("fork").Process(target=self._in_child, args=("p", number, count))
            child.start()
            threading.Thread(target=child.join, daemon=True).start()
            return
        with contextlib.ExitStack() as stack:
            if how == "inside":
                stack.enter_context(audit_scope(schema="public"))
                stack.enter_context(Operation(Group(self, f"m{number}", 1, "plain", "public"), 0, bank=None))
            pid = os.fork()
            if pid == 0:
                self._in_child("f", number, count)
                if self._chance.random() < 0.5:
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(0)
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()

    def _in_child(self, how: str, fork: int, count: int) -> None:
        signal.alarm(60)  # where it hangs, it ends by that
        self.note("forked", number=fork)
        for number in range(1, count + 1):
            for _ in Group(self, f"{how}{fork}", number, self._chance.choice(list(KINDS)), "public").perform():
                pass
        self.note("left", number=fork)


class Operation:
    """One audited operation, noted in the ledger."""

    def __init__(
        self, group: Group, part: int, action: str = "recall", bank: str | None = "", required: bool = False
    ) -> None:
        self._group = group
        self._part = part
        self._required = required
        self._operation = audit_operation(
            action,
            bank_id=None if bank is None else group.token + bank,
            required=required,
            metadata={f"part{part}": group.token},
            tracer_provider=group.application.provider,
        )
        self._schema = group.schemas[-1]

    def __enter__(self) -> None:
        if self._required:
            self._note("start")
        try:
            self._operation.__enter__()
        except AuditUnavailableError:
            self._note("unavailable", "failure")
            raise
        if self._required:
            self._note("body")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._operation.__exit__(kind, error, traceback)
        self._note("returned", "success" if error is None else "failure")

    def _note(self, what: str, outcome: str = "-") -> None:
        group, row_id = self._group, self._operation.record_id or "-"
        group.application.write(
            Event(what, group.slot, group.number, group.kind, self._part, row_id, self._schema, outcome, time.time())
        )


class Group:
    """Some operations that belong together."""

    def __init__(self, application: Application, slot: str, number: int, kind: str, schema: str) -> None:
        self.application = application
        self.slot = slot
        self.number = number
        self.kind = kind
        self.schemas = [schema]
        self.token = f"{application.plan.name}:{slot}:{number}"

    def perform(self) -> Iterator[None]:
        """Do all of it; yields where others may come in between."""
        with contextlib.suppress(OnPurposeError, AuditUnavailableError), audit_scope(schema=self.schemas[0]):
            yield from self._perform()

    def _perform(self) -> Iterator[None]:
        match self.kind:
            case "plain":
                with Operation(self, 0):
                    yield
            case "raises":
                with Operation(self, 0):
                    yield
                    raise OnPurposeError
            case "required":
                with Operation(self, 0, required=True):
                    yield
            case "nested" | "required around":
                with Operation(self, 0, bank=None if self.kind == "nested" else "", required=self.kind != "nested"):
                    with Operation(self, 1):
                        yield
                    yield
            case "deep":
                with Operation(self, 0):
                    with Operation(self, 1):
                        with Operation(self, 2):
                            yield
                        yield
                    yield
            case "two":
                with Operation(self, 0):
                    with Operation(self, 1):
                        yield
                    with Operation(self, 2):
                        yield
                    yield
            case "fails within":
                with Operation(self, 0):
                    with contextlib.suppress(OnPurposeError), Operation(self, 1):
                        yield
                        raise OnPurposeError
                    yield
            case "required within":
                with Operation(self, 0):
                    with Operation(self, 1, required=True):
                        yield
                    yield
            case "banks":
                with Operation(self, 0):
                    with Operation(self, 1, bank=":other"):
                        yield
                    yield
            case "actions":
                with Operation(self, 0):
                    with Operation(self, 1, "retain"):
                        yield
                    yield
            case "tenants":
                with Operation(self, 0):
                    self.schemas.append(SCHEMAS[SCHEMAS.index(self.schemas[0]) - 1])
                    with audit_scope(schema=self.schemas[-1]), Operation(self, 1):
                        yield
                    yield


# The faults.


@dataclass
class Process:
    """A process that audits."""

    name: str
    popen: subprocess.Popen[str]
    is_capped: bool
    is_external: bool
    #: When its ledger was found, seconds since the epoch.
    began: float = 0.0
    #: How it was ended.
    end: str = ""
    #: The name of a file that it has to put back: it must live.
    lacks: str = ""

    def __str__(self) -> str:
        room, writer = ("little room" if self.is_capped else "room"), ("external" if self.is_external else "thread")
        return f"{self.name} (writer {writer}, {room}, end: {self.end})"


Course: TypeAlias = Generator[float, None, None]


class Fault(NamedTuple):
    name: str
    weight: float
    #: Two faults of the same thing don't come together.
    of: str
    #: Does it, yields how many seconds it shall last, and undoes it. May yield more than once.
    do: Callable[[], Course]


class Soak:
    """All of it.

    Args:
        server: a Postgres with the table, stopped.
        directory: for spool, ledgers and logs.
        seconds: how long faults come.
        seed: of the faults, and of what the processes do.
        say: told how it goes.
    """

    def __init__(
        self, server: Server, directory: Path, *, seconds: float, seed: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.server = server
        self.directory = directory
        self.spool = directory / "spool"
        #: Hard links to what was in the spool, for whoever has to find out what became of a record.
        self.attic = directory / "attic"
        self.ledgers = directory / "ledgers"
        self.logs = directory / "logs"
        for each in (self.spool, self.attic, self.ledgers, self.logs):
            each.mkdir(mode=0o700)
        self._seconds = seconds
        self._seed = seed
        self._say = say
        self._chance = random.Random(f"faults {seed}")
        self._names = itertools.count(1)
        self._began = time.monotonic()
        self._ended = threading.Event()
        #: By the number of their place: two with a thread, two without, one of each with little room.
        self.processes: list[Process] = []
        self.past: list[Process] = []
        self._writers: list[subprocess.Popen[bytes]] = []
        self.faults = Counter[str]()
        self._under_way: dict[str, tuple[float, Course]] = {}
        #: Closed at one end once each process has ended that has inherited the other.
        self._alive = os.pipe()

    def run(self) -> Report:
        """Do it, and say what has come of it."""
        with open(self.server.data / "postgresql.conf", "a") as settings:
            settings.write("max_connections = 100\n")
        self.server.start()
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.close)
            for tenant in TENANTS:
                table = AuditTable(OwnConnection(self.server.dsn))
                table.migrate(tenant, create_schema=True)
                table.close()
                self.server.execute(
                    f"GRANT USAGE ON SCHEMA {tenant} TO writer",
                    f"GRANT INSERT ON ALL TABLES IN SCHEMA {tenant} TO writer",
                )
            self.proxy = Proxy(self.server.socket)
            stack.callback(self.proxy.close)
            self.dsn = make_conninfo(
                self.server.writer_dsn, host="127.0.0.1", port=self.proxy.port, connect_timeout=2,
                tcp_user_timeout=1000, keepalives_idle=1, keepalives_interval=1, keepalives_count=2,
            )  # fmt: skip
            keeper = threading.Thread(target=self._keep_links)
            stack.callback(keeper.join)
            stack.callback(self._ended.set)
            keeper.start()
            stack.callback(self._end_all)
            self._begin_writer()
            for place in range(4):
                self.processes.append(self._begin(place))
            self._let_faults_come()
            self._calm_down()
            left = self._replay()
            self._ended.set()
            keeper.join()
            return compare(self, left)

    def _let_faults_come(self) -> None:
        faults = self._list_of_faults()
        end, next_at, said_at = time.monotonic() + self._seconds, time.monotonic() + 1.0, 0.0
        while (now := time.monotonic()) < end:
            self._go_on_with_faults(now)
            self._replace_ended()
            if now >= next_at:
                next_at = now + self._chance.uniform(0.05, 0.5)
                [fault] = self._chance.choices(faults, [each.weight for each in faults])
                if fault.of not in self._under_way:
                    self._begin_fault(fault, now)
            if now >= said_at:
                said_at = now + 5
                self._say(self._progress(now))
            time.sleep(0.02)

    def _begin_fault(self, fault: Fault, now: float) -> None:
        running = fault.do()
        try:
            lasts = next(running)
        except StopIteration:  # there is nothing to do it to
            return
        self.faults[fault.name] += 1
        with open(self.directory / "faults", "a") as file:
            print(f"{time.time():.3f} {fault.name}", file=file)
        self._under_way[fault.of] = now + lasts, running

    def _go_on_with_faults(self, now: float) -> None:
        for of, (at, running) in list(self._under_way.items()):
            if now >= at:
                try:
                    self._under_way[of] = now + next(running), running
                except StopIteration:
                    del self._under_way[of]

    def _progress(self, now: float) -> str:
        ledgers = sum(path.stat().st_size for path in self.ledgers.iterdir())
        return (
            f"{now - self._began:6.0f} s  {self.faults.total():5d} faults  {len(self.past):4d} processes ended  "
            f"{ledgers // 1024:7d} KB of ledgers  {', '.join(sorted(self._under_way)) or 'no fault'} under way"
        )

    def _calm_down(self) -> None:
        """Lift all faults, and end all processes."""
        self._say("all faults are lifted, all processes end")
        deadline = time.monotonic() + 60
        while self._under_way or any(process.lacks for process in self.processes):
            self._go_on_with_faults(time.monotonic())
            self._look_for_lacking()
            assert time.monotonic() < deadline, f"can't be lifted: {[*self._under_way]}, {self.processes}"
            time.sleep(0.02)
        if self._chance.random() < 0.5:  # what is left is for `spool replay`
            for writer in self._writers:
                writer.kill()
        for process in self.processes:
            if not process.end:
                self._end(process, self._chance.choice(["in order", "in order", "while it works", "SIGKILL"]))
        for process in self.processes:
            process.popen.wait(60)
            self._close_input(process)
        self.past += self.processes
        self.processes.clear()
        os.close(self._alive[1])
        assert os.read(self._alive[0], 1) == b""  # what they have forked has ended too
        os.close(self._alive[0])
        for writer in self._writers:
            writer.terminate()
            assert writer.wait(60) in (0, -signal.SIGTERM, -signal.SIGKILL)  # or it had only just begun

    def _replay(self) -> list[str]:
        """Write what is left in the spool, and return what is there all the same."""
        self.replayed_rows = 0
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-m", "astrocyte_otel_audit", "spool", "replay", "--json", "--any-destination",
                 "--dsn", self.dsn, "--spool-dir", self.spool],
                cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said = json.loads(done.stdout)
            self.replayed_rows += said["written"]
            self._say(f"spool replay: {said}")
            if not said["processes"]:
                break
        # What was damaged as its process was killed is kept, and so is, for a minute, what one was about to make.
        kept = re.compile(r"writer-.*\.lock|damaged-.*|\..*")
        return sorted(path.name for path in self.spool.iterdir() if not kept.fullmatch(path.name))

    def _keep_links(self) -> None:
        while not self._ended.wait(0.1):
            for path in self._segments("*"):
                with contextlib.suppress(OSError):  # gone meanwhile, or linked before
                    os.link(path, self.attic / f"{path.parent.name}-{path.stem}-{path.stat().st_ino}")

    def look_for(self, name: str) -> Iterator[str]:
        """Say where in the spool a group of operations was, as far as links were kept."""
        for path in (*self.attic.iterdir(), *self.spool.glob("damaged-*"), *self.directory.glob("taken-*")):
            for line in path.read_bytes().split(b"\n") if path.is_file() else []:
                if f'"{name}"'.encode() in line:
                    yield f"{path.name}: {line[:60].decode(errors='replace')}…"

    def _segments(self, process: str) -> list[Path]:
        """Return the files of some processes, oldest first."""
        found: list[Path] = []
        for directory in self.spool.glob(process):
            with contextlib.suppress(OSError):  # gone meanwhile
                found += directory.glob("0*.segment")
        return sorted(found)

    # Processes.

    def _begin(self, place: int) -> Process:
        chance = self._chance
        name = f"k{next(self._names):03d}"
        is_external, is_capped = place >= 2, place % 2 == 1
        settings: dict[str, Any] = {
            "spool_dir": str(self.spool),
            "schedule_delay_millis": chance.choice([5.0, 50.0, 200.0]),
            "export_timeout_millis": 3000.0,
        }
        if is_capped:
            settings["spool_max_bytes"] = chance.choice([16, 64, 256]) * 1024
            settings["on_full"] = chance.choice(["drop", "block"])
            settings["on_full_timeout_millis"] = 50.0
        if is_external:
            settings["writer"] = "external"
        else:
            settings["dsn"] = self.dsn
            settings["spool_keep_seconds"] = chance.choice([0.0, 0.0, 3.0])
            settings["spool_fsync"] = chance.choice(["interval", "interval", "never", "always"])
            settings["max_queue_size"] = chance.choice([200, 32768])
            settings["max_export_batch_size"] = chance.choice([64, 2048])
        plan = Plan(
            name=name, seed=f"{self._seed} {name}", ledger=str(self.ledgers / name), settings=settings,
            sampled=chance.choice([0.0, 0.5, 1.0]), flushes=chance.random() < 0.5,
        )  # fmt: skip
        with open(self.logs / name, "wb") as log:
            popen = subprocess.Popen(
                # Python 3.12 warns of every fork beside a thread, which is what is tested.
                [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.faults.soak", "--work",
                 json.dumps(plan.__dict__)],
                cwd=ROOT, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, text=True,
                pass_fds=[self._alive[1]],
            )  # fmt: skip
        return Process(name, popen, is_capped, is_external)

    def _begin_writer(self) -> None:
        with open(self.logs / "writer", "ab") as log:
            self._writers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "astrocyte_otel_audit", "writer", "--dsn", self.dsn,
                     "--spool-dir", self.spool],
                    cwd=ROOT, env={**_environment(), "OTEL_ASTROCYTE_AUDIT_EXPORT_TIMEOUT_MILLIS": "3000"},
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                )
            )  # fmt: skip

    def _end(self, process: Process, how: str) -> None:
        process.end = how
        match how:
            case "SIGKILL" | "SIGTERM":
                process.popen.send_signal(getattr(signal, how))
            case "while it works":
                process.popen.send_signal(signal.SIGUSR1)
            case "in order":
                self._tell(process, "stop")
            case "_exit":
                self._close_input(process)

    def _tell(self, process: Process, command: str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            print(command, file=process.popen.stdin, flush=True)

    @staticmethod
    def _close_input(process: Process) -> None:
        assert process.popen.stdin is not None
        with contextlib.suppress(OSError):
            process.popen.stdin.close()

    def _replace_ended(self) -> None:
        self._look_for_lacking()
        for place, process in enumerate(self.processes):
            if process.popen.poll() is not None:
                process.end = process.end or f"by itself ({process.popen.returncode})"
                self._close_input(process)
                self.past.append(process)
                self.processes[place] = self._begin(place)
        self._writers = [writer for writer in self._writers if writer.poll() is None]
        if not self._writers and "the writer" not in self._under_way:
            raise AssertionError("the writer has ended by itself")

    def _look_for_lacking(self) -> None:
        for process in self.processes:
            if process.lacks in [path.name for path in self._segments(f"{process.popen.pid}-*")]:
                process.lacks = ""

    def _any_process(self) -> Process | None:
        """Return one that has worked for a while and may be ended."""
        found: list[Process] = []
        for process in self.processes:
            with contextlib.suppress(FileNotFoundError):  # it has not begun yet
                if not (process.end or process.lacks) and self._age(process) > 1:
                    found.append(process)
        return self._chance.choice(found) if found else None

    def _age(self, process: Process) -> float:
        began = process.began = process.began or (self.ledgers / process.name).stat().st_mtime
        return time.time() - began

    def _end_all(self) -> None:
        """End whatever still runs, where something has failed; and let go of the rest."""
        for _, running in self._under_way.values():
            running.close()
        for process in self.processes:
            process.popen.kill()
            process.popen.wait(10)
            self._close_input(process)
        for writer in self._writers:
            writer.kill()
            writer.wait(10)

    # Faults.

    def _list_of_faults(self) -> list[Fault]:
        chance, proxy, server = self._chance, self.proxy, self.server

        def network(name: str, weight: float, begin: Callable[[], None], longest: float = 1.5) -> Fault:
            def do() -> Course:
                begin()
                yield chance.uniform(0.1, longest)
                proxy.heal()
                if "answers" in name or name.startswith("packets") or chance.random() < 0.5:
                    self._cut()  # what was given up at one end

            return Fault(f"network: {name}", weight, "the network", do)

        def lost_commit(what: str) -> Course:
            lost = proxy.lost
            proxy.lose_commit(what)
            for _ in range(40):
                yield 0.05
                if proxy.lost > lost:
                    yield chance.uniform(0, 0.5)
                    break
            proxy.heal()

        def end_sessions() -> Course:
            pids = self._sessions()
            if chance.random() < 0.5:
                pids = pids[:1]
            if pids and self._execute(f"SELECT pg_terminate_backend(pid) FROM unnest(ARRAY{pids}) pid"):
                yield 0

        def freeze_session() -> Course:
            for pid in self._sessions()[:1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    session = psutil.Process(pid)
                    session.suspend()
                    try:
                        yield chance.uniform(0.1, 2)
                    finally:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            session.resume()

        def freeze() -> Course:
            server.freeze()
            try:
                yield chance.uniform(0.1, 1.5)
            finally:
                server.thaw()

        def crash(end: Callable[[], None]) -> Course:
            end()
            yield chance.uniform(0, 1.5)
            server.start()

        def table(there: str, back: str) -> Course:
            tenant = chance.choice(SCHEMAS)
            if self._execute(there.format(tenant)):
                yield chance.uniform(0.3, 3)
                while not self._execute(back.format(tenant)):
                    yield 0.1

        def locked() -> Course:
            with contextlib.suppress(psycopg.Error), contextlib.closing(psycopg.connect(server.dsn)) as connection:
                connection.execute("SET lock_timeout = 500")
                connection.execute(f"LOCK {chance.choice(SCHEMAS)}.{LOG}")
                yield chance.uniform(0.1, 4)

        def end_writer(how: str, *, stands_by: bool = False) -> Course:
            if stands_by:
                self._begin_writer()
                yield chance.uniform(0.5, 2)
            self._writers[0].send_signal(getattr(signal, how))
            if not stands_by:
                self._writers[0].wait(30)
                yield chance.uniform(0, 2)
                self._begin_writer()
            yield 1

        def freeze_writer() -> Course:
            writer = self._writers[0]
            writer.send_signal(signal.SIGSTOP)
            try:
                yield chance.uniform(0.1, 2)
            finally:
                writer.send_signal(signal.SIGCONT)

        def end(how: str) -> Course:
            if (process := self._any_process()) is not None:
                self._end(process, how)
                yield 0

        def freeze_and_kill() -> Course:
            if (process := self._any_process()) is not None:
                process.end = "SIGKILL"
                process.popen.send_signal(signal.SIGSTOP)
                yield chance.uniform(0.1, 1)
                process.popen.kill()

        def fork(how: str) -> Course:
            if (process := self._any_process()) is not None:
                self._tell(process, f"fork {how}")
                yield 0

        def delete(whole: bool) -> Course:
            process = self._any_process()
            paths = [] if process is None or process.is_capped else self._segments(f"{process.popen.pid}-*")
            # Where others clear away, one that doesn't grow any more is taken for cleared away: not covered.
            with contextlib.suppress(FileNotFoundError):  # it is cleared away at this moment
                if process is None or len(paths) != 1 or paths[0].stat().st_size > 3_000_000:
                    return
                if not whole and chance.random() < 0.5:
                    paths[0].unlink()
                else:
                    (paths[0].parent if whole else paths[0]).rename(self.directory / f"taken-{self.faults.total()}")
                process.lacks = paths[0].name
                yield 0

        moved = f"{LOG}_away"
        faults = [
            network("connections cut", 3, self._cut, longest=0.1),
            network("refused", 2, proxy.refuse),
            network("answers held", 1, proxy.hold_answers),
            network("answers swallowed", 1, proxy.swallow_answers),
            Fault("network: COMMIT lost", 2, "the network", lambda: lost_commit("request")),
            Fault("network: answer to COMMIT lost", 3, "the network", lambda: lost_commit("answer")),
            Fault("server: sessions ended", 3, "the server", end_sessions),
            Fault("server: session frozen", 2, "the server", freeze_session),
            Fault("server: frozen", 0.5, "the server", freeze),
            Fault("server: stopped at once", 1, "the server", lambda: crash(server.stop)),
            Fault("server: killed", 0.5, "the server", lambda: crash(server.kill)),
            Fault("table: renamed", 2, "the server", lambda: table(
                f"ALTER TABLE {{}}.{LOG} RENAME TO {moved}", f"ALTER TABLE {{}}.{moved} RENAME TO {LOG}")),
            Fault("table: right revoked", 1, "the server", lambda: table(
                f"REVOKE INSERT ON {{}}.{LOG} FROM writer", f"GRANT INSERT ON {{}}.{LOG} TO writer")),
            Fault("table: locked", 1, "the server", locked),
            Fault("writer: SIGKILL", 2, "the writer", lambda: end_writer("SIGKILL")),
            Fault("writer: SIGTERM", 1, "the writer", lambda: end_writer("SIGTERM")),
            Fault("writer: SIGKILL, another stands by", 1, "the writer", lambda: end_writer("SIGKILL", stands_by=True)),
            Fault("writer: SIGTERM, another stands by", 1, "the writer", lambda: end_writer("SIGTERM", stands_by=True)),
            Fault("writer: frozen", 1, "the writer", freeze_writer),
            Fault("process: SIGKILL", 4, "a process", lambda: end("SIGKILL")),
            Fault("process: SIGTERM", 1, "a process", lambda: end("SIGTERM")),
            Fault("process: _exit", 1, "a process", lambda: end("_exit")),
            Fault("process: ends in order", 1, "a process", lambda: end("in order")),
            Fault("process: ends while it works", 1, "a process", lambda: end("while it works")),
            Fault("process: frozen, then SIGKILL", 1, "a process", freeze_and_kill),
            Fault("process: fork", 2, "a process", lambda: fork("plain")),
            Fault("process: fork in an operation", 1, "a process", lambda: fork("inside")),
            Fault("process: multiprocessing", 1, "a process", lambda: fork("multiprocessing")),
            Fault("spool: file deleted", 1.5, "a process", lambda: delete(False)),
            Fault("spool: directory moved away", 1, "a process", lambda: delete(True)),
        ]  # fmt: skip
        if sys.platform == "linux":
            faults.append(network("packets dropped", 1, proxy.blackhole, longest=3))
        return faults

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # one is closed already
            self.proxy.cut()

    def _execute(self, statement: str) -> bool:
        """Execute a statement, if it can be done soon."""
        try:
            self.server.execute("SET lock_timeout = 300", statement)
        except psycopg.Error:
            return False
        return True

    def _sessions(self) -> list[int]:
        """Return the pids of the sessions that write, in any order."""
        try:
            found = [pid for (pid,) in self.server.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'writer'")]
        except psycopg.Error:
            return []
        self._chance.shuffle(found)
        return found


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


# The verdict.


class Row(NamedTuple):
    schema: str
    id: str
    action: str
    bank_id: str | None
    metadata: dict[str, Any]
    outcome: str | None
    has_ended: bool
    service_name: str | None
    #: Seconds since the epoch: when the transaction began that has written it.
    recorded_at: float


@dataclass
class Told:
    """What a ledger says of a group."""

    kind: str
    events: list[tuple[int, Event]] = field(default_factory=list)

    def of(self, what: str) -> dict[int, Event]:
        return {event.part: event for _, event in self.events if event.what == what}

    @property
    def over(self) -> dict[int, tuple[int, Event]]:
        """Its parts that are over, each with the number of the ledger's line that says so."""
        return {event.part: (at, event) for at, event in self.events if event.what in ("returned", "unavailable")}

    @property
    def expected(self) -> tuple[tuple[int, ...], ...]:
        # Where the outer one is refused, its body never runs.
        return ((0,),) if 0 in self.of("unavailable") else KINDS[self.kind]


@dataclass
class Report:
    """What has come of a soak."""

    seed: int
    #: Sentences, each about something that may not be; and what there is of it in the spool, or was.
    unexplained: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    duplicates: int = 0
    #: By how their process ended: processes, operations that have returned, rows, refused ones, rows of what had not.
    ends: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    gaps: int = 0
    missing: int = 0
    replayed: int = 0
    flushes: int = 0

    def __str__(self) -> str:
        columns = ("processes", "operations", "rows", "in gaps", "refused at the end", "had not returned")
        lines = [f"seed {self.seed}", "", f"{'end of the process':<24}" + "".join(f"{name:>20}" for name in columns)]
        total = Counter[str]()
        for end, counts in sorted(self.ends.items()):
            total += counts
            lines.append(f"{end:<24}" + "".join(f"{counts[name]:20,}" for name in columns))
        lines.append(f"{'':<24}" + "".join(f"{total[name]:20,}" for name in columns))
        lines += ["", *(f"{name:<44}{count:6,}" for name, count in sorted(self.faults.items()))]
        lines += [
            f"{'':<44}{sum(self.faults.values()):6,}",
            "",
            f"rows                 {self.rows:10,}, of which spool replay wrote {self.replayed:,} at the end",
            f"gap records          {self.gaps:10,}, which stand for {self.missing:,} operations",
            f"flushes that held    {self.flushes:10,}",
            f"duplicates           {self.duplicates:10,}",
            f"unexplained          {len(self.unexplained):10,}",
            *(f"  {sentence}" for sentence in (*self.unexplained[:50], *self.found[:50])),
        ]
        return "\n".join(lines)


def read_ledger(path: Path) -> list[Event]:
    text = path.read_text(errors="replace") if path.exists() else ""
    return [event for line in text.split("\n") if line and (event := Event.parse(line)) is not None]


def read_rows(server: Server) -> tuple[list[Row], list[tuple[Any, ...]]]:
    """Return all rows of all tenants, and what was set aside."""
    columns = (
        "id::text, action, bank_id, metadata, outcome, ended_at IS NOT NULL, service_name,"
        " extract(epoch FROM recorded_at)::float"
    )
    rows = [
        Row(schema, *values) for schema in SCHEMAS for values in server.execute(f"SELECT {columns} FROM {schema}.{LOG}")
    ]
    aside = [
        row for schema in SCHEMAS for row in server.execute(f"SELECT id, action, reason FROM {schema}.{LOG}_set_aside")
    ]
    return rows, aside


def compare(soak: Soak, left: list[str]) -> Report:
    """Compare the table with the ledgers."""
    rows, aside = read_rows(soak.server)
    verdict = Verdict(soak, rows)
    for process in soak.past:
        verdict.judge(process)
    verdict.judge_rows()
    report = verdict.report
    report.faults = soak.faults
    report.rows = len(rows)
    report.replayed = soak.replayed_rows
    report.unexplained += [f"{row[0]} ({row[1]}) was set aside: {row[2]}" for row in aside]
    report.unexplained += [f"{name} is left in the spool" for name in left]
    for name in dict.fromkeys(re.findall(r"^k\d+:\w+:\d+", "\n".join(report.unexplained[:20]), re.MULTILINE)):
        report.found += [f"{name} was in {found}" for found in soak.look_for(name)] or [f"{name} was in no file"]
    return report


class Verdict:
    """Says of each operation and of each row whether it may be so.

    Args:
        soak: that is over.
        rows: all that there are.
    """

    def __init__(self, soak: Soak, rows: list[Row]) -> None:
        self._soak = soak
        self.report = Report(soak._seed)
        self._rows = rows
        self._gaps: dict[str | None, int] = defaultdict(int)
        self._by_group: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row.action == "audit.gap":
                self.report.gaps += 1
                self.report.missing += row.metadata["missing"]
                self._gaps[row.service_name] += row.metadata["missing"]
                continue
            token = next((value for key, value in row.metadata.items() if key.startswith("part")), row.bank_id or "")
            self._by_group[":".join(token.split(":")[:3])].append(row)

    def judge(self, process: Process) -> None:
        """Compare what a process has said with its rows."""
        account = Account(process, read_ledger(self._soak.ledgers / process.name))
        for (slot, number), told in account.groups.items():
            name = f"{process.name}:{slot}:{number}"
            account.judge_group(name, told, self._by_group.pop(name, []))
        if account.ended is None:
            # What was begun and has said nothing: the next of each thread and task, and the first of those that fork.
            begun = {f"{process.name}:{slot}:{number + 1}" for slot, number in account.last.items()}
            firsts = {name for name in self._by_group if re.match(rf"{process.name}:[amt]\d+:1$", name)}
            for name in begun | firsts:
                account.judge_unheard(self._by_group.pop(name, []))
        account.judge_gaps(self._gaps.pop(process.name, 0))
        account.judge_flushes()
        account.judge_process()
        self.report.unexplained += account.unexplained
        self.report.duplicates += account.duplicates
        self.report.flushes += account.flushes
        self.report.ends[process.end] += account.counts

    def judge_rows(self) -> None:
        """Name the rows that nobody has accounted for."""
        for rows in self._by_group.values():
            self.report.unexplained += [f"nobody's row: {row}" for row in rows]
        self.report.unexplained += [f"a gap of nobody's, {name}: {missing}" for name, missing in self._gaps.items()]
        for row_id, count in Counter(row.id for row in self._rows).items():
            if count > 1:
                self.report.duplicates += 1
                self.report.unexplained.append(f"{count} rows have the id {row_id}")


class Account:
    """What one process has said, and what has come of it.

    Args:
        process: that has ended.
        events: its ledger.
    """

    def __init__(self, process: Process, events: list[Event]) -> None:
        self._process = process
        self._events = events
        self.groups: dict[tuple[str, int], Told] = {}
        #: The line that says that it ends; and what says that it has ended in order, with how many it has refused.
        self._ending = len(events)
        self.ended: Event | None = None
        for at, event in enumerate(events):
            if event.slot != "-":
                self.groups.setdefault((event.slot, event.number), Told(event.kind)).events.append((at, event))
            elif event.what == "ending":
                self._ending = at
            elif event.what == "ended":
                self.ended = event
        #: The last group of each thread and task.
        self.last: dict[str, int] = {}
        for slot, number in self.groups:
            self.last[slot] = max(number, self.last.get(slot, 0))
        self.unexplained: list[str] = []
        self.duplicates = self.flushes = 0
        self.counts = Counter[str](processes=1)
        #: Operations that must be in a gap record; and, with what may be in one, how many that can be.
        self._missing: list[tuple[Event, str]] = []
        self._late: set[str] = set()
        self._may_be_missing = 0
        #: Rows of what had returned: after which line of the ledger, and when it was written.
        self._recorded: list[tuple[int, float, Event]] = []

    def judge_group(self, name: str, told: Told, rows: list[Row]) -> None:
        """Compare what is said of a group with its rows."""
        self.counts["operations"] += len(told.over)
        self.counts["rows"] += len(rows)
        holders = self._holders(name, told, rows)
        for event in told.of("body").values():
            if [row.id for row in rows].count(event.id) != 1:
                self._say(event, "is required, has begun, and has no row")
        if all(part in told.over for parts in told.expected for part in parts):
            for parts in told.expected:
                self._judge_operation(name, parts, told, holders)
            return
        # Its process has ended in the middle of it.
        slot, number = name.split(":")[1:]
        if int(number) < self.last[slot] or (self.ended is not None and slot[0] in "at"):
            self.unexplained.append(f"{name} is not over, and its ledger goes on: {told}")
        self.counts["had not returned"] += sum(not told.over.keys() & _parts_of(row, holders) for row in rows)
        self._may_be_missing += sum(map(len, KINDS[told.kind]))
        for part, (_, event) in told.over.items():
            if not holders[part]:
                self._missing.insert(0, (event, "has no row, and what is around it has not returned"))

    def judge_unheard(self, rows: list[Row]) -> None:
        """Count rows of what was begun and has not returned."""
        self._may_be_missing += 3
        self.counts["had not returned"] += len(rows)
        self.counts["rows"] += len(rows)

    def judge_gaps(self, gap: int) -> None:
        """Compare how many have no row with what gap records say."""
        refused = 0 if self.ended is None else self.ended.number
        self.counts["in gaps"] += gap
        self.counts["refused at the end"] += refused
        missing, most = len(self._missing), self._may_be_missing
        if missing > gap:
            self.unexplained.append(f"{self._process}: {missing} have no row, and its gap records say {gap}")
            for event, trouble in self._missing[:5]:
                self._say(event, trouble)
        if gap > most:
            self.unexplained.append(f"{self._process}: its gap records say {gap}, and at most {most} have no row")
        if self.ended is not None and not missing + len(self._late) <= gap + refused <= most:
            self.unexplained.append(
                f"{self._process}: {missing} to {most} and at its end {len(self._late)} have no row, {gap} are in gap "
                f"records and {refused} were refused at the end"
            )

    def judge_flushes(self) -> None:
        """What had returned before a flush that said True was in the table when it said so."""
        begun: dict[int, int] = {}
        self._recorded.sort()
        for at, event in enumerate(self._events):
            if event.what == "flush":
                begun[event.number] = at
            elif event.what == "flushed":
                self.flushes += 1
                for returned_at, recorded_at, returned in self._recorded:
                    if returned_at > begun[event.number]:
                        break
                    if recorded_at > event.at:
                        self._say(returned, f"came to the table {recorded_at - event.at:.3f} s after a flush said so")
                        break

    def judge_process(self) -> None:
        """Each child has come to its end, and so has the process."""
        forked, left = ({event.number for event in self._events if event.what == what} for what in ("forked", "left"))
        if forked != left:
            self.unexplained.append(f"{self._process}: its children {forked - left} hung or ended by themselves")
        if self._process.end.startswith("by itself"):
            self.unexplained.append(f"{self._process}: nobody has ended it")

    def _judge_operation(self, name: str, parts: tuple[int, ...], told: Told, holders: dict[int, list[Row]]) -> None:
        """Compare what is said of an operation, over with all of its parts, with what should be its row."""
        at, outermost = told.over[parts[0]]
        rows = list({id(row): row for part in parts for row in holders[part]}.values())
        lacking = [part for part in parts if not holders[part]]
        # What has no room beside what is around it is one of its own, which has room or is refused; and what is in one
        # that has not returned when its process ends is handed on before.
        is_exact = not (self._process.is_capped or told.events[-1][0] > self._ending)
        if lacking and not (is_exact and rows):
            self._may_be_missing += len(lacking)
            if at < self._ending:
                self._missing.append((outermost, f"has no row that says what part {lacking[0]} did"))
            elif outermost.id not in [row.id for row in rows]:
                self._late.add(name)
            return
        if not is_exact:
            return
        [row, *_] = rows
        if len(rows) > 1 or _parts_of(row, holders) != set(parts):
            self._say(outermost, f"should be one row with {parts}: {rows}")
        elif (
            outermost.id not in ("-", row.id)
            or (row.schema, row.outcome) != (outermost.schema, outermost.outcome)
            or row.service_name != self._process.name
            or not row.has_ended
        ):
            self._say(outermost, f"has another row: {row}")
        if outermost.slot[0] in "at":  # by the end of all, as what fails within another one waits for that
            self._recorded.append((told.events[-1][0], row.recorded_at, outermost))

    def _holders(self, name: str, told: Told, rows: list[Row]) -> dict[int, list[Row]]:
        """Return the rows of each part: that say something which only this part said, or have its id."""
        ids = {event.id: part for part, event in told.of("body").items()}
        holders: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            parts = {int(key[4:]) for key, value in row.metadata.items() if key.startswith("part") and value == name}
            if row.id in ids:
                parts.add(ids[row.id])
            for part in parts:
                holders[part].append(row)
            if not parts and row.outcome != "unknown":
                self.unexplained.append(f"a row says nothing of what it is of: {row}")
        for part, found in holders.items():
            if len(found) > 1:
                self.duplicates += 1
                self.unexplained.append(f"{self._process}: part {part} of {told.kind} is in {len(found)} rows: {found}")
        return holders

    def _say(self, event: Event, trouble: str) -> None:
        name = f"{self._process.name}:{event.slot}:{event.number}"
        at = f"line {self._events.index(event) + 1} of {len(self._events)}, {event.at:.3f}"
        self.unexplained.append(
            f"{name}, part {event.part} of {event.kind!r}, {event.id}: {trouble} ({at}; {self._process})"
        )


def _parts_of(row: Row, holders: dict[int, list[Row]]) -> set[int]:
    """Return the parts that a row is of."""
    return {part for part, rows in holders.items() if any(each is row for each in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Accepted means in the table.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults come (600)")
    parser.add_argument("--seed", type=int, help="of the faults; another one each time by default")
    parser.add_argument("--keep", type=Path, help="a directory that isn't there yet, for what it leaves behind")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        Application(Plan(**json.loads(given.work))).run()
        return
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    directory = given.keep or Path(tempfile.mkdtemp(prefix="audit-soak-"))
    directory.mkdir(exist_ok=True)
    print(f"seed {seed}, in {directory}", flush=True)
    with migrated() as template:
        server = template.copy()
        report = Soak(
            server, directory, seconds=given.seconds, seed=seed, say=lambda what: print(what, flush=True)
        ).run()
    print(f"\n{report}", flush=True)
    if report.unexplained:
        sys.exit(f"what it left is in {directory}; seed {seed}")
    if given.keep is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
