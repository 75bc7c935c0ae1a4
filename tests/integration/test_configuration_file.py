"""What declarative configuration makes of a file: the examples as they are, and files that are wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from astrocyte_otel_audit import audit_operation, emit
from astrocyte_otel_audit.instrumentor import AuditInstrumentor

# It comes with the extra dev, and pairs with the SDK of its own release only.
configuration = pytest.importorskip("opentelemetry.configuration")
from opentelemetry.configuration.instrumentation import configure_instrumentation  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples" / "configuration"
NOBODY = "postgresql://nobody@127.0.0.1:1/nothing"

APPLICATION = """
from opentelemetry import trace
from astrocyte_otel_audit import audited

@audited("recall", bank_id="bank")
def recall(query, filter):
    return ["a"]

recall("what does Calvin like?", "likes of Calvin")
reflecting = {"astrocyte.bank_id": "brain"}
with trace.get_tracer("astrocyte").start_as_current_span("astrocyte.reflect", attributes=reflecting):
    pass
with trace.get_tracer("memory.store").start_as_current_span("store.write", attributes={"store.bank": "stored"}):
    pass
print("done")
"""

#: An application that brings its own processor, and is called by one that has not sampled its trace.
WITH_ITS_OWN_PROCESSOR = """
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from astrocyte_otel_audit import AuditSpanExporter, AuditSpanProcessor, audited

@audited("recall")
def recall(query):
    return ["a"]

processor = AuditSpanProcessor(AuditSpanExporter())
trace.get_tracer_provider().add_span_processor(processor)
for flags in ("00", "01"):
    caller = {"traceparent": f"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}"}
    token = context.attach(TraceContextTextMapPropagator().extract(caller))
    recall("x")
    context.detach(token)
"""


def run(file, tmp_path, program=APPLICATION, **variables):
    """Run a program under `opentelemetry-instrument` with a configuration file."""
    (tmp_path / "application.py").write_text(program)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OTEL_CONFIG_FILE": str(file),
        **variables,
    }
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, "application.py"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def said_by(ended):
    """Return the lines of the log, but for one that the SDK writes at each start with a file."""
    return [line for line in ended.stderr.splitlines() if "ignoring configurator kwargs" not in line]


def rows(database, columns="action, bank_id, sampled"):
    with psycopg.connect(database) as connection:
        return connection.execute(
            f"SELECT {columns} FROM astrocyte_audit_log WHERE action <> 'audit.retention' ORDER BY started_at"
        ).fetchall()


def file_with(tmp_path, keys):
    """Write a file with the pipeline of some keys, and return its path. JSON is YAML too."""
    said = {
        "file_format": "1.1",
        "resource": {"attributes": [{"name": "service.name", "value": "memories#1"}]},  # not where a comment begins
        "tracer_provider": {"processors": [{"batch": {"exporter": {"console": {}}}}]},
        "instrumentation/development": {"python": {} if keys is None else {"astrocyte_audit": keys}},
    }
    path = tmp_path / "telemetry.yaml"
    path.write_text(json.dumps(said) + "\n# astrocyte_audit: {}\n")
    return path


@pytest.mark.parametrize("ratio", ["0", "1"])
def test_the_pipeline_of_a_file_leaves_the_same_rows_whatever_is_sampled(database, tmp_path, ratio):
    spool = tmp_path / "spool"
    ended = run(EXAMPLES / "pipeline.yaml", tmp_path, AUDIT_DSN=database, TRACE_RATIO=ratio, AUDIT_SPOOL_DIR=str(spool))
    assert (ended.returncode, said_by(ended)) == (0, [])
    sampled = ratio == "1"
    assert rows(database) == [("recall", "bank", sampled), ("reflect", "brain", sampled), ("retain", "stored", sampled)]
    assert rows(database, "service_name") == [("memories",)] * 3
    # The normalizer is the file's, and so is the place of the spool.
    assert rows(database, "request")[0] == ({"query": {"length": 22}, "filter": "likes of Calvin"},)
    assert spool.is_dir()
    # The application's own traces go where they went before.
    assert ('"name": "audit recall"' in ended.stdout) is sampled
    assert ended.stdout.startswith("done\n")


@pytest.mark.parametrize(("ratio", "expected"), [("0", []), ("1", [("recall", "bank", True)])])
def test_the_exporter_of_a_file_is_best_effort(database, tmp_path, ratio, expected):
    ended = run(EXAMPLES / "exporter.yaml", tmp_path, AUDIT_DSN=database, TRACE_RATIO=ratio)
    assert ended.stdout == "done\n"
    assert rows(database) == expected
    assert [line for line in said_by(ended) if "best-effort" not in line] == []
    assert len(said_by(ended)) == len(expected)


def test_the_sampler_of_a_file_keeps_what_a_caller_has_not_sampled(database, tmp_path):
    ended = run(
        EXAMPLES / "sampler.yaml",
        tmp_path,
        WITH_ITS_OWN_PROCESSOR,
        OTEL_ASTROCYTE_AUDIT_DSN=database,
        OTEL_ASTROCYTE_AUDIT_ACTIONS="recall",
    )
    assert (ended.returncode, said_by(ended)) == (0, [])
    assert rows(database) == [("recall", None, False), ("recall", None, True)]
    assert ended.stdout.count('"name": "audit recall"') == 1


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.iterdir()} == {"pipeline.yaml", "exporter.yaml", "sampler.yaml"}


def test_what_is_wrong_is_said_in_one_line_and_the_application_starts(tmp_path):
    file = file_with(tmp_path, {"dsn": NOBODY, "actions": "recall"})
    ended = run(file, tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith("done\n")
    [line] = said_by(ended)
    assert line.startswith(f"Nothing is audited: astrocyte_audit.actions in {file}: got 'recall'; accepted is a list")


@pytest.fixture
def global_provider(monkeypatch):
    """A global tracer provider for one test."""
    provider = TracerProvider(shutdown_on_exit=False)
    with monkeypatch.context() as patched:
        patched.setattr(trace, "_TRACER_PROVIDER", provider)
        yield provider
        AuditInstrumentor().uninstrument()
        provider.shutdown()
    emit.renew_tracers()


@pytest.fixture
def configure(tmp_path, monkeypatch, global_provider):
    """Does with a file what `opentelemetry-instrument` does once the SDK is set up; returns the file's path."""

    def configure(keys, path=None):
        path = path or file_with(tmp_path, keys)
        monkeypatch.setenv("OTEL_CONFIG_FILE", str(path))
        configure_instrumentation(configuration.load_config_file(path).instrumentation_development)
        AuditInstrumentor().instrument(skip_dep_check=True)  # as every instrumentor is, whatever the file says
        return path

    return configure


