"""What upstream's audit logs promise, and where each was seen to break its promise: kept here, on a real Postgres."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from psycopg import sql
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from astrocyte_otel_audit import (
    AuditEntry,
    AuditLogger,
    ConfigurationError,
    audit_operation,
    audit_scope,
    audited,
    get_default_audit_logger,
)
from astrocyte_otel_audit.configure import attached_to
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

TEXT = "Calvin's blood pressure is rising"


def entry(**given: Any) -> AuditEntry:
    return AuditEntry(**{"action": "recall", "transport": "http", "request": {"query": TEXT, "top_k": 5}, **given})


def make_table(dsn: str, *schemas: str) -> None:
    table = AuditTable(OwnConnection(dsn))
    for schema in schemas or ("public",):
        table.migrate(schema, create_schema=True)
    table.close()


@pytest.fixture
def make_logger(provider: TracerProvider) -> Callable[..., AuditLogger]:
    """Upstream's own wiring, but for the provider."""
    return partial(AuditLogger, enabled=True, tracer_provider=provider)


@pytest.fixture
def audit_log(make_logger: Callable[..., AuditLogger], database: str) -> AuditLogger:
    """A logger that audits everything into the database, by a pool that is never opened."""
    pool = ConnectionPool(database, open=False)
    return make_logger(pool_getter=lambda: pool)


@pytest.fixture
def rows(provider: TracerProvider, database: str) -> Callable[..., list[dict[str, Any]]]:
    """All rows of a schema's table, oldest operation first, once everything is written."""

    def read(schema: str = "public") -> list[dict[str, Any]]:
        assert provider.force_flush()
        query = sql.SQL("SELECT * FROM {} ORDER BY started_at").format(sql.Identifier(schema, "astrocyte_audit_log"))
        with psycopg.connect(database, row_factory=dict_row) as connection:
            return connection.execute(query).fetchall()

    return read


class TestItNeverBlocksTheCaller:
    """1. Fire and forget. Upstream: a burst makes a task each, all on the application's own pool."""

    async def test_a_burst_leaves_the_application_s_pool_alone(self, make_logger, rows, database):
        async with AsyncConnectionPool(database, min_size=1, max_size=2, open=False) as pool:
            async with pool.connection() as connection:
                await connection.execute("SELECT 1")
            used = pool.get_stats()["requests_num"]
            tasks = asyncio.all_tasks()
            audit_log = make_logger(pool_getter=lambda: pool)
            for number in range(5_000):
                audit_log.log(entry(bank_id=f"bank-{number}"))
            assert asyncio.all_tasks() == tasks, "a burst makes no task"
            assert len({row["bank_id"] for row in rows()}) == 5_000
            assert pool.get_stats()["requests_num"] == used

    def test_a_call_returns_while_the_table_is_locked(self, audit_log, rows, database):
        with psycopg.connect(database) as connection:
            connection.execute("LOCK TABLE astrocyte_audit_log IN ACCESS EXCLUSIVE MODE")
            for number in range(100):
                audit_log.log(entry(bank_id=f"bank-{number}"))
            assert connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone() == (0,)
        assert len(rows()) == 100


