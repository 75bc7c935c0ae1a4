"""`AuditLogger`: the interface of `astrocyte.audit`, kept to the letter, on top of audit spans."""

from __future__ import annotations

import asyncio
import enum
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from astrocyte import audit as upstream
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider, get_current_span
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit import (
    AuditEntry,
    AuditLogger,
    AuditRecord,
    AuditSpanExporter,
    ConfigurationError,
    RetentionPolicy,
    audit_operation,
    audit_scope,
    get_default_audit_logger,
    logger,
    set_default_audit_logger,
)
from astrocyte_otel_audit.configure import attached_to
from tests.support import MemoryStorage

#: A database that isn't there.
NOWHERE = "postgresql://127.0.0.1:1/none"
TEXT = "Calvin's blood pressure is rising"
STARTED = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
ENDED = datetime(2026, 3, 1, 12, 0, 1, 654321, tzinfo=UTC)

entry = partial(AuditEntry, action="recall", transport="bench")


@pytest.fixture
def make_logger(provider: TracerProvider) -> Callable[..., AuditLogger]:
    """An enabled logger on the test's own provider, where a pipeline is registered and so no pool is asked for."""

    def make(**arguments: Any) -> AuditLogger:
        defaults = {"pool_getter": lambda: None, "enabled": True, "tracer_provider": provider}
        return AuditLogger(**{**defaults, **arguments})

    return make


@pytest.fixture
def audit_log(make_logger) -> AuditLogger:
    return make_logger()


@pytest.fixture
def recorded(audit, storage) -> Callable[[], list[AuditRecord]]:
    """Everything is audited; the function returns all records so far."""
    processor = audit(storage=storage)

    def records() -> list[AuditRecord]:
        assert processor.force_flush()
        return storage.records

    return records


@pytest.fixture
def fresh_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """No default logger was set or asked for yet, and the one that a test sets goes with it."""
    monkeypatch.setattr(logger, "_default", None)


class TestTheInterfaceOfUpstream:
    @pytest.mark.parametrize("name", ["get_default_audit_logger", "set_default_audit_logger"])
    def test_functions_take_what_upstream_s_take(self, name):
        theirs, ours = (list(inspect.signature(getattr(module, name)).parameters) for module in (upstream, logger))
        assert ours == theirs

    def test_an_entry_has_upstream_s_fields_first_and_in_order(self):
        theirs, ours = ([(f.name, f.default) for f in fields(module.AuditEntry)] for module in (upstream, logger))
        assert ours[: len(theirs)] == theirs

    def test_a_logger_takes_upstream_s_arguments_with_the_same_defaults(self):
        theirs, ours = (inspect.signature(module.AuditLogger.__init__).parameters for module in (upstream, logger))
        for name, parameter in theirs.items():
            assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
        assert all(parameter.kind is parameter.KEYWORD_ONLY for name, parameter in ours.items() if name != "self")

    def test_a_logger_has_upstream_s_methods(self):
        for name, theirs in inspect.getmembers(upstream.AuditLogger, inspect.isfunction):
            if not name.startswith("_"):
                ours = getattr(AuditLogger, name)
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
                assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs), name

    def test_an_entry_that_is_not_told_when_it_started_starts_now(self):
        before = datetime.now(UTC)
        assert before <= entry().started_at <= datetime.now(UTC)
        assert entry().metadata is not entry().metadata

    def test_an_entry_of_upstream_s_own_class_is_logged(self, audit_log, recorded):
        audit_log.log(upstream.AuditEntry(action="retain", transport="http", bank_id="bank-1", request={"top_k": 5}))
        with audit_log.log_with_timing(upstream.AuditEntry(action="recall", transport="mcp")) as timed:
            timed.response = {"hits": 3}
        assert [(r.action, r.transport, r.bank_id, r.request, r.response) for r in recorded()] == [
            ("retain", "http", "bank-1", {"top_k": 5}, None),
            ("recall", "mcp", None, None, {"hits": 3}),
        ]


