"""However Postgres fails: no call of the application waits for it, and once it is back each operation is one row."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit import audit_operation
from astrocyte_otel_audit.postgres import OwnConnection
from astrocyte_otel_audit.postgres.sweep import AuditSweeper
from astrocyte_otel_audit.retention import RetentionPolicy
from tests.faults.proxy import Proxy, can_drop_packets
from tests.faults.server import migrated, wait_until

FLUSH_MILLIS = 30_000
#: How soon a blackholed network is given up; by default it takes half a minute.
IMPATIENT = {
    "connect_timeout": 2, "tcp_user_timeout": 1000,
    "keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 2,
}  # fmt: skip


class Application:
    """A thread that goes on calling an audited function, and the pipeline below it."""

    def __init__(self, provider, processor):
        self.processor = processor
        #: The record id and the number of each operation that has returned, and how long it took.
        self.returned: list[tuple[str | None, int]] = []
        self.seconds: list[float] = []
        self.raised: list[Exception] = []
        self._provider = provider
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        for number in itertools.count():
            if self._done.wait(0.001):
                return
            began = time.monotonic()
            try:
                with audit_operation("recall", bank_id="user-calvin", tracer_provider=self._provider) as operation:
                    operation.response = {"answer": number}
            except Exception as error:
                self.raised.append(error)
            self.seconds.append(time.monotonic() - began)
            self.returned.append((operation.record_id, number))

    def stop(self):
        self._done.set()
        self._thread.join()

    def goes_on(self, calls=100):
        """Wait for more calls to return."""
        goal = len(self.returned) + calls
        wait_until(lambda: len(self.returned) >= goal)

    def assert_is_audited(self):
        self.goes_on()
        assert self.processor.force_flush(FLUSH_MILLIS)

    def assert_goes_on_without_postgres(self):
        self.goes_on()
        assert not self.processor.force_flush(300)
        self.goes_on()

    def assert_each_operation_is_one_row_of(self, server):
        """Wait until all is written, now that nothing hinders it, and compare."""
        assert self.processor.force_flush(FLUSH_MILLIS)
        self.stop()
        assert self.processor.force_flush(FLUSH_MILLIS)
        assert self.raised == []
        rows = server.execute("SELECT id::text, (response->>'answer')::int FROM astrocyte_audit_log")
        assert sorted(rows, key=lambda row: row[1]) == self.returned
        stats = self.processor.stats()
        assert stats["accepted"] == stats["stored"] == len(rows)
        assert [stats[name] for name in ("waiting", "parked", "set_aside", "lost", "refused_full", "damaged")] == [
            0
        ] * 6
        # Of a hundred calls one may meet a busy machine.
        assert sorted(self.seconds)[len(self.seconds) * 99 // 100] < 0.1


@pytest.fixture(scope="module")
def template():
    with migrated() as server:
        yield server


@pytest.fixture
def server(template):
    server = template.copy()
    server.start()
    yield server
    server.close()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.socket)
    yield proxy
    proxy.close()


@pytest.fixture
def serve(audit, provider, tmp_path):
    """Starts an application."""
    started = []

    def serve(dsn=None, **settings):
        settings = {"spool_dir": tmp_path / "spool", "max_export_batch_size": 64, **settings}
        processor = audit(**settings) if dsn is None else audit(dsn=dsn, **settings)
        started.append(Application(provider, processor))
        return started[-1]

    yield serve
    for application in started:
        application.stop()


@pytest.fixture
def lent_pool():
    """Makes a pool of the application's own."""
    with contextlib.ExitStack() as pools:
        yield lambda dsn: pools.enter_context(ConnectionPool(dsn, min_size=1, max_size=2, timeout=5.0))


def by_way_of(proxy, server, **parameters):
    """The writer's DSN, by TCP and through the proxy."""
    return make_conninfo(server.writer_dsn, host="127.0.0.1", port=proxy.port, **parameters)


