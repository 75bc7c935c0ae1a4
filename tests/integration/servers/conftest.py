"""Servers as they are started on a command line, what they say, and what they leave."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "servers"
PATIENCE = 60.0


def wait_until(condition: Callable[[], object], otherwise: Callable[[], object] = lambda: None) -> None:
    """Wait for what has to come; `otherwise` says what is known where it doesn't."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


class Program:
    """A process with its children, and what they say."""

    def __init__(self, arguments: list[str], environment: dict[str, str], said: Path) -> None:
        self._said = said
        with said.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore::DeprecationWarning", *arguments],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self.send = self._process.send_signal

    @property
    def said(self) -> str:
        return self._said.read_text()

    def tell(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_until_said(self, what: str, count: int = 1) -> None:
        wait_until(lambda: self.said.count(what) >= count or self.is_over(), lambda: self.said)
        assert self.said.count(what) >= count, self.said

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and wait until it has ended, and its children, who may outlive it."""
        self.send(number)
        self._process.wait(PATIENCE)
        wait_until(lambda: not self._session(), lambda: self.said)

    def kill(self) -> None:
        """Kill what there is of it and its children."""
        while session := self._session():
            for process in session:
                process.kill()
        self._process.wait(PATIENCE)
        self._process.stdin.close()

    def _session(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has ended meanwhile
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


class Server(Program):
    """A program that answers HTTP on a Unix socket, so that no port is needed."""

    def __init__(self, arguments: list[str], environment: dict[str, str], said: Path, address: str) -> None:
        super().__init__(arguments, environment, said)
        self._address = address
        self._connections: list[http.client.HTTPConnection] = []

    def wait_until_up(self) -> None:
        wait_until(lambda: self._listens() or self.is_over(), lambda: self.said)
        assert not self.is_over(), self.said

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._address) == 0

    def get(self, bank: str) -> int:
        """Ask for an audited operation; return the id of the process that has answered."""
        return json.load(self.request(bank).getresponse())["process"]

    def request(self, bank: str) -> http.client.HTTPConnection:
        """Ask, and leave the answer to the caller."""
        connection = http.client.HTTPConnection("localhost")
        self._connections.append(connection)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(self._address)
        connection.request("GET", f"/{bank}", headers={"Connection": "close"})
        return connection

    def kill(self) -> None:
        super().kill()
        for connection in self._connections:
            connection.close()


@pytest.fixture
def environment(database, tmp_path, monkeypatch):
    """Variables of the servers: what is accepted waits for an hour, unless somebody hurries."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, EXAMPLES, tmp_path))),
        "OTEL_ASTROCYTE_AUDIT_DSN": database,
        "OTEL_ASTROCYTE_AUDIT_SCHEDULE_DELAY_MILLIS": "3600000",
    }


@pytest.fixture
def without_spool(environment):
    """Nobody else can write what a process leaves: what is in the table was written at its exit."""
    environment["OTEL_ASTROCYTE_AUDIT_SPOOL_DIR"] = "off"


@pytest.fixture
def start(environment, tmp_path):
    """Starts programs; what is left of them is killed at the end."""
    started = []

    def start(*arguments):
        started.append(Program(list(arguments), environment, tmp_path / f"said-{len(started)}"))
        return started[-1]

    yield start
    for program in started:
        program.kill()


@pytest.fixture
def serve(environment, tmp_path):
    """Starts servers; ``{socket}`` in an argument is their address."""
    started = []
    with tempfile.TemporaryDirectory(prefix="audit-") as directory:  # the path of a Unix socket must be short

        def serve(*arguments):
            address = f"{directory}/{len(started)}"
            given = [argument.format(socket=address) for argument in arguments]
            started.append(Server(given, environment, tmp_path / f"served-{len(started)}", address))
            started[-1].wait_until_up()
            return started[-1]

        yield serve
        for server in started:
            server.kill()


@pytest.fixture
def banks(database):
    """Reads the banks of all rows, sorted."""

    def banks():
        with psycopg.connect(database) as connection:
            return [bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log ORDER BY bank_id")]

    return banks


@pytest.fixture
def replay(environment):
    """Runs `spool replay`, and gives what it said."""

    def replay():
        done = subprocess.run(
            [sys.executable, "-m", "astrocyte_otel_audit", "spool", "replay", "--json"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return replay