class TestIsEnabled:
    @pytest.mark.parametrize(
        ("enabled", "allowed", "yes", "no"),
        [
            (True, None, ["retain", "anything"], []),
            (True, "*", ["retain", "anything"], []),
            (True, [], [], ["retain", "anything"]),
            (True, ["retain", "recall"], ["retain", "recall"], ["forget", "Retain", "retain2", ""]),
            (True, ("retain.*", "re?all"), ["retain.batch", "recall"], ["retain", "reall"]),
            (True, {"retain"}, ["retain"], ["recall"]),
            (False, None, [], ["retain"]),
            (False, ["retain"], [], ["retain"]),
        ],
    )
    def test_says_what_the_allowlist_says(self, make_logger, enabled, allowed, yes, no):
        audit_log = make_logger(enabled=enabled, allowed_actions=allowed)
        assert [action for action in [*yes, *no] if audit_log.is_enabled(action)] == yes

    def test_is_off_unless_it_is_turned_on(self):
        assert not AuditLogger(pool_getter=lambda: None).is_enabled("retain")

    def test_knows_an_enum_of_strings(self, make_logger):
        action = enum.StrEnum("Action", {"RETAIN": "retain"}).RETAIN
        assert make_logger(allowed_actions=["retain"]).is_enabled(action)

    @pytest.mark.parametrize("action", [None, 5, ["retain"], b"retain"])
    def test_answers_for_what_is_no_action(self, make_logger, action):
        assert make_logger().is_enabled(action) is True
        assert make_logger(allowed_actions=["retain"]).is_enabled(action) is False


class TestARefusedLogger:
    @pytest.mark.parametrize(
        ("arguments", "source"),
        [
            ({"allowed_actions": "retain"}, "allowed_actions"),
            ({"allowed_actions": [""]}, "allowed_actions"),
            ({"allowed_actions": [5]}, "allowed_actions"),
            ({"allowed_actions": 5}, "allowed_actions"),
            ({"enabled": "yes"}, "enabled"),
            ({"table": 'log"; DROP TABLE users; --'}, "table"),
        ],
    )
    def test_names_the_argument(self, make_logger, arguments, source):
        with pytest.raises(ConfigurationError) as refused:
            make_logger(**arguments)
        assert refused.value.source == source