class TestAFailedWriteIsNotTheEndOfARow:
    """2. Upstream: a warning, and the row is gone."""

    async def test_the_application_s_pool_may_close(self, make_logger, rows, database):
        async with AsyncConnectionPool(database, min_size=1, open=False) as pool:
            audit_log = make_logger(pool_getter=lambda: pool)
            for number in range(500):
                audit_log.log(entry(bank_id=f"bank-{number}"))
        assert len(rows()) == 500

    def test_the_event_loop_may_end(self, audit_log, rows):
        async def main():
            for number in range(500):
                audit_log.log(entry(bank_id=f"bank-{number}"))

        asyncio.run(main())
        assert len(rows()) == 500

    def test_the_provider_s_shutdown_writes_what_waits(self, audit_log, provider, database, table):
        for number in range(500):
            audit_log.log(entry(bank_id=f"bank-{number}"))
        provider.shutdown()
        assert len(table.search(limit=1000).records) == 500

    def test_a_table_that_comes_late_gets_every_row_once(self, make_logger, provider, empty_database, caplog):
        pool = ConnectionPool(empty_database, open=False)
        audit_log = make_logger(pool_getter=lambda: pool)
        for number in range(100):
            audit_log.log(entry(bank_id=f"bank-{number}"))
        assert not provider.force_flush(), "nobody claims that they are written"
        assert "the table does not exist" in caplog.text
        make_table(empty_database)
        assert provider.force_flush()
        with psycopg.connect(empty_database) as connection:
            banks = [bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log")]
        assert sorted(banks) == sorted(f"bank-{number}" for number in range(100))

    def test_a_trouble_is_a_warning_that_quotes_neither_text_nor_connection(
        self, make_logger, provider, empty_database, caplog
    ):
        pool = ConnectionPool(empty_database, open=False)
        make_logger(pool_getter=lambda: pool).log(entry())
        assert not provider.force_flush()
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert TEXT not in caplog.text
        assert empty_database not in caplog.text
        make_table(empty_database)
        assert provider.force_flush()


class TestItWorksFromAnyCode:
    """3. Upstream: inside a running event loop only; sync code is skipped."""

    def test_sync(self, audit_log, rows):
        audit_log.log(entry())
        assert len(rows()) == 1

    async def test_async(self, audit_log, rows):
        async with audit_log.log_with_timing(entry()):
            await asyncio.sleep(0)
        assert len(rows()) == 1

    def test_threads(self, audit_log, rows):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: audit_log.log(entry()), range(40)))
        assert len(rows()) == 40

    async def test_generators_of_both_kinds(self, audit, provider, database, rows):
        audit(dsn=database)

        @audited("recall", tracer_provider=provider)
        def pages() -> Iterator[int]:
            yield from range(3)

        @audited("reflect", tracer_provider=provider)
        async def tokens() -> AsyncIterator[int]:
            for number in range(4):
                yield number

        assert [*pages(), *[token async for token in tokens()]] == [0, 1, 2, 0, 1, 2, 3]
        assert [(row["action"], row["response"]) for row in rows()] == [
            ("recall", {"item_count": 3}),
            ("reflect", {"item_count": 4}),
        ]


class TestTheAllowlist:
    """4. Upstream: an empty list audits everything, and a bare string becomes its letters."""

    @pytest.mark.parametrize(
        ("allowed", "written"),
        [
            (None, ["classify", "recall", "retain"]),
            (["*"], ["classify", "recall", "retain"]),
            ([], []),
            (["retain", "recall"], ["recall", "retain"]),
            (["re*"], ["recall", "retain"]),
            (["r", "e", "t", "a", "i", "n"], []),
        ],
    )
    def test_decides_what_is_written(self, make_logger, provider, rows, database, allowed, written):
        pool = ConnectionPool(database, open=False)
        audit_log = make_logger(pool_getter=lambda: pool, allowed_actions=allowed)
        for action in ("retain", "recall", "classify"):
            audit_log.log(entry(action=action))
        assert sorted(row["action"] for row in rows()) == written

    def test_is_no_bare_string(self, make_logger):
        with pytest.raises(ConfigurationError, match=r"allowed_actions: got 'retain'; accepted is a list of actions"):
            make_logger(pool_getter=lambda: None, allowed_actions="retain")

    def test_that_is_empty_says_that_nothing_is_audited(self, audit, database, caplog):
        audit(dsn=database, actions=[])
        assert "Nothing is audited: the allowlist is empty" in caplog.text


class TestTenants:
    """5. Upstream: the schema is unquoted, so one tenant's rows end up with another, or wherever its name says."""

    @pytest.fixture
    def tenants(self, database: str) -> list[str]:
        make_table(database, "tenant_a", "Tenant_A")
        return ["tenant_a", "Tenant_A"]

    @pytest.fixture
    def make_tenant_logger(self, make_logger, database) -> Callable[[Callable[[], str]], AuditLogger]:
        pool = ConnectionPool(database, open=False)
        return lambda getter: make_logger(pool_getter=lambda: pool, schema_getter=getter)

    def test_differ_by_case(self, make_tenant_logger, rows, tenants):
        schema = contextvars.ContextVar("schema", default="public")
        audit_log = make_tenant_logger(schema.get)
        for name in tenants:
            schema.set(name)
            audit_log.log(entry(bank_id=f"of {name}"))
        for name in tenants:
            assert [row["bank_id"] for row in rows(name)] == [f"of {name}"]
        assert rows() == []

    @pytest.mark.parametrize(
        "crafted",
        ['tenant_a"."astrocyte_audit_log', "tenant_a.astrocyte_audit_log --", "tenant_a; --", "pg_catalog", "x\x00y"],
    )
    def test_are_never_reached_by_a_crafted_name(self, make_tenant_logger, provider, rows, tenants, table, crafted):
        make_tenant_logger(lambda: "tenant_a").log(entry(bank_id="honest"))
        assert [row["bank_id"] for row in rows("tenant_a")] == ["honest"]
        make_tenant_logger(lambda: crafted).log(entry(bank_id="crafted"))
        assert not provider.force_flush()
        [aside] = table.set_aside()
        assert "schema's name" in aside.reason
        assert len(table.search(schema="tenant_a").records) == 1
        assert table.search().records == table.search(schema="Tenant_A").records == []

    def test_are_asked_for_on_the_thread_that_logs(self, make_tenant_logger, rows, tenants):
        asked_on = []

        def getter():
            asked_on.append(threading.current_thread())
            return "tenant_a"

        make_tenant_logger(getter).log(entry())
        assert len(rows("tenant_a")) == 1
        assert asked_on == [threading.current_thread()]


