"""What the SDK's auto-configuration makes of environment variables alone."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import psycopg
import pytest

PROGRAM = """
from opentelemetry.sdk._configuration import _OTelSDKConfigurator
from opentelemetry import trace
from astrocyte_otel_audit import audited

_OTelSDKConfigurator().configure()

@audited("recall", bank_id="bank")
def recall(query):
    return ["a"]

recall("x")
provider = trace.get_tracer_provider()
print(provider.sampler.get_description())
provider.shutdown()
"""


def run(database, tmp_path, **variables):
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OTEL_ASTROCYTE_AUDIT_DSN": database,
        "OTEL_ASTROCYTE_AUDIT_ACTIONS": "recall",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        **variables,
    }
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)


def rows(database):
    with psycopg.connect(database) as connection:
        return connection.execute("SELECT action, bank_id, sampled FROM astrocyte_audit_log").fetchall()


@pytest.mark.parametrize(
    "group",
    [
        "opentelemetry_traces_exporter",
        "opentelemetry_traces_sampler",
        "opentelemetry_sampler",
        "opentelemetry_instrumentor",
    ],
)
def test_every_entry_point_leads_somewhere(group):
    [entry] = entry_points(group=group, name="astrocyte_audit")
    assert callable(entry.load())


def test_as_an_exporter_it_writes_rows_and_says_that_it_is_best_effort(database, tmp_path):
    ended = run(database, tmp_path, OTEL_TRACES_EXPORTER="astrocyte_audit")
    assert rows(database) == [("recall", "bank", True)]
    assert "best-effort" in ended.stderr
    assert "configure_audit()" in ended.stderr


def test_as_an_exporter_without_a_database_it_says_what_is_missing_and_the_application_goes_on(tmp_path):
    ended = run("", tmp_path, OTEL_TRACES_EXPORTER="astrocyte_audit")
    assert "OTEL_ASTROCYTE_AUDIT_DSN" in ended.stderr


def test_as_a_sampler_it_lets_another_decide_about_traces(database, tmp_path):
    ended = run(
        database, tmp_path, OTEL_TRACES_SAMPLER="astrocyte_audit", OTEL_TRACES_SAMPLER_ARG="parentbased_traceidratio=0"
    )
    assert ended.stdout.startswith("AuditSampler{ParentBased{root:TraceIdRatioBased{0")
    assert rows(database) == []  # nobody writes: the sampler is not the pipeline


def test_as_a_sampler_with_a_wrong_argument_it_says_what_is_accepted(database, tmp_path):
    ended = run(database, tmp_path, OTEL_TRACES_SAMPLER="astrocyte_audit", OTEL_TRACES_SAMPLER_ARG="0.1")
    assert "parentbased_traceidratio=0.1" in ended.stderr
    assert json.dumps("0.1").strip('"') in ended.stderr


APPLICATION = """
from opentelemetry import trace
from astrocyte_otel_audit import audited

@audited("recall", bank_id="bank")
def recall(query):
    return ["a"]

recall("x")
print("done")
"""


def run_instrumented(tmp_path, **variables):
    program = tmp_path / "application.py"
    program.write_text(APPLICATION)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        **variables,
    }
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, str(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
def test_under_opentelemetry_instrument_the_environment_is_enough(database, tmp_path, sampler):
    ended = run_instrumented(
        tmp_path,
        OTEL_ASTROCYTE_AUDIT_DSN=database,
        OTEL_ASTROCYTE_AUDIT_ACTIONS="recall",
        OTEL_TRACES_SAMPLER=sampler,
    )
    assert ended.stdout == "done\n", ended.stderr
    assert rows(database) == [("recall", "bank", sampler == "always_on")]


@pytest.mark.parametrize("ratio", ["0", "1"])
def test_the_sampler_beside_the_whole_pipeline_changes_no_row(database, tmp_path, ratio):
    ended = run_instrumented(
        tmp_path,
        OTEL_ASTROCYTE_AUDIT_DSN=database,
        OTEL_ASTROCYTE_AUDIT_ACTIONS="recall",
        OTEL_TRACES_SAMPLER="astrocyte_audit",
        OTEL_TRACES_SAMPLER_ARG=f"parentbased_traceidratio={ratio}",
    )
    assert (ended.stdout, ended.stderr) == ("done\n", "")
    assert rows(database) == [("recall", "bank", ratio == "1")]


def test_who_has_not_asked_for_an_audit_gets_none(tmp_path):
    ended = run_instrumented(tmp_path)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


def test_a_wrong_setting_is_said_in_one_line_and_the_application_starts(tmp_path):
    ended = run_instrumented(tmp_path, OTEL_ASTROCYTE_AUDIT_ACTIONS="recall", OTEL_ASTROCYTE_AUDIT_MIGRATE="perhaps")
    assert ended.stdout == "done\n"
    assert "OTEL_ASTROCYTE_AUDIT_MIGRATE" in ended.stderr


@pytest.mark.parametrize(("variables", "sampler"), [("pipeline", "always_off"), ("exporter", "always_on")])
def test_the_example_without_code_leaves_its_rows(database, tmp_path, variables, sampler):
    example = Path(__file__).parents[2] / "examples" / "without_code"
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    script = f'set -a; . "{example}/{variables}.env"; OTEL_TRACES_SAMPLER={sampler}; set +a; exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", script, "sh", str(instrument), sys.executable, str(example / "app.py")],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OTEL_ASTROCYTE_AUDIT_DSN": database},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "hits: 1\n"), ended.stderr
    assert ("best-effort" in ended.stderr) is (variables == "exporter")
    sampled = sampler == "always_on"
    assert rows(database) == [("retain", "user-calvin", sampled), ("recall", "user-calvin", sampled)]