def test_a_server_that_is_down_at_the_start(server, serve):
    server.stop()
    application = serve(server.writer_dsn)
    application.assert_goes_on_without_postgres()
    server.start()
    application.assert_each_operation_is_one_row_of(server)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_that_crashes_in_the_middle_of_a_batch(server, serve, end):
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    with server.held_up():
        getattr(server, end)()
    application.assert_goes_on_without_postgres()
    server.start()
    application.assert_is_audited()
    getattr(server, end)()
    application.assert_goes_on_without_postgres()
    server.start()
    application.assert_each_operation_is_one_row_of(server)


def test_sessions_that_are_ended_in_the_middle_of_a_batch(server, serve):
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    with server.held_up():
        application.assert_goes_on_without_postgres()
        assert server.end_sessions() == 1
    for _ in range(20):
        application.goes_on(20)
        server.end_sessions()
    application.assert_each_operation_is_one_row_of(server)


@pytest.mark.parametrize("what", ["request", "answer"])
def test_a_commit_that_is_lost_on_its_way_there_or_back(server, proxy, serve, what):
    application = serve(by_way_of(proxy, server))
    for lost in range(1, 4):
        application.assert_is_audited()
        proxy.lose_commit(what)
        wait_until(lambda lost=lost: proxy.lost == lost)
        application.assert_goes_on_without_postgres()
        [(rows,)] = server.execute("SELECT count(*) FROM astrocyte_audit_log")
        assert (rows > application.processor.stats()["stored"]) == (what == "answer")
        proxy.heal()
    application.assert_each_operation_is_one_row_of(server)


def test_a_network_that_breaks_again_and_again(server, proxy, serve):
    application = serve(by_way_of(proxy, server))
    for _ in range(20):
        application.goes_on(20)
        proxy.cut()
    proxy.refuse()
    application.assert_goes_on_without_postgres()
    proxy.heal()
    application.assert_each_operation_is_one_row_of(server)


def test_a_slow_network(server, proxy, serve):
    proxy.slow_down(0.1)
    application = serve(by_way_of(proxy, server), max_export_batch_size=4096)
    application.goes_on(500)
    application.assert_each_operation_is_one_row_of(server)


@pytest.mark.skipif(not can_drop_packets(), reason="the kernel doesn't let us drop packets")
@pytest.mark.parametrize("what", ["request", "answer"])
def test_a_network_that_swallows_every_packet(server, proxy, serve, caplog, what):
    application = serve(by_way_of(proxy, server, **IMPATIENT))
    application.assert_is_audited()
    if what == "request":
        proxy.blackhole()
    else:
        with server.held_up():
            proxy.blackhole()
    application.assert_goes_on_without_postgres()
    wait_until(lambda: "audit records wait for Postgres" in caplog.text)
    application.assert_goes_on_without_postgres()
    proxy.heal()
    application.assert_each_operation_is_one_row_of(server)


def test_answers_that_come_late(server, proxy, serve):
    application = serve(by_way_of(proxy, server))
    application.assert_is_audited()
    proxy.hold_answers()
    application.assert_goes_on_without_postgres()
    proxy.heal()
    application.assert_each_operation_is_one_row_of(server)


@pytest.mark.parametrize("lends_pool", [False, True])
def test_answers_that_never_come(server, proxy, serve, lent_pool, caplog, lends_pool):
    dsn = by_way_of(proxy, server)
    source = {"pool": lent_pool(dsn)} if lends_pool else {"dsn": dsn}
    application = serve(**source, export_timeout_millis=1000)
    application.assert_is_audited()
    proxy.swallow_answers()
    application.assert_goes_on_without_postgres()
    proxy.heal()  # What was swallowed never comes, and everything else is as it should be.
    wait_until(lambda: "is connected and doesn't answer" in caplog.text)
    application.assert_each_operation_is_one_row_of(server)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_is_frozen(server, serve, moment):
    if moment == "before":
        server.freeze()
    application = serve(server.writer_dsn)
    if moment == "after":
        application.assert_is_audited()
        server.freeze()
    application.assert_goes_on_without_postgres()
    server.thaw()
    application.assert_each_operation_is_one_row_of(server)


