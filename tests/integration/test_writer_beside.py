"""`astrocyte-otel-audit writer`: one process with a connection writes for all of a machine that have none."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit import ConfigurationError, audit_operation
from astrocyte_otel_audit.doctor import Examination
from astrocyte_otel_audit.doctor.beside import check_writer
from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.integration.test_database_away import Cluster

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0

#: An application without a connection, and what its scripts are made of. It says of each operation that it returned.
PRELUDE = """
import os, signal, sys, threading, time
from pathlib import Path
from opentelemetry.sdk.trace import TracerProvider
from astrocyte_otel_audit import AuditUnavailableError, audit_operation, configure_audit

name, spool = sys.argv[1], Path(os.environ["OTEL_ASTROCYTE_AUDIT_SPOOL_DIR"])
provider = TracerProvider()

def configure(**arguments):
    return configure_audit(actions="*", writer="external", tracer_provider=provider, **arguments)

def emit(*numbers, action="recall", **arguments):
    for number in numbers:
        with audit_operation(action, bank_id=f"{name}-{number}", tracer_provider=provider, **arguments):
            pass
        os.write(1, f"{name}-{number}\\n".encode())

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
"""

WORK = """
processor = configure()
emit(*range(50))
assert processor.force_flush(60_000)
assert processor.stats()["stored"] == 50
"""

WORK_UNTIL_KILLED = """
processor = configure()
number = 0
while True:
    emit(number)
    number += 1
