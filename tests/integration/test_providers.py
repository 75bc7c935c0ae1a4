"""Providers that others make: each vendor's real SDK exports as before, and the rows are there at any sampling rate."""

import gzip
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from tests.servers import new_database

EXAMPLES = Path(__file__).parents[2] / "examples" / "providers"

#: How each vendor's provider is made, what its spans are made by, and whether it exports spans of other scopes.
VENDORS = {
    "logfire": (
        """
        import logfire
        logfire.configure(service_name="memory", send_to_logfire=False, console=False)
        """,
        "with logfire.span('of the vendor'): pass",
        True,
    ),
    "phoenix": (
        """
        from phoenix.otel import register
        register(project_name="memory", protocol="http/protobuf", batch=True, verbose=False)
        """,
        "trace.get_tracer('of the vendor').start_span('of the vendor').end()",
        True,
    ),
    "langfuse": (
        """
        from langfuse import Langfuse
        langfuse = Langfuse()
        """,
        "with langfuse.start_as_current_observation(name='of the vendor'): pass",
        False,
    ),
    "traceloop": (
        """
        from traceloop.sdk import Traceloop
        from traceloop.sdk.decorators import task
        Traceloop.init(app_name="memory", telemetry_enabled=False)
        """,
        "task(name='of the vendor')(lambda: None)()",
        True,
    ),
}


def needs(vendor):
    return pytest.param(
        vendor, marks=pytest.mark.skipif(find_spec(vendor) is None, reason=f"no {vendor} is installed here")
    )


vendors = pytest.mark.parametrize("vendor", [needs(vendor) for vendor in VENDORS])
rates = pytest.mark.parametrize("sampled", [True, False], ids=["100 %", "0 %"])


class Receiver(ThreadingHTTPServer):
    """Takes traces by OTLP over HTTP on any path, and keeps the names of their spans."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Taker)
        self.bodies = []

    @property
    def names(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        resources = [each for body in self.bodies for each in ExportTraceServiceRequest.FromString(body).resource_spans]
        return [span.name.split(".")[0] for each in resources for scope in each.scope_spans for span in scope.spans]


class _Taker(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/traces"):
            self.server.bodies.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def receiver():
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(database, tmp_path):
    def run(program, url="http://127.0.0.1:1", *, sampled=True, instrumented=False):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "LANGFUSE_"))}
        environment = {
            **kept,
            "HOME": str(tmp_path),
            "OTEL_ASTROCYTE_AUDIT_DSN": database,
            "OTEL_ASTROCYTE_AUDIT_ACTIONS": "re*",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "PHOENIX_COLLECTOR_ENDPOINT": url,
            "LANGFUSE_BASE_URL": url,
            "LANGFUSE_PUBLIC_KEY": "pk",
            "LANGFUSE_SECRET_KEY": "sk",
            "LANGFUSE_SAMPLE_RATE": "1" if sampled else "0",
            "TRACELOOP_BASE_URL": url,
            "OTEL_TRACES_SAMPLER": "always_on" if sampled else "always_off",
            "OTEL_PYTHON_CONFIGURATOR": "none",  # no provider before the application's own
        }
        if isinstance(program, str):
            text, program = textwrap.dedent(program), tmp_path / "program.py"
            program.write_text(text)
        runner = [str(Path(sys.executable).with_name("opentelemetry-instrument"))] if instrumented else []
        command = [*runner, sys.executable, str(program)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return run


def rows(database, columns, table="astrocyte_audit_log"):
    with psycopg.connect(database) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY started_at").fetchall()


PROGRAM = """
{made}
from opentelemetry import trace
from astrocyte_otel_audit import SpanMapping, audited, configure_audit

@audited("recall")
def recall(): ...

library = trace.get_tracer("memory", "1.2")

def work():
    recall()
    library.start_span("memory.retain").end()
    {emits}

work()
mapping = SpanMapping(span_name="memory.{{action}}")
processor = configure_audit(actions="*", mappings=[mapping])
assert configure_audit(actions="*", mappings=[mapping]) is processor
work()
trace.get_tracer_provider().shutdown()
assert processor.force_flush()
"""


@vendors
@rates
def test_a_vendors_provider_that_is_in_use_is_audited_and_exports_as_before(vendor, sampled, run, receiver, database):
    made, emits, exports_all = VENDORS[vendor]
    program = PROGRAM.format(made=textwrap.dedent(made), emits=emits)
    run(program, f"http://127.0.0.1:{receiver.server_port}", sampled=sampled)
    assert rows(database, "action, sampled") == [("recall", sampled), ("retain", sampled)]
    others = {"audit recall": 2, "memory": 2} if exports_all else {}
    expected = {**others, "of the vendor": 2} if sampled else {}
    assert {name: receiver.names.count(name) for name in receiver.names} == expected


LATER = """
import logging
from opentelemetry import trace
from astrocyte_otel_audit import SpanMapping, audited, configure_audit

@audited("recall")
def recall(): ...