@pytest.fixture
def small_disk(template):
    disk = template.directory.parent / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "audit", disk]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    if template.user is not None:
        shutil.chown(disk, template.user)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full(small_disk, server, serve, caplog):
    server.execute(
        f"CREATE TABLESPACE small LOCATION '{small_disk}'",
        "ALTER TABLE ALL IN TABLESPACE pg_default SET TABLESPACE small",
        "ALTER INDEX ALL IN TABLESPACE pg_default SET TABLESPACE small",
    )
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(4096))
    wait_until(lambda: "out of disk" in caplog.text)
    application.assert_goes_on_without_postgres()
    (small_disk / "ballast").unlink()
    application.assert_each_operation_is_one_row_of(server)


def test_a_server_that_is_read_only_for_a_while(server, serve, caplog):
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    server.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    wait_until(lambda: "read-only" in caplog.text)
    application.assert_goes_on_without_postgres()
    server.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    application.assert_each_operation_is_one_row_of(server)


def test_a_database_that_is_read_only_for_a_while(server, serve, caplog):
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    server.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    server.end_sessions()
    wait_until(lambda: "read-only" in caplog.text)
    application.assert_goes_on_without_postgres()
    server.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
    application.assert_each_operation_is_one_row_of(server)


@pytest.fixture
def standby(server):
    standby = server.standby()
    standby.start()
    yield standby
    standby.close()


def test_a_standby_that_becomes_the_primary(server, standby, serve, caplog):
    application = serve(standby.writer_dsn)
    wait_until(lambda: "read-only" in caplog.text)
    application.assert_goes_on_without_postgres()
    server.kill()
    standby.promote()
    application.assert_each_operation_is_one_row_of(standby)


def test_a_name_that_leads_to_a_standby_for_a_while(server, standby, proxy, serve, caplog):
    application = serve(by_way_of(proxy, server))
    application.assert_is_audited()
    proxy.target = standby.socket
    proxy.cut()
    wait_until(lambda: "read-only" in caplog.text)
    application.assert_goes_on_without_postgres()
    proxy.target = server.socket
    application.assert_each_operation_is_one_row_of(server)


def test_a_failover_to_the_other_host(server, standby, serve):
    hosts = f"{server.directory},{standby.directory}"
    application = serve(make_conninfo(server.writer_dsn, host=hosts, target_session_attrs="read-write"))
    application.assert_is_audited()
    with server.held_up():
        # What the standby hasn't got is another test's matter.
        wait_until(lambda: server.has("(SELECT replay_lsn >= pg_current_wal_lsn() FROM pg_stat_replication)"))
        server.kill()
    application.assert_goes_on_without_postgres()
    standby.promote()
    application.assert_each_operation_is_one_row_of(standby)


def test_a_failover_to_a_standby_that_lacks_the_last_commits(server, standby, serve):
    hosts = f"{server.directory},{standby.directory}"
    dsn = make_conninfo(server.writer_dsn, host=hosts, target_session_attrs="read-write")
    application = serve(dsn, spool_keep_seconds=60)
    application.assert_is_audited()
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
    wait_until(lambda: not server.has("(SELECT count(*) > 0 FROM pg_stat_replication)"))
    application.assert_is_audited()
    [(written,)] = server.execute("SELECT count(*) FROM astrocyte_audit_log")
    server.kill()
    [(there,)] = standby.execute("SELECT count(*) FROM astrocyte_audit_log")
    assert there < written
    application.assert_goes_on_without_postgres()
    standby.promote()
    application.assert_each_operation_is_one_row_of(standby)