class TestLog:
    def test_becomes_a_record_with_everything_in_the_entry(self, audit_log, recorded):
        audit_log.log(
            AuditEntry(
                action="retain",
                transport="http",
                bank_id="bank-1",
                started_at=STARTED,
                ended_at=ENDED,
                request={"content": TEXT, "tags": ["a", "b"]},
                response={"memory_id": "m-1"},
                metadata={"attempt": 1},
                outcome="failure",
                actor_id="user-7",
                actor_type="user",
            )
        )
        [record] = recorded()
        assert (record.action, record.transport, record.bank_id) == ("retain", "http", "bank-1")
        assert (record.started_at, record.ended_at) == (STARTED, ENDED)
        assert record.request == {"content": {"length": len(TEXT)}, "tags": ["a", "b"]}
        assert (record.response, record.metadata) == ({"memory_id": "m-1"}, {"attempt": 1})
        assert (record.outcome, record.actor_id, record.actor_type) == ("failure", "user-7", "user")

    def test_takes_the_end_to_be_now_and_says_so_on_the_entry(self, audit_log, recorded):
        before, logged = datetime.now(UTC), entry(started_at=STARTED)
        audit_log.log(logged)
        assert before <= logged.ended_at <= datetime.now(UTC)
        assert recorded()[0].ended_at == logged.ended_at

    @pytest.mark.parametrize(
        ("given", "instant"),
        [
            (datetime(2026, 3, 1, 12, 0), datetime(2026, 3, 1, 12, 0, tzinfo=UTC)),
            (datetime(2026, 3, 1, 12, 0, tzinfo=timezone(timedelta(hours=2))), datetime(2026, 3, 1, 10, 0, tzinfo=UTC)),
            (datetime(1969, 7, 20, tzinfo=UTC), datetime(1969, 7, 20, tzinfo=UTC)),
        ],
        ids=["naive is UTC", "with an offset", "before the epoch"],
    )
    def test_keeps_the_entry_s_own_times(self, audit_log, recorded, given, instant):
        audit_log.log(entry(started_at=given, ended_at=given))
        [record] = recorded()
        assert (record.started_at, record.ended_at) == (instant, instant)

    async def test_works_inside_an_event_loop(self, audit_log, recorded):
        audit_log.log(entry())
        assert len(recorded()) == 1

    def test_works_on_any_thread(self, audit_log, recorded):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: audit_log.log(entry(bank_id=f"bank-{number}")), range(100)))
        assert {record.bank_id for record in recorded()} == {f"bank-{number}" for number in range(100)}

    def test_takes_payloads_as_they_are_at_the_call(self, audit_log, recorded):
        logged = entry(request={"tags": ["a"]}, response={"hits": 1}, metadata={"attempt": 1})
        audit_log.log(logged)
        logged.request["tags"].append("b")
        logged.response["hits"] = 99
        logged.metadata.clear()
        logged.bank_id = "bank-2"
        [record] = recorded()
        assert (record.request, record.response, record.metadata) == ({"tags": ["a"]}, {"hits": 1}, {"attempt": 1})
        assert record.bank_id is None

    def test_makes_a_row_of_each_call(self, audit_log, recorded):
        same = entry(started_at=STARTED, ended_at=ENDED)
        audit_log.log(same)
        audit_log.log(same)
        assert len({record.id for record in recorded()}) == 2

    def test_belongs_to_the_trace_that_it_is_called_in(self, audit_log, provider, recorded):
        with audit_operation("reflect", tracer_provider=provider):
            audit_log.log(entry())
        inner, outer = recorded()
        assert (inner.trace_id, inner.parent_span_id) == (outer.trace_id, outer.span_id)

    def test_takes_from_a_scope_what_the_entry_leaves_empty(self, audit_log, recorded):
        with audit_scope(actor_id="user-7", bank_id="bank-1", transport="http"):
            audit_log.log(entry())
            audit_log.log(entry(bank_id="bank-2", actor_id="user-8"))
        assert [(record.actor_id, record.bank_id, record.transport) for record in recorded()] == [
            ("user-7", "bank-1", "bench"),
            ("user-8", "bank-2", "bench"),
        ]

    def test_leaves_nothing_current(self, audit_log, recorded):
        before = get_current_span()
        audit_log.log(entry())
        assert get_current_span() is before

    @pytest.mark.parametrize(
        "arguments", [{"enabled": False}, {"allowed_actions": []}, {"allowed_actions": ["forget"]}]
    )
    def test_does_nothing_where_it_is_not_enabled(self, make_logger, recorded, arguments):
        logged = entry()
        make_logger(**arguments).log(logged)
        assert recorded() == []
        assert logged.ended_at is None

    def test_does_not_ask_for_a_pool_where_it_is_not_enabled(self, make_logger):
        asked = []
        audit_log = make_logger(enabled=False, pool_getter=lambda: asked.append("pool"))
        audit_log.log(entry())
        assert not asked


async def _sync_block(timed: Any, block: Callable[[Any], None]) -> None:
    with timed as given:
        block(given)


async def _async_block(timed: Any, block: Callable[[Any], None]) -> None:
    async with timed as given:
        await asyncio.sleep(0)
        block(given)


@pytest.fixture(params=[_sync_block, _async_block], ids=["with", "async with"])
def run(request: pytest.FixtureRequest) -> Any:
    """Run a block that is timed, in one of the two ways that there are."""
    return request.param


