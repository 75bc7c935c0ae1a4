"""Connections break, servers go away, logins are refused: the table says so, in our words, and comes back."""

import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, FaultClass, OwnConnection, PooledConnections, dsn_of_pool
from tests.records import full_record, full_records

SECRET = "hunter2-secret"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def guarded_dsn():
    """DSN of a server of our own that asks some of its roles for a password."""
    # Not below pytest's own directory: that is closed to the user that the server runs as where the tests are root's.
    directory = Path(tempfile.mkdtemp(prefix="audit-guarded-"))
    try:
        with embedded_postgres(directory) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                """
                CREATE ROLE guarded LOGIN PASSWORD 'right';
                CREATE ROLE locked_out NOLOGIN;
                CREATE ROLE crowded LOGIN CONNECTION LIMIT 0;
                CREATE ROLE rejected LOGIN;
                CREATE ROLE plain LOGIN;
                """
            )
            connection.execute("CREATE DATABASE closed ALLOW_CONNECTIONS false")
            connection.execute("CREATE DATABASE private")
            connection.execute("REVOKE CONNECT ON DATABASE private FROM PUBLIC")
        rules = directory / "pg_hba.conf"
        rules.write_text(
            "local all guarded scram-sha-256\n"
            "local all absent_with_password scram-sha-256\n"
            "local all rejected reject\n" + rules.read_text()
        )  # fmt: skip
        with embedded_postgres(directory) as dsn:  # it reads its rules when it starts
            yield dsn
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def free_port():
    """A port of this machine where nothing listens, for as long as the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def refusal(dsn, caplog):
    """Return the error that writing meets there, once it is sure that nothing of it shows a password."""
    caplog.set_level(logging.DEBUG)
    table = AuditTable(OwnConnection(dsn))
    with pytest.raises(DatabaseUnavailableError) as caught:
        table.append([full_record(request={"text": SECRET})])
    table.close()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text
    return caught.value


class TestLogin:
    def test_a_right_password_is_let_in(self, guarded_dsn):
        with OwnConnection(make_conninfo(guarded_dsn, user="guarded", password="right")).connection() as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("guarded",)
        connection.close()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"user": "guarded", "password": SECRET}, "the password is wrong"),
            ({"user": "guarded"}, "the server wants a password"),
            ({"user": "absent_with_password", "password": SECRET}, "the password is wrong"),
            ({"user": "absent", "password": SECRET}, "the role does not exist"),
            ({"user": "locked_out", "password": SECRET}, "the role may not log in"),
            ({"user": "crowded", "password": SECRET}, "the server has no connection free"),
            ({"user": "rejected", "password": SECRET}, "pg_hba.conf does not admit this user"),
            ({"dbname": "absent", "password": SECRET}, "the database does not exist"),
            ({"dbname": "closed", "user": "plain", "password": SECRET}, "the database lets nobody in"),
            ({"dbname": "private", "user": "plain", "password": SECRET}, "GRANT CONNECT"),
        ],
        ids=[
            "wrong password", "no password", "role absent, password asked", "role absent", "role without login",
            "role at its limit", "rejected by pg_hba.conf", "database absent", "database closed", "no right to connect",
        ],
    )  # fmt: skip
    def test_a_refused_login_says_why(self, guarded_dsn, caplog, changes, reason):
        error = refusal(make_conninfo(guarded_dsn, **changes), caplog)

        assert reason in error.reason


class TestAbsence:
    def test_a_port_where_nothing_listens_is_named_as_such(self, free_port, caplog):
        error = refusal(f"postgresql://u:{SECRET}@127.0.0.1:{free_port}/d", caplog)

        assert error.reason == "nothing listens at that host and port; is Postgres running?"

    def test_a_socket_that_is_not_there_is_named_as_such(self, tmp_path, caplog):
        error = refusal(f"host={tmp_path} dbname=d user=u password={SECRET}", caplog)

        assert error.reason == "there is no such socket; is Postgres running?"

    def test_a_server_that_never_answers_is_given_up(self, caplog):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            error = refusal(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d?connect_timeout=2", caplog)

        assert error.reason == "no answer in time; is the host reachable?"

    def test_the_second_host_of_a_dsn_is_tried(self, server_dsn, free_port):
        parts = conninfo_to_dict(server_dsn)
        hosts = f"127.0.0.1,{parts.get('host', '')}"
        ports = f"{free_port},{parts.get('port') or 5432}"
        own = OwnConnection(make_conninfo(server_dsn, host=hosts, port=ports))

        with own.connection() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

        own.close()

    @pytest.mark.parametrize("read", [AuditTable.search, AuditTable.set_aside, AuditTable.check, AuditTable.migrate])
    def test_every_way_to_use_the_table_says_so(self, free_port, read):
        table = AuditTable(OwnConnection(f"host=127.0.0.1 port={free_port} dbname=d user=u"))

        with pytest.raises(DatabaseUnavailableError, match="nothing listens"):
            read(table)

    def test_a_table_that_found_no_server_finds_one_that_came_later(self):
        directory = Path(tempfile.mkdtemp(prefix="audit-late-"))
        try:
            with embedded_postgres(directory) as dsn:
                table = AuditTable(OwnConnection(dsn))
                table.migrate()
            with pytest.raises(DatabaseUnavailableError):
                table.append([full_record(0)])
            with embedded_postgres(directory):
                assert table.append([full_record(0)]).stored == 1
                table.close()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


class TestOwnConnection:
    def test_it_is_opened_when_it_is_first_needed(self, server_dsn):
        own = OwnConnection(make_conninfo(server_dsn, application_name="lazy"))
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lazy'"

        with psycopg.connect(server_dsn, autocommit=True) as connection:
            assert connection.execute(sessions).fetchone() == (0,)
            with own.connection():
                assert connection.execute(sessions).fetchone() == (1,)
        own.close()

    def test_it_is_kept_from_one_use_to_the_next(self, server_dsn):
        own = OwnConnection(server_dsn)
        with own.connection() as first:
            first.execute("SELECT 1")
            first.commit()
        with own.connection() as second:
            pass
        own.close()

        assert first is second

    def test_it_waits_for_nothing_without_end(self, server_dsn):
        own = OwnConnection(server_dsn)
        with own.connection() as connection:
            used = connection.info.get_parameters()
        own.close()

        assert used.items() >= {
            "connect_timeout": "10", "tcp_user_timeout": "30000", "keepalives_idle": "30", "keepalives_interval": "10",
            "keepalives_count": "3", "application_name": "astrocyte-otel-audit",
        }.items()  # fmt: skip

    def test_what_the_dsn_says_goes_before(self, server_dsn):
        own = OwnConnection(make_conninfo(server_dsn, connect_timeout=3, application_name="mine"))
        with own.connection() as connection:
            used = connection.info.get_parameters()
        own.close()

        assert (used["connect_timeout"], used["application_name"]) == ("3", "mine")

    def test_a_connection_that_the_server_ended_fails_once_and_is_replaced(self, table, connection):
        table.append([full_record(0)])
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'astrocyte-otel-audit'"
        )

        with pytest.raises(DatabaseUnavailableError) as refused:
            table.append([full_record(1)])

        assert "shutting down" in refused.value.reason or "the connection broke" in refused.value.reason
        assert table.append([full_record(1)]).stored == 1
        assert len(table.search().records) == 2

    def test_a_connection_that_was_closed_is_replaced_unnoticed(self, server_dsn):
        own = OwnConnection(server_dsn)
        with own.connection() as first:
            pass
        first.close()

        with own.connection() as second:
            assert second.execute("SELECT 1").fetchone() == (1,)
        own.close()

    def test_an_error_in_a_transaction_leaves_nothing_for_the_next_user(self, server_dsn):
        own = OwnConnection(server_dsn)
        with pytest.raises(psycopg.errors.DivisionByZero), own.connection() as first:
            first.execute("SELECT 1 / 0")

        with own.connection() as second:
            assert second.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
            assert second.execute("SELECT 1").fetchone() == (1,)
        own.close()
        assert first.closed

    def test_an_interrupt_in_the_middle_leaves_nothing_for_the_next_user(self, server_dsn):
        own = OwnConnection(server_dsn)
        with pytest.raises(KeyboardInterrupt), own.connection() as first:
            first.execute("BEGIN")
            first.execute("CREATE TABLE half_done (n integer)")
            raise KeyboardInterrupt

        with own.connection() as second:
            assert second.execute("SELECT to_regclass('half_done')").fetchone() == (None,)
        own.close()

    def test_after_it_was_closed_it_opens_again(self, table):
        table.append([full_record(0)])
        table.close()
        table.close()

        assert table.append([full_record(1)]).stored == 1

    def test_threads_take_turns(self, table):
        batches = [full_records(400)[start : start + 50] for start in range(0, 400, 50)]

        with ThreadPoolExecutor(max_workers=8) as threads:
            results = list(threads.map(table.append, batches))

        assert [result.stored for result in results] == [50] * 8
        assert len(table.search(limit=1_000).records) == 400

    def test_a_forked_child_leaves_its_parents_connection_alone(self, table, database):
        # In a process of its own: a fork of this one would have its threads' locks and none of its threads.
        run = subprocess.run(
            [sys.executable, "-c", FORKING, database], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )

        assert (run.stdout, run.stderr) == ("child 1\nparent 1\n", "")
        assert len(table.search().records) == 3


FORKING = """
import os, sys
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.records import full_record