class TestPools:
    """6. Upstream: with an asyncpg pool every INSERT is a syntax error, and nothing says so."""

    def test_of_asyncpg_are_refused_in_plain_words(self, make_logger, provider, caplog):
        class Pool:
            def acquire(self) -> Any:
                raise AssertionError

        audit_log = make_logger(pool_getter=Pool)
        audit_log.log(entry())
        audit_log.log(entry())
        [error] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert "asyncpg" in error
        assert "configure_audit(dsn=…)" in error
        assert attached_to(provider) == []


class _Hostile:
    def __str__(self) -> str:
        raise RuntimeError(TEXT)

    __repr__ = __str__


def _cycle() -> dict[str, Any]:
    payload: dict[str, Any] = {"top_k": 5}
    payload["self"] = payload
    return payload


class TestPayloads:
    """8. Upstream: NaN, NUL, lone surrogates, cycles, tuple keys and a hostile __str__ lose the payload or the row."""

    STORED: tuple[tuple[dict[Any, Any], dict[str, Any]], ...] = (
        ({"at": datetime(2026, 3, 1, tzinfo=UTC)}, {"at": "2026-03-01T00:00:00+00:00"}),
        ({"memory_id": uuid.UUID(int=7)}, {"memory_id": str(uuid.UUID(int=7))}),
        ({"blob": b"12345"}, {"blob": {"length": 5}}),
        ({"tags": {"b", "a"}}, {"tags": ["a", "b"]}),
        ({"score": float("nan")}, {"score": "nan"}),
        ({"score": float("-inf")}, {"score": "-inf"}),
        ({"note": "a\x00b"}, {"note": {"length": 3}}),
        ({"kind": "a\x00b"}, {"kind": {"length": 3}}),
        ({"kind": "\ud800"}, {"kind": {"length": 1}}),
        ({"k\x00ey": 1}, {"#0": 1}),
        ({"\ud800": 1}, {"#0": 1}),
        ({("a", 1): 1, "top_k": 5}, {"#0": 1, "top_k": 5}),
        ({"client": _Hostile()}, {"client": "_Hostile"}),
        ({_Hostile(): 1}, {"#0": 1}),
        ({"big": 2**200}, {"big": str(2**200)}),
        ({"bigger": 10**5000}, {"bigger": "int:16610bits"}),
    )

    def test_of_any_kind_are_stored(self, audit_log, rows):
        for payload, _ in self.STORED:
            audit_log.log(entry(request=payload, response=payload, metadata=payload))
        expected = [stored for _, stored in self.STORED]
        for column in ("request", "response", "metadata"):
            assert [row[column] for row in rows()] == expected

    def test_that_hold_themselves_are_stored_to_a_depth(self, audit_log, rows):
        audit_log.log(entry(request=_cycle()))
        [row] = rows()
        assert row["request"]["top_k"] == row["request"]["self"]["top_k"] == 5
        assert len(json.dumps(row["request"])) < 1000

    def test_too_big_to_store_are_described(self, audit_log, rows):
        audit_log.log(entry(request={f"k{number}": "x" * 50 for number in range(100_000)}, response=["x"] * 1_000_000))
        [row] = rows()
        assert row["request"]["[truncated]"] is True
        assert row["response"] == {"count": 1_000_000}

    def test_changed_after_the_call_stay_as_they_were(self, audit_log, rows):
        payload = {"options": {"top_k": 5}}
        audit_log.log(entry(request=payload, response=payload, metadata=payload))
        payload["options"]["top_k"] = 99
        [row] = rows()
        assert row["request"] == row["response"] == row["metadata"] == {"options": {"top_k": 5}}


