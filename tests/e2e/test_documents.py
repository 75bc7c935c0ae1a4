"""What the documents say is so: their code runs, their names exist, and nothing that exists is left out."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from typer.main import get_command

import astrocyte_otel_audit
from astrocyte_otel_audit import SpanMapping
from astrocyte_otel_audit.cli import app
from astrocyte_otel_audit.pipeline.presets import PRESETS
from astrocyte_otel_audit.settings import SETTINGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PACKAGE = Path(astrocyte_otel_audit.__file__).parent


def run(code_or_path: str | Path, dsn: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(code_or_path)] if isinstance(code_or_path, Path) else ["-c", code_or_path]
    environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": dsn, **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def rows(dsn: str, schema: str = "public") -> list[tuple]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(
            f'SELECT action, bank_id, outcome, actor_id, request, response FROM "{schema}".astrocyte_audit_log'
            " ORDER BY started_at"
        ).fetchall()


def test_the_first_example_of_the_readme_leaves_the_rows_that_it_says(database):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert run(example, database).returncode == 0
    recall, forget = rows(database)
    assert recall == (
        "recall",
        "user-calvin",
        "success",
        "calvin",
        {"query": {"length": 22}, "top_k": 10},
        {"hits": {"count": 1, "ids": ["m-1"]}},
    )
    assert forget[:2] == ("forget", "user-calvin")
    assert forget[5] == {"deleted": 1}


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1:])
def test_the_other_examples_of_the_readme_run(example, database):
    result = run(example, database)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("own_pipeline.py", ["retain", "recall", "reflect", "forget"]),
        ("astrocyte_brain.py", ["retain", "recall"]),
        ("tenants.py", []),
        ("imperative_logger.py", ["recall"]),
        ("mapped_spans.py", ["recall", "reflect"]),
    ],
)
def test_an_example_leaves_its_rows(example, expected, database):
    result = run(ROOT / "examples" / example, database)
    assert result.returncode == 0, result.stderr
    assert [row[0] for row in rows(database)] == expected
    if example == "tenants.py":
        assert len(rows(database, "tenant_a")) == len(rows(database, "Tenant_B")) == 1
    if example == "mapped_spans.py":
        request = {"query": {"length": 22}, "top_k": 10}
        assert rows(database)[0][1:] == ("user-calvin", "success", "calvin", request, {"hits": 1})
    if example == "own_pipeline.py":
        assert rows(database)[-1][2] == "failure"
    assert "Calvin" not in str([row[4:] for row in rows(database)])


def test_every_example_is_tested():
    here = {"own_pipeline.py", "astrocyte_brain.py", "tenants.py", "imperative_logger.py", "mapped_spans.py"}
    tested = here | {"astrocyte_enriched.py"}  # in test_astrocyte_enrichment.py
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)
def test_every_setting_is_documented(setting):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{setting.name}` | `OTEL_"))
    assert all(f"`{variable}`" in row for variable in setting.variables)
    if isinstance(setting.default, int) and not isinstance(setting.default, bool):
        assert f"| {setting.default} |" in row


MAPPINGS = (ROOT / "docs/mappings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", MAPPINGS, re.DOTALL))
def test_the_examples_about_mappings_run(example, database):
    result = run(example, database)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_argument_of_a_mapping_and_every_preset_is_documented():
    arguments = [each.name for each in dataclasses.fields(SpanMapping) if each.init]
    assert [name for name in (*arguments, *PRESETS) if f"`{name}`" not in MAPPINGS] == []


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_every_command_is_documented(command):
    assert f"| `{command}` |" in README


def test_every_public_name_has_a_docstring():
    names = [name for name in astrocyte_otel_audit.__all__ if name != "__version__"]
    assert [name for name in names if not getattr(astrocyte_otel_audit, name).__doc__] == []


@pytest.mark.parametrize(
    "line", [line for line in ARCHITECTURE.splitlines() if re.match(r"\| .* \| `\w+[/.].*\|$", line)]
)
def test_every_place_that_the_architecture_names_exists(line):
    for name in re.findall(r"`([^`]+)`", line.split("|")[2]):
        if "/" in name or name.endswith(".py"):
            path = next((base / name for base in (PACKAGE, ROOT) if (base / name).exists()), None)
            assert path is not None, name
        else:
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", path.read_text(encoding="utf-8")), name


def test_every_module_is_in_the_index_or_in_a_room():
    missing = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("_") and str(path.relative_to(PACKAGE)) not in ARCHITECTURE
    ]
    # Parts that no reader looks for by themselves.
    assert set(missing) <= {"emit/scope.py", "pipeline/backlog.py", "postgres/statements.py", "view/records.py"}


GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", re.findall(r"^\| (?!Fault|---)(.*) \|$", GUARANTEES, re.MULTILINE))
def test_every_guarantee_names_what_proves_it(row):
    *_, proof = row.split(" | ")
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", proof)
    assert tests or proof == "argued"
    for path, name in tests:
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8")