table = AuditTable(OwnConnection(sys.argv[1]))
table.append([full_record(0)])
child = os.fork()
if child == 0:
    table.after_fork()
    print("child", table.append([full_record(1)]).stored, flush=True)
    table.close()
else:
    os.waitpid(child, 0)
    print("parent", table.append([full_record(2)]).stored, flush=True)
    table.close()
"""


class TestLentPool:
    @pytest.fixture
    def pool(self, database):
        with ConnectionPool(database, min_size=1, max_size=2) as pool:
            yield pool

    def test_records_are_written_and_read_through_it(self, pool):
        table = AuditTable(PooledConnections(pool))

        assert table.append(full_records(3)).stored == 3
        assert len(table.search().records) == 3

    def test_it_is_the_applications_to_close(self, pool):
        table = AuditTable(PooledConnections(pool))
        table.append(full_records(3))

        table.close()

        assert not pool.closed
        with pool.connection() as connection:
            assert connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone() == (3,)

    def test_its_connections_come_back_as_they_were(self, pool):
        with pool.connection() as connection:
            before = connection.execute("SELECT name, setting FROM pg_settings ORDER BY name").fetchall()
            connection.rollback()

        AuditTable(PooledConnections(pool)).append(full_records(3))

        with pool.connection() as connection:
            assert connection.execute("SELECT name, setting FROM pg_settings ORDER BY name").fetchall() == before
        assert pool.get_stats().get("returns_bad", 0) == 0

    def test_a_session_that_began_as_a_read_only_one_is_not_lent_again(self, database, connection):
        setting = sql.SQL("ALTER DATABASE {} {} default_transaction_read_only {}")
        name = sql.Identifier(connection.info.dbname)
        connection.execute(setting.format(name, sql.SQL("SET"), sql.SQL("= on")))
        with ConnectionPool(database, min_size=1, max_size=1) as pool:
            table = AuditTable(PooledConnections(pool))
            with pytest.raises(DatabaseUnavailableError):
                table.append([full_record()])
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(setting.format(name, sql.SQL("RESET"), sql.SQL("")))
            with suppress(DatabaseUnavailableError):  # by one that was made meanwhile
                table.append([full_record()])
            assert table.append([full_record()]).stored == 1

    def test_a_connection_in_autocommit_writes_a_batch_in_one_transaction(self, database, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log ADD CHECK (transport <> 'fax')")
        with ConnectionPool(database, min_size=1, max_size=1, kwargs={"autocommit": True}) as pool:
            result = AuditTable(PooledConnections(pool)).append([full_record(0), full_record(1, transport="fax")])

        assert (result.stored, len(result.set_aside)) == (1, 1)

    def test_one_that_is_closed_says_so(self):
        pool = ConnectionPool("host=/nowhere", open=False)

        with pytest.raises(DatabaseUnavailableError, match="the lent pool gives no connection"):
            AuditTable(PooledConnections(pool)).append([full_record()])

    def test_one_that_is_exhausted_says_so(self, server_dsn):
        with (
            ConnectionPool(server_dsn, min_size=1, max_size=1, timeout=0.05) as pool,
            pool.connection(),
            pytest.raises(DatabaseUnavailableError, match="the lent pool gives no connection"),
        ):
            AuditTable(PooledConnections(pool)).append([full_record()])

    def test_its_dsn_connects_to_the_same_place(self, pool, connection):
        own = AuditTable(OwnConnection(dsn_of_pool(pool)))
        own.append([full_record()])
        own.close()

        assert connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone() == (1,)

    @pytest.mark.parametrize("cursor_factory", [psycopg.ClientCursor, psycopg.RawCursor, psycopg.RawServerCursor])
    def test_one_whose_connections_make_other_cursors_will_do(self, database, cursor_factory):
        with ConnectionPool(database, min_size=1, kwargs={"cursor_factory": cursor_factory}) as pool:
            table = AuditTable(PooledConnections(pool), migrate=True)
            assert table.append([full_record(1), full_record(2, schema="tenant_a")]).stored == 2
            assert table.get(full_record(1).id).action == full_record(1).action

    def test_no_statement_is_prepared_on_its_connections(self, database):
        with ConnectionPool(database, min_size=1, max_size=1, kwargs={"prepare_threshold": 1}) as pool:
            table = AuditTable(PooledConnections(pool))
            for number in range(10):
                table.append([full_record(number)])
                table.search()
            with pool.connection() as connection:
                assert connection.execute("SELECT name FROM pg_prepared_statements").fetchall() == []


class TestServerTrouble:
    @pytest.mark.parametrize(
        ("sqlstate", "reason"),
        [
            ("40001", "rolled back by a concurrent one"),
            ("53100", "out of disk"),
            ("57P03", "starting up"),
        ],
    )
    def test_trouble_that_passes_is_raised_and_the_batch_can_be_given_again(self, table, connection, sqlstate, reason):
        connection.execute(
            f"""
            CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '{sqlstate}'; END $$;
            CREATE TRIGGER trouble BEFORE INSERT ON astrocyte_audit_log EXECUTE FUNCTION trouble();
            """
        )

        with pytest.raises(DatabaseUnavailableError, match=reason) as refused:
            table.append(full_records(3))

        assert refused.value.sqlstate == sqlstate
        assert str(refused.value).endswith(f"[SQLSTATE {sqlstate}]")
        connection.execute("DROP TRIGGER trouble ON astrocyte_audit_log")
        assert table.append(full_records(3)).stored == 3

    def test_trouble_in_one_tenant_rolls_all_of_the_batch_back(self, table, connection):
        table.migrate("tenant_b", create_schema=True)
        connection.execute(
            """
            CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '40001'; END $$;
            CREATE TRIGGER trouble BEFORE INSERT ON tenant_b.astrocyte_audit_log EXECUTE FUNCTION trouble();
            """
        )

        with pytest.raises(DatabaseUnavailableError):
            table.append([full_record(0), full_record(1, schema="tenant_b")])

        assert table.search().records == []

    def test_a_read_only_server_says_where_to_point_the_dsn(self, database):
        standby = make_conninfo(database, options="-c default_transaction_read_only=on")
        table = AuditTable(OwnConnection(standby))

        with pytest.raises(DatabaseUnavailableError, match="point the DSN at the primary"):
            table.append([full_record()])

        assert table.search().records == []
        table.close()

    def test_a_lock_on_one_tenants_table_holds_up_nobody_else(self, database, connection):
        table = AuditTable(OwnConnection(database), statement_timeout_seconds=0.2)
        table.migrate("tenant_b", create_schema=True)
        locked, free = full_record(0), full_record(1, schema="tenant_b")

        with connection.transaction():
            connection.execute("LOCK TABLE astrocyte_audit_log IN SHARE MODE")
            appended = table.append([locked, free])

        fault, waiting = appended.parked["public"]
        assert (fault.kind, waiting) == (FaultClass.PARK, [locked])
        assert "locked" in fault.reason
        assert table.search(schema="tenant_b").records[0].id == free.id
        assert table.append([locked]).stored == 1
        table.close()

    def test_a_time_for_statements_beyond_what_postgres_can_count_is_for_ever(self, database):
        table = AuditTable(OwnConnection(database), statement_timeout_seconds=1e12)

        assert table.append([full_record()]).stored == 1
        table.close()

    def test_a_view_that_takes_no_rows_parks_its_tenant(self, table, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log RENAME TO renamed")
        connection.execute("CREATE VIEW astrocyte_audit_log AS SELECT DISTINCT * FROM renamed")

        fault, records = table.append([full_record()]).parked["public"]

        assert (fault.kind, fault.sqlstate, records) == (FaultClass.PARK, "55000", [full_record()])
        assert "is it a view?" in fault.reason

    def test_a_table_of_other_types_parks_its_tenant(self, table, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log ALTER sampled TYPE integer USING 1")

        fault, _ = table.append([full_record()]).parked["public"]

        assert (fault.kind, fault.sqlstate) == (FaultClass.PARK, "42804")

    def test_a_migration_on_demand_does_not_wait_long_for_a_lock(self, database, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log DROP COLUMN outcome")
        connection.execute("DELETE FROM astrocyte_audit_log_migrations")
        table = AuditTable(OwnConnection(database), migrate=True)
        with connection.transaction():
            connection.execute("LOCK TABLE astrocyte_audit_log IN ROW EXCLUSIVE MODE")  # as any writer does
            begin = time.monotonic()
            result = table.append([full_record()])
            assert time.monotonic() - begin < 15.0
        assert result.parked["public"][0].sqlstate == "55P03"
        assert table.append([full_record()]).stored == 1
        table.close()