def recall(provider):
    with audit_operation("recall", bank_id="bank"):
        pass
    assert provider.force_flush()


def test_the_retention_of_a_file_deletes_what_it_says(database, configure):
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO astrocyte_audit_log (id, action, transport, started_at) SELECT gen_random_uuid(), action,"
            " 'http', now() - interval '40 days' FROM unnest(ARRAY['recall', 'retain', 'forget']) AS action"
        )
        retention = {
            "days": 39,
            "actions": {"recall": 41, "forget": "forever"},
            "jitter_seconds": 0,
            "batch_size": None,
        }
        configure({"dsn": database, "actions": ["recall"], "retention": retention})
        deadline = time.monotonic() + 60
        while not connection.execute("SELECT 1 FROM astrocyte_audit_log WHERE action = 'audit.retention'").fetchone():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.01)
    assert sorted(rows(database, "action")) == [("forget",), ("recall",)]


@pytest.mark.parametrize("keys", [{"enabled": False}, {"enabled": False, "actions": ["recall"]}, {"action": "recall"}])
def test_a_file_that_names_it_says_all(database, configure, global_provider, monkeypatch, caplog, keys):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", database)
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_ACTIONS", "*")
    configure(keys)
    recall(global_provider)
    assert rows(database) == []
    assert len(caplog.records) == ("action" in keys)


@pytest.mark.parametrize("keys", [None, {}], ids=["all of it", "all keys"])
def test_what_a_file_leaves_out_the_environment_says(database, configure, global_provider, monkeypatch, caplog, keys):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", database)
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_ACTIONS", "recall")
    configure(keys)
    recall(global_provider)
    assert rows(database) == [("recall", "bank", True)]
    assert caplog.records == []


def test_a_file_that_does_not_name_it_asks_for_nothing(configure, caplog):
    configure(None)
    assert AuditInstrumentor._processor is None
    assert caplog.records == []


