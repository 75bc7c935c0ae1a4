"""What the import contracts can't say, and what keeps the house small."""

import ast
from pathlib import Path

import pytest

import astrocyte_otel_audit

PACKAGE = Path(astrocyte_otel_audit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("module", sorted((PACKAGE / "emit").glob("*.py")), ids=lambda path: path.name)
def test_emit_knows_the_api_and_not_the_sdk(module):
    assert not [name for name in imported(module) if name.startswith("opentelemetry.sdk")]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_read_in_one_sitting(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 460


def test_no_sql_stands_outside_its_room():
    verbs = ("SELECT ", "INSERT INTO", "CREATE TABLE", "DELETE FROM", "ALTER TABLE")
    found = [
        path.name
        for path in MODULES
        if path.parent.name != "postgres" and any(verb in path.read_text(encoding="utf-8") for verb in verbs)
    ]
    assert found == []


def test_the_public_names_are_sorted_and_there():
    names = astrocyte_otel_audit.__all__
    assert names == sorted(names)
    assert all(hasattr(astrocyte_otel_audit, name) for name in names)