class TestNoRawText:
    """9. Upstream: payloads "should be normalized", and nothing enforces it."""

    PLACES: tuple[dict[str, Any], ...] = (
        {"query": TEXT},
        {"anything": TEXT},
        {"messages": [{"role": "user", "content": TEXT}]},
        {"hits": [{"id": "m-1", "text": TEXT}, {"id": "m-2", "text": TEXT}]},
        {"deep": {"deeper": {"deepest": {"bottom": {"text": TEXT}}}}},
        {TEXT: 1},
        {"tags": [TEXT]},
        {"pair": (TEXT, TEXT)},
        {"error": LookupError(TEXT)},
        {"blob": TEXT.encode()},
    )

    def test_is_stored_wherever_it_stood(self, audit_log, audit, database, provider, rows):
        audit(dsn=database)

        @audited("retain", tracer_provider=provider)
        def retain(content: object) -> object:
            raise LookupError(TEXT)

        for payload in self.PLACES:
            audit_log.log(entry(request=payload, response=payload, metadata=payload))
            with pytest.raises(LookupError):
                retain(payload)
            with (
                pytest.raises(LookupError),
                audit_operation("reflect", request=payload, metadata=payload, tracer_provider=provider) as operation,
            ):
                operation.response = payload
                raise LookupError(TEXT)

        stored = rows()
        assert len(stored) == 3 * len(self.PLACES)
        assert [row for row in stored if "blood" in str(row)] == []


class TestAFailure:
    """10. Upstream: a failed operation looks like a successful one."""

    def test_looks_like_one_and_every_row_leads_to_its_trace(self, audit_log, provider, rows):
        tracer = provider.get_tracer("application")
        with audit_scope(actor_id="user-7", actor_type="user"), tracer.start_as_current_span("request") as request:
            with audit_log.log_with_timing(entry(bank_id="fine")) as timed:
                timed.response = {"hits": 3}
            with pytest.raises(LookupError), audit_log.log_with_timing(entry(bank_id="failed")):
                raise LookupError(TEXT)
            audit_log.log(entry(bank_id="denied", outcome="failure"))

        written = {row["bank_id"]: row for row in rows()}
        assert {bank: (row["outcome"], row["error_type"]) for bank, row in written.items()} == {
            "fine": ("success", None),
            "failed": ("failure", "LookupError"),
            "denied": ("failure", None),
        }
        context = request.get_span_context()
        for row in written.values():
            assert (row["actor_id"], row["actor_type"]) == ("user-7", "user")
            assert (row["trace_id"], row["parent_span_id"]) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
            assert len(row["span_id"]) == 16
            assert row["ended_at"] >= row["started_at"]
            assert row["sampled"] is True
        assert len({row["span_id"] for row in written.values()}) == 3


class TestQueries:
    """11. Upstream: an index for recent-first queries by bank and by action, and no code that queries."""

    def test_by_bank_and_by_action_give_the_newest_first(self, audit_log, provider, table):
        start = datetime(2026, 3, 1, tzinfo=UTC)
        for number in range(12):
            audit_log.log(
                entry(
                    action=("retain", "recall")[number % 2],
                    bank_id=("bank-1", "bank-2", "bank-3")[number % 3],
                    started_at=start + timedelta(minutes=number),
                    metadata={"number": number},
                )
            )
        assert provider.force_flush()

        def numbers(**filters: Any) -> list[int]:
            return [record.metadata["number"] for record in table.search(**filters).records]

        assert numbers() == list(reversed(range(12)))
        assert numbers(bank_id="bank-2") == [10, 7, 4, 1]
        assert numbers(action="retain") == [10, 8, 6, 4, 2, 0]
        assert numbers(bank_id="bank-1", action="recall", limit=1) == [9]
        hour = {"since": start + timedelta(minutes=2), "until": start + timedelta(minutes=5)}
        assert numbers(**hour) == [4, 3, 2]


class TestWithoutAnAudit:
    """12. A default logger that does nothing, so that code needs no branching."""

    def test_code_that_audits_runs_the_same(self, provider):
        @audited("recall", tracer_provider=provider)
        def recall(query: str) -> list[str]:
            with audit_operation("rank", tracer_provider=provider) as operation:
                operation.response = {"ranked": 1}
            get_default_audit_logger().log(entry())
            with get_default_audit_logger().log_with_timing(entry()) as timed:
                timed.response = {"hits": 1}
            return [query]

        assert recall(TEXT) == [TEXT]
        assert attached_to(provider) == []
