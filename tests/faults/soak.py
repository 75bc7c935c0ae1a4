"""A soak: processes that audit, faults at random, and in the end a row for each operation that has returned.

    python -m tests.faults.soak --seconds 600 --seed 1

Processes with a writer's thread, and processes that leave writing to `astrocyte-otel-audit writer`, share one spool and
one table, which is on a server that fails, behind a network that fails. They fork, they are killed, and others take
their place; half of them have little room in the spool. Each says in a ledger of its own which operations have
returned, and when all of it is over, the table and the ledgers are compared.

A seed says what comes, and not at which instruction it hits: the same one finds other things.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.faults.proxy import Proxy
from tests.faults.server import Server, migrated
from tests.faults.soak_application import KINDS, Application
from tests.faults.soak_faults import SCHEMAS, Faults
from tests.faults.soak_verdict import Process, Report, judge

ROOT = Path(__file__).parents[2]
#: What is done where there is little room. There an inner operation that has returned is in memory only, until the
#: outer one has: in one that is killed between, it would be neither a row nor counted.
FLAT = [kind for kind in KINDS if kind != "nested"]


class Soak:
    """All of it.

    Args:
        server: a Postgres with the table, stopped.
        directory: for spool, ledgers and logs.
        seed: of the faults, and of what the processes do.
    """

    def __init__(self, server: Server, directory: Path, seed: int) -> None:
        self.server, self._seed, self.chance = server, seed, random.Random(seed)
        self._spool, self._ledgers, self._logs = (directory / name for name in ("spool", "ledgers", "logs"))
        for each in (self._spool, self._ledgers, self._logs):
            each.mkdir(mode=0o700)
        self._numbers = itertools.count(1)
        self._processes: list[Process] = []
        self._past: list[Process] = []
        self._writers: list[Popen[bytes]] = []
        #: Closed at one end once each process has ended that has inherited the other.
        self._alive = os.pipe()

    def run(self, seconds: float) -> Report:
        """Let faults come for that long, and say what has come of it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.close)
            self._start_server()
            self.proxy = Proxy(self.server.socket)
            stack.callback(self.proxy.close)
            self._dsn = make_conninfo(
                self.server.writer_dsn, host="127.0.0.1", port=self.proxy.port, connect_timeout=2,
                tcp_user_timeout=1000, keepalives_idle=1, keepalives_interval=1, keepalives_count=2,
            )  # fmt: skip
            self._places = ["--dsn", self._dsn, "--spool-dir", str(self._spool)]
            stack.callback(self._kill_all)
            self.begin_writer()
            self._processes = [self._begin(place) for place in range(4)]
            faults, end = Faults(self), time.monotonic() + seconds
            while time.monotonic() < end:
                faults.go_on()
                self._replace_ended()
                time.sleep(0.02)
            faults.end()
            self._end_all()
            report = Report(self._seed, faults.counts, self._replay())
            judge(report, self.server, self._past, self._ledgers)
            return report

    def begin_writer(self) -> None:
        """Start `astrocyte-otel-audit writer`."""
        self._writers = [writer for writer in self._writers if writer.poll() is None]
        self._writers.append(self._start("writer", ["astrocyte_otel_audit", "writer", *self._places]))

    def signal_writer(self, what: signal.Signals) -> None:
        """Send the oldest of them a signal."""
        self._writers[0].send_signal(what)

    def end_process(self, how: str) -> bool:
        """End a process that audits, or say False where none has begun."""
        found = [each for each in self._processes if not each.end and (self._ledgers / each.name).exists()]
        if found:
            self._end(self.chance.choice(found), how)
        return bool(found)

    def _start_server(self) -> None:
        with open(self.server.data / "postgresql.conf", "a") as settings:
            settings.write("max_connections = 100\n")
        self.server.start()
        for schema in SCHEMAS[1:]:
            table = AuditTable(OwnConnection(self.server.dsn))
            table.migrate(schema, create_schema=True)
            table.close()
            self.server.execute(f"GRANT USAGE ON SCHEMA {schema} TO writer")
            self.server.execute(f"GRANT INSERT ON ALL TABLES IN SCHEMA {schema} TO writer")

    def _replace_ended(self) -> None:
        for place, process in enumerate(self._processes):
            if process.popen.poll() is not None:
                self._past.append(process)
                self._processes[place] = self._begin(place)

    def _begin(self, place: int) -> Process:
        choice, name, is_capped = self.chance.choice, f"k{next(self._numbers):03d}", place % 2 == 1
        settings: dict[str, Any] = {"schedule_delay_millis": choice([5.0, 50.0, 200.0])}
        if is_capped:
            settings |= {
                "spool_max_bytes": choice([16, 64]) * 1024, "on_full": choice(["drop", "block"]),
                "on_full_timeout_millis": 50.0,
            }  # fmt: skip
        if place >= 2:
            settings |= {"writer": "external"}
        else:
            settings |= {
                "dsn": self._dsn, "spool_keep_seconds": choice([0.0, 3.0]),
                "spool_fsync": choice(["interval", "never", "always"]),
                "max_queue_size": choice([200, 32768]), "max_export_batch_size": choice([64, 2048]),
            }  # fmt: skip
        work = {
            "name": name, "seed": f"{self._seed} {name}", "ledger": str(self._ledgers / name),
            "kinds": FLAT if is_capped else [*KINDS], "settings": {"spool_dir": str(self._spool), **settings},
        }  # fmt: skip
        command = ["tests.faults.soak", "--work", json.dumps(work)]
        return Process(name, is_capped, self._start(name, command, stdin=subprocess.PIPE, pass_fds=[self._alive[1]]))

    def _start(self, log: str, command: list[str], stdin: int = subprocess.DEVNULL, **how: Any) -> Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        environment["OTEL_ASTROCYTE_AUDIT_EXPORT_TIMEOUT_MILLIS"] = "3000"
        # Python 3.12 warns of every fork beside a thread, which is what is tested.
        python = [sys.executable, "-W", "ignore::DeprecationWarning", "-m"]
        with open(self._logs / log, "ab") as file:
            return Popen([*python, *command], cwd=ROOT, env=environment, stdin=stdin, stdout=file, stderr=file, **how)

    def _end(self, process: Process, how: str) -> None:
        process.end = how
        if how == "in order":
            assert process.popen.stdin is not None
            process.popen.stdin.close()
        else:
            process.popen.send_signal(signal.Signals[how])

    def _end_all(self) -> None:
        """End all processes, and wait for what they have forked."""
        for process in self._processes:
            if not process.end:
                self._end(process, self.chance.choice(["in order", "SIGKILL"]))
            process.popen.wait(60)
        for writer in self._writers:
            writer.send_signal(self.chance.choice([signal.SIGTERM, signal.SIGKILL]))  # what is left is for `replay`
            writer.wait(60)
        self._past += self._processes
        os.close(self._alive[1])
        assert os.read(self._alive[0], 1) == b""

    def _kill_all(self) -> None:
        processes = [process.popen for process in (*self._past, *self._processes)]
        for popen in (*processes, *self._writers):
            popen.kill()
            popen.wait(10)
            if popen.stdin is not None:
                popen.stdin.close()
        os.close(self._alive[0])

    def _replay(self) -> list[str]:
        """Write what is left in the spool, and say what is there all the same."""
        command = ["astrocyte_otel_audit", "spool", "replay", "--any-destination", *self._places]
        assert self._start("replay", command).wait(120) == 0
        # What was damaged as its process was killed is kept, and so is, for a minute, what one was about to make.
        kept = re.compile(r"writer-.*\.lock|damaged-.*|\..*")
        return [f"{path.name} is left in the spool" for path in self._spool.iterdir() if not kept.fullmatch(path.name)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Accepted means in the table.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults come (600)")
    parser.add_argument("--seed", type=int, help="of the faults; another one each time by default")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        Application(**json.loads(given.work)).run()
        return
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    directory = Path(tempfile.mkdtemp(prefix="audit-soak-"))
    print(f"seed {seed}, for {given.seconds:g} s, in {directory}", flush=True)
    with migrated() as template:
        report = Soak(template.copy(), directory, seed).run(given.seconds)
    print(f"\n{report}", flush=True)
    if report.unexplained:
        sys.exit(f"what it left is in {directory}; seed {seed}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