@contextlib.contextmanager
def no_connection_for_the_role(server):
    server.execute("ALTER ROLE writer CONNECTION LIMIT 0")
    server.end_sessions()
    yield
    server.execute("ALTER ROLE writer CONNECTION LIMIT -1")


@contextlib.contextmanager
def no_connection_for_anybody(server):
    with contextlib.ExitStack() as connections:
        for _ in range(17):  # of 20, as the others are a superuser's
            connections.enter_context(contextlib.closing(psycopg.connect(server.dsn)))
        server.end_sessions()
        yield


@pytest.mark.parametrize("no_connection", [no_connection_for_the_role, no_connection_for_anybody])
def test_a_server_without_a_free_connection(server, serve, caplog, no_connection):
    application = serve(server.writer_dsn)
    application.assert_is_audited()
    with no_connection(server):
        wait_until(lambda: "no connection free" in caplog.text)
        application.assert_goes_on_without_postgres()
    application.assert_each_operation_is_one_row_of(server)


class Pgbouncer:
    """A pgbouncer in transaction mode before a server."""

    def __init__(self, program, server):
        self.dsn = make_conninfo(server.writer_dsn, port=6432)
        self._command = [program, server.directory / "pgbouncer.ini"]
        self._user = server.user
        self._command[1].write_text(
            f"""
            [databases]
            postgres = host={server.directory} user=writer
            [pgbouncer]
            pool_mode = transaction
            default_pool_size = 2
            auth_type = any
            unix_socket_dir = {server.directory}
            listen_port = 6432
            server_login_retry = 0.1
            """
        )

    def start(self):
        self._process = subprocess.Popen(
            self._command, user=self._user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._answers)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def _answers(self):
        with contextlib.suppress(psycopg.OperationalError), contextlib.closing(psycopg.connect(self.dsn)):
            return True
        return False


@pytest.fixture
def pgbouncer(server):
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no pgbouncer on this machine")
    pgbouncer = Pgbouncer(program, server)
    pgbouncer.start()
    yield pgbouncer
    pgbouncer.kill()


@pytest.mark.parametrize("whose", ["pgbouncer", "server"])
def test_a_crash_behind_pgbouncer_or_of_itself(server, pgbouncer, serve, whose):
    broken = pgbouncer if whose == "pgbouncer" else server
    application = serve(pgbouncer.dsn)
    application.assert_is_audited()
    with server.held_up():
        broken.kill()
    application.assert_goes_on_without_postgres()
    broken.start()
    application.assert_each_operation_is_one_row_of(server)


def test_two_sweepers_behind_pgbouncer_delete_each_row_once(server, pgbouncer):
    server.execute(
        "GRANT SELECT, DELETE ON astrocyte_audit_log, astrocyte_audit_log_set_aside TO writer",
        "GRANT SELECT ON astrocyte_audit_log_holds TO writer",
        """
        INSERT INTO astrocyte_audit_log (action, transport, bank_id, started_at)
        SELECT 'recall', 'http', 'bank-' || n % 5, now() - (n + 0.5) * interval '1 hour'
        FROM generate_series(1, 1000) AS n
        """,
        "INSERT INTO astrocyte_audit_log_holds (bank_id, reason) VALUES ('bank-3', 'a case')",
    )
    cutoffs = RetentionPolicy(days=10).cutoffs(datetime.now(UTC))

    def sweep(_):
        sweeper = AuditSweeper(OwnConnection(pgbouncer.dsn))
        rounds = [sweeper.sweep("public", cutoffs, batch_size=20, pause=lambda seconds: None) for _ in range(50)]
        sweeper.close()
        assert [swept.faults for swept in rounds] == [[]] * 50
        return sum(swept.rows for swept in rounds)

    with ThreadPoolExecutor(2) as sweepers:
        rows = sum(sweepers.map(sweep, range(2)))
    [(left,)] = server.execute("SELECT count(*) FROM astrocyte_audit_log")
    assert (rows, left) == (609, 391)  # of the 761 that are older, a fifth is held