def test_an_sdk_that_knows_no_files_goes_by_the_environment(database, configure, monkeypatch, tmp_path):
    monkeypatch.setenv("OTEL_CONFIG_FILE", str(file_with(tmp_path, {"enabled": False})))
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", database)
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_ACTIONS", "recall")
    monkeypatch.delitem(sys.modules, "opentelemetry.configuration")
    AuditInstrumentor().instrument(skip_dep_check=True)
    assert AuditInstrumentor._processor is not None


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"action": ["recall"]}, "action", "no such key; did you mean actions? accepted are dsn, actions, mappings, "),
        ({"retention_days": 30}, "retention_days", "no such key; did you mean retention.days? accepted are dsn, "),
        ({"xyzzy": 1}, "xyzzy", "no such key; accepted are dsn, "),
        ({"pool": "here"}, "pool", "no such key; "),
        ({}, "dsn", "no database to write to; accepted is a connection string, here or in OTEL_ASTROCYTE_AUDIT_DSN"),
        ({"dsn": "${UNSET_VARIABLE}"}, "dsn", "not a connection string; accepted is "),  # quoted, it is a text
        ({"dsn": 5}, "dsn", "not a connection string; accepted is "),
        ({"dsn": NOBODY, "actions": "recall"}, "actions", "got 'recall'; accepted is a list of actions or globs, "),
        ({"dsn": NOBODY, "actions": ["recall", 5]}, "actions", "holds 5; accepted is a list of actions or globs, "),
        ({"dsn": NOBODY, "mappings": ["hindsite"]}, "mappings", "holds 'hindsite'; accepted are "),
        ({"dsn": NOBODY, "mappings": [{"span_nam": "x"}]}, "mappings[0]", "has no key 'span_nam'; did you mean "),
        ({"dsn": NOBODY, "mappings": "astrocyte"}, "mappings", "got 'astrocyte'; accepted is a list of "),
        ({"dsn": NOBODY, "migrate": "perhaps"}, "migrate", "got 'perhaps'; accepted is true or false"),
        ({"dsn": NOBODY, "max_queue_size": "many"}, "max_queue_size", "got 'many'; accepted is a whole number"),
        ({"dsn": NOBODY, "spool_fsync": "often"}, "spool_fsync", "got 'often'; accepted is never, interval or always"),
        ({"dsn": NOBODY, "retention": "long"}, "retention", "got 'long'; accepted is a RetentionPolicy, a number"),
        ({"retention": {"day": 30}}, "retention.day", "no such key; did you mean retention.days? accepted are days, "),
        ({"retention": {5: 30}}, "retention.5", "no such key; accepted are days, "),
        ({"retention": {"days": "long"}}, "retention.days", "got 'long'; accepted is a whole number of days"),
        ({"retention": {"actions": {"recall": 0}}}, "retention.actions", "got 0; accepted is a whole number"),
        (
            {"retention": {"actions": {"recall": 3}, "minimum_days": "hipaa"}},
            "retention.actions['recall']",
            "got 3; accepted is 2192 days or more, which minimum_days asks for",
        ),
        ({"dsn": NOBODY, "normalizer": ["filter"]}, "normalizer", "got a list; accepted is a "),
        ({"normalizer": {"keeps": ["filter"]}}, "normalizer.keeps", "no such key; did you mean normalizer.keep? "),
        ({"normalizer": {"hash_key": "short"}}, "normalizer.hash_key", "too short or not bytes; accepted are 16 bytes"),
    ],
)
def test_what_is_wrong_names_the_file_the_key_and_what_is_accepted(keys, key, said, configure, caplog):
    path = configure(keys)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Nothing is audited: astrocyte_audit.{key} in {path}: {said}")
    assert "\n" not in line
    assert "nobody@" not in line


def test_a_variable_that_is_not_set_leaves_an_empty_value(configure, caplog):
    path = configure(None, EXAMPLES / "pipeline.yaml")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Nothing is audited: astrocyte_audit.dsn in {path}: no database to write to; accepted is ")


def test_what_is_wrong_with_a_variable_names_the_variable(configure, caplog, monkeypatch):
    monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MIGRATE", "perhaps")
    configure({"dsn": NOBODY})
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("Nothing is audited: OTEL_ASTROCYTE_AUDIT_MIGRATE: got 'perhaps'; accepted is ")


def test_without_a_tracer_provider_the_file_is_told_what_to_add(configure, caplog, monkeypatch):
    with monkeypatch.context() as patched:  # undone before the fixture's own
        patched.setattr(trace, "_TRACER_PROVIDER", None)
        path = configure({"dsn": NOBODY, "actions": ["recall"]})
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Nothing is audited: tracer_provider in {path}: there is none to attach")


def test_what_code_has_loaded_has_no_name(configure, caplog, tmp_path, global_provider):
    loaded = configuration.load_config_file(file_with(tmp_path, {"dsn": NOBODY, "actions": "recall"}))
    configure_instrumentation(loaded.instrumentation_development)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("Nothing is audited: actions: got 'recall'; accepted is ")


def test_what_nobody_foresaw_stops_nobody_else(caplog):
    class Surprising:
        def add_span_processor(self, processor):
            raise RuntimeError("with a password in it")

    AuditInstrumentor().instrument(tracer_provider=Surprising(), writer="external")
    assert [record.getMessage() for record in caplog.records] == [
        "Nothing is audited: the set-up failed (RuntimeError)"
    ]