class TestLogWithTiming:
    async def test_gives_the_entry_and_logs_what_the_block_sets_on_it(self, audit_log, recorded, run):
        timed = entry(request={"top_k": 5})

        def block(given):
            assert given is timed
            given.bank_id = "bank-1"
            given.transport = "http"
            given.request["depth"] = 2
            given.response = {"hits": 3}
            given.metadata["attempt"] = 1
            given.actor_id, given.actor_type = "user-7", "user"

        await run(audit_log.log_with_timing(timed), block)
        [record] = recorded()
        assert (record.action, record.transport, record.bank_id) == ("recall", "http", "bank-1")
        assert (record.request, record.response) == ({"top_k": 5, "depth": 2}, {"hits": 3})
        assert (record.metadata, record.outcome) == ({"attempt": 1}, "success")
        assert (record.actor_id, record.actor_type) == ("user-7", "user")

    async def test_times_the_block_on_the_record_and_on_the_entry(self, audit_log, recorded, run):
        timed = entry(started_at=STARTED, ended_at=ENDED)
        inside = []
        before = datetime.now(UTC)
        await run(audit_log.log_with_timing(timed), lambda given: inside.append(datetime.now(UTC)))
        after = datetime.now(UTC)
        assert before <= timed.started_at <= inside[0] <= timed.ended_at <= after
        [record] = recorded()
        assert before <= record.started_at <= inside[0] <= record.ended_at <= after

    async def test_records_an_exception_as_failure_and_lets_it_go_on(self, audit_log, recorded, run):
        error = LookupError(TEXT)

        def block(given):
            given.response = {"hits": 0}
            raise error

        with pytest.raises(LookupError) as caught:
            await run(audit_log.log_with_timing(entry()), block)
        assert caught.value is error
        [record] = recorded()
        assert (record.outcome, record.error_type, record.response) == ("failure", "LookupError", {"hits": 0})
        assert TEXT not in repr(record)

    async def test_leaves_an_outcome_that_the_block_sets(self, audit_log, recorded, run):
        def block(given):
            given.outcome = "failure"

        await run(audit_log.log_with_timing(entry()), block)
        assert [(record.outcome, record.error_type) for record in recorded()] == [("failure", None)]

    async def test_records_a_cancellation_as_failure(self, audit_log, recorded):
        entered = asyncio.Event()

        async def work():
            async with audit_log.log_with_timing(entry()):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [record.error_type for record in recorded()] == ["asyncio.exceptions.CancelledError"]

    async def test_is_the_parent_of_what_the_block_does_and_current_only_there(self, audit_log, recorded, run):
        before = get_current_span()
        await run(audit_log.log_with_timing(entry()), lambda given: audit_log.log(entry(action="rank")))
        assert get_current_span() is before
        inner, outer = recorded()
        assert (inner.action, inner.parent_span_id) == ("rank", outer.span_id)

    async def test_times_and_records_nothing_where_it_is_not_enabled(self, make_logger, recorded, run):
        timed = entry(started_at=STARTED)
        await run(make_logger(enabled=False).log_with_timing(timed), lambda given: None)
        assert recorded() == []
        assert STARTED < timed.started_at <= timed.ended_at, "the entry itself is timed, as upstream"


class TestTheSchema:
    def test_is_the_one_that_the_getter_gives_at_the_call(self, make_logger, recorded):
        tenants: Iterator[str] = iter(["tenant_a", "Tenant_A"])
        audit_log = make_logger(schema_getter=lambda: next(tenants))
        audit_log.log(entry())
        with audit_log.log_with_timing(entry()):
            pass
        assert [record.schema for record in recorded()] == ["tenant_a", "Tenant_A"]

    def test_is_the_scope_s_where_there_is_no_getter(self, audit_log, recorded):
        with audit_scope(schema="tenant_a"):
            audit_log.log(entry())
        assert [record.schema for record in recorded()] == ["tenant_a"]

    def test_is_the_default_where_the_getter_fails(self, make_logger, recorded, caplog):
        def fails():
            raise LookupError(TEXT)

        make_logger(schema_getter=fails).log(entry())
        assert [record.schema for record in recorded()] == [None]
        assert "schema_getter failed (LookupError)" in caplog.text
        assert TEXT not in caplog.text


