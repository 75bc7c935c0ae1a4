"""Wiring written for upstream's logger works as it is: a pool, a schema getter, and a table of one's own."""

from __future__ import annotations

import contextvars
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from astrocyte_otel_audit import AuditEntry, AuditLogger
from astrocyte_otel_audit.configure import attached_to
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection


@pytest.fixture
def make_logger(provider: TracerProvider) -> Callable[..., AuditLogger]:
    def make(pool_getter: Callable[[], Any], **arguments: Any) -> AuditLogger:
        return AuditLogger(
            **{
                "pool_getter": pool_getter,
                "enabled": True,
                "allowed_actions": ["retain", "recall"],
                "tracer_provider": provider,
                **arguments,
            }
        )

    return make


@pytest.fixture
def banks(provider: TracerProvider, database: str) -> Callable[..., list[str]]:
    """The banks in a table, oldest operation first, once everything is written."""

    def read(schema: str = "public", table: str = "astrocyte_audit_log") -> list[str]:
        assert provider.force_flush()
        query = sql.SQL("SELECT bank_id FROM {} ORDER BY started_at").format(sql.Identifier(schema, table))
        with psycopg.connect(database) as connection:
            return [bank for (bank,) in connection.execute(query)]

    return read


@pytest.fixture
def tenants(database: str) -> list[str]:
    """Two tenants' schemas whose names differ by case alone, each with its table."""
    table = AuditTable(OwnConnection(database))
    for schema in ("tenant_a", "Tenant_A"):
        table.migrate(schema, create_schema=True)
    table.close()
    return ["tenant_a", "Tenant_A"]


def entry(bank_id: str, action: str = "recall") -> AuditEntry:
    return AuditEntry(action=action, transport="http", bank_id=bank_id, request={"top_k": 5})


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class TestThePool:
    async def test_may_be_async_and_open(self, make_logger, banks, database):
        async with AsyncConnectionPool(database, min_size=1, max_size=2, open=False) as pool:
            audit_log = make_logger(lambda: pool)
            audit_log.log(entry("logged"))
            async with audit_log.log_with_timing(entry("timed")) as timed:
                timed.response = {"hits": 3}
        assert banks() == ["logged", "timed"]

    def test_may_be_sync_and_open(self, make_logger, banks, database):
        with ConnectionPool(database, min_size=1, max_size=2, open=False) as pool:
            make_logger(lambda: pool).log(entry("bank-1"))
            assert banks() == ["bank-1"]

    @pytest.mark.parametrize("kind", [ConnectionPool, AsyncConnectionPool])
    def test_need_not_be_open(self, make_logger, banks, database, kind):
        pool = kind(database, open=False)
        make_logger(lambda: pool).log(entry("bank-1"))
        assert banks() == ["bank-1"]
        assert pool.closed, "nobody but the application opens it"

    def test_may_be_closed_by_now(self, make_logger, banks, database):
        pool = ConnectionPool(database, min_size=1, open=True)
        audit_log = make_logger(lambda: pool)
        audit_log.log(entry("before"))
        pool.close()
        audit_log.log(entry("after"))
        assert banks() == ["before", "after"]

    def test_is_not_needed_before_the_first_entry_that_is_written(self, make_logger, banks, database):
        pools: list[ConnectionPool | None] = [None, None, ConnectionPool(database, open=False)]
        asked: Iterator[ConnectionPool | None] = iter(pools)
        audit_log = make_logger(lambda: next(asked))
        for number in range(5):
            audit_log.log(entry(f"bank-{number}"))
        assert banks() == ["bank-2", "bank-3", "bank-4"]

    def test_may_be_asked_for_by_many_threads_and_is_used_once(self, make_logger, provider, banks, database):
        barrier = threading.Barrier(8)
        audit_log = make_logger(lambda: ConnectionPool(database, open=False))

        def work(number):
            barrier.wait()
            audit_log.log(entry(f"bank-{number}"))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
        assert sorted(banks()) == [f"bank-{number}" for number in range(8)]
        assert len(attached_to(provider)) == 1

    def test_says_how_to_connect_by_its_keywords_too(self, make_logger, banks, database):
        given = conninfo_to_dict(database)
        pool = AsyncConnectionPool(
            make_conninfo(database, dbname="another", user="another"),
            kwargs={
                "dbname": given["dbname"],
                "user": given.get("user"),
                "password": given.get("password", "not asked for"),
                "row_factory": dict_row,
                "autocommit": True,
                "prepare_threshold": 0,
            },
            open=False,
        )
        make_logger(lambda: pool).log(entry("bank-1"))
        assert banks() == ["bank-1"]

    def test_may_be_used_by_the_application_meanwhile(self, make_logger, banks, database):
        with ConnectionPool(database, min_size=1, max_size=1, open=False) as pool, pool.connection() as connection:
            make_logger(lambda: pool).log(entry("bank-1"))
            assert banks() == ["bank-1"], "the only connection of the pool is lent out, and the row is there"
            assert connection.execute("SELECT 1").fetchone() == (1,)
            assert pool.get_stats()["requests_num"] == 1