library = trace.get_tracer("memory", "1.2")
processor = configure_audit(actions="*", mappings=[SpanMapping(span_name="memory.{{action}}")], create_provider=False)
recall()
{made}
recall()
library.start_span("memory.retain").end()
{emits}
trace.get_tracer_provider().shutdown()
assert processor.force_flush()
"""


@vendors
@rates
def test_a_vendors_provider_that_is_made_later_is_audited_and_exports_as_before(
    vendor, sampled, run, receiver, database
):
    made, emits, exports_all = VENDORS[vendor]
    program = LATER.format(made=textwrap.dedent(made), emits=emits)
    said = run(program, f"http://127.0.0.1:{receiver.server_port}", sampled=sampled).stderr
    assert "There is no tracer provider yet." in said
    assert rows(database, "action, sampled") == [("recall", sampled), ("retain", sampled)]
    expected = {"of the vendor", *(("audit recall", "memory") if exports_all else ())} if sampled else set()
    assert set(receiver.names) == expected


@pytest.mark.parametrize("vendor", [needs("logfire")])
def test_a_vendors_provider_that_is_replaced_beneath_is_audited_once_it_is_said_again(vendor, run, database):
    run(
        """
        import logfire
        from opentelemetry import trace
        from astrocyte_otel_audit import audited, configure_audit
        from astrocyte_otel_audit.configure import attached_to

        @audited("recall")
        def recall(): ...

        @audited("retain")
        def retain(): ...

        logfire.configure(send_to_logfire=False, console=False)
        first = configure_audit()
        recall()
        logfire.configure(send_to_logfire=False, console=False)
        assert attached_to(trace.get_tracer_provider()) == []
        second = configure_audit()
        assert second is not first
        retain()
        assert first.force_flush() and second.force_flush()
        """,
        sampled=False,
    )
    assert rows(database, "action, sampled") == [("recall", False), ("retain", False)]


@pytest.mark.parametrize(
    ("vendor", "exported"),
    [
        pytest.param(*needs("logfire").values, {"audit recall", "search {bank_id}"}, marks=needs("logfire").marks),
        pytest.param(*needs("phoenix").values, {"audit recall", "search"}, marks=needs("phoenix").marks),
        pytest.param(*needs("langfuse").values, {"search"}, marks=needs("langfuse").marks),
        pytest.param(*needs("traceloop").values, {"audit recall", "search"}, marks=needs("traceloop").marks),
    ],
)
def test_the_example_for_a_vendor_leaves_its_row_and_its_spans(vendor, exported, run, receiver, database):
    done = run(EXAMPLES / f"with_{vendor}.py", f"http://127.0.0.1:{receiver.server_port}")
    assert "all written: True" in done.stdout
    assert rows(database, "action, bank_id, sampled") == [("recall", "user-calvin", True)]
    assert set(receiver.names) == exported


def test_the_example_of_a_provider_that_is_set_later_leaves_the_row_of_what_came_after(run, database):
    done = run(EXAMPLES / "set_later.py")
    assert done.stdout == "all written: True\n"
    assert done.stderr.startswith("There is no tracer provider yet.")
    assert rows(database, "action, request ->> 'query', sampled") == [("recall", '{"length": 22}', False)]


def test_the_example_of_two_pipelines_leaves_in_each_table_what_that_one_allows(run, database):
    done = run(EXAMPLES / "two_pipelines.py")
    assert (done.stdout, done.stderr) == ("all written: True\n", "")
    everything, deletions = (
        rows(database, "action, trace_id", table) for table in ("astrocyte_audit_log", "deletion_log")
    )
    assert [action for action, _ in everything] == ["recall", "forget"]
    assert deletions == everything[1:]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "set_later",
        "two_pipelines",
        *(f"with_{vendor}" for vendor in VENDORS),
    }


@rates
def test_pipelines_to_two_databases_get_what_each_allows_from_tracers_in_use(run, database, server_dsn, sampled):
    with new_database(server_dsn) as other:
        run(
            f"""
            from opentelemetry import trace
            from opentelemetry.sdk.trace import TracerProvider
            from astrocyte_otel_audit import SpanMapping, audited, configure_audit

            @audited("recall")
            def recall(): ...

            @audited("forget")
            def forget(): ...

            library = trace.get_tracer("memory")
            provider = TracerProvider()
            trace.set_tracer_provider(provider)
            library.start_span("memory.retain").end()
            one = configure_audit(actions=["recall", "forget"])
            two = configure_audit(
                dsn={other!r}, actions=["forget", "retain"], mappings=[SpanMapping(span_name="memory.{{action}}")],
                migrate=True,
            )
            assert one is not two
            recall()
            forget()
            library.start_span("memory.retain").end()
            provider.shutdown()
            """,
            sampled=sampled,
        )
        first, second = rows(database, "action, trace_id, sampled"), rows(other, "action, trace_id, sampled")
    assert [action for action, *_ in first] == ["recall", "forget"]
    assert [action for action, *_ in second] == ["forget", "retain"]
    assert first[1] == second[0]
    assert {row[-1] for row in first + second} == {sampled}


FACTORY = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from astrocyte_otel_audit import audited

@audited("recall", bank_id="bank")
def recall(): ...

def create_app():
    trace.set_tracer_provider(TracerProvider())
    return recall

recall()
create_app()()
"""


@rates
def test_under_opentelemetry_instrument_the_provider_that_the_applications_factory_sets_is_audited(
    run, database, sampled
):
    said = run(FACTORY, sampled=sampled, instrumented=True).stderr
    assert "There is no tracer provider yet." in said
    assert rows(database, "action, bank_id, sampled") == [("recall", "bank", sampled)]
