"""What the tests share: a real Postgres, a fresh database a test, and a pipeline onto either a table or a list."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from psycopg import sql
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit import AuditSpanProcessor, configure_audit
from astrocyte_otel_audit.embedded import embedded_postgres
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from tests.servers import new_database
from tests.support import MemoryStorage

#: Names a server to test against, with a role that may create databases and roles; without it one is embedded.
SERVER_VARIABLE = "OTEL_ASTROCYTE_AUDIT_TEST_DSN"
#: Tests that may be skipped on a machine, by node id, one a line. Any other skip fails the run.
EXPECTED_SKIPS = Path(__file__).parent / "expected_skips.txt"

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """DSN of a superuser on a real server."""
    if dsn := os.environ.get(SERVER_VARIABLE):
        yield dsn
        return
    # Not below pytest's own directory: that is closed to the user that the server runs as where the tests are root's.
    directory = Path(tempfile.mkdtemp(prefix="audit-"))
    try:
        with embedded_postgres(directory) as dsn:
            with psycopg.connect(dsn, autocommit=True) as connection:
                # A fresh database a test costs mostly the disk's time, and no test here pulls the plug.
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
            yield dsn
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template_database(server_dsn: str) -> str:
    """Name of a migrated database that others are cloned from: cloning costs less than migrating."""
    name = f"audit_template_{os.getpid()}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    table = AuditTable(OwnConnection(make_conninfo(server_dsn, dbname=name)))
    table.migrate()
    table.close()
    return name


def _database(server_dsn: str, template: str | None) -> Iterator[str]:
    name = f"audit_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template or "template1")
        )
        if connection.info.server_version >= 150_000:
            create += sql.SQL(" STRATEGY file_copy")  # quicker than by WAL, where nothing is synced
        connection.execute(create)
        yield make_conninfo(server_dsn, dbname=name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def module_database(server_dsn: str) -> Iterator[str]:
    """DSN of a database for all tests of a module, where a fresh one each would cost them most of their time."""
    with new_database(server_dsn) as dsn:
        yield dsn


@pytest.fixture
def empty_database(server_dsn: str) -> Iterator[str]:
    """DSN of a fresh database without any table."""
    yield from _database(server_dsn, None)


@pytest.fixture
def database(server_dsn: str, template_database: str) -> Iterator[str]:
    """DSN of a fresh database with a migrated table in schema public."""
    yield from _database(server_dsn, template_database)


@pytest.fixture
def table(database: str) -> Iterator[AuditTable]:
    """The migrated table of a fresh database."""
    table = AuditTable(OwnConnection(database))
    yield table
    table.close()


@pytest.fixture
def storage() -> MemoryStorage:
    """A stand-in for the table that keeps records in a list."""
    return MemoryStorage()


@pytest.fixture
def provider() -> Iterator[TracerProvider]:
    """A tracer provider of the test's own, shut down at its end."""
    provider = TracerProvider(shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def audit(provider: TracerProvider) -> Callable[..., AuditSpanProcessor]:
    """`configure_audit` on the test's own provider; everything is allowed and the delay is short by default."""

    def configure(**arguments: Any) -> AuditSpanProcessor:
        defaults: dict[str, Any] = {"tracer_provider": provider, "actions": "*", "schedule_delay_millis": 5.0}
        return configure_audit(**{**defaults, **arguments})

    return configure


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the settings of the machine it runs on, or another test's spool."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for variable in list(os.environ):
        if variable.startswith("OTEL_") and variable != SERVER_VARIABLE:
            monkeypatch.delenv(variable)


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """On CI, a skip that nobody expected is a failure: a test that did not run has proved nothing."""
    expected = {line.strip() for line in EXPECTED_SKIPS.read_text().splitlines() if line and not line.startswith("#")}
    unexpected = sorted(set(_skipped) - expected)
    if unexpected and os.environ.get("CI"):
        print("\nskipped, and not listed in tests/expected_skips.txt:", *unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