#: Written for `astrocyte.audit`, its wiring pattern included; only the import is another.
PROGRAM_FOR_UPSTREAM = """
import asyncio
import sys

from psycopg_pool import AsyncConnectionPool

from astrocyte_otel_audit import AuditEntry, AuditLogger, get_default_audit_logger, set_default_audit_logger


class Store:
    _pool = None

    async def open(self, dsn):
        self._pool = AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False)
        await self._pool.open()

    def _current_schema_or_public(self):
        return "public"


async def main():
    store = Store()
    logger = AuditLogger(
        pool_getter=lambda: store._pool,
        schema_getter=lambda: store._current_schema_or_public(),
        enabled=True,
        allowed_actions=["retain", "recall", "classify"],
    )
    set_default_audit_logger(logger)
    await store.open(sys.argv[1])
    logger.log(AuditEntry(action="recall", transport="bench", bank_id="logged",
                          request={"query": "what is due?", "top_k": 20}, response={"n_results": 18}))
    async with get_default_audit_logger().log_with_timing(
        AuditEntry(action="classify", transport="harness", bank_id="timed")
    ) as e:
        e.response = {"n_results": 1}
    logger.log(AuditEntry(action="forget", transport="bench", bank_id="not allowed"))
    await store._pool.close()


asyncio.run(main())
"""


def test_a_program_written_for_upstream_leaves_its_rows(database, banks):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM_FOR_UPSTREAM, database],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert banks() == ["logged", "timed"]


class _AsyncpgPool:
    """The shape of an asyncpg pool: it gives connections, and not its settings."""

    def acquire(self) -> Any:
        raise AssertionError("its connections belong to another driver")


def _async_settings() -> AsyncConnectionPool:
    async def conninfo() -> str:
        return "dbname=of-a-secret-store"

    return AsyncConnectionPool(conninfo, open=False)


class TestAPoolThatCannotWork:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (_AsyncpgPool, ["_AsyncpgPool", "psycopg_pool", "asyncpg", "configure_audit(dsn=…)"]),
            (object, ["builtins.object", "psycopg_pool"]),
            (_async_settings, ["coroutine", "configure_audit(dsn=…)"]),
        ],
        ids=["asyncpg", "anything", "settings from a coroutine"],
    )
    async def test_is_explained_once_and_disturbs_nobody(self, make_logger, caplog, make, words):
        asked = []
        pool = make()

        def get_pool():
            asked.append("pool")
            return pool

        audit_log = make_logger(get_pool)
        for number in range(3):
            audit_log.log(entry(f"bank-{number}"))
            async with audit_log.log_with_timing(entry("timed")) as timed:
                timed.response = {"hits": number}
        [message] = errors(caplog)
        assert message.startswith("No audit entry will be written: ")
        assert [word for word in words if word not in message] == []
        assert asked == ["pool"]

    def test_does_not_show_its_password(self, make_logger, caplog):
        pool = ConnectionPool("postgresql://app:p%4hunter2@localhost/app", open=False)
        make_logger(lambda: pool).log(entry("bank-1"))
        assert len(errors(caplog)) == 1
        assert "hunter2" not in caplog.text


class TestTheTable:
    def test_may_have_a_name_of_its_own(self, make_logger, banks, database):
        table = AuditTable(OwnConnection(database), table="memory_audit")
        table.migrate()
        table.close()
        pool = ConnectionPool(database, open=False)
        make_logger(lambda: pool, table="memory_audit").log(entry("bank-1"))
        assert banks(table="memory_audit") == ["bank-1"]
        assert banks() == []

    def test_gets_the_allowed_actions_only(self, make_logger, banks, database):
        pool = ConnectionPool(database, open=False)
        audit_log = make_logger(lambda: pool)
        for action in ("retain", "forget", "recall"):
            audit_log.log(entry(action, action))
        assert banks() == ["retain", "recall"]

    def test_gets_all_actions_where_none_are_named(self, make_logger, banks, database):
        pool = ConnectionPool(database, open=False)
        make_logger(lambda: pool, allowed_actions=None).log(entry("bank-1", "consolidate"))
        assert banks() == ["bank-1"]

    def test_is_that_of_the_first_logger_and_the_second_one_says_so(self, make_logger, banks, database, caplog):
        pool = ConnectionPool(database, open=False)
        make_logger(lambda: pool).log(entry("first"))
        second = make_logger(lambda: pool, table="memory_audit", allowed_actions=["recall", "forget"])
        for action in ("recall", "forget"):
            second.log(entry("second", action))
        assert banks() == ["first", "second"]
        [warning] = [record.getMessage() for record in caplog.records if "AuditLogger" in record.getMessage()]
        assert "the actions ['forget']" in warning
        assert "to the table 'astrocyte_audit_log', and not to 'memory_audit'" in warning


class TestTheSchema:
    def test_is_the_tenant_s_whose_thread_logs(self, make_logger, banks, database, tenants):
        pool, current = ConnectionPool(database, open=False), threading.local()
        audit_log = make_logger(lambda: pool, schema_getter=lambda: current.schema)

        def work(schema):
            current.schema = schema
            for number in range(20):
                audit_log.log(entry(f"{schema} {number:02d}"))

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(work, tenants))
        for schema in tenants:
            assert banks(schema) == [f"{schema} {number:02d}" for number in range(20)]
        assert banks() == []

    async def test_is_the_one_of_the_call_and_not_of_the_write(self, make_logger, banks, database, tenants):
        schema: contextvars.ContextVar[str] = contextvars.ContextVar("schema")
        async with AsyncConnectionPool(database, min_size=1, open=False) as pool:
            audit_log = make_logger(lambda: pool, schema_getter=schema.get)
            for name in tenants:
                schema.set(name)
                audit_log.log(entry(f"logged for {name}"))
                async with audit_log.log_with_timing(entry(f"timed for {name}")):
                    pass
            schema.set("public")
            for name in tenants:
                assert banks(name) == [f"logged for {name}", f"timed for {name}"]
            assert banks() == []