class _Frozen:
    """An entry of which nothing can be read or set."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(TEXT)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError(TEXT)


class TestWrongTypes:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"action": None},
            {"action": ["recall"]},
            {"transport": 5},
            {"transport": None},
            {"bank_id": UUID(int=7)},
            {"bank_id": object()},
            {"started_at": "yesterday"},
            {"started_at": None},
            {"ended_at": 5.0},
            {"request": TEXT},
            {"request": [1, 2]},
            {"response": object()},
            {"metadata": None},
            {"metadata": 5},
            {"metadata": [TEXT]},
            {"outcome": ["failure"]},
            {"actor_id": 7},
        ],
        ids=lambda wrong: "-".join(f"{name}-{type(value).__name__}" for name, value in wrong.items()),
    )
    def test_in_an_entry_neither_raise_nor_lose_the_row(self, audit_log, recorded, wrong):
        audit_log.log(entry(**wrong))
        with audit_log.log_with_timing(entry(**wrong)) as timed:
            timed.response = {"hits": 3}
        action = "unknown" if "action" in wrong else "recall"
        assert [record.action for record in recorded()] == [action, action]
        assert TEXT not in repr(recorded())

    @pytest.mark.parametrize("make", [lambda: None, str, int, _Frozen], ids=["none", "string", "number", "frozen"])
    def test_in_place_of_an_entry_warn_and_let_the_block_run(self, audit_log, recorded, caplog, make):
        wrong, ran = make(), False
        audit_log.log(wrong)
        with audit_log.log_with_timing(wrong) as given:
            assert given is wrong
            ran = True
        assert ran
        assert "An audit entry could not be logged" in caplog.text
        assert TEXT not in caplog.text

    def test_do_not_replace_the_block_s_own_exception(self, audit_log, recorded):
        with pytest.raises(LookupError), audit_log.log_with_timing(_Frozen()):
            raise LookupError


class TestThePool:
    def test_is_not_asked_for_where_a_pipeline_is_registered(self, make_logger, recorded):
        asked = []
        make_logger(pool_getter=lambda: asked.append("pool")).log(entry())
        assert len(recorded()) == 1
        assert not asked

    def test_that_can_t_be_got_is_asked_for_again(self, make_logger, caplog):
        asked = []

        def fails():
            asked.append("pool")
            raise LookupError(TEXT)

        audit_log = make_logger(pool_getter=fails)
        for _ in range(3):
            audit_log.log(entry())
        assert len(asked) == 3
        assert "pool_getter failed (LookupError)" in caplog.text
        assert TEXT not in caplog.text

    def test_is_asked_for_without_a_lock_of_ours(self, make_logger):
        inside, go_on = threading.Event(), threading.Event()

        def waits():
            inside.set()
            go_on.wait(30)

        waiting = threading.Thread(target=make_logger(pool_getter=waits).log, args=[entry()])
        waiting.start()
        assert inside.wait(30)
        another = threading.Thread(target=make_logger().log, args=[entry()])
        another.start()
        another.join(10)
        held_up = another.is_alive()
        go_on.set()
        waiting.join()
        another.join()
        assert not held_up

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_is_asked_for_in_a_child_that_was_forked_during_a_set_up(self):
        program = """
import os, signal, threading
from opentelemetry.sdk.trace import TracerProvider
from astrocyte_otel_audit import AuditEntry, AuditLogger
from psycopg_pool import ConnectionPool

class Slow(TracerProvider):
    def get_tracer(self, *arguments, **named):  # the set-up asks for one, to put its sampler there
        inside.set()
        go_on.wait()
        return super().get_tracer(*arguments, **named)

def log(provider, pool):
    logger = AuditLogger(pool_getter=lambda: pool, enabled=True, tracer_provider=provider)
    logger.log(AuditEntry(action="recall", transport="http"))

inside, go_on = threading.Event(), threading.Event()
pool = ConnectionPool("postgresql://127.0.0.1:1/none", open=False)
thread = threading.Thread(target=log, args=[Slow(shutdown_on_exit=False), pool])
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    log(TracerProvider(shutdown_on_exit=False), pool)
    os._exit(0)
