"""`astrocyte_otel_audit.testing`: what users test their own audit with, and that it leaves nothing behind."""

import asyncio
import gc
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from astrocyte_otel_audit import (
    AuditEntry,
    AuditLogger,
    ConfigurationError,
    Normalizer,
    SpanMapping,
    audit_operation,
    audit_scope,
    audited,
    configure_audit,
    testing,
)
from astrocyte_otel_audit.emit import operation as emitted
from astrocyte_otel_audit.testing import AuditLog, InMemoryAuditTable, record_audit
from tests.support import MemoryStorage

#: As of a library: it looks up its provider once, when it makes its first span.
_library = trace.get_tracer("library")


@pytest.fixture
def log():
    with record_audit() as log:
        yield log


@audited("recall", transport="http")
def recall(query, bank_id, top_k=10):
    return {"hits": ["m-1"]}


@audited("forget", required=True)
def forget(memory_id, bank_id):
    raise PermissionError("Calvin's memories are on legal hold")


class TestRecords:
    def test_are_those_of_a_decorated_function(self, log):
        recall("What does Calvin like?", "user-calvin")
        [record] = log.records
        assert (record.action, record.bank_id, record.outcome, record.transport) == (
            "recall",
            "user-calvin",
            "success",
            "http",
        )
        assert (record.request, record.response) == ({"query": {"length": 22}, "top_k": 10}, {"hits": ["m-1"]})
        assert record.schema == "public"
        assert record.recorded_at >= record.ended_at

    def test_are_in_the_order_in_which_operations_ended(self, log):
        with audit_operation("consolidate"):
            recall("q", "b")
            recall("q", "c")
        assert [(record.action, record.bank_id) for record in log.records] == [
            ("recall", "b"),
            ("recall", "c"),
            ("consolidate", None),
        ]

    def test_are_those_of_other_threads_too(self, log):
        threads = [threading.Thread(target=recall, args=("q", f"bank-{number}")) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(record.bank_id for record in log.records) == [f"bank-{number}" for number in range(8)]

    def test_are_those_of_spans_by_the_plain_api(self, log):
        with trace.get_tracer("any").start_as_current_span("recall", attributes={"audit.action": "recall"}):
            pass
        log.one("recall", outcome="unknown")

    def test_are_those_of_a_tracer_that_was_there_before_any_provider(self, log):
        @_library.start_as_current_span("classify", attributes={"audit.action": "classify"})
        def classify():
            pass

        classify()
        log.one("classify")

    def test_are_those_of_an_imperative_logger(self, log):
        async def main():
            entry = AuditEntry(action="recall", transport="mcp", bank_id="b")
            async with AuditLogger(pool_getter=lambda: None, enabled=True).log_with_timing(entry):
                pass

        asyncio.run(main())
        log.one("recall", transport="mcp")

    def test_of_a_required_operation_are_kept(self, log):
        with pytest.raises(PermissionError):
            forget("m-1", "user-calvin")
        assert log.one("forget", outcome="failure").error_type == "PermissionError"

    def test_are_still_there_when_the_application_has_shut_its_provider_down(self, log):
        recall("q", "b")
        trace.get_tracer_provider().shutdown()
        log.one("recall")

    def test_are_forgotten_on_request(self, log):
        recall("q", "b")
        assert log.records
        log.clear()
        assert log.records == []

    def test_can_be_searched(self, log):
        recall("q", "b")
        recall("q", "c")
        assert [record.bank_id for record in log.table.search(action="recall").records] == ["c", "b"]

    def test_say_that_one_is_missing(self, log):
        trace.get_tracer_provider().shutdown()
        recall("q", "b")
        with pytest.raises(AssertionError, match=r"was recorded: {'refused_shutdown': 1}$"):
            log.records  # noqa: B018 - a property that looks


class TestWhatIsRecorded:
    def test_is_what_is_allowed(self):
        with record_audit(actions=["re*"]) as log:
            recall("q", "b")
            with audit_operation("classify"):
                pass
        assert [record.action for record in log.records] == ["recall"]

    def test_is_what_is_mapped(self):
        mapping = SpanMapping(span_name="memory.{action}", scope="library")
        with record_audit(mappings=[mapping]) as log, _library.start_as_current_span("memory.retain"):
            pass
        log.one("retain", outcome="success")

    def test_is_what_is_switched_on(self):
        with record_audit(enabled_for=lambda action, bank_id: bank_id != "private") as log:
            recall("q", "private")
            recall("q", "b")
        assert [record.bank_id for record in log.records] == ["b"]

    def test_goes_to_its_tenant(self):
        with record_audit(schema=lambda: "tenant_a") as log:
            recall("q", "b")
            with audit_scope(schema="Tenant_B"):
                recall("q", "b")
        assert [record.schema for record in log.records] == ["tenant_a", "Tenant_B"]
        assert log.table.search().records == []
        assert len(log.table.search(schema="Tenant_B").records) == 1

    def test_is_normalized_as_asked(self):
        with record_audit(normalizer=Normalizer(drop=["query"])) as log:
            recall("q", "b")
        log.one("recall", request={"top_k": 10})

    def test_does_not_depend_on_the_environment(self, monkeypatch):
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        for name, value in {
            "ACTIONS": "nothing",
            "WRITER": "external",
            "RETENTION_DAYS": "3",
            "SPOOL_DIR": "off",
        }.items():
            monkeypatch.setenv(f"OTEL_ASTROCYTE_AUDIT_{name}", value)
        with record_audit() as log:
            recall("q", "b")
        log.one("recall", sampled=True)
        assert os.environ["OTEL_SDK_DISABLED"] == "true"

    def test_can_be_that_of_a_provider_of_ones_own(self, provider, audit):
        log = AuditLog(audit(storage=InMemoryAuditTable(), spool_dir=False))
        with log.expect("recall"), provider.get_tracer("any").start_as_current_span("x") as span:
            span.set_attribute("audit.action", "recall")

    def test_must_go_into_memory(self, audit):
        with pytest.raises(ConfigurationError, match=r"^processor: its storage is a MemoryStorage"):
            AuditLog(audit(storage=MemoryStorage()))


class TestAnAssertion:
    def test_gives_the_one_record(self, log):
        recall("q", "b")
        recall("q", "c")
        assert log.one("recall", bank_id="c").bank_id == log.one(bank_id="c").bank_id == "c"
        assert log.one(bank_id="b", request={"query": {"length": 1}, "top_k": 10}, error_type=None)

    def test_that_finds_none_shows_what_was_recorded(self, log):
        recall("What does Calvin like?", "user-calvin")
        with pytest.raises(PermissionError):
            forget("m-1", "user-calvin")
        with pytest.raises(AssertionError) as raised:
            log.one("recall", bank_id="user-susie", parent_span_id=None)
        assert str(raised.value) == (
            "expected one record with action='recall', bank_id='user-susie', parent_span_id=None, found none\n"
            "recorded were 2:\n"
            "  recall: bank_id='user-calvin', outcome='success', transport='http', "
            "request={'top_k': 10, 'query': {'length': 22}}, response={'hits': ['m-1']}, parent_span_id=None\n"
            "  forget: bank_id='user-calvin', outcome='failure', error_type='PermissionError', transport='unknown', "
            "request={'memory_id': 'm-1'}, parent_span_id=None"
        )

    def test_that_finds_several_shows_them(self, log):
        recall("q", "b")
        recall("q", "c")
        with pytest.raises(AssertionError, match=r"found 2\nrecorded were 2:\n  recall: bank_id='b'.*\n.*bank_id='c'"):
            log.one("recall")

    def test_shows_no_more_than_a_person_reads(self, log):
        for number in range(23):
            with audit_operation("recall", bank_id=f"bank-{number}", transport="http", request={"top_k": 3}):
                pass
        with pytest.raises(AssertionError) as raised:
            log.one("retain")
        assert str(raised.value).splitlines()[-2:] == [
            "  recall: bank_id='bank-19', outcome='success', transport='http', request={'top_k': 3}",
            "  and 3 more",
        ]

    def test_that_finds_nothing_says_so(self, log):
        with pytest.raises(AssertionError, match=r"^expected one record, found none\nnothing was recorded$"):
            log.one()

    def test_of_none_passes_where_there_is_none(self, log):
        log.none()
        recall("q", "b")
        log.none("retain")
        log.none("recall", bank_id="c")

    def test_of_none_shows_what_there_is(self, log):
        recall("q", "b")
        with pytest.raises(
            AssertionError, match=r"expected no record with action='recall', found 1\nrecorded was 1:\n"
        ):
            log.none("recall")
        with pytest.raises(AssertionError, match=r"expected no record, found 1\n"):
            log.none()

    @pytest.mark.parametrize("method", ["one", "none", "expect"])
    def test_knows_its_columns(self, log, method):
        with pytest.raises(TypeError, match=r"^bank, who: no column of a record; accepted are id, action, transport"):
            getattr(log, method)("recall", who="calvin", bank="b")

    def test_can_name_every_column(self, log):
        recall("q", "b")
        [record] = log.records
        columns = record._asdict()
        assert set(testing.Columns.__annotations__) == set(columns) - {"action"}
        assert log.one(**columns) is record


class TestAnExpectation:
    def test_gives_what_its_block_has_left(self, log):
        recall("q", "b")
        with log.expect("recall", outcome="success", bank_id="b") as expected:
            recall("q", "b", top_k=3)
        assert expected.record.request["top_k"] == 3

    async def test_is_for_async_blocks_too(self, log):
        @audited("reflect")
        async def reflect(query, bank_id):
            await asyncio.sleep(0)
            raise TimeoutError

        async with log.expect("reflect", outcome="failure", bank_id="user-calvin") as expected:
            with pytest.raises(TimeoutError):
                await reflect("q", "user-calvin")
        assert expected.record.error_type == "TimeoutError"

    def test_shows_what_the_block_has_left_instead(self, log):
        recall("q", "b")
        with (
            pytest.raises(AssertionError, match=r"found none\nrecorded was 1:\n  recall: bank_id='c'"),
            log.expect("recall", bank_id="b"),
        ):
            recall("q", "c")

    def test_hides_no_exception(self, log):
        expectation = log.expect("retain")
        with pytest.raises(PermissionError), expectation:
            forget("m-1", "b")
        with pytest.raises(AssertionError, match="once its block has ended"):
            expectation.record  # noqa: B018 - a property that looks


class TestNothingIsLeft:
    def test_of_provider_tracer_normalizer_or_thread(self):
        def state():
            tracer = type(emitted._tracer)
            return trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE, tracer, emitted._default_normalizer

        before, threads = state(), set(threading.enumerate())  # other tests may have left some of the same name
        with record_audit(normalizer=Normalizer(strict=True)) as log:
            during = state()
            recall("q", "b")
            assert set(threading.enumerate()) - threads
        assert all(a != b for a, b in zip(before, during, strict=True))
        assert state() == before
        assert not set(threading.enumerate()) - threads
        recall("q", "c")
        assert [record.bank_id for record in log.records] == ["b"]

    def test_of_the_processor_or_the_table(self):
        with record_audit() as log:
            recall("q", "b")
            with _library.start_as_current_span("x"):
                pass
            left = [weakref.ref(log.table), weakref.ref(trace.get_tracer_provider())]
        del log
        gc.collect()
        assert [reference() for reference in left] == [None, None]

    def test_on_the_disk(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with record_audit():
            recall("q", "b")
            assert list(tmp_path.iterdir()) != []
        assert list(tmp_path.iterdir()) == []

    def test_where_the_arguments_are_wrong(self):
        before = trace._TRACER_PROVIDER
        threads = threading.active_count()
        with pytest.raises(ConfigurationError, match="mappings"), record_audit(mappings=["no such"]):
            pass
        assert trace._TRACER_PROVIDER is before
        assert threading.active_count() == threads

    def test_where_the_test_fails(self):
        before = trace._TRACER_PROVIDER
        with suppress(ZeroDivisionError), record_audit():
            1 / 0  # noqa: B018
        assert trace._TRACER_PROVIDER is before

    def test_of_an_application_that_sets_its_own_telemetry_up(self, caplog):
        for bank in ("b", "c"):
            with record_audit() as log:
                with caplog.at_level(logging.ERROR):
                    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
                own = configure_audit(storage=InMemoryAuditTable(), actions=["recall"], spool_dir=False)
                recall("q", bank)
                assert [record.bank_id for record in log.records] == [bank]
                assert own.force_flush()
                assert [record.bank_id for record in own.exporter.storage.records] == [bank]

    def test_of_an_inner_recording_in_an_outer_one(self):
        with record_audit() as outer:
            recall("q", "b")
            with record_audit() as inner:
                recall("q", "c")
            recall("q", "d")
        assert [record.bank_id for record in outer.records] == ["b", "d"]
        assert [record.bank_id for record in inner.records] == ["c"]

    def test_of_a_library_s_tracer(self):
        for _ in range(2):
            with record_audit() as log, _library.start_as_current_span("x", attributes={"audit.action": "recall"}):
                pass
            log.one("recall")
        assert not _library.start_span("x").is_recording()


def run(*arguments, directory, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=directory,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_global_provider_that_was_set_before_is_there_again_and_is_left_alone(tmp_path):
    code = """
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        sampler, tracer = provider.sampler, trace.get_tracer("app")

        from astrocyte_otel_audit import audited
        from astrocyte_otel_audit.testing import record_audit

        @audited("recall")
        def recall(bank_id):
            return 3

        recall("a")
        with record_audit() as log:
            late = trace.get_tracer("late")
            with tracer.start_as_current_span("request"):
                recall("b")
            late.start_span("late").end()
        recall("c")
        late.start_span("later").end()
        assert trace.get_tracer_provider() is provider
        assert provider.sampler is sampler
        [record] = log.records
        names = [span.name for span in exporter.get_finished_spans()]
        assert names == ["audit recall", "request", "audit recall", "later"], names
        request = exporter.get_finished_spans()[1]
        assert (record.bank_id, record.parent_span_id) == ("b", f"{request.context.span_id:016x}")
    """
    finished = run("-c", textwrap.dedent(code), directory=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")


EXAMPLES = """
import sys

import pytest

from astrocyte_otel_audit import Normalizer, audited

@audited("recall")
async def recall(query, bank_id):
    return 3

def test_that_needs_no_log():
    assert "opentelemetry.sdk" not in sys.modules
    assert "psycopg" not in sys.modules

async def test_async(audit_log):
    async with audit_log.expect("recall", bank_id="user-calvin", outcome="success"):
        await recall("q", "user-calvin")

@pytest.mark.audit_log(actions=["retain"])
async def test_allowlist(audit_log):
    await recall("q", "user-calvin")
    audit_log.none()

@pytest.mark.audit_log(normalizer=Normalizer(keep=["recall:query"]))
class TestMarkedClass:
    async def test_keeps(self, audit_log):
        await recall("q", "user-calvin")
        assert audit_log.one("recall").request == {"query": "q"}

    @pytest.mark.audit_log
    async def test_closest_marker_wins(self, audit_log):
        await recall("q", "user-calvin")
        assert audit_log.one("recall").request == {"query": {"length": 1}}

async def test_fails(audit_log):
    await recall("q", "user-calvin")
    audit_log.one("recall", bank_id="user-susie")

@pytest.mark.audit_log(["retain"])
def test_wrong_marker(audit_log):
    pass
"""


@pytest.fixture
def installed(tmp_path):
    """Directory of a project where pytest finds the plugin by its entry point."""
    (tmp_path / "plugin-1.dist-info").mkdir()
    (tmp_path / "plugin-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text(
        "[pytest11]\nastrocyte_audit = astrocyte_otel_audit.testing.plugin\n"
    )
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "addopts = --strict-markers -p no:cacheprovider\n"
    )
    return tmp_path


def pytest_in(directory, *arguments):
    return run("-m", "pytest", "-q", *arguments, directory=directory, PYTHONPATH=str(directory))


def test_the_fixture_is_there_without_an_import_and_costs_nothing_where_it_is_not_used(installed):
    finished = pytest_in(installed)
    assert "5 passed, 1 failed, 1 error" in finished.stdout.replace("1 failed, 5 passed", "5 passed, 1 failed")
    assert "expected one record with action='recall', bank_id='user-susie', found none" in finished.stdout
    assert "the marker audit_log takes arguments by name only" in finished.stdout


def test_the_plugin_can_be_blocked(installed):
    finished = pytest_in(installed, "-p", "no:astrocyte_audit", "-o", "markers=audit_log", "-k", "async")
    assert "fixture 'audit_log' not found" in finished.stdout
    assert finished.returncode == 1


def test_the_plugin_itself_loads_nothing(tmp_path):
    code = "import sys, astrocyte_otel_audit.testing.plugin as plugin; print(*sorted(sys.modules))"
    loaded = run("-c", code, directory=tmp_path).stdout.split()
    ours = [name for name in loaded if name.startswith("astrocyte_otel_audit")]
    assert ours == [
        "astrocyte_otel_audit",
        "astrocyte_otel_audit._version",
        "astrocyte_otel_audit.testing",
        "astrocyte_otel_audit.testing.plugin",
    ]
    assert not [name for name in loaded if name.partition(".")[0] in ("opentelemetry", "psycopg", "orjson")]


def test_the_public_names_are_there_sorted_and_no_others():
    assert testing.__all__ == sorted(testing.__all__)
    assert all(getattr(testing, name).__doc__ for name in testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        testing.no_such_name  # noqa: B018


def test_the_examples_pass(tmp_path):
    root = Path(__file__).parents[2]
    examples = sorted((root / "examples" / "testing").glob("test_*.py"))
    assert examples
    document = (root / "docs" / "testing.md").read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document, re.DOTALL)):
        examples.append(tmp_path / f"test_{number}.py")
        examples[-1].write_text(code if "def test_" in code else "def test():\n" + textwrap.indent(code, "    "))
    assert len(examples) == 4
    finished = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path),
        "-p", "astrocyte_otel_audit.testing.plugin", "-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto",
        "-o", "asyncio_default_fixture_loop_scope=function", *map(str, examples),
        directory=tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "8 passed" in finished.stdout


def test_the_assertion_of_the_document_reads_so(log):
    document = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```text\nAssertionError: (.*?)\n```", document, re.DOTALL)
    with audit_operation(
        "recall", bank_id="user-calvin", actor_id="calvin", request={"query": "What does Calvin like?"}
    ) as operation:
        operation.response = {"hits": ["m-1"]}
    with pytest.raises(AssertionError) as raised:
        log.one("recall", bank_id="user-susie")
    assert str(raised.value) == shown


def test_the_document_names_what_there_is():
    document = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    assert [name for name in dir(AuditLog) if not name.startswith("_") and f"| `{name}" not in document] == []
    arguments = inspect.signature(record_audit).parameters
    assert [name for name in arguments if f"`{name}`" not in document] == []