"""


class Process:
    """A process, and what it says."""

    def __init__(self, arguments, said):
        self._said = said
        with said.open("w") as output:
            self._process = subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output)
        self.send = self._process.send_signal

    @property
    def lines(self):
        return self._said.read_text().splitlines()

    def wait_until_said(self, what, count=1):
        wait_until(lambda: self.is_over() or sum(what in line for line in self.lines) >= count)
        assert sum(what in line for line in self.lines) >= count, self.lines

    def is_over(self):
        return self._process.poll() is not None

    def end(self, number=None):
        """Wait for its end, sending it a signal before that; return its exit code."""
        if number is not None:
            self.send(number)
        return self._process.wait(PATIENCE)

    def kill(self):
        if not self.is_over():
            self._process.kill()
        self._process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts processes that share a spool; what is left of them is killed at the end."""
    started = []
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_SPOOL_DIR", str(tmp_path / "spool"))

    def start(*arguments):
        started.append(Process([sys.executable, *arguments], tmp_path / f"said-{len(started)}"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def application(start):
    """Starts applications: a name, and a script after the prelude."""

    def application(name, script):
        # Python 3.12 warns of every fork beside a thread, and there is none here.
        return start("-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(script), name)

    return application


@pytest.fixture
def writer(start, database, tmp_path):
    """Starts writers, and waits until they have said what they do."""

    def writer(*options, dsn=database, says="writing what is in"):
        command = ("-m", "astrocyte_otel_audit", "writer", "--dsn", dsn, "--spool-dir", str(tmp_path / "spool"))
        process = start(*command, *options)
        process.wait_until_said(says)
        return process

    return writer


@pytest.fixture
def spool(tmp_path):
    """Gives the names of the processes' directories in the spool."""
    return lambda: [path.name for path in (tmp_path / "spool").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def cluster():
    """A Postgres of this module's own, that can be stopped and started."""
    directory = Path(tempfile.mkdtemp(prefix="audit-"))
    try:
        with embedded_postgres(directory) as dsn:
            table = AuditTable(OwnConnection(dsn))
            table.migrate()
            table.close()
            yield Cluster(directory, dsn)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def banks(dsn):
    with psycopg.connect(dsn) as connection:
        return sorted(bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log"))


def assert_ended(process, code=0):
    assert process.end() == code, process.lines
    assert "Traceback" not in "\n".join(process.lines)


def assert_ends(writer, number=signal.SIGTERM, *, stored, set_aside=0):
    """End a writer, and look at its last words."""
    assert writer.end(number) == 0, writer.lines
    assert "Traceback" not in "\n".join(writer.lines)
    assert writer.lines[-1] == f"{stored} records are in the table, {set_aside} were set aside"


# Every operation is one row.


def test_every_operation_of_every_process_is_one_row_also_of_one_that_is_killed(writer, application, database, spool):
    beside = writer()
    processes = [application(f"app{number}", WORK) for number in range(3)]
    killed = application("killed", WORK_UNTIL_KILLED)
    killed.wait_until_said("killed-", count=200)
    killed.end(signal.SIGKILL)
    for process in processes:
        assert_ended(process)
    wait_until(lambda: spool() == [])
    returned = [line for process in (*processes, killed) for line in process.lines]
    rows = banks(database)
    assert len(rows) == len(set(rows))
    # The one whose return was being said may be there, too.
    assert set(returned) <= set(rows)
    assert len(rows) <= len(returned) + 1
    assert_ends(beside, stored=len(rows))


def test_what_processes_have_left_before_a_writer_came_is_written(writer, application, database, spool):
    process = application("app", "processor = configure()\nemit(*range(5))\nassert not processor.force_flush(50)")
    assert_ended(process)
    killed = application("killed", "configure()\nemit(*range(5))\nos.kill(os.getpid(), signal.SIGKILL)")
    assert killed.end() == -signal.SIGKILL
    assert len(spool()) == 2
    beside = writer()
    wait_until(lambda: spool() == [])
    assert banks(database) == sorted(f"{name}-{number}" for name in ("app", "killed") for number in range(5))
    assert_ends(beside, signal.SIGINT, stored=10)


def test_a_flush_waits_for_the_writer_and_answers_by_what_has_become_of_the_records(writer, application, database):
    process = application(
        "app",
        """
        processor = configure()
        emit(0)
        assert not processor.force_flush(100)
        os.write(1, b"waiting\\n")
        assert processor.force_flush(60_000)
        emit("refused")
        assert not processor.force_flush(60_000)
        stats = processor.stats()
        assert (stats["stored"], stats["set_aside"], stats["waiting"]) == (1, 1, 0), stats
        """,
    )
    process.wait_until_said("waiting")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE astrocyte_audit_log ADD CHECK (bank_id <> 'app-refused')")
    beside = writer()
    assert_ended(process)
    assert banks(database) == ["app-0"]
    assert_ends(beside, stored=1, set_aside=1)


def test_each_process_of_a_fork_leaves_its_own_to_the_writer(writer, application, database):
    beside = writer()
    process = application(
        "app",
        """
        processor = configure()
        emit("parent-0")
        if (child := os.fork()) == 0:
            emit("child-0", "child-1")
            assert processor.force_flush(60_000)
            os._exit(0)
        emit("parent-1")
        assert os.waitpid(child, 0)[1] == 0
        assert processor.force_flush(60_000)
        assert processor.stats()["stored"] == 2
        """,
    )
    assert_ended(process)
    assert banks(database) == ["app-child-0", "app-child-1", "app-parent-0", "app-parent-1"]
    assert_ends(beside, stored=4)


# The application has nothing but files.


def test_the_applications_have_no_connection_and_no_thread_and_the_writer_has_one(writer, application, database):
    beside = writer()
    script = """
        processor = configure()
        emit(*range(5))
        assert processor.force_flush(60_000)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        assert not any(os.readlink(path).startswith("socket:") for path in descriptors if os.path.exists(path))
        os.write(1, b"ready\\n")
        signal.pause()
    """
    processes = [application(f"app{number}", script) for number in range(3)]
    for process in processes:
        process.wait_until_said("ready")
    with psycopg.connect(database) as connection:
        open_ones = connection.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE application_name = 'astrocyte-otel-audit' AND datname = current_database()"
        )
        assert open_ones.fetchone() == (1,)
    assert len(banks(database)) == 15
    assert_ends(beside, stored=15)


@pytest.mark.parametrize("place", ["dsn", "pool", "storage"])
def test_an_application_that_leaves_writing_to_another_is_given_no_place_to_write_to(audit, storage, place):
    pool = ConnectionPool("postgresql://127.0.0.1:1/nowhere", open=False)
    given = {"dsn": "postgresql://127.0.0.1:1/nowhere", "pool": pool, "storage": storage}[place]
    with pytest.raises(ConfigurationError, match=r"^writer: external writes through no connection of this process"):
        audit(writer="external", **{place: given})


def test_where_the_environment_names_a_database_it_is_none_of_an_applications_concern(
    audit, provider, monkeypatch, caplog
):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", "postgresql://127.0.0.1:1/nowhere")
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "external")
    processor = audit()
    with audit_operation("recall", tracer_provider=provider):
        pass
    assert not processor.force_flush(50)
    assert processor.exporter.destination == "default"
    assert (processor.stats()["accepted"], caplog.messages) == (1, [])


@pytest.mark.parametrize("spool_dir", [False, "/dev/null"])
def test_an_application_that_leaves_writing_to_another_needs_a_spool(audit, spool_dir):
    with pytest.raises(ConfigurationError, match=r"^spool_dir: "):
        audit(writer="external", spool_dir=spool_dir)


# Operations that must leave a row.


def test_a_required_operation_is_on_the_disk_before_its_body_runs_and_leaves_one_row(writer, application, database):
    beside = writer()
    process = application(
        "app",
        """
        processor = configure()
        with audit_operation("forget", bank_id="app-0", tracer_provider=provider, required=True):
            assert any(b"app-0" in path.read_bytes() for path in spool.glob("*/0*.segment"))
        assert processor.force_flush(60_000)
        """,
    )
    assert_ended(process)
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT action, bank_id, outcome FROM astrocyte_audit_log").fetchall()
    assert rows == [("forget", "app-0", "success")]
    assert_ends(beside, stored=1)


def test_a_required_operation_whose_process_is_killed_inside_leaves_a_row(writer, application, database, spool):
    beside = writer()
    process = application(
        "app",
        """
        configure()
        emit(0)
        with audit_operation("forget", bank_id="app-1", tracer_provider=provider, required=True):
            os.write(1, b"inside\\n")
            signal.pause()
        """,
    )
    process.wait_until_said("inside")
    wait_until(lambda: banks(database) == ["app-0"])
    process.end(signal.SIGKILL)
    wait_until(lambda: spool() == [])
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT action, bank_id, outcome, ended_at IS NULL FROM astrocyte_audit_log ORDER BY bank_id"
        ).fetchall()
    assert rows == [("recall", "app-0", "success", False), ("forget", "app-1", "unknown", True)]
    assert_ends(beside, stored=2)


def test_a_required_operation_that_finds_no_room_does_not_run(writer, application, database, spool):
    process = application(
        "app",
        """
        configure(spool_max_bytes=20_000)
        try:
            for number in range(1_000):
                emit(number, required=True)
        except AuditUnavailableError:
            os.write(1, b"refused\\n")
        """,
    )
    assert_ended(process)
    *returned, last = process.lines
    assert (len(returned) > 5, last) == (True, "refused")
    beside = writer()
    wait_until(lambda: spool() == [])
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT bank_id, outcome FROM astrocyte_audit_log").fetchall()
    assert sorted(bank for bank, outcome in rows if outcome == "success") == sorted(returned)
    # Its own row says that it failed, or a gap's where there was no room for that either.
    assert {outcome for bank, outcome in rows if bank not in returned} <= {"failure", "unknown"}
    assert_ends(beside, stored=len(rows))


# Writers come and go.


def test_a_second_writer_stands_by_and_takes_over_when_the_first_is_killed(writer, application, database, spool):
    first = writer()
    second = writer(says="another writer is at work on this spool: standing by")
    working = application("app", WORK_UNTIL_KILLED)
    wait_until(lambda: len(banks(database)) > 100)
    assert not any("writing what is in" in line for line in second.lines)
    first.end(signal.SIGKILL)
    second.wait_until_said("writing what is in")
    count = len(banks(database))
    wait_until(lambda: len(banks(database)) > count + 100)
    working.end(signal.SIGKILL)
    wait_until(lambda: spool() == [])
    rows = banks(database)
    assert len(rows) == len(set(rows))
    assert set(working.lines) <= set(rows)
    assert len(rows) <= len(working.lines) + 1
    assert second.end(signal.SIGTERM) == 0


def test_a_writer_that_stands_by_can_be_ended(writer, application, database):
    first, second = writer(), writer(says="standing by")
    assert_ends(second, stored=0)
    assert_ended(application("app", WORK))
    assert_ends(first, stored=50)


def test_a_writer_ends_though_its_processes_go_on_and_the_next_goes_on_where_it_ended(writer, application, database):
    first = writer()
    working = application("app", WORK_UNTIL_KILLED)
    wait_until(lambda: len(banks(database)) > 100)
    assert first.end(signal.SIGTERM) == 0
    written = len(banks(database))
    assert first.lines[-1] == f"{written} records are in the table, 0 were set aside"
    working.wait_until_said("app-", count=written + 100)
    assert len(banks(database)) == written
    second = writer()
    wait_until(lambda: len(banks(database)) > written + 100)
    working.end(signal.SIGKILL)
    wait_until(lambda: set(working.lines) <= set(banks(database)))
    assert second.end(signal.SIGTERM) == 0


def test_a_process_with_another_destination_is_left_alone_until_a_writer_has_that(writer, application, database, spool):
    beside = writer()
    emits = "configure(destination={!r})\nemit(0)"
    for destination in ("default", "elsewhere"):
        assert_ended(application(destination, emits.format(destination)))
    wait_until(lambda: len(spool()) == 1)
    assert_ended(application("default-again", emits.format("default")))
    wait_until(lambda: len(spool()) == 1 and len(banks(database)) == 2)
    assert banks(database) == ["default-0", "default-again-0"]
    assert_ends(beside, stored=2)
    beside = writer("--destination", "elsewhere", "--destination", "somewhere")
    wait_until(lambda: spool() == [])
    assert banks(database) == ["default-0", "default-again-0", "elsewhere-0"]
    assert_ends(beside, stored=1)


def test_a_living_process_that_writes_itself_is_left_alone(writer, application, database, spool, tmp_path):
    script = f"""
    slow = {{"schedule_delay_millis": 3_600_000}}
    processor = configure_audit(actions="*", dsn={database!r}, tracer_provider=provider, **slow)
    emit(*range(5))
    wait_for((spool / "go").exists)
    assert processor.force_flush(60_000)
    assert processor.stats()["stored"] == 5
    """
    itself = application("itself", script)
    itself.wait_until_said("itself-4")
    (directory,) = spool()
    beside = writer()
    assert_ended(application("other", WORK))  # which the writer has found, and so it has looked at all
    assert "other-0" in banks(database)
    assert "itself-0" not in banks(database)
    (tmp_path / "spool" / "go").touch()
    assert_ended(itself)
    assert not any(directory in line for line in beside.lines)
    assert_ends(beside, stored=50)


def test_doctor_knows_whether_a_writer_is_at_work(writer, spool, tmp_path, monkeypatch):
    def found():
        return [(each.check, each.status) for each in check_writer(Examination(spool_dir=tmp_path / "spool"))]

    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "external")
    beside = writer()
    assert found() == [("writer", "ok"), ("writer-waiting", "ok")]
    assert_ends(beside, stored=0)
    assert found() == [("writer", "warning"), ("writer-waiting", "ok")]


# Postgres away.


def test_while_postgres_is_away_for_a_while_nothing_is_lost_and_nobody_waits(writer, application, cluster):
    beside = writer(dsn=cluster.dsn)
    process = application(
        "app",
        """
        processor = configure()
        emit(*range(10))
        assert processor.force_flush(60_000)
        os.write(1, b"written\\n")
        wait_for(lambda: os.path.exists(os.environ["XDG_STATE_HOME"] + "/away"))
        started = time.monotonic()
        emit(*range(10, 500))
        assert time.monotonic() - started < 5
        assert not processor.force_flush(200)
        os.write(1, b"waiting\\n")
        assert processor.force_flush(60_000)
        """,
    )
    process.wait_until_said("written")
    cluster.stop()
    try:
        Path(os.environ["XDG_STATE_HOME"], "away").touch()
        process.wait_until_said("waiting")
        beside.wait_until_said("audit records wait for Postgres")
    finally:
        cluster.start()
    assert_ended(process)
    beside.wait_until_said("audit records are being written again")
    rows = banks(cluster.dsn)
    assert rows == sorted(f"app-{number}" for number in range(500))
    assert_ends(beside, stored=500)


def test_a_writer_that_is_ended_while_postgres_is_away_leaves_what_it_has_in_the_spool(
    writer, application, database, monkeypatch, spool
):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_EXPORT_TIMEOUT_MILLIS", "300")
    beside = writer(dsn="postgresql://127.0.0.1:1/nowhere")
    assert_ended(application("app", "configure()\nemit(*range(5))"))
    beside.wait_until_said("Audit records of other processes are written now")
    started = time.monotonic()
    assert_ends(beside, stored=0)
    assert time.monotonic() - started < 10
    assert re.search(r"WARNING 5 audit records were not written by the shutdown's deadline", beside.lines[-2])
    beside = writer()
    wait_until(lambda: spool() == [])
    assert banks(database) == [f"app-{number}" for number in range(5)]
    assert_ends(beside, stored=5)


# On the command line.


def test_without_a_database_there_is_no_writer(start):
    process = start("-m", "astrocyte_otel_audit", "writer")
    assert process.end() == 2
    assert process.lines == ["error: --dsn: no database named; give --dsn or set OTEL_ASTROCYTE_AUDIT_DSN"]