_, status = os.waitpid(child, 0)
go_on.set()
thread.join()
print(status)
os._exit(0)
"""
        finished = subprocess.run(
            # Python 3.12 warns of every fork beside a thread, which is what is tested.
            [sys.executable, "-u", "-W", "ignore::DeprecationWarning", "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert finished.stdout == "0\n", finished.stderr

    def test_is_not_needed_for_a_provider_that_records_nothing(self):
        audit_log = AuditLogger(pool_getter=lambda: None, enabled=True, tracer_provider=NoOpTracerProvider())
        audit_log.log(entry())
        with audit_log.log_with_timing(entry()) as timed:
            timed.response = {"hits": 3}
        assert timed.ended_at is not None


class TestAPipelineThatIsThereAlready:
    @pytest.fixture
    def log_once_warned(self, make_logger, caplog):
        """Log three entries, and return the warnings."""

        def log(**arguments):
            audit_log = make_logger(**arguments)
            for action in ("retain", "recall", "forget"):
                audit_log.log(entry(action=action))
            return [record.getMessage() for record in caplog.records]

        return log

    @pytest.mark.parametrize(
        ("pipeline", "logger"),
        [("*", None), ("*", ["retain", "re*"]), (["re*"], ["retain", "recall"]), (["retain"], ["retain"]), (["a"], [])],
    )
    def test_is_used_silently_where_it_allows_all_that_the_logger_does(
        self, audit, storage, log_once_warned, pipeline, logger
    ):
        audit(storage=storage, actions=pipeline)
        assert log_once_warned(allowed_actions=logger) == []

    @pytest.mark.parametrize(
        ("pipeline", "logger", "missed"),
        [
            (["retain"], ["retain", "forget"], "['forget']"),
            (["retain"], None, "['*']"),
            (["recall"], ["re*"], "['re*']"),
        ],
    )
    def test_is_warned_of_once_where_it_allows_less(self, audit, storage, log_once_warned, pipeline, logger, missed):
        audit(storage=storage, actions=pipeline)
        [warning] = log_once_warned(allowed_actions=logger)
        assert f"it does not write the actions {missed}, as it allows {pipeline}" in warning
        assert "Give both the same settings" in warning

    def test_is_warned_of_once_where_it_has_another_table(self, audit, log_once_warned):
        dsn = "postgresql://127.0.0.1:1/none"
        audit(dsn=dsn, table="memory_audit", export_timeout_millis=1.0, schedule_delay_millis=3_600_000.0)
        [warning] = [message for message in log_once_warned() if "AuditLogger" in message]
        assert "it writes to the table 'memory_audit', and not to 'astrocyte_audit_log'" in warning
        assert "the actions" not in warning

    def test_may_be_one_of_several(self, audit, log_once_warned):
        audit(storage=MemoryStorage(), actions=["retain"])
        audit(storage=MemoryStorage(), actions=["recall", "forget"])
        assert log_once_warned(allowed_actions=["retain", "recall", "forget"]) == []


class TestRetention:
    @pytest.fixture
    def sweepers(self, monkeypatch):
        """The connection strings by which somebody asked to delete. Nothing is there to be deleted from."""
        asked = []
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_EXPORT_TIMEOUT_MILLIS", "50")  # what is logged goes nowhere
        sweeper = AuditSpanExporter(dsn=NOWHERE).sweeper()
        monkeypatch.setattr(AuditSpanExporter, "sweeper", lambda self, dsn=None: asked.append(dsn) or sweeper)
        return asked

    async def test_can_be_started_and_stopped_in_any_order_as_upstream(self, audit_log):
        await audit_log.stop_retention_sweep()
        audit_log.start_retention_sweep()
        audit_log.start_retention_sweep()
        await audit_log.stop_retention_sweep()

    async def test_is_the_pipeline_s_started_and_stopped(self, make_logger, audit, storage, sweepers):
        processor = audit(storage=storage)
        audit_log = make_logger(retention_days=30)
        assert processor.retention is None
        audit_log.start_retention_sweep()
        audit_log.start_retention_sweep()
        task = processor.retention
        assert (task.policy, task.is_started) == (RetentionPolicy(days=30), True)
        await audit_log.stop_retention_sweep()
        await audit_log.stop_retention_sweep()
        assert not task.is_started
        audit_log.start_retention_sweep()
        assert processor.retention is task
        assert task.is_started
        assert len(sweepers) == 1

    @pytest.mark.parametrize("days", [-1, 0, -30])
    async def test_of_no_days_keeps_everything_for_ever(self, make_logger, audit, storage, days):
        processor = audit(storage=storage, retention=30, retention_dsn=NOWHERE)
        audit_log = make_logger(retention_days=days)
        audit_log.start_retention_sweep()
        await audit_log.stop_retention_sweep()
        assert processor.retention.is_started  # which is somebody else's

    async def test_is_started_by_the_first_entry_once_the_pool_is_there(self, make_logger, provider, sweepers):
        pools = []
        audit_log = make_logger(pool_getter=lambda: pools[0] if pools else None, retention_days=30)
        audit_log.start_retention_sweep()
        assert attached_to(provider) == []
        pools.append(ConnectionPool(NOWHERE, open=False))
        audit_log.log(entry())
        [processor] = attached_to(provider)
        assert processor.retention.is_started

    @pytest.mark.parametrize("how", ["log", "log_with_timing"])
    async def test_does_not_depend_on_what_is_enabled(self, make_logger, provider, sweepers, how):
        pools = []
        audit_log = make_logger(pool_getter=lambda: pools[0] if pools else None, retention_days=30, enabled=False)
        audit_log.start_retention_sweep()
        pools.append(ConnectionPool(NOWHERE, open=False))
        if how == "log":
            audit_log.log(entry())
        else:
            with audit_log.log_with_timing(entry()):
                pass
        [processor] = attached_to(provider)
        assert processor.retention.is_started
        assert processor.exporter.selection.allowlist.actions == ()
        assert processor.stats()["accepted"] == 0

    async def test_that_was_stopped_before_there_was_a_pipeline_is_not_started(self, make_logger, provider, sweepers):
        pools = []
        audit_log = make_logger(pool_getter=lambda: pools[0] if pools else None, retention_days=30)
        audit_log.start_retention_sweep()
        await audit_log.stop_retention_sweep()
        pools.append(ConnectionPool(NOWHERE, open=False))
        audit_log.log(entry())
        [processor] = attached_to(provider)
        assert processor.retention is None

    async def test_of_a_pipeline_that_has_another_is_left_as_it_is_and_said(self, make_logger, audit, storage, caplog):
        processor = audit(storage=storage, retention=60, retention_dsn=NOWHERE)
        make_logger(retention_days=30).start_retention_sweep()
        assert processor.retention.policy.days == 60
        assert "retention_days of this AuditLogger have no effect" in caplog.text

    async def test_of_a_pipeline_that_has_the_same_needs_no_word(self, make_logger, audit, storage, caplog):
        audit(storage=storage, retention=30, retention_dsn=NOWHERE)
        make_logger(retention_days=30).start_retention_sweep()
        assert "no effect" not in caplog.text

    async def test_of_a_pipeline_without_a_database_is_an_error_in_the_log(self, make_logger, audit, storage, caplog):
        processor = audit(storage=storage)
        make_logger(retention_days=30).start_retention_sweep()
        assert processor.retention is None
        assert "No audit record will be deleted: retention_dsn: no database to delete from" in caplog.text

    async def test_stopping_it_does_not_hold_up_the_event_loop(self, make_logger, audit, storage, monkeypatch):
        processor = audit(storage=storage, retention=30, retention_dsn=NOWHERE)
        audit_log = make_logger(retention_days=30)
        audit_log.start_retention_sweep()
        released = threading.Event()
        monkeypatch.setattr(processor.retention, "stop", lambda: released.wait(20))
        stopping = asyncio.create_task(audit_log.stop_retention_sweep())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        released.set()
        await stopping
        monkeypatch.undo()

    @pytest.mark.parametrize("days", [None, "30", 3.0, True])
    def test_of_what_is_no_number_is_refused_at_construction(self, make_logger, days):
        with pytest.raises(ConfigurationError, match=r"^retention_days: got "):
            make_logger(retention_days=days)

    def test_under_the_environment_s_floor_is_refused_at_construction(self, make_logger, monkeypatch):
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_MINIMUM_DAYS", "hipaa")
        with pytest.raises(ConfigurationError, match=r"^retention_days: got 30; accepted is 2192 days or more"):
            make_logger(retention_days=30)


@pytest.mark.usefixtures("fresh_default")
class TestTheDefaultLogger:
    def test_does_nothing_until_another_is_set(self):
        default, logged = get_default_audit_logger(), entry()
        assert get_default_audit_logger() is default
        assert not default.is_enabled("retain")
        default.log(logged)
        assert logged.ended_at is None
        with default.log_with_timing(entry()):
            assert not get_current_span().is_recording()

    def test_is_the_one_that_was_set(self, audit_log, recorded):
        set_default_audit_logger(audit_log)
        assert get_default_audit_logger() is audit_log
        get_default_audit_logger().log(entry())
        assert len(recorded()) == 1
